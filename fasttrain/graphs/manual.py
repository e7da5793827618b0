"""Manual optimization: the verbs a module calls inside its training_step, and the step that runs them in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from fasttrain.errors import ModuleError, reject
from fasttrain.graphs.cut import CutFunction
from fasttrain.graphs.eager import hooked_tail
from fasttrain.graphs.hooks import InStepHooks
from fasttrain.graphs.program import REFUSED, StepOutput, StepSpec, detached, forward, keys_and_values
from fasttrain.graphs.scale import LossScale
from fasttrain.graphs.tail import clip_gradients, trainable_params
from fasttrain.graphs.traced import TracedCall
from fasttrain.graphs.tracer import unvalidated
from fasttrain.module import Trainable, loss_of
from fasttrain.options import Options
from fasttrain.results import LogKey, Obstacle


class Acts(Protocol):
    """Who carries the verbs out: plain torch, or operations in a captured graph."""

    def backward(self, loss: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None: ...

    def step(self, index: int, closure: Callable[[], Any] | None) -> Any: ...

    def zero_grad(self, index: int, set_to_none: bool) -> None: ...

    def clip(self, index: int, value: float | None, algorithm: str) -> None: ...

    def toggle(self, index: int | None) -> None: ...

    def move(self, index: int, args: tuple[Any, ...]) -> None: ...

    def taken(self) -> int: ...


class ManualOptimizer:
    """What ``self.optimizers()`` gives: the optimizer, with ``step`` and ``zero_grad`` under the run's precision."""

    def __init__(self, verbs: Verbs, index: int, optimizer: torch.optim.Optimizer) -> None:
        self._verbs, self._index, self.optimizer = verbs, index, optimizer
        self.passes_for = type(optimizer)  # whose instance it is said to be

    def step(self, closure: Callable[[], Any] | None = None, **_: Any) -> Any:
        """Unscale, test and update from the gradients as they are; ``closure`` is called first, as torch calls it."""
        return self._verbs.carrier().step(self._index, closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._verbs.carrier().zero_grad(self._index, set_to_none)

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        """Only this optimizer's parameters require a gradient within."""
        self._verbs.toggle_optimizer(self)
        try:
            yield
        finally:
            self._verbs.untoggle_optimizer(self)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.optimizer.defaults

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["optimizer"], name)


class ManualScheduler:
    """What ``self.lr_schedulers()`` gives: ``step`` moves the schedule at its place in the step, everything else is the scheduler's."""

    def __init__(self, verbs: Verbs, index: int, scheduler: Any) -> None:
        self._verbs, self._index, self.scheduler = verbs, index, scheduler

    def step(self, *args: Any) -> None:
        if self._verbs.in_graph:
            self._verbs.carrier().move(self._index, args)
        else:
            self.scheduler.step(*args)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self.scheduler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["scheduler"], name)


def _passing(base: type, verbs: Verbs, index: int, real: Any) -> Any:
    """One of ours that passes for the class it stands for: people ask ``isinstance(sch, ReduceLROnPlateau)``."""
    kind: Any = type(type(real).__name__, (base, type(real)), {})
    return kind(verbs, index, real)


