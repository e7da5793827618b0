"""The two kernels for people with a loop of their own: the gradient norm, and clip and step in one call."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from fasttrain.kernels import steps


@torch.no_grad()
def grad_norm(tensors: Iterable[Tensor], norm_type: float = 2.0) -> Tensor:
    """The norm of all tensors together, as `torch.nn.utils.get_total_norm` gives it: a 0-d tensor.

    Native for dense CPU tensors and norms 2.0 and inf, where the result is float32 and has the same bits for any number
    of threads. Anything else goes to torch. In `torch.compile(fullgraph=True)` it is one opaque operation.

        norm = grad_norm([p.grad for p in model.parameters()])
    """
    listed = list(tensors)
    if torch.compiler.is_compiling():
        from fasttrain.kernels import graph_ops

        traced: Tensor = graph_ops.OPS.grad_norm(listed, norm_type)
        return traced
    return steps.norm_of(listed, norm_type)


@torch.no_grad()
def clip_and_step_(
    optimizer: Optimizer, *, max_norm: float | None = None, grad_scale: float | None = None, zero_grad: bool = False
) -> Tensor:
    """One optimizer step from `p.grad`, clipped to `max_norm`; gives back the norm before clipping, a 0-d tensor.

    Stands for `clip_grad_norm_(params, max_norm); optimizer.step()`, with gradients multiplied by `grad_scale` first
    (one over a loss scale). A step whose norm is inf or NaN writes nothing, neither parameters nor optimizer state.
    `zero_grad` sets every `p.grad` to None afterwards. What is left in `p.grad` otherwise is not specified.

    torch's SGD, Adam and AdamW, and a Lion, run as one native call on the CPU and as three Triton launches on a GPU, where
    nothing is read on the host; any other optimizer as plain torch, reading the norm on the host. Inside
    `torch.compile(fullgraph=True)` the step is one opaque operation. Raises KernelError for a `max_norm` that is negative or
    NaN, and for gradients that do not fit.

        loss.backward()
        norm = clip_and_step_(optimizer, max_norm=1.0, zero_grad=True)
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    grads = [param.grad for param in params]
    scale = 1.0 if grad_scale is None else float(grad_scale)
    if torch.compiler.is_compiling():
        from fasttrain.kernels import graph_ops

        norm: Tensor = graph_ops.OPS.clip_and_step_(id(optimizer), params, grads, max_norm, scale)
    else:
        norm = steps.step(optimizer, params, grads, max_norm, scale, own_grads=True)
    if zero_grad:
        for param in params:
            param.grad = None
    return norm
