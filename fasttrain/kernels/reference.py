"""The truth beside every kernel: norm, clip and update of lists of tensors in plain torch, on any device.

Half-precision tensors are widened to float32 for the arithmetic of one step and rounded once when stored, as the fused
updates of torch do. Every function with a trailing `_` writes its first arguments and the state it is given in place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def grad_norm(grads: Sequence[Tensor], norm_type: float = 2.0) -> Tensor:
    """The norm of all gradients together: 0-d float32, accumulated in float64. `norm_type` is 2.0 or inf."""
    if not grads:
        return torch.zeros(())
    flat = [grad.detach().double().flatten() for grad in grads if grad.numel()]
    if not flat:
        return torch.zeros((), device=grads[0].device)
    norms = torch.stack([torch.linalg.vector_norm(grad, norm_type) for grad in flat])
    total: Tensor = torch.linalg.vector_norm(norms, norm_type)
    return total.float()


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What multiplies every gradient: `max_norm / (norm + 1e-6)`, at most 1 (torch.nn.utils.clip_grad_norm_)."""
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)


def is_bad(norm: Tensor, loss: Tensor | None = None) -> Tensor:
    """0-d bool: the norm or the loss is inf or NaN, so the step must write nothing."""
    bad = ~torch.isfinite(norm)
    return bad if loss is None else bad.logical_or(~torch.isfinite(loss.detach()).reshape(()))


def scaled(grad: Tensor, factor: Tensor | float, clip_value: float = math.inf, maximize: bool = False) -> Tensor:
    """The widened gradient an update sees: times `factor` (unscale and clip), clamped to +-clip_value, signed."""
    wide: Tensor = torch.clamp(_wide(grad.detach()) * factor, -clip_value, clip_value)
    return -wide if maximize else wide


@torch.no_grad()
def sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: list[Tensor | None],
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> None:
    """torch.optim.SGD. A buffer that is None is made from the gradient, undamped, and put into `buffers`."""
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        wide = _wide(param)
        step = _wide(grad) + weight_decay * wide
        if momentum != 0:
            buffer = buffers[i]
            moment = step if buffer is None else momentum * _wide(buffer) + (1 - dampening) * step
            buffers[i] = moment.to(param.dtype) if buffer is None else buffer.copy_(moment)
            step = step + momentum * moment if nesterov else moment
        param.copy_(wide - lr * step)


@torch.no_grad()
def adam_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
) -> None:
    """torch.optim.Adam, or AdamW when `decoupled`; amsgrad when `max_exp_avg_sqs` is not empty."""
    beta1, beta2 = betas
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        steps[i].add_(1)
        count = float(steps[i])
        wide, g = _wide(param), _wide(grad)
        if decoupled:
            wide = wide * (1 - lr * weight_decay)
        else:
            g = g + weight_decay * wide
        first = torch.lerp(_wide(exp_avgs[i]), g, 1 - beta1)
        second = beta2 * _wide(exp_avg_sqs[i]) + (1 - beta2) * g * g
        exp_avgs[i].copy_(first)
        exp_avg_sqs[i].copy_(second)
        if max_exp_avg_sqs:
            second = torch.maximum(_wide(max_exp_avg_sqs[i]), second)
            max_exp_avg_sqs[i].copy_(second)
        root = second.sqrt() / math.sqrt(1 - beta2**count) + eps
        param.copy_(wide - lr / (1 - beta1**count) * first / root)


@torch.no_grad()
def lion_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
) -> None:
    """Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2): the sign of an interpolated momentum, decoupled decay."""
    beta1, beta2 = betas
    for param, grad, exp_avg in zip(params, grads, exp_avgs, strict=True):
        wide, g, moment = _wide(param), _wide(grad), _wide(exp_avg)
        direction = (beta1 * moment + (1 - beta1) * g).sign()
        param.copy_(wide * (1 - lr * weight_decay) - lr * direction)
        exp_avg.copy_(beta2 * moment + (1 - beta2) * g)


@torch.no_grad()
def add_(totals: Sequence[Tensor], terms: Sequence[Tensor], scale: float = 1.0) -> None:
    """totals[i] += scale * terms[i], added in float32 where a tensor is narrower."""
    for total, term in zip(totals, terms, strict=True):
        total.copy_(_wide(total) + scale * _wide(term))
