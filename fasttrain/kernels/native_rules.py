"""How the native update takes an optimizer: what it must refuse, and how groups, rows and learning rates are written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fasttrain.errors import KernelError, reject
from fasttrain.kernels import library, rules
from fasttrain.kernels.layout import in_order_of, unfit
from fasttrain.kernels.library import AMSGRAD, DECOUPLED, DTYPES, MAXIMIZE, NESTEROV
from fasttrain.kernels.rules import ADAM_RULE, Rule


def obstacle(optimizer: Optimizer) -> str | None:
    """Why this optimizer cannot be updated natively, in one sentence; None when it can."""
    if (reason := library.obstacle()) is not None:
        return reason
    return rules.obstacle(optimizer, unfit, _lr_fits, _unfit_state, capturable=False)


def _lr_fits(lr: Tensor) -> bool:
    return lr.device.type == "cpu" and lr.dtype in DTYPES and lr.numel() == 1


def _unfit_state(rule: Rule, group: Mapping[str, Any], state: Mapping[str, Any], param: Tensor) -> str | None:
    for name in rule.slots(group):
        slot = state.get(name)
        if not isinstance(slot, Tensor) or slot.device.type != "cpu" or slot.layout != torch.strided:
            return f"has no {name} on the CPU in its optimizer state"
        if slot.dtype != param.dtype or slot.shape != param.shape:
            return f"has a {name} of dtype {slot.dtype} and shape {tuple(slot.shape)}"
    if rule.code != ADAM_RULE:
        return None
    step = state.get("step")
    if not isinstance(step, Tensor) or step.device.type != "cpu" or step.numel() != 1:
        return "has a step count that is not a 0-d CPU tensor"
    return None if step.dtype in (torch.float32, torch.float64) else f"has a step count of dtype {step.dtype}"


def write_group(native: library.Group, rule: Rule, group: Mapping[str, Any]) -> None:
    """Every hyperparameter, lr too."""
    hyper = rule.hyper(group)
    native.beta1, native.beta2, native.eps = hyper.beta1, hyper.beta2, hyper.eps
    native.weight_decay, native.momentum, native.dampening = hyper.weight_decay, hyper.momentum, hyper.dampening
    flags = NESTEROV * hyper.nesterov | AMSGRAD * hyper.amsgrad | MAXIMIZE * hyper.maximize
    native.flags = flags | DECOUPLED * hyper.decoupled
    write_lr(native, group["lr"])


def write_row(row: library.Row, state: dict[str, Any], rule: Rule, group: Mapping[str, Any], param: Tensor) -> list[Tensor]:
    """Fills the row's state addresses, gives back the tensors behind them; a slot in another order is laid out anew."""
    kept = []
    for i, name in enumerate(rule.slots(group)):
        state[name] = in_order_of(state[name], param)
        row.slot[i] = state[name].data_ptr()
        kept.append(state[name])
    if rule.code == ADAM_RULE:
        row.step, row.step_is_double = state["step"].data_ptr(), state["step"].dtype == torch.float64
        kept.append(state["step"])
    return kept


def write_lr(native: library.Group, lr: float | Tensor) -> None:
    """A number, or the address of a 0-d CPU tensor that every step reads anew."""
    if isinstance(lr, Tensor):
        if lr.device.type != "cpu" or lr.dtype not in DTYPES:
            got = f"a tensor of {lr.dtype} on {lr.device}"
            raise KernelError(reject("lr", got, "a number or a CPU tensor", "Move it there."))
        native.lr_address, native.lr_dtype = lr.data_ptr(), DTYPES[lr.dtype]
    else:
        native.lr, native.lr_address = lr, 0
