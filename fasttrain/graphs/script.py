"""A step whose own code says when an optimizer moves - a generator, or manual optimization - captured whole, updates and all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fasttrain.errors import CaptureError, KernelError
from fasttrain.graphs.generator import GeneratorStep
from fasttrain.graphs.host import Host, Key, ops
from fasttrain.graphs.manual import ManualStep, Verbs, one_number
from fasttrain.graphs.program import (
    REFUSED,
    TRUE_DTYPES,
    Raw,
    StepOutput,
    StepSpec,
    cast_floats,
    detached,
    gradients_of,
    mean_of,
    unwrapped,
)
from fasttrain.graphs.scale import LossScale
from fasttrain.graphs.tail import owns_zero_grad
from fasttrain.graphs.traced import TracedCall
from fasttrain.module import Trainable, loss_of
from fasttrain.options import Options
from fasttrain.results import Build, Obstacle


class ScriptStep:
    """One compiled graph from the batch to the last update. Nothing of it is read on the host.

    ``verbs`` given: manual optimization, whose verbs become operations of the graph; else a generator step.
    """

    rung = "compile"
    takes_closure = True

    def __init__(
        self, trainable: Trainable, spec: StepSpec, optimizers: Sequence[torch.optim.Optimizer], schedulers: Sequence[Any],
        options: Options, scaler: LossScale | None, verbs: Verbs | None, eager: GeneratorStep | ManualStep, *, build: Build,
    ) -> None:  # fmt: skip
        self._trainable, self._spec, self._verbs, self.eager = trainable, spec, verbs, eager
        self.host = Host(optimizers, options, scaler, schedulers, spec, apart=verbs is None)
        self.acts = _Acts(self.host)
        self._divisor_value, self._divisor = 1, torch.tensor(1.0, device=spec.device)
        accumulates = max(options.accumulate_grad_batches.values()) > 1
        self.call = TracedCall(
            self._function(), trainable, spec, build=build, own=(self.acts, *([] if verbs is None else [verbs])), eager=self._eagerly,
            extra=(self._divisor if accumulates else None, None if scaler is None else scaler.tensor, self.host.order),
        )  # fmt: skip
        self._window = (True, True, 1, 1)

    @property
    def epoch(self) -> int:
        return self.eager.epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        self.eager.epoch = value

    @property
    def moved(self) -> Sequence[int]:
        return self.host.moved

    @property
    def calls(self) -> Sequence[TracedCall]:
        return (self.call,)

    @property
    def obstacles(self) -> Sequence[Obstacle]:
        return self.call.obstacles

    def micro_step(self, batch: Any, batch_idx: int, *, first: bool, last: bool, divisor: int, opened: int) -> StepOutput:
        call, host = self.call, self.host
        if divisor != self._divisor_value:
            self._divisor_value = divisor
            self._divisor.fill_(divisor)
        self._window = (first, last, divisor, opened)
        if self._verbs is not None:
            self._verbs.acts, self._verbs.in_graph = self.acts, True
        elif first:
            host.new_window()
        if call.dirty:
            self._recheck()
        host.begin(last=last, rescale=divisor / opened if last and self._verbs is None else 1.0)
        try:
            call.count += 1
            out = call.plan(batch) if call.plan is not None and not call.dirty else None
            if out is None:
                out = call.guarded(batch, batch_idx)
            if last and self._verbs is None and host.open():
                host.close()
        finally:
            host.end()
            if self._verbs is not None:
                self._verbs.in_graph = False
        return out

    def update_step(self, rescale: float) -> int:
        if self._verbs is None and not self._window[1] and self.host.open():  # a stop has cut the window short
            self.host.begin(last=True, rescale=rescale)
            self.host.close()
            self.host.end()
        return self.host.result()

    def eager_twin(self, batch: Any, batch_idx: int, held: dict[str, Tensor]) -> tuple[StepOutput, dict[str, Tensor]]:
        """The micro-step just made, on the eager rung from ``held`` gradients: its output, and the gradients it leaves."""
        first, last, divisor, opened = self._window
        eager = self.eager
        if self._verbs is not None:
            self._verbs.in_graph = False
        if self._verbs is not None or not first:
            eager.load_gradients(held)
        out = eager.micro_step(batch, batch_idx, first=first, last=last, divisor=divisor, opened=opened)
        if self._verbs is not None:
            self._verbs.acts = self.acts
        return out, {} if self._verbs is None and last else eager.gradients()

    def _eagerly(self, batch: Any, batch_idx: int) -> StepOutput:
        """A batch that was not traced, on the eager rung; gradients gathered so far go there and come back."""
        host, last = self.host, self._window[1]
        host.end()
        out, left = self.eager_twin(batch, batch_idx, self.gradients())
        host.begin(last=last, rescale=1.0)
        self.follow_eager(left)
        return out

    def follow_eager(self, left: dict[str, Tensor]) -> None:
        """The eager twin's micro-step is this one's: what it has moved, and the gradients it ``left``."""
        eager, host = self.eager, self.host
        host.moved, host.refused = list(eager.moved), self._window[1] and eager.update_step(1.0) == REFUSED
        host.new_window()
        self._see_who_trains()
        if left:
            self.load_gradients(left)
        for p in host.leaves:
            p.grad = None
        self.call.dirty = True  # the optimizer's state may be other tensors now

    def refresh(self) -> None:
        self.call.dirty = True

    def gradients(self) -> dict[str, Tensor]:
        named = self._named()
        return {named[k]: g for k, g in self.host.gradients().items() if k in named}

    def load_gradients(self, gradients: dict[str, Tensor]) -> None:
        self.host.load_gradients({k: gradients[n].to(self._spec.device).clone() for k, n in self._named().items() if n in gradients})

    def take_gradients(self) -> None:
        """Manual optimization: what hooks have gathered in ``p.grad`` before the first batch is gathered here from now on."""
        gathered = self.eager.gradients() if self._verbs is not None else {}
        if gathered:
            self.load_gradients(gathered)
            self.eager.load_gradients({})

    def _named(self) -> dict[Key, str]:
        """The host's keys as the eager rung names gradients."""
        names = {id(p): n for n, p in self._trainable.module.named_parameters()}
        return {(i, p): names[p] if self._verbs is not None else f"{i}:{names[p]}" for i, p in self.host.keys if p in names}

    def _recheck(self) -> None:
        self._see_who_trains()
        if self._verbs is None and any(map(owns_zero_grad, self.host.optimizers)):
            raise CaptureError("the zero_grad of an optimizer was replaced: a captured generator does not call it. Use capture='eager'.")
        self.call.forget_moved()
        hooked = any(p._backward_hooks or p._post_accumulate_grad_hooks for p in self.host.leaves)
        if hooked or self.host.touched() or (self._verbs is not None and self._verbs.touched()):
            self.call.failed, self.call.plan = True, None
        try:
            for tail in self.host.tails:
                tail.refresh()
        except KernelError:  # a weight of another dtype, say
            self.host.bind()

    def _see_who_trains(self) -> None:
        if self.host.changed():
            self.host.bind()
            self.call.bind(self._function())

    def _function(self) -> Callable[..., Raw]:
        if self._verbs is None:
            return make_generator_step(self._trainable, self._spec, self.host)
        return make_manual_step(self._trainable, self._spec, self.acts)


