"""The two kernels for people with a loop of their own: the gradient norm, and clip and step in one call."""

from __future__ import annotations

import math
from collections.abc import Iterable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from fasttrain.errors import KernelError, reject
from fasttrain.kernels import library, native_lists
from fasttrain.kernels.native_tail import NativeTail

_tails: WeakKeyDictionary[Optimizer, NativeTail] = WeakKeyDictionary()


@torch.no_grad()
def grad_norm(tensors: Iterable[Tensor], norm_type: float = 2.0) -> Tensor:
    """The norm of all tensors together, as `torch.nn.utils.get_total_norm` gives it: a 0-d tensor.

    Native for dense CPU tensors and norms 2.0 and inf, where the result is float32 and has the same bits for any number
    of threads. Anything else goes to torch.

        norm = grad_norm([p.grad for p in model.parameters()])
    """
    listed = list(tensors)
    native = norm_type in (2.0, math.inf) and all(t.is_cpu and t.layout == torch.strided for t in listed)
    if native and listed and all(t.dtype in library.DTYPES for t in listed) and library.load() is not None:
        return torch.tensor(native_lists.norm(listed, norm_type), dtype=torch.float32)
    return torch.nn.utils.get_total_norm(listed, norm_type)


@torch.no_grad()
def clip_and_step_(
    optimizer: Optimizer, *, max_norm: float | None = None, grad_scale: float | None = None, zero_grad: bool = False
) -> Tensor:
    """One optimizer step from `p.grad`, clipped to `max_norm`; gives back the norm before clipping, a 0-d tensor.

    Stands for `clip_grad_norm_(params, max_norm); optimizer.step()`, with gradients multiplied by `grad_scale` first
    (one over a loss scale). A step whose norm is inf or NaN writes nothing, neither parameters nor optimizer state.
    `zero_grad` sets every `p.grad` to None afterwards. What is left in `p.grad` otherwise is not specified.

    torch's SGD, Adam and AdamW on the CPU run as one native call; any other optimizer, and any on another device, as
    plain torch, reading the norm on the host. Raises KernelError for a `max_norm` that is negative or NaN.

        loss.backward()
        norm = clip_and_step_(optimizer, max_norm=1.0, zero_grad=True)
    """
    if max_norm is not None and not max_norm >= 0:
        raise KernelError(reject("max_norm", max_norm, "a number >= 0 or None", "Use None not to clip."))
    params = [param for group in optimizer.param_groups for param in group["params"]]
    scale = 1.0 if grad_scale is None else float(grad_scale)
    tail = _tail_of(optimizer, params)
    if tail is not None:
        tail.step([param.grad for param in params], max_norm=math.inf if max_norm is None else max_norm, grad_scale=scale, check=True)
        norm = tail.grad_norm.clone()
    else:
        norm = _plain(optimizer, [param.grad for param in params if param.grad is not None], max_norm, scale)
    if zero_grad:
        for param in params:
            param.grad = None
    return norm


def _tail_of(optimizer: Optimizer, params: list[Tensor]) -> NativeTail | None:
    """The optimizer's tail, made at its first step and made anew when anything moved."""
    tail = _tails.get(optimizer)
    if tail is not None and library.available() and not tail.moved(params):
        return tail
    _tails.pop(optimizer, None)
    library.load()  # says once that there is none
    if NativeTail.obstacle(optimizer) is not None:
        return None
    return _tails.setdefault(optimizer, NativeTail(optimizer, params, bump_versions=True))


def _plain(optimizer: Optimizer, grads: list[Tensor], max_norm: float | None, scale: float) -> Tensor:
    if scale != 1.0:
        torch._foreach_mul_(grads, scale)
    norm = grad_norm(grads)
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(_holders(optimizer), max_norm, norm)
    if bool(torch.isfinite(norm)):  # host read
        optimizer.step()
    return norm


def _holders(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]
