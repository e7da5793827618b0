"""The end of a window: unscale, finite test, clip, update - one fused call where it can be, torch's own step else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fasttrain.errors import ModuleError
from fasttrain.graphs.device_tail import DeviceTail
from fasttrain.graphs.norms import GradientNorms
from fasttrain.graphs.pending import Pending
from fasttrain.graphs.scale import LossScale
from fasttrain.kernels import library
from fasttrain.kernels.native_tail import NativeTail
from fasttrain.options import Options


class Tail(Protocol):
    """Consumes the window's gradients. ``step`` says whether the weights moved."""

    def step(self, grads: Sequence[Tensor | None], rescale: float, loss: Tensor | None) -> bool: ...

    def refresh(self) -> None: ...


def trainable_params(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The optimizer's parameters that require grad, each once, in group order."""
    seen: dict[int, nn.Parameter] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.requires_grad:
                seen.setdefault(id(p), p)
    return list(seen.values())


def step_of(optimizer: torch.optim.Optimizer) -> tuple[Any, ...]:
    """What makes torch's own step another: a class or a function put on the object, or hooks."""
    hooks = (getattr(optimizer, name, None) for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"))
    return type(optimizer), optimizer.__dict__.get("step"), any(hooks)


def owns_zero_grad(optimizer: torch.optim.Optimizer) -> bool:
    """Is its ``zero_grad`` somebody's own, who may look at the gradients, or keep them?"""
    return "zero_grad" in optimizer.__dict__ or type(optimizer).zero_grad is not torch.optim.Optimizer.zero_grad


def still_moved(params: Sequence[nn.Parameter], grads: Sequence[Tensor | None]) -> list[nn.Parameter]:
    """Those frozen since they were given a gradient of this window: torch's update moves them by it, as ``p.grad`` is there."""
    return [p for p, g in zip(params, grads, strict=False) if g is not None and not p.requires_grad]


def frozen(optimizer: torch.optim.Optimizer, which: str = "the optimizer") -> ModuleError:
    held = sum(len(g["params"]) for g in optimizer.param_groups)
    return ModuleError(f"no parameter of {which} trains: all {held} have requires_grad=False. Unfreeze at least one.")


class FusedTail:
    """Native kernels over the optimizer's own state; the CPU knows at once whether the step was taken."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter], options: Options, scaler: LossScale | None,
        norms: GradientNorms | None = None, *, graphs: bool = False,
    ) -> None:  # fmt: skip
        """``graphs``: autograd may hold these weights from before a step, and must hear that they were written."""
        self._params, self._norms = params, norms
        self._scaler = scaler
        by_norm = options.gradient_clip_algorithm == "norm"
        self._max_norm = options.gradient_clip_val if by_norm else None
        self._clip_value = None if by_norm else options.gradient_clip_val
        if self._max_norm is None and (scaler is not None or options.nonfinite == "skip"):
            self._max_norm = math.inf  # measured, not clipped
        self._check = scaler is not None or options.nonfinite != "ignore"
        kind = self._norm_kind()
        self._native = NativeTail(optimizer, params, norm_type=kind or 2.0, bump_versions=graphs)
        self._each = torch.empty(len(params)) if kind else None
        self._names: tuple[str, ...] = ()
        # The kernel refuses what it measures: where the loss alone decides, it is asked here.
        self._asks_loss = kind is not None and self._max_norm is None and self._check
        self._check = self._check and not self._asks_loss

    def _norm_kind(self) -> float | None:
        """The norm that is wanted of each gradient, where the kernel's one pass can measure it; it measures in float32."""
        kind = None if self._norms is None else self._norms.type
        fits = kind == 2.0 or (kind == math.inf and self._max_norm in (None, math.inf))
        return kind if fits and all(p.dtype is not torch.float64 for p in self._params) else None

    def step(self, grads: Sequence[Tensor | None], rescale: float, loss: Tensor | None) -> bool:
        scaler = self._scaler
        refused = self._asks_loss and loss is not None and not math.isfinite(loss.item())
        if self._norms is not None and (self._each is None or refused):
            self._norms(self._params, grads, rescale if scaler is None else rescale / scaler.value)
        if refused:
            return False
        skipped = self._native.step(
            grads, max_norm=self._max_norm, clip_value=self._clip_value,
            grad_scale=rescale if scaler is None else rescale / scaler.value,
            # The loss scale goes by the gradients alone, as torch's does.
            loss=loss if scaler is None else None, check=self._check, norms_out=self._each,
        )  # fmt: skip
        if self._each is not None and (scaler is None or not skipped):
            self._tell_norms(grads)
        if scaler is not None:
            scaler.update(found_inf=bool(skipped))
        return not skipped

    def refresh(self) -> None:
        if self._native.stale():
            self._native.refresh()

    def _tell_norms(self, grads: Sequence[Tensor | None]) -> None:
        assert self._norms is not None
        assert self._each is not None
        norms, total = self._each.clone().unbind(), self._native.grad_norm.clone()
        if any(g is None for g in grads):
            there = [i for i, g in enumerate(grads) if g is not None]
            if there:
                self._norms.measured(self._norms.names([self._params[i] for i in there]), [norms[i] for i in there], total)
            return
        self._names = self._names or self._norms.names(self._params)
        self._norms.measured(self._names, norms, total)


def clip_gradients(optimizer: Any, value: float | None, algorithm: str | None) -> None:
    """Clip ``p.grad`` of an optimizer's parameters by "norm" (default) or "value"; 0 or None clips nothing."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if value and algorithm == "value":
        torch.nn.utils.clip_grad_value_(params, value)
    elif value:
        torch.nn.utils.clip_grad_norm_(params, value)


class StockTail:
    """Torch's own unscale, clip and ``optimizer.step``, as a plain loop would write them."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter], options: Options, scaler: LossScale | None,
        norms: GradientNorms | None = None,
    ) -> None:  # fmt: skip
        self._optimizer, self._params, self._options, self._scaler, self._norms = optimizer, list(params), options, scaler, norms
        self.before_step: Callable[[], None] | None = None  # hooks between unscale and clip
        self.clip: Callable[[], None] | None = None  # configure_gradient_clipping, when overridden

    def step(self, grads: Sequence[Tensor | None] | None, rescale: float, loss: Tensor | None) -> bool:
        """``grads`` None: autograd has filled ``p.grad``. Host reads: the finite test, where one is asked for."""
        if grads is not None:
            for p, g in zip(self._params, apart(grads), strict=True):
                p.grad = g
        if not self.prepare(rescale, loss):
            return False
        self._optimizer.step()
        if grads is not None:
            self._optimizer.zero_grad(set_to_none=True)
        return True

    def prepare(self, rescale: float, loss: Tensor | None) -> bool:
        """Everything of a step but the update itself; False when the step must be skipped."""
        scaler, options = self._scaler, self._options
        params = [p for group in self._optimizer.param_groups for p in group["params"]]  # anew: layers may be unfrozen
        present = [p.grad for p in params if p.grad is not None]
        if scaler is not None and scaler.lent:  # kernels had it before
            scaler.read()
        factor = rescale if scaler is None else rescale / scaler.value
        if factor != 1.0 and present:
            torch._foreach_mul_(present, factor)
        if scaler is not None:
            finite = not present or math.isfinite(float(torch.nn.utils.get_total_norm(present)))
            scaler.update(found_inf=not finite)
            if not finite:
                return False
        if self._norms is not None:
            self._norms(params, [p.grad for p in params])
        if self.before_step is not None:
            self.before_step()
        if options.nonfinite != "ignore" and scaler is None and loss is not None and not math.isfinite(loss.item()):
            return False
        if self.clip is not None:
            self.clip()
        elif options.gradient_clip_val is not None and options.gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(params, options.gradient_clip_val)
        elif options.gradient_clip_val is not None:
            norm = torch.nn.utils.clip_grad_norm_(params, options.gradient_clip_val)
            return options.nonfinite == "ignore" or bool(torch.isfinite(norm))
        if options.nonfinite == "skip" and scaler is None and present:
            return bool(torch.isfinite(torch.nn.utils.get_total_norm(present)))
        return True

    def refresh(self) -> None:
        pass


def apart(grads: Sequence[Tensor | None]) -> Iterator[Tensor | None]:
    """Gradients that may be written in place: a graph gives equal ones back as one tensor, and constant ones expanded."""
    seen: set[int] = set()
    for g in grads:
        if g is not None and g.numel() and g.layout is torch.strided:
            if g.data_ptr() in seen or 0 in g.stride():
                g = g.clone(memory_format=torch.contiguous_format)
            seen.add(g.data_ptr())
        yield g


def make_tail(
    optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter], options: Options, scaler: LossScale | None,
    norms: GradientNorms | None = None, pending: Pending | None = None,
) -> Tail:  # fmt: skip
    """The fastest tail that is right for this optimizer; ``tail_obstacle`` says why it is not the fused one.

    ``pending``: who is told later what a device decides; None where the caller must know at once.
    """
    if tail_obstacle(optimizer, params) is None:
        return FusedTail(optimizer, params, options, scaler, norms)
    if pending is not None and params and DeviceTail.obstacle(optimizer, params) is None:
        return DeviceTail(optimizer, params, options, scaler, norms, pending)
    if params and params[0].is_cpu:
        library.load()  # says once that there is none
    return StockTail(optimizer, params, options, scaler, norms)


def tail_obstacle(optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter]) -> str | None:
    """Why the fused tail cannot be had for this optimizer, or None."""
    if not params or any(p.device.type != "cpu" for p in params):
        return "the fused native tail runs on the CPU"
    return NativeTail.obstacle(optimizer)
