"""One step of any optimizer on the best road there is: a native tail, a Triton tail, or plain torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from fasttrain.errors import KernelError, reject
from fasttrain.kernels import library, native_lists
from fasttrain.kernels.native_tail import NativeTail
from fasttrain.kernels.triton_tail import TritonTail

_tails: WeakKeyDictionary[Optimizer, NativeTail | TritonTail] = WeakKeyDictionary()


def params_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters, in the order of the groups."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def norm_of(listed: Sequence[Tensor], norm_type: float) -> Tensor:
    """The norm of all tensors together: native where it can be, torch's else."""
    native = norm_type in (2.0, math.inf) and all(t.is_cpu and t.layout == torch.strided for t in listed)
    if native and listed and all(t.dtype in library.DTYPES for t in listed) and library.load() is not None:
        return torch.tensor(native_lists.norm(listed, norm_type), dtype=torch.float32)
    return torch.nn.utils.get_total_norm(listed, norm_type)


def step(
    optimizer: Optimizer, params: list[Tensor], grads: Sequence[Tensor | None], max_norm: float | None, scale: float, *, own_grads: bool
) -> Tensor:
    """The step of `clip_and_step_` from these gradients, which plain torch writes in place only where they are `own_grads`."""
    if max_norm is not None and not max_norm >= 0:
        raise KernelError(reject("max_norm", max_norm, "a number >= 0 or None", "Use None not to clip."))
    tail = _tail_of(optimizer, params)
    if tail is None:
        return _plain(optimizer, params, grads, max_norm, scale, own_grads=own_grads)
    tail.step(grads, max_norm=math.inf if max_norm is None else max_norm, grad_scale=scale, check=True)
    return tail.grad_norm.clone()


def _tail_of(optimizer: Optimizer, params: list[Tensor]) -> NativeTail | TritonTail | None:
    """The optimizer's tail, made at its first step and made anew when anything moved."""
    tail = _tails.get(optimizer)
    if tail is not None and (isinstance(tail, TritonTail) or library.available()) and not tail.moved(params):
        return tail
    _tails.pop(optimizer, None)
    if params and params[0].is_cuda:
        return None if TritonTail.obstacle(optimizer) else _tails.setdefault(optimizer, TritonTail(optimizer, params, bump_versions=True))
    library.load()  # says once that there is none
    return None if NativeTail.obstacle(optimizer) else _tails.setdefault(optimizer, NativeTail(optimizer, params, bump_versions=True))


def _plain(
    optimizer: Optimizer, params: list[Tensor], grads: Sequence[Tensor | None], max_norm: float | None, scale: float, *, own_grads: bool
) -> Tensor:
    for i, grad in enumerate(grads):
        if grad is None:
            continue
        if grad.layout != torch.strided or not grad.is_floating_point() or grad.device != params[0].device:
            got = f"{grad.dtype} of layout {grad.layout} on {grad.device}"
            wanted = f"a dense tensor of floats on {params[0].device}"
            raise KernelError(reject(f"the gradient of parameter {i}", got, wanted, "Nothing was written."))
    if not own_grads:
        for param, grad in zip(params, grads, strict=True):
            param.grad = None if grad is None else grad.clone()
    present = [param.grad for param in params if param.grad is not None]
    if scale != 1.0:
        torch._foreach_mul_(present, scale)
    norm = norm_of(present, 2.0)
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm)
    if bool(torch.isfinite(norm)):  # host read
        optimizer.step()
    if not own_grads:
        for param in params:
            param.grad = None
    return norm
