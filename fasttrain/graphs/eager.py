"""The eager rung: the step as a plain torch loop writes it, with every hook at its place. The truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasttrain.errors import ModuleError
from fasttrain.graphs.hooks import InStepHooks
from fasttrain.graphs.norms import GradientNorms
from fasttrain.graphs.program import REFUSED, StepOutput, StepSpec, detached, forward, keys_and_values
from fasttrain.graphs.scale import LossScale
from fasttrain.graphs.tail import StockTail, frozen, trainable_params
from fasttrain.graphs.traced import TracedCall
from fasttrain.module import Trainable, loss_of
from fasttrain.options import Options
from fasttrain.results import LogKey, Obstacle


class EagerStep:
    """Forward, backward and update in plain torch. Gradients live in ``p.grad``."""

    rung = "eager"
    moved = (1,)  # one optimizer: update_step says it all
    calls: Sequence[TracedCall] = ()
    obstacles: Sequence[Obstacle] = ()

    def __init__(
        self, trainable: Trainable, spec: StepSpec, optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter],
        options: Options, scaler: LossScale | None, hooks: InStepHooks, index: int = 0,
    ) -> None:  # fmt: skip
        self._trainable, self._spec, self._optimizer, self._options = trainable, spec, optimizer, options
        self._scaler, self._hooks, self._index = scaler, hooks, index
        self.tail = hooked_tail(optimizer, index, params, options, scaler, hooks, spec.norms)
        self.function: Callable[[Any, int, int], Any] = trainable.step("train")
        self.takes_closure = "optimizer_step" in trainable.hooks or isinstance(optimizer, torch.optim.LBFGS)
        self.epoch = 0
        self._bad: Tensor | None = None
        self._stepped = False
        self._again: tuple[Callable[[], StepOutput], int] | None = None  # the open window's newest batch, for closures
        self._before: list[tuple[nn.Parameter, Tensor]] = []  # what the batches before that one have left
        self._keys: tuple[LogKey, ...] = ()

    def micro_step(self, batch: Any, batch_idx: int, *, first: bool, last: bool, divisor: int, opened: int) -> StepOutput:
        """One batch forward and backward; with a closure optimizer the last of a window also steps."""
        if not self.takes_closure:
            return self._forward_backward(batch, batch_idx, first, divisor)
        if not last:
            self._before = [] if first else self._kept_gradients()
            self._again = (lambda: self._forward_backward(batch, batch_idx, first, divisor)), batch_idx
            return self._forward_backward(batch, batch_idx, first, divisor)
        rescale = divisor / opened
        return self._step_by_closure(lambda: self._forward_backward(batch, batch_idx, first, divisor), first, rescale, batch_idx)

    def update_step(self, rescale: float) -> int:
        """Unscale, clip and update: 1, or REFUSED when the step was skipped as non-finite."""
        if self._again is not None:  # a stop has cut the window short: the optimizer steps on what is there
            again, batch_idx = self._again
            self._step_by_closure(again, False, rescale, batch_idx, there=True)
        bad, self._bad = self._bad, None
        return 1 if (self._stepped if self.takes_closure else self.tail.step(None, rescale, bad)) else REFUSED

    def _step_by_closure(
        self, evaluate: Callable[[], StepOutput], first: bool, rescale: float, batch_idx: int, *, there: bool = False
    ) -> StepOutput:
        """The optimizer asks for the loss and its gradients as often as it likes; ``there``: the first time they are there already."""
        outputs: list[StepOutput] = []
        # Every evaluation starts from what the window's earlier batches have left.
        earlier = self._before if there else ([] if first else self._kept_gradients())
        before, self._again = self._bad, None

        def closure() -> Tensor | None:
            if there and not outputs:
                outputs.append(StepOutput(self._bad, (), (), None, None))
            else:
                if outputs and not first:
                    self._optimizer.zero_grad(set_to_none=True)
                    self._bad = before
                    for p, grad in earlier:
                        p.grad = grad.clone()
                outputs.append(evaluate())
            if not self.tail.prepare(rescale, self._bad):
                self._stepped = False
                self._optimizer.zero_grad(set_to_none=True)
            return outputs[-1].loss

        self._stepped = True
        if self._hooks.owned("optimizer_step"):
            self._hooks.call("optimizer_step", epoch=self.epoch, batch_idx=batch_idx, optimizer=self._optimizer,
                             optimizer_idx=self._index, optimizer_closure=closure)  # fmt: skip
        else:
            self._optimizer.step(closure)  # type: ignore[arg-type]
        if not outputs:
            raise ModuleError("optimizer_step never called its closure: call optimizer.step(closure=optimizer_closure), "
                              "or optimizer_closure() yourself when you skip the step.")  # fmt: skip
        *others, out = outputs  # every evaluation has logged; the last one is the step's
        return out._replace(earlier=others) if others else out

    def _kept_gradients(self) -> list[tuple[nn.Parameter, Tensor]]:
        return [(p, p.grad.clone()) for _, p in self._own_parameters() if p.grad is not None]

    def refresh(self) -> None:
        """Nothing is kept that user code could have changed."""

    def gradients(self) -> dict[str, Tensor]:
        """The open window's gradients by parameter name, for a checkpoint in mid-window."""
        return {n: p.grad for n, p in self._own_parameters() if p.grad is not None}

    def load_gradients(self, gradients: dict[str, Tensor]) -> None:
        for name, p in self._own_parameters():
            p.grad = gradients[name].to(p.device).clone() if name in gradients else None

    def _own_parameters(self) -> list[tuple[str, nn.Parameter]]:
        mine = {id(p) for g in self._optimizer.param_groups for p in g["params"]}
        return [(n, p) for n, p in self._trainable.module.named_parameters() if id(p) in mine]

    def _forward_backward(self, batch: Any, batch_idx: int, first: bool, divisor: int) -> StepOutput:
        output, items = forward(self._trainable, self._spec, "train", batch, batch_idx, self._index, self.function)
        loss = loss_of(output)
        keys, values = self._cached(items)
        if first:
            self._zero_grad(batch_idx)
        if loss is None:
            return StepOutput(None, keys, values, detached(output), None)
        plain = self._note_loss(loss, first)
        if divisor != 1:
            loss = loss / divisor
        if self._scaler is not None:
            loss = loss * self._scaler.tensor
        self._hooks.fire("on_before_backward", loss)
        if self._hooks.owned("backward"):
            self._hooks.call("backward", loss=loss, optimizer=self._optimizer, optimizer_idx=self._index)
        elif not loss.requires_grad and not trainable_params(self._optimizer):
            raise frozen(self._optimizer, f"optimizer {self._index}")
        else:
            loss.backward()  # type: ignore[no-untyped-call]
        self._hooks.fire("on_after_backward")
        return StepOutput(plain, keys, values, detached(output) if self._spec.keep_outputs else None, None)

    def _note_loss(self, loss: Tensor, first: bool) -> Tensor:
        """The loss as it came, added to what tells whether this window is finite."""
        plain = loss.detach()
        self._bad = plain if self._bad is None or first else self._bad + plain
        return plain

    def _cached(self, items: list[tuple[Any, ...]]) -> tuple[tuple[LogKey, ...], list[Any]]:
        """The same tuple object for the same keys, so that the metric store sees no change."""
        keys, values = keys_and_values(items)
        if keys != self._keys:
            self._keys = keys
        return self._keys, values

    def _zero_grad(self, batch_idx: int) -> None:
        zero_grad(self._optimizer, self._index, self.epoch, batch_idx, self._hooks)