class Verbs:
    """``self.optimizers()``, ``manual_backward``, ``toggle_optimizer``, ... of one module."""

    def __init__(self) -> None:
        self._optimizers: list[ManualOptimizer] = []
        self._plain: list[ManualOptimizer] = []
        self.in_graph = False  # what a tracer meets must be ours alone: it has ideas of its own about optimizers
        self._schedulers: list[ManualScheduler] = []
        self.acts: Acts | None = None

    def bind(self, optimizers: Sequence[torch.optim.Optimizer], schedulers: Sequence[Any]) -> None:
        self._optimizers = [_passing(ManualOptimizer, self, i, o) for i, o in enumerate(optimizers)]
        self._plain = [ManualOptimizer(self, i, o) for i, o in enumerate(optimizers)]
        self._schedulers = [_passing(ManualScheduler, self, i, s) for i, s in enumerate(schedulers)]

    def named(self) -> dict[str, Callable[..., Any]]:
        names = ("optimizers", "lr_schedulers", "manual_backward", "toggle_optimizer", "untoggle_optimizer", "clip_gradients")
        return {n: getattr(self, n) for n in (*names, "toggled_optimizer")}

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """The optimizers of configure_optimizers: one by itself, several in a list."""
        mine = self._plain if self.in_graph else self._optimizers
        found: list[Any] = mine if use_pl_optimizer else [o.optimizer for o in mine]
        return found[0] if len(found) == 1 else list(found)

    def lr_schedulers(self) -> Any:
        """The schedulers: None, one by itself, or several in a list."""
        return None if not self._schedulers else self._schedulers[0] if len(self._schedulers) == 1 else list(self._schedulers)

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """``loss.backward(*args, **kwargs)``, scaled where the precision asks for it."""
        self.carrier().backward(loss, args, kwargs)

    def toggle_optimizer(self, optimizer: Any, *_: Any) -> None:
        """From here on only this optimizer's parameters require a gradient."""
        self.carrier().toggle(self._index_of(optimizer))

    def untoggle_optimizer(self, optimizer: Any = None, *_: Any) -> None:
        """What ``toggle_optimizer`` switched off is on again."""
        self.carrier().toggle(None)

    @contextmanager
    def toggled_optimizer(self, optimizer: Any) -> Iterator[None]:
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizer)

    def clip_gradients(self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None) -> None:
        """Clip this optimizer's gradients by "norm" (default) or "value"."""
        if self.acts is None:  # in a hook of automatic optimization
            clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        self.carrier().clip(self._index_of(optimizer), gradient_clip_val, gradient_clip_algorithm or "norm")

    def touched(self) -> bool:
        """Has somebody put a verb of his own on what ``optimizers()`` gives?"""
        return any(len(vars(o)) > len(vars(p)) for o, p in zip(self._optimizers, self._plain, strict=True))

    def taken(self) -> int:
        """Steps taken so far by the training_step that runs; ``global_step`` does not have them yet."""
        return 0 if self.acts is None else self.acts.taken()

    def carrier(self) -> Acts:
        if self.acts is None:
            raise ModuleError("manual_backward, step and zero_grad belong into training_step or a hook of the run: nothing is trained now.")
        return self.acts

    def _index_of(self, optimizer: Any) -> int:
        for i, mine in enumerate(self._plain):
            if optimizer is mine or optimizer is mine.optimizer or optimizer is self._optimizers[i]:
                return i
        raise ModuleError(reject("optimizer", type(optimizer).__name__, "one of self.optimizers()", "Take it from there."))


def one_number(loss: Tensor) -> Tensor:
    """What the bar shows and the finite test reads of a loss, or of a vector that was given a gradient."""
    return loss.detach() if loss.numel() == 1 else loss.detach().mean()