def make_generator_step(trainable: Trainable, spec: StepSpec, host: Host) -> Callable[..., Raw]:
    """A whole generator step as a pure function, in the form a tracer takes whole."""
    sink, step, keep = trainable.sink, trainable.step("train"), spec.keep_outputs
    true_dtype, number = TRUE_DTYPES.get(spec.precision), host.number
    params = [(tuple(ps), len(trains)) for ps, trains in zip(host.params, host.trains, strict=True)]
    turn = ops().turn

    def generator_step(batch: Any, batch_idx: int, divisor: Tensor | None, scale: Tensor | None, order: Tensor) -> Raw:
        sink.items = []
        if true_dtype is not None:
            batch = cast_floats(batch, true_dtype)
        losses: list[Any] = []
        outputs: list[Any] = []
        with spec.autocast():
            generator = step(batch, batch_idx, 0)
        for i, (mine, leaves) in enumerate(params):
            with spec.autocast():
                output = unwrapped(next(generator), sink, "train")
            outputs.append(output)
            loss = loss_of(output)
            if loss is None:
                continue
            scaled = loss if divisor is None else loss / divisor
            scaled = scaled if scale is None else scaled * scale
            grads = gradients_of(scaled, mine, leaves, retain=True)
            plain = loss.detach()
            with torch.no_grad():
                turn(number, i, order, mine, grads, plain)
            losses.append(plain)
        with spec.autocast():
            for _ in generator:
                raise CaptureError("a yield more than there are optimizers")
        items = sink.items
        sink.items = None
        return Raw(mean_of(losses), (), items, detached(outputs) if keep else None)

    return generator_step


