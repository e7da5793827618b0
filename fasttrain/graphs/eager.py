"""The eager rung: the step as a plain torch loop writes it, with every hook at its place. The truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasttrain.errors import ModuleError
from fasttrain.graphs.program import REFUSED, StepOutput, StepSpec, detached, forward, keys_and_values
from fasttrain.graphs.tail import LossScale, StockTail
from fasttrain.module import Trainable, loss_of
from fasttrain.options import Options
from fasttrain.results import LogKey

Fire = Callable[..., Any]  # fire(hook, *args): callbacks first, then the module


class EagerStep:
    """Forward, backward and update in plain torch. Gradients live in ``p.grad``."""

    rung = "eager"

    def __init__(
        self, trainable: Trainable, spec: StepSpec, optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter],
        options: Options, scaler: LossScale | None, fire: Fire, live: frozenset[str],
    ) -> None:  # fmt: skip
        self._trainable, self._spec, self._optimizer, self._options = trainable, spec, optimizer, options
        self._scaler, self._fire, self._live = scaler, fire, live
        self.tail = StockTail(optimizer, params, options, scaler)
        self._own_hooks = trainable.hooks
        if live & {"on_before_optimizer_step"}:
            self.tail.before_step = lambda: fire("on_before_optimizer_step", optimizer)
        if "configure_gradient_clipping" in self._own_hooks:
            self.tail.clip = lambda: trainable.call(
                "configure_gradient_clipping", optimizer, options.gradient_clip_val, options.gradient_clip_algorithm
            )
        self.takes_closure = "optimizer_step" in self._own_hooks or isinstance(optimizer, torch.optim.LBFGS)
        self.epoch = 0
        self._bad: Tensor | None = None
        self._stepped = False
        self._keys: tuple[LogKey, ...] = ()

    def micro_step(self, batch: Any, batch_idx: int, *, first: bool, last: bool, divisor: int) -> StepOutput:
        """One batch forward and backward; with a closure optimizer the last of a window also steps."""
        if not (self.takes_closure and last):
            return self._forward_backward(batch, batch_idx, first, divisor)
        outputs: list[StepOutput] = []

        def closure() -> Tensor | None:
            out = self._forward_backward(batch, batch_idx, first or bool(outputs), divisor)
            outputs.append(out)
            if not self.tail.prepare(1.0, self._bad):
                self._stepped = False
                self._optimizer.zero_grad(set_to_none=True)
            return out.loss

        self._stepped = True
        if "optimizer_step" in self._own_hooks:
            self._trainable.call("optimizer_step", self.epoch, batch_idx, self._optimizer, closure)
        else:
            self._optimizer.step(closure)  # type: ignore[arg-type]
        if not outputs:
            raise ModuleError("optimizer_step never called its closure: call optimizer.step(closure=optimizer_closure), "
                              "or optimizer_closure() yourself when you skip the step.")  # fmt: skip
        return outputs[0]

    def update_step(self, rescale: float) -> int:
        """Unscale, clip and update: 1, or REFUSED when the step was skipped as non-finite."""
        bad, self._bad = self._bad, None
        return 1 if (self._stepped if self.takes_closure else self.tail.step(None, rescale, bad)) else REFUSED

    def refresh(self) -> None:
        """Nothing is kept that user code could have changed."""

    def gradients(self) -> dict[str, Tensor]:
        """The open window's gradients by parameter name, for a checkpoint in mid-window."""
        named = self._trainable.module.named_parameters()
        return {n: p.grad for n, p in named if p.grad is not None}

    def load_gradients(self, gradients: dict[str, Tensor]) -> None:
        for name, p in self._trainable.module.named_parameters():
            p.grad = gradients[name].to(p.device).clone() if name in gradients else None

    def _forward_backward(self, batch: Any, batch_idx: int, first: bool, divisor: int) -> StepOutput:
        output, items = forward(self._trainable, self._spec, "train", batch, batch_idx)
        loss = loss_of(output)
        keys, values = self._cached(items)
        if first:
            self._zero_grad(batch_idx)
        if loss is None:
            return StepOutput(None, keys, values, detached(output), None)
        plain = loss.detach()
        self._bad = plain if self._bad is None or first else self._bad + plain
        if divisor != 1:
            loss = loss / divisor
        if self._scaler is not None:
            loss = loss * self._scaler.tensor
        live = self._live
        if "on_before_backward" in live:
            self._fire("on_before_backward", loss)
        if "backward" in self._own_hooks:
            self._trainable.call("backward", loss)
        else:
            loss.backward()  # type: ignore[no-untyped-call]
        if "on_after_backward" in live:
            self._fire("on_after_backward")
        return StepOutput(plain, keys, values, detached(output) if self._spec.keep_outputs else None, None)

    def _cached(self, items: list[tuple[Any, ...]]) -> tuple[tuple[LogKey, ...], list[Any]]:
        """The same tuple object for the same keys, so that the metric store sees no change."""
        keys, values = keys_and_values(items)
        if keys != self._keys:
            self._keys = keys
        return self._keys, values

    def _zero_grad(self, batch_idx: int) -> None:
        if "on_before_zero_grad" in self._live:
            self._fire("on_before_zero_grad", self._optimizer)
        if "optimizer_zero_grad" in self._own_hooks:
            self._trainable.call("optimizer_zero_grad", self.epoch, batch_idx, self._optimizer)
        else:
            self._optimizer.zero_grad()