def zero_grad(optimizer: torch.optim.Optimizer, index: int, epoch: int, batch_idx: int, hooks: InStepHooks) -> None:
    """The first batch of a window: the gradients of the last one go."""
    hooks.fire("on_before_zero_grad", optimizer)
    if hooks.owned("optimizer_zero_grad"):
        hooks.call("optimizer_zero_grad", epoch=epoch, batch_idx=batch_idx, optimizer=optimizer, optimizer_idx=index)
    else:
        optimizer.zero_grad()


def hooked_tail(
    optimizer: torch.optim.Optimizer, index: int, params: Sequence[nn.Parameter], options: Options, scaler: LossScale | None,
    hooks: InStepHooks, norms: GradientNorms | None,
) -> StockTail:  # fmt: skip
    """Torch's own update with the hooks that stand before it."""
    tail = StockTail(optimizer, params, options, scaler, norms)
    if "on_before_optimizer_step" in hooks.live:
        tail.before_step = lambda: hooks.fire("on_before_optimizer_step", optimizer, index)
    if hooks.owned("configure_gradient_clipping"):
        tail.clip = lambda: hooks.call(
            "configure_gradient_clipping", optimizer=optimizer, optimizer_idx=index,
            gradient_clip_val=options.gradient_clip_val, gradient_clip_algorithm=options.gradient_clip_algorithm,
        )  # fmt: skip
    return tail
