"""A generator training_step, op by op: one loss a yield, an update between two yields, shared locals. The truth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasttrain.errors import ModuleError
from fasttrain.graphs.eager import hooked_tail, zero_grad
from fasttrain.graphs.hooks import InStepHooks
from fasttrain.graphs.program import REFUSED, TRUE_DTYPES, StepOutput, StepSpec, cast_floats, detached, keys_and_values, mean_of, unwrapped
from fasttrain.graphs.scale import LossScale
from fasttrain.graphs.tail import frozen, trainable_params
from fasttrain.graphs.traced import TracedCall
from fasttrain.graphs.turns import OwnGradients
from fasttrain.module import Trainable, loss_of
from fasttrain.options import Options
from fasttrain.results import LogKey, Obstacle

_OVER = object()


class GeneratorStep:
    """Loss i belongs to optimizer i: backward into its parameters alone, and its update before the code after the yield."""

    rung = "eager"
    takes_closure = True
    calls: Sequence[TracedCall] = ()
    obstacles: Sequence[Obstacle] = ()

    def __init__(
        self, trainable: Trainable, spec: StepSpec, optimizers: Sequence[torch.optim.Optimizer], options: Options,
        scaler: LossScale | None, hooks: InStepHooks,
    ) -> None:  # fmt: skip
        self._trainable, self._spec, self._optimizers, self._scaler = trainable, spec, optimizers, scaler
        self._hooks = hooks
        self.check: Callable[[int, Any], Any] | None = None  # of each yield, in the dry look
        self._tails = [hooked_tail(o, i, trainable_params(o), options, scaler, hooks, spec.norms) for i, o in enumerate(optimizers)]
        self._own = OwnGradients(optimizers)
        self.epoch = 0
        self.moved = [0] * len(optimizers)
        self._bad: list[Tensor | None] = [None] * len(optimizers)
        self._result = 0
        self._keys: tuple[LogKey, ...] = ()

    def micro_step(self, batch: Any, batch_idx: int, *, first: bool, last: bool, divisor: int, opened: int) -> StepOutput:
        self.moved, self._result = [0] * len(self._optimizers), 0
        sink, spec = self._trainable.sink, self._spec
        sink.items = []
        losses, outputs = [], []
        if self._scaler is not None:
            self._scaler.gather()
        try:
            for i, yielded in enumerate(self._yields(batch, batch_idx)):
                output = unwrapped(yielded, sink, "train")
                self._own.enter(i)
                losses.append(self._turn(i, output, batch_idx, first, divisor))
                outputs.append(detached(output))
                if last:
                    self._update(i, divisor / opened)
                self._own.leave(i, open=self._bad[i] is not None)
            items = sink.items
        finally:
            sink.items = None
            if self._scaler is not None:
                self._scaler.settle()
        keys, values = keys_and_values(items)
        self._keys = keys if keys != self._keys else self._keys
        return StepOutput(mean_of(losses), self._keys, values, outputs if spec.keep_outputs else None, None)

    def update_step(self, rescale: float) -> int:
        if not any(self.moved) and self._result == 0 and any(b is not None for b in self._bad):  # a stop closes the window
            if self._scaler is not None:
                self._scaler.gather()
            for i in range(len(self._optimizers)):
                self._own.enter(i)
                self._update(i, rescale)
                self._own.leave(i, open=False)
            if self._scaler is not None:
                self._scaler.settle()
        return self._result or max(self.moved)

    def refresh(self) -> None:
        """Nothing is kept that user code could have changed."""

    def gradients(self) -> dict[str, Tensor]:
        """By "optimizer:name"."""
        held: dict[str, Tensor] = {}
        for i, mine in enumerate(self._named()):
            self._own.enter(i)
            held |= {f"{i}:{n}": p.grad for n, p in mine.items() if p.grad is not None and self._bad[i] is not None}
        return held

    def load_gradients(self, gradients: dict[str, Tensor]) -> None:
        for i, mine in enumerate(self._named()):
            for name, p in mine.items():
                g = gradients.get(f"{i}:{name}")
                p.grad = None if g is None else g.to(p.device).clone()
            gathered = any(n.startswith(f"{i}:") for n in gradients)
            self._bad[i] = torch.zeros((), device=self._spec.device) if gathered else None
            self._own.leave(i, open=gathered)

    def _named(self) -> list[dict[str, nn.Parameter]]:
        """Every optimizer's parameters by name."""
        names = {id(p): n for n, p in self._trainable.module.named_parameters()}
        held = [[p for g in o.param_groups for p in g["params"]] for o in self._optimizers]
        return [{names[id(p)]: p for p in mine if id(p) in names} for mine in held]

    def _yields(self, batch: Any, batch_idx: int) -> Iterator[Any]:
        """What the module's generator yields, one for each optimizer: no more, no less."""
        spec, count = self._spec, len(self._optimizers)
        if spec.precision in TRUE_DTYPES:
            batch = cast_floats(batch, TRUE_DTYPES[spec.precision])
        with spec.autocast(), spec.default_dtype():
            generator = self._trainable.step("train")(batch, batch_idx, 0)
        for i in range(count):
            with spec.autocast(), spec.default_dtype():
                output = next(generator, _OVER)
            if output is _OVER:
                raise ModuleError(_count(self._trainable, count, f"yielded {i}", "Yield one loss for each optimizer, in order."))
            yield output
        with spec.autocast(), spec.default_dtype():
            if next(generator, _OVER) is not _OVER:
                raise ModuleError(_count(self._trainable, count, f"yielded more than {count}", "Yield one loss for each optimizer."))

    def _turn(self, i: int, output: Any, batch_idx: int, first: bool, divisor: int) -> Tensor | None:
        loss, optimizer = loss_of(output), self._optimizers[i]
        if first:
            self._bad[i] = None
            zero_grad(optimizer, i, self.epoch, batch_idx, self._hooks)
        if self.check is not None and output is not None:
            self.check(i, output)
        if loss is None:
            return None
        plain = loss.detach()
        bad = self._bad[i]
        self._bad[i] = plain if bad is None else bad + plain
        loss = loss if divisor == 1 else loss / divisor
        loss = loss if self._scaler is None else loss * self._scaler.tensor
        self._hooks.fire("on_before_backward", loss)
        more, leaves = i + 1 < len(self._optimizers), trainable_params(optimizer)
        if not leaves:
            raise frozen(optimizer, f"optimizer {i}")
        loss.backward(inputs=leaves, retain_graph=more)  # type: ignore[no-untyped-call]
        self._hooks.fire("on_after_backward")
        return plain

    def _update(self, i: int, rescale: float) -> None:
        bad, self._bad[i] = self._bad[i], None
        if bad is None:
            return
        if self._tails[i].step(None, rescale, bad):
            self.moved[i] = 1
        else:
            self._result = REFUSED


def _count(trainable: Trainable, wanted: int, came: str, do: str) -> str:
    name = "turns=" if trainable.takes_turns else f"{type(trainable.module).__name__}.training_step"
    return f"{name} is a generator: it {came} losses and configure_optimizers returned {wanted} optimizers. {do}"
