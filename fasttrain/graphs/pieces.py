"""Steps with something between their captured pieces: hooks around forward and backward, or Python in their middle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fasttrain.errors import KernelError
from fasttrain.graphs.cut import CutFunction
from fasttrain.graphs.eager import EagerStep
from fasttrain.graphs.hooks import InStepHooks
from fasttrain.graphs.program import REFUSED, Raw, StepOutput, StepSpec, make_forward, make_micro_step, with_gradients
from fasttrain.graphs.scale import LossScale
from fasttrain.graphs.tail import FusedTail, apart, frozen, owns_zero_grad, step_of, still_moved, tail_obstacle, trainable_params
from fasttrain.graphs.traced import TracedCall
from fasttrain.module import Trainable
from fasttrain.options import Options
from fasttrain.results import Build, Obstacle


class HookedStep(EagerStep):
    """The eager step with a fused update behind its hooks, where the optimizer allows one."""

    rung = "compile"

    def __init__(
        self, trainable: Trainable, spec: StepSpec, optimizer: torch.optim.Optimizer, options: Options, scaler: LossScale | None,
        hooks: InStepHooks, index: int = 0,
    ) -> None:  # fmt: skip
        self.params = self._leaves = trainable_params(optimizer)
        super().__init__(trainable, spec, optimizer, self.params, options, scaler, hooks, index)
        # A module that clips by itself leaves nothing to clip; unscaling comes before the hooks, so it is torch's.
        self._fused_options = replace(options, gradient_clip_val=None) if self.tail.clip is not None else options
        self._fused: FusedTail | None = None
        self._bind_tail()

    def update_step(self, rescale: float) -> int:
        """As on the eager rung; where the optimizer allows it, what follows the hooks is one fused call."""
        self._look_again()  # the step itself is somebody's code
        if self._fused is None or rescale != 1.0 or self._by_torch():
            return super().update_step(rescale)
        if self.tail.before_step is not None:
            self.tail.before_step()
        if self.tail.clip is not None:
            self.tail.clip()
        if self._by_torch():  # since those hooks
            with self._hooks_behind():
                return super().update_step(rescale)
        bad, self._bad = self._bad, None
        return 1 if self._fused.step([p.grad for p in self.params], 1.0, bad) else REFUSED

    def _by_torch(self) -> bool:
        """Is there a gradient that the fused update does not take: sparse, or one that somebody has given to a frozen parameter?"""
        mine = {id(p) for p in self.params}
        there = [p for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
        return any(id(p) not in mine or p.grad.layout is not torch.strided for p in there)

    @contextmanager
    def _hooks_behind(self) -> Iterator[None]:
        before = self.tail.before_step, self.tail.clip
        self.tail.before_step, self.tail.clip = None, None if before[1] is None else lambda: None
        yield
        self.tail.before_step, self.tail.clip = before

    def _zero_grad(self, batch_idx: int) -> None:
        if owns_zero_grad(self._optimizer) or self._hooks.owned("optimizer_zero_grad"):
            super()._zero_grad(batch_idx)
            return
        self._hooks.fire("on_before_zero_grad", self._optimizer)
        for group in self._optimizer.param_groups:  # what torch's does, but for its profiler: 35 us for 14 tensors
            for p in group["params"]:
                p.grad = None

    def _bind_tail(self) -> None:
        self._step_seen = step_of(self._optimizer)
        plain = not self.takes_closure and self._scaler is None and tail_obstacle(self._optimizer, self.params) is None
        # The eager rung leaves clipped gradients for everybody to see.
        plain = plain and (self.rung != "eager" or self._fused_options.gradient_clip_val is None)
        given = (self._optimizer, self.params, self._fused_options, None, self._spec.norms)
        self._fused = FusedTail(*given, graphs=True) if plain else None

    def _look_again(self) -> None:
        """Somebody's code ran: do other parameters train now?"""
        now = trainable_params(self._optimizer)
        changed = [id(p) for p in now] != [id(p) for p in self._leaves]
        if changed and not now:
            raise frozen(self._optimizer, f"optimizer {self._index}")
        if changed:
            self.params, self._leaves = [*now, *still_moved(self.params, [p.grad for p in self.params])], now
        if changed or step_of(self._optimizer) != self._step_seen:
            self._bind_tail()
        if self._fused is not None:
            try:
                self._fused.refresh()
            except KernelError:  # a weight of another dtype, say
                self._bind_tail()