class _Acts:
    """The verbs of manual optimization as operations of a graph."""

    def __init__(self, host: Host) -> None:
        self.host, self._ops = host, ops()
        self.toggled = -1
        self.ever_toggled = False
        self.moved: tuple[int, ...] = ()  # steps of each optimizer in the graph that is being traced
        self.scale: Tensor | None = None
        self.order: Tensor = host.order
        self.last: Tensor | None = None

    def backward(self, loss: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        gradient = args[0] if args else kwargs.get("gradient")
        if kwargs.get("inputs") is not None or len(args) > 3:
            raise CaptureError("manual_backward with inputs of its own")
        if self.ever_toggled and self.toggled < 0:
            raise CaptureError("manual_backward after untoggle_optimizer: what was computed under the toggle has no gradient outside it")
        host = self.host
        params, leaves = (host.leaves, host.training) if self.toggled < 0 else (host.params[self.toggled], len(host.trains[self.toggled]))
        scaled = loss if self.scale is None else loss * self.scale
        grads = gradients_of(scaled, tuple(params), leaves, gradient, retain=True)
        plain = one_number(loss)
        self.last = plain
        with torch.no_grad():
            self._ops.add(host.number, self.toggled, self.order, grads, plain)

    def step(self, index: int, closure: Callable[[], Any] | None) -> Any:
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        host = self.host
        with torch.no_grad():
            self._ops.step(host.number, index, self.order, tuple(host.params[index]))
        self.moved = tuple(n + (i == index) for i, n in enumerate(self.moved))
        return result

    def zero_grad(self, index: int, set_to_none: bool) -> None:
        if not set_to_none:
            raise CaptureError("zero_grad(set_to_none=False): gradients of zero still move the optimizer's state")
        self._ops.zero(self.host.number, index, self.order)

    def clip(self, index: int, value: float | None, algorithm: str) -> None:
        if value and self.scale is not None:
            raise CaptureError("clip_gradients under a loss scale")
        if value:
            self._ops.clip(self.host.number, index, self.order, float(value), algorithm == "norm")

    def toggle(self, index: int | None) -> None:
        self.toggled = -1 if index is None else index
        self.ever_toggled = self.ever_toggled or index is not None

    def move(self, index: int, args: tuple[Any, ...]) -> None:
        if args:
            raise CaptureError("a scheduler's step with a metric reads it on the host")
        self._ops.move(self.host.number, index, self.order)

    def taken(self) -> int:
        if any(self.moved) and self.host.may_refuse:
            raise CaptureError("global_step behind a step: whether it was taken is not known while the graph runs")
        return max(self.moved, default=0)


def make_manual_step(trainable: Trainable, spec: StepSpec, acts: _Acts) -> Callable[..., Raw]:
    """A whole manual step as a pure function, in the form a tracer takes whole."""
    sink, step, keep, true_dtype = trainable.sink, trainable.step("train"), spec.keep_outputs, TRUE_DTYPES.get(spec.precision)

    optimizers = len(acts.host.params)

    def manual_step(batch: Any, batch_idx: int, divisor: Tensor | None, scale: Tensor | None, order: Tensor) -> Raw:
        sink.items = []
        acts.order, acts.scale, acts.last, acts.toggled, acts.ever_toggled = order, scale, None, -1, False
        acts.moved = (0,) * optimizers
        if true_dtype is not None:
            batch = cast_floats(batch, true_dtype)
        with spec.autocast():
            output = unwrapped(step(batch, batch_idx, 0), sink, "train")
        loss, items = loss_of(output), sink.items
        plain = acts.last if loss is None else loss.detach()
        sink.items, acts.last, acts.toggled, acts.ever_toggled, acts.moved = None, None, -1, False, ()
        return Raw(plain, (), items, detached(output) if keep else None)

    return manual_step
