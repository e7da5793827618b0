"""What the Triton tail must refuse, and how a parameter group is written into the table that the kernels read."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fasttrain.errors import KernelError, reject
from fasttrain.kernels import rules
from fasttrain.kernels.layout import is_dense
from fasttrain.kernels.rules import ADAM_RULE, SGD_RULE, Rule
from fasttrain.kernels.triton_plan import ADAM, AMSGRAD, FLOATS, LION, NESTEROV, SGD, SGD_MOMENTUM

KNOBS, HYPER = 8, 12  # as in triton_kernels: numbers of a call, numbers of a group


def obstacle(optimizer: Optimizer) -> str | None:
    """Why this optimizer cannot be updated by the Triton kernels, in one sentence; None when it can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if not params:
        return "the optimizer has no parameters"
    if (reason := rules.obstacle(optimizer, _unfit, _lr_fits, _unfit_state, capturable=True)) is not None:
        return reason
    other = next((i for i, param in enumerate(params) if param.device != params[0].device), None)
    return None if other is None else f"parameter 0 is on {params[0].device} and parameter {other} on {params[other].device}"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _unfit(param: Tensor) -> str | None:
    if type(param) not in (Tensor, nn.Parameter):
        return f"is a {type(param).__name__}"
    if param.layout != torch.strided:
        return f"has layout {param.layout}"
    if param.device.type != "cuda" and not (param.is_cpu and _interpreted()):
        return f"is on {param.device}"
    if param.dtype not in FLOATS:
        return f"has dtype {param.dtype}"
    if not is_dense(param):
        return f"is a view with gaps (shape {tuple(param.shape)}, strides {param.stride()})"
    return None


def _lr_fits(lr: Tensor) -> bool:
    return lr.is_floating_point() and lr.numel() == 1


def _unfit_state(rule: Rule, group: Mapping[str, Any], state: Mapping[str, Any], param: Tensor) -> str | None:
    dtypes = set()
    for name in rule.slots(group):
        slot = state.get(name)
        if not isinstance(slot, Tensor) or slot.device != param.device or slot.layout != torch.strided:
            return f"has no {name} on {param.device} in its optimizer state"
        if slot.dtype not in FLOATS or slot.shape != param.shape:
            return f"has a {name} of dtype {slot.dtype} and shape {tuple(slot.shape)}"
        dtypes.add(slot.dtype)
    if len(dtypes) > 1:
        return "has optimizer state of several dtypes"
    step = state.get("step")
    if rule.code == ADAM_RULE and (not isinstance(step, Tensor) or step.numel() != 1):
        return "has a step count that is not a 0-d tensor"
    return None


def mode_of(rule: Rule, group: Mapping[str, Any]) -> int:
    """Which of the kernels' updates a group needs."""
    hyper = rule.hyper(group)
    if rule.code == SGD_RULE:
        return SGD if hyper.momentum == 0 else NESTEROV if hyper.nesterov else SGD_MOMENTUM
    return LION if rule.code != ADAM_RULE else AMSGRAD if hyper.amsgrad else ADAM


def hyper_row(rule: Rule, group: Mapping[str, Any]) -> list[float]:
    """What `judge` reads of one group; a learning rate on the device is put in its place by every step."""
    hyper, lr = rule.hyper(group), group["lr"]
    rate = math.nan if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr)
    logs = [math.log(beta) if beta > 0 else -math.inf for beta in (hyper.beta1, hyper.beta2)]
    numbers = [rate, hyper.beta1, hyper.beta2, hyper.eps, hyper.weight_decay, hyper.momentum, hyper.dampening, *logs]
    return [*numbers, float(hyper.decoupled), -1.0 if hyper.maximize else 1.0, 0.0]


def refusal(optimizer: Optimizer) -> str:
    """The message of the error that refuses this optimizer."""
    return reject("optimizer", type(optimizer).__name__, "one with a Triton update", f"{obstacle(optimizer)}.")


def check_grad(i: int, grad: Tensor, param: Tensor) -> None:
    """Refuses a gradient that does not fit its parameter, before anything is written."""
    fits = grad.layout == torch.strided and grad.shape == param.shape and grad.dtype in FLOATS and grad.device == param.device
    if not fits:
        wanted = f"float32, bfloat16 or float16 {tuple(param.shape)} on {param.device}"
        raise KernelError(reject(f"the gradient of parameter {i}", _describe(grad), wanted, "Nothing was written."))


def check_call(
    device: torch.device, count: int, max_norm: float | None, clip_value: float | None, grad_scale: float | Tensor,
    loss: Tensor | None, norms_out: Tensor | None,
) -> None:  # fmt: skip
    """Refuses limits that are none, and scalars and results that a kernel on `device` cannot reach."""
    for name, value in (("max_norm", max_norm), ("clip_value", clip_value)):
        if value is not None and not value >= 0:
            raise KernelError(reject(name, value, "a number >= 0 or None", "Use None not to clip."))
    if max_norm is not None and max_norm != math.inf and clip_value is not None:
        raise KernelError(reject("max_norm and clip_value", "both", "one of them", "Leave the other None."))
    for name, cell in (("loss", loss), ("grad_scale", grad_scale)):
        if isinstance(cell, Tensor) and (cell.dtype not in FLOATS or cell.device != device or cell.numel() != 1):
            raise KernelError(reject(name, _describe(cell), f"one float on {device}", "Give its 0-d value."))
    if norms_out is not None:
        fits = norms_out.dtype == torch.float32 and norms_out.numel() == count and norms_out.is_contiguous()
        if not fits or norms_out.device != device:
            wanted = f"torch.float32 ({count},) on {device}, contiguous"
            raise KernelError(reject("norms_out", _describe(norms_out), wanted, "Nothing was written."))


def _describe(tensor: Tensor) -> str:
    layout = "" if tensor.layout == torch.strided else f" {tensor.layout}"
    return f"{tensor.dtype}{layout} {tuple(tensor.shape)} on {tensor.device}"
