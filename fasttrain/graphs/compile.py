"""The compile rung: forward and backward traced as one graph, then one fused update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fasttrain.errors import CaptureError, KernelError
from fasttrain.graphs.device import Device
from fasttrain.graphs.program import REFUSED, Raw, StepOutput, StepSpec, keys_and_values, make_forward, make_micro_step, with_gradients
from fasttrain.graphs.replay import Replay
from fasttrain.graphs.scale import LossScale
from fasttrain.graphs.step import Step
from fasttrain.graphs.tail import Tail, clip_gradients, frozen, make_tail, owns_zero_grad, step_of, still_moved, trainable_params
from fasttrain.graphs.traced import StandIn, TracedCall
from fasttrain.module import Trainable
from fasttrain.options import Options
from fasttrain.results import Build, Obstacle


class CompileStep:
    """Whole-graph forward and backward, then one fused update. Same signature as every rung."""

    rung = "compile"
    takes_closure = False
    moved = (1,)  # one optimizer: update_step says it all

    def __init__(
        self, trainable: Trainable, spec: StepSpec, optimizer: torch.optim.Optimizer, options: Options,
        scaler: LossScale | None, index: int = 0, *, build: Build, eager: Callable[[], Step], device: Device | None = None,
    ) -> None:  # fmt: skip
        self._trainable, self._spec, self._optimizer, self._options = trainable, spec, optimizer, options
        self._scaler, self._index = scaler, index
        stand_in: StandIn | None = None
        if device is not None:  # recorded as it was traced, gradients and all
            self.rung, stand_in = "graph", lambda run, plan: Replay(run, [i for i, _ in plan.slots], plan.read_by_user, device)
        self._divisor_value, self._divisor = 1, torch.tensor(1.0, device=spec.device)
        accumulates = max(options.accumulate_grad_batches.values()) > 1
        self._grads: Sequence[Tensor | None] | None = None
        self._bad: Tensor | None = None
        self._own = False  # are the gradients tensors that nobody else holds?
        self.epoch = 0
        self.params = self._leaves = trainable_params(optimizer)
        self.call = TracedCall(
            make_micro_step(trainable, spec, self.params, index), trainable, spec, build=build, stand_in=stand_in,
            extra=(self._divisor if accumulates else None, None if scaler is None else scaler.tensor), op_by_op=self._op_by_op,
        )  # fmt: skip
        self._forward = make_forward(trainable, spec, index)
        self._make_eager, self._eager = eager, cast(Step | None, None)  # which goes on where a captured step may not
        self._spent: tuple[Sequence[Tensor | None] | None, float] = (None, 1.0)  # the last window's gradients, and what they were scaled by
        self._bind_tail()

    def micro_step(self, batch: Any, batch_idx: int, *, first: bool, last: bool, divisor: int, opened: int) -> StepOutput:
        """One batch forward and backward; the window's gradients stay here until ``update_step``."""
        if divisor != self._divisor_value:
            self._divisor_value = divisor
            self._divisor.fill_(divisor)
        call = self.call
        if call.dirty:
            self._recheck()
        if self._eager is not None:
            return self._eager.micro_step(batch, batch_idx, first=first, last=last, divisor=divisor, opened=opened)
        self._spent = None, 1.0
        call.count += 1
        out = call.plan(batch) if call.plan is not None and not call.dirty else None
        if out is None:
            out = call.guarded(batch, batch_idx)
            self._after_python()
        if first:
            # A replay's gradients are the graph's own: what must outlive the next replay is copied.
            kept = out.grads if last or not call.replays else [None if g is None else g.clone() for g in out.grads or ()]
            self._grads, self._bad, self._own = kept, out.loss, False
        else:
            self._accumulate(out)
        return out

    def update_step(self, rescale: float) -> int:
        """Unscale, clip and update in one call: 1, or REFUSED when the step was skipped as non-finite."""
        if self._eager is not None:
            return self._eager.update_step(rescale)
        grads, self._grads = self._grads, None
        self._spent = grads, rescale if self._scaler is None else rescale / self._scaler.value
        return 1 if self.tail.step(grads, rescale, self._bad) else REFUSED  # type: ignore[arg-type]

    def refresh(self) -> None:
        """User code ran: check the guards, the addresses and the set of trainable parameters at the next step."""
        self.call.dirty = True

    @property
    def calls(self) -> Sequence[TracedCall]:
        return [self.call]

    @property
    def obstacles(self) -> Sequence[Obstacle]:
        return self.call.obstacles

    def gradients(self) -> dict[str, Tensor]:
        """The open window's gradients by parameter name, for a checkpoint in mid-window."""
        if self._eager is not None:
            return self._eager.gradients()
        self._own = False
        names = {id(p): n for n, p in self._trainable.module.named_parameters()}
        return {names[id(p)]: g for p, g in zip(self.params, self._grads or (), strict=False) if g is not None and id(p) in names}

    def held(self) -> tuple[Sequence[Tensor | None] | None, Tensor | None]:
        """The open window's gradients in parameter order, and its losses' sum. They are not written into any more."""
        self._own = False
        return self._grads, self._bad

    def hold(self, held: tuple[Sequence[Tensor | None] | None, Tensor | None]) -> None:
        self._grads, self._bad = held
        self._own = False

    def parameter_names(self) -> list[str]:
        names = {id(p): n for n, p in self._trainable.module.named_parameters()}
        return [names.get(id(p), "") for p in self.params]

    def untraced(self, batch: Any, batch_idx: int, *, first: bool, divisor: int) -> StepOutput:
        """The same micro-step run op by op: what the traced one is compared with."""
        self._divisor.fill_(divisor)
        raw = self.call.untraced(batch, batch_idx)
        out = StepOutput(raw.loss, *keys_and_values(raw.items), raw.returned, raw.grads)
        if first:
            self._grads, self._bad, self._own = out.grads, out.loss, False
        else:
            self._accumulate(out)
        return out

    def load_gradients(self, gradients: dict[str, Tensor]) -> None:
        if self._eager is not None:
            self._eager.load_gradients(gradients)
            return
        names = {id(p): n for n, p in self._trainable.module.named_parameters()}
        self._grads = [gradients[n].to(p.device) if (n := names.get(id(p), "")) in gradients else None for p in self.params]
        self._bad, self._own = torch.zeros((), device=self._spec.device), False

    def _recheck(self) -> None:
        if owns_zero_grad(self._optimizer) and self._eager is None:
            self._go_eager()
        if self._eager is not None:
            self._eager.refresh()
            return
        self._see_who_trains()
        self.call.forget_moved()
        if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in self.params):
            self.call.failed, self.call.plan = True, None  # only op by op are they called
        if step_of(self._optimizer) != self._step_seen:
            self._bind_tail()
        try:
            self.tail.refresh()
        except KernelError:  # a weight of another dtype, say
            self._bind_tail()

    def _see_who_trains(self) -> None:
        now = trainable_params(self._optimizer)
        if len(self._leaves) == len(now) and all(a is b for a, b in zip(now, self._leaves, strict=True)):
            return
        if not now:
            raise frozen(self._optimizer, f"optimizer {self._index}")
        grads, old, self._leaves = self._grads, self.params, now
        self.params = [*now, *still_moved(old, grads or ())]
        self.call.bind(make_micro_step(self._trainable, self._spec, self.params, self._index))
        self._bind_tail()
        if grads is not None:
            by_id = {id(p): g for p, g in zip(old, grads, strict=True)}
            self._grads, self._own = [by_id.get(id(p)) for p in self.params], False

    def _op_by_op(self, *args: Any) -> Raw:
        """The gradients of what trains once the forward pass is over: the step itself may have frozen or unfrozen something."""
        raw = self._forward(*args)
        self._see_who_trains()
        return with_gradients(raw, self.params)

    def _after_python(self) -> None:
        """The step's own code ran, and may have got at the optimizer."""
        if owns_zero_grad(self._optimizer):
            raise CaptureError("training_step replaced the zero_grad of its optimizer. Do it in a hook, or use capture='eager'.")
        if step_of(self._optimizer) != self._step_seen:
            self._bind_tail()

    def _go_eager(self) -> None:
        """Somebody has put his own zero_grad on the optimizer: he may look at gradients, which are where torch has them from now on."""
        names = {id(p): n for n, p in self._trainable.module.named_parameters()}
        grads, factor = (self._grads, 1.0) if self._grads is not None else self._spent
        step = self._make_eager()
        step.epoch = self.epoch
        step.load_gradients({names[id(p)]: g * factor for p, g in zip(self.params, grads or (), strict=False) if g is not None})
        if self._grads is None:
            clip_gradients(self._optimizer, self._options.gradient_clip_val, self._options.gradient_clip_algorithm)
        self._eager, self._grads = step, None
        self.call.failed = True
        advice = "Done in configure_optimizers it would be called around a captured piece."
        self.call.ended.append(Obstacle("the zero_grad of the optimizer was replaced: the step goes on eagerly", advice=advice))

    def _bind_tail(self) -> None:
        self._step_seen = step_of(self._optimizer)
        self.tail: Tail = make_tail(self._optimizer, self.params, self._options, self._scaler, self._spec.norms, self._spec.pending)

    def _accumulate(self, out: StepOutput) -> None:
        """Into tensors of our own from the window's third batch on; the first gradients may be anybody's (a batch's, say)."""
        assert out.grads is not None
        old = self._grads if self._grads is not None else [None] * len(out.grads)
        both = [(a, b) for a, b in zip(old, out.grads, strict=True) if a is not None and b is not None]
        if self._own:
            torch._foreach_add_([a for a, _ in both], [b for _, b in both])
        sums = iter(torch._foreach_add([a for a, _ in both], [b for _, b in both]) if both and not self._own else [a for a, _ in both])
        self._grads = [
            next(sums) if a is not None and b is not None else (a if b is None else b) for a, b in zip(old, out.grads, strict=True)
        ]
        self._own = len(both) == len(old)
        if out.loss is not None:
            self._bad = out.loss if self._bad is None else self._bad + out.loss