class ManualStep:
    """The eager rung of manual optimization: every verb at its place, in plain torch.

    ``cut``: the module's own code in compiled stretches between the verbs.
    """

    takes_closure = True
    calls: Sequence[TracedCall] = ()
    obstacles: Sequence[Obstacle] = ()

    def __init__(
        self, trainable: Trainable, spec: StepSpec, optimizers: Sequence[torch.optim.Optimizer], schedulers: Sequence[Any],
        options: Options, scaler: LossScale | None, verbs: Verbs, hooks: InStepHooks, cut: CutFunction | None = None,
    ) -> None:  # fmt: skip
        self.cut, self.rung = cut, "eager" if cut is None else "compile"
        self._trainable, self._spec, self._scaler, self._verbs, self._hooks = trainable, spec, scaler, verbs, hooks
        self._optimizers, self._schedulers = optimizers, schedulers
        self._tails = [hooked_tail(o, i, trainable_params(o), options, scaler, hooks, spec.norms) for i, o in enumerate(optimizers)]
        for tail in self._tails:
            tail.clip = None  # the module clips by itself
        self.epoch = 0
        self.moved = [0] * len(optimizers)
        self._bad: list[Tensor | None] = [None] * len(optimizers)  # the losses behind the gradients each optimizer holds
        self._last: Tensor | None = None
        self._refused = self._within = False
        self._unscaled: set[int] = set()
        self.gently = False  # a toggle chooses whose gradients are taken, and switches nothing off: what a capture does
        self.toggles = False
        self._toggled: int | None = None
        self._switched: list[tuple[Tensor, bool]] = []
        self._keys: tuple[LogKey, ...] = ()
        if cut is not None:  # between stretches, as they are
            with unvalidated():  # torch switches it off for the process at the first such call
                for verb in ("backward", "step", "zero_grad", "clip", "toggle", "move", "taken"):
                    setattr(self, verb, torch.compiler.disable(getattr(self, verb)))  # type: ignore[no-untyped-call]

    def micro_step(self, batch: Any, batch_idx: int, *, first: bool, last: bool, divisor: int, opened: int) -> StepOutput:
        self.moved, self._last, self._refused = [0] * len(self._optimizers), None, False
        self._verbs.acts, self._within = self, True
        if self._scaler is not None:
            self._scaler.gather()
        try:
            output, items = forward(self._trainable, self._spec, "train", batch, batch_idx, 0, self.cut)
        finally:
            if self._scaler is not None:
                self._scaler.settle()
            self.toggle(None)
            self._within = False
        keys, values = keys_and_values(items)
        self._keys = keys if keys != self._keys else self._keys
        loss = loss_of(output)
        plain = loss.detach() if isinstance(loss, Tensor) and loss.numel() == 1 else self._last
        return StepOutput(plain, self._keys, values, detached(output) if self._spec.keep_outputs else None, None)

    def update_step(self, rescale: float) -> int:
        return REFUSED if self._refused else max(self.moved, default=0)

    def refresh(self) -> None:
        """Nothing is kept that user code could have changed."""

    def gradients(self) -> dict[str, Tensor]:
        """What the module has gathered over batches by hand."""
        return {n: p.grad for n, p in self._trainable.module.named_parameters() if p.grad is not None}

    def load_gradients(self, gradients: dict[str, Tensor]) -> None:
        for name, p in self._trainable.module.named_parameters():
            p.grad = gradients[name].to(p.device).clone() if name in gradients else None

    # -- the verbs ----------------------------------------------------------------------------------------------
    def backward(self, loss: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._last = plain = one_number(loss)
        for i, optimizer in enumerate(self._optimizers):
            held = any(p.grad is not None for g in optimizer.param_groups for p in g["params"])
            bad = self._bad[i] if held else None
            self._bad[i] = plain if bad is None else bad + plain
        if self._scaler is not None:
            loss = loss * self._scaler.tensor
        self._hooks.fire("on_before_backward", loss)
        if self.gently:
            self._into_leaves(loss, args[0] if args else kwargs.get("gradient"))
        elif self._hooks.owned("backward") and (args or kwargs):
            self._trainable.module.backward(loss, *args, **kwargs)  # type: ignore[operator]
        elif self._hooks.owned("backward"):
            self._hooks.call("backward", loss=loss)
        else:
            loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._hooks.fire("on_after_backward")

    def step(self, index: int, closure: Callable[[], Any] | None) -> Any:
        optimizer, result = self._optimizers[index], None
        if isinstance(optimizer, torch.optim.LBFGS):
            return self._step_by_closure(index, closure)
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        unscaled = 1.0 if self._scaler is None or index not in self._unscaled else self._scaler.value
        self._unscaled.discard(index)
        if self._tails[index].step(None, unscaled, self._bad[index]):
            self.moved[index] += 1
        else:
            self._refused = True
        return result

    def zero_grad(self, index: int, set_to_none: bool) -> None:
        self._unscaled.discard(index)
        self._bad[index] = None
        self._optimizers[index].zero_grad(set_to_none=set_to_none)

    def clip(self, index: int, value: float | None, algorithm: str) -> None:
        params = [p for g in self._optimizers[index].param_groups for p in g["params"]]
        if self._scaler is not None and index not in self._unscaled:
            self._unscaled.add(index)
            torch._foreach_mul_([p.grad for p in params if p.grad is not None], 1.0 / self._scaler.value)
        clip_gradients(self._optimizers[index], value, algorithm)

    def _into_leaves(self, loss: Tensor, gradient: Tensor | None) -> None:
        chosen = self._optimizers if self._toggled is None else [self._optimizers[self._toggled]]
        leaves = list({id(p): p for o in chosen for p in trainable_params(o)}.values())
        for p, g in zip(leaves, torch.autograd.grad(loss, leaves, gradient, allow_unused=True, retain_graph=True), strict=True):
            if g is not None:
                p.grad = g.clone() if p.grad is None else p.grad + g

    def toggle(self, index: int | None) -> None:
        self._toggled, self.toggles = index, self.toggles or index is not None
        if self.gently:
            return
        for p, before in self._switched:
            p.requires_grad_(before)
        self._switched = []
        if index is not None:
            mine = {id(p) for g in self._optimizers[index].param_groups for p in g["params"]}
            others = {id(p): p for o in self._optimizers for g in o.param_groups for p in g["params"] if id(p) not in mine}
            self._switched = [(p, p.requires_grad) for p in others.values()]
            for p in others.values():
                p.requires_grad_(False)

    def move(self, index: int, args: tuple[Any, ...]) -> None:
        self._schedulers[index].step(*args)

    def taken(self) -> int:
        return max(self.moved, default=0) if self._within else 0

    def _step_by_closure(self, index: int, closure: Callable[[], Any] | None) -> Any:
        def prepared() -> Any:
            result = None if closure is None else closure()
            if not self._tails[index].prepare(1.0, self._bad[index]):
                self._refused = True
                self._optimizers[index].zero_grad(set_to_none=True)
            return result

        result = self._optimizers[index].step(prepared)
        self.moved[index] += not self._refused
        return result