class EagerFusedStep(HookedStep):
    """What ``auto`` stays with where it captures nothing: every operation as in a plain loop, then one fused update."""

    rung = "eager"

    @property
    def is_fused(self) -> bool:
        return self._fused is not None


class PiecedStep(HookedStep):
    """Every hook and closure sees ``p.grad``, as on the eager rung; what they stand around is captured whole.

    A closure (LBFGS, ``optimizer_step``) replays the captured piece as often as it is called.
    """

    def __init__(
        self, trainable: Trainable, spec: StepSpec, optimizer: torch.optim.Optimizer, options: Options, scaler: LossScale | None,
        hooks: InStepHooks, index: int = 0, *, build: Build,
    ) -> None:  # fmt: skip
        super().__init__(trainable, spec, optimizer, options, scaler, hooks, index)
        self._divisor_value, self._divisor = 1, torch.tensor(1.0, device=spec.device)
        accumulates = max(options.accumulate_grad_batches.values()) > 1
        self.call = TracedCall(
            make_micro_step(trainable, spec, self.params, index), trainable, spec, build=build,
            extra=(self._divisor if accumulates else None, None if scaler is None else scaler.tensor), op_by_op=self._op_by_op,
        )  # fmt: skip
        self._forward = make_forward(trainable, spec, index)
        self.calls = (self.call,)

    @property
    def obstacles(self) -> Sequence[Obstacle]:  # type: ignore[override]  # on the eager rung there are none, ever
        return self.call.obstacles

    def refresh(self) -> None:
        self.call.dirty = True

    def _op_by_op(self, *args: Any) -> Raw:
        """The gradients of what trains once the forward pass is over: the step itself may have frozen or unfrozen something."""
        raw = self._forward(*args)
        self._look_again()
        return with_gradients(raw, self.params)

    def _look_again(self) -> None:
        before = self.params
        super()._look_again()
        if self.params is not before:  # before an update too: a hook behind the backward pass may have unfrozen some
            self.call.bind(make_micro_step(self._trainable, self._spec, self.params, self._index))

    def micro_step(self, batch: Any, batch_idx: int, *, first: bool, last: bool, divisor: int, opened: int) -> StepOutput:
        self.call.dirty = True  # the hooks of the step before were anybody's code
        return super().micro_step(batch, batch_idx, first=first, last=last, divisor=divisor, opened=opened)

    def _forward_backward(self, batch: Any, batch_idx: int, first: bool, divisor: int) -> StepOutput:
        call = self.call
        if divisor != self._divisor_value:
            self._divisor_value = divisor
            self._divisor.fill_(divisor)
        if call.dirty:
            self._look_again()
            call.forget_moved()
        call.count += 1
        out = call.plan(batch) if call.plan is not None and not call.dirty else None
        already = False  # autograd itself has called the parameters' hooks
        if out is None:
            out = call.guarded(batch, batch_idx)
            already = call.op_by_op
        if first:
            self._zero_grad(batch_idx)
        if out.loss is not None:
            self._note_loss(out.loss, first)
            _accumulate(self.params, list(apart(out.grads or ())), told=not self._hooks.muted, already=already)
            self._hooks.fire("on_after_backward")
        return out._replace(grads=None)


class CutStep(HookedStep):
    """A step the tracer cannot take whole: compiled stretches, ordinary autograd across them, the fused update behind."""

    def __init__(
        self, trainable: Trainable, spec: StepSpec, optimizer: torch.optim.Optimizer, options: Options, scaler: LossScale | None,
        hooks: InStepHooks, index: int = 0, *, build: Build,
    ) -> None:  # fmt: skip
        super().__init__(trainable, spec, optimizer, options, scaler, hooks, index)
        self.function = self.cut = CutFunction(trainable.step("train"), spec, build)


def _accumulate(params: Sequence[nn.Parameter], grads: Sequence[Tensor | None], *, told: bool, already: bool) -> None:
    """What autograd does at its leaves: hooks on the parameter, then into ``p.grad``, then the hooks behind."""
    for p, g in zip(params, grads, strict=True):
        if g is None:
            continue
        for hook in (p._backward_hooks or {}).values() if told and not already else ():
            changed = hook(g)
            g = g if changed is None else changed
        if p.grad is None:
            p.grad = g
        else:
            p.grad += g
        for after in (getattr(p, "_post_accumulate_grad_hooks", None) or {}).values() if told else ():
            after(p)
