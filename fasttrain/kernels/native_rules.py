"""What the native update knows of torch's optimizers: which it can stand for, their state, their hyperparameters.

State is exactly what torch.optim would have made (torch 2.13, `SGD._init_group` and `Adam._init_group`), so that
`optimizer.state_dict()` loads into the stock fused, foreach and for-loop updates, and theirs here, in mid-training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer
from torch.optim import optimizer as torch_optimizer

from fasttrain.errors import KernelError, reject
from fasttrain.kernels import library
from fasttrain.kernels.layout import in_order_of, overlapping, unfit
from fasttrain.kernels.library import ADAM, AMSGRAD, DECOUPLED, DTYPES, MAXIMIZE, NESTEROV


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One family of updates: its native number, and how its hyperparameters but lr are read and written."""

    code: int
    read: Callable[[Mapping[str, Any]], tuple[Any, ...]]
    write: Callable[[library.Group, Mapping[str, Any]], None]
    slots: Callable[[Mapping[str, Any]], tuple[str, ...]]  # the state a step of this group needs, in native order


def _write_sgd(native: library.Group, group: Mapping[str, Any]) -> None:
    native.momentum, native.dampening = group["momentum"], group["dampening"]
    native.weight_decay = group["weight_decay"]
    native.flags = NESTEROV * bool(group["nesterov"]) | MAXIMIZE * bool(group["maximize"])


def _write_adam(native: library.Group, group: Mapping[str, Any]) -> None:
    native.beta1, native.beta2 = group["betas"]
    native.eps, native.weight_decay = group["eps"], group["weight_decay"]
    flags = AMSGRAD * bool(group["amsgrad"]) | MAXIMIZE * bool(group["maximize"])
    native.flags = flags | DECOUPLED * bool(group["decoupled_weight_decay"])


_SGD = Rule(
    code=library.SGD,
    read=itemgetter("momentum", "weight_decay", "dampening", "nesterov", "maximize"),
    write=_write_sgd,
    slots=lambda group: ("momentum_buffer",) if group["momentum"] != 0 else (),
)
_ADAM = Rule(
    code=library.ADAM,
    read=itemgetter("betas", "eps", "weight_decay", "amsgrad", "maximize"),
    write=_write_adam,
    slots=lambda group: ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq"),
)


def rule_of(optimizer: Optimizer) -> Rule | None:
    """The rule of a torch SGD, Adam or AdamW, or of a subclass that leaves their step alone."""
    for base, rule in ((SGD, _SGD), (Adam, _ADAM)):
        if isinstance(optimizer, base):
            return rule if all(_is_torchs_own(type(optimizer), name) for name in ("step", "_init_group")) else None
    return None


def _is_torchs_own(cls: type, name: str) -> bool:
    """Where is ``name`` defined? Function identity does not tell: torch wraps ``step`` class by class as it goes."""
    owner = next(c for c in cls.__mro__ if name in vars(c))
    return owner.__module__.startswith("torch.optim.")


def obstacle(optimizer: Optimizer) -> str | None:
    """Why this optimizer cannot be updated natively, in one sentence; None when it can."""
    if (reason := library.obstacle()) is not None:
        return reason
    name = type(optimizer).__name__
    rule = rule_of(optimizer)
    if rule is None:
        return f"{name} is not torch.optim.SGD, Adam or AdamW, or it overrides their step"
    replaced = vars(optimizer).get("step")
    if replaced is not None and not hasattr(replaced, "_wrapped_by_lr_sched"):
        return f"the step of this {name} was replaced on the object"
    if (
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
    ):
        return f"{name} has step hooks, which a native update would not call"
    groups = enumerate(optimizer.param_groups)
    reasons = (reason for i, group in groups if (reason := _group_obstacle(optimizer, rule, i, group)))
    return next(reasons, None) or _memory_obstacle(optimizer)


def _group_obstacle(optimizer: Optimizer, rule: Rule, index: int, group: Mapping[str, Any]) -> str | None:
    where = f"parameter group {index}"
    for option in ("differentiable", "capturable"):
        if group.get(option):
            return f"{where} has {option}=True"
    lr = group["lr"]
    if isinstance(lr, Tensor) and (lr.device.type != "cpu" or lr.dtype not in DTYPES or lr.numel() != 1):
        return f"{where} has a learning rate of dtype {lr.dtype} on {lr.device}"
    for value in rule.read(group):
        if any(isinstance(part, Tensor) for part in (value if isinstance(value, tuple) else (value,))):
            return f"{where} has a tensor among its hyperparameters"
    for i, param in enumerate(group["params"]):
        if (reason := unfit(param)) is not None:
            return f"parameter {i} of group {index} {reason}"
        if (reason := _state_obstacle(optimizer.state.get(param) or {}, rule, group, param)) is not None:
            return f"parameter {i} of group {index} {reason}"
    return None


def _state_obstacle(state: Mapping[str, Any], rule: Rule, group: Mapping[str, Any], param: Tensor) -> str | None:
    if is_missing(state, rule, group):
        return None
    for name in rule.slots(group):
        slot = state.get(name)
        if not isinstance(slot, Tensor) or slot.device.type != "cpu" or slot.layout != torch.strided:
            return f"has no {name} on the CPU in its optimizer state"
        if slot.dtype != param.dtype or slot.shape != param.shape:
            return f"has a {name} of dtype {slot.dtype} and shape {tuple(slot.shape)}"
    if rule.code != ADAM:
        return None
    step = state.get("step")
    if not isinstance(step, Tensor) or step.device.type != "cpu" or step.numel() != 1:
        return "has a step count that is not a 0-d CPU tensor"
    return None if step.dtype in (torch.float32, torch.float64) else f"has a step count of dtype {step.dtype}"


def _memory_obstacle(optimizer: Optimizer) -> str | None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    shared = overlapping(params)
    return None if shared is None else f"parameters {shared[0]} and {shared[1]} of the optimizer share memory"


def is_missing(state: Mapping[str, Any], rule: Rule, group: Mapping[str, Any]) -> bool:
    """Whether torch would make this parameter's state at its next step."""
    if rule.code == ADAM:
        return not state
    return bool(rule.slots(group)) and state.get("momentum_buffer") is None


def make_state(rule: Rule, group: Mapping[str, Any], param: Tensor) -> dict[str, Tensor]:
    """What torch would put into `optimizer.state[param]`; SGD's buffer is left for the first step to fill."""
    if rule.code != ADAM:
        return {"momentum_buffer": torch.empty_like(param, memory_format=torch.preserve_format, requires_grad=False)}
    wide = torch.get_default_dtype() == torch.float64 and not group["fused"]
    step = torch.zeros((), dtype=torch.float64 if wide else torch.float32)
    zeros = {name: torch.zeros_like(param, memory_format=torch.preserve_format) for name in rule.slots(group)}
    return {"step": step, **{name: slot.detach() for name, slot in zeros.items()}}


def write_row(row: library.Row, state: dict[str, Any], rule: Rule, group: Mapping[str, Any], param: Tensor) -> list[Tensor]:
    """Fills the row's state addresses, gives back the tensors behind them; a slot in another order is laid out anew."""
    kept = []
    for i, name in enumerate(rule.slots(group)):
        state[name] = in_order_of(state[name], param)
        row.slot[i] = state[name].data_ptr()
        kept.append(state[name])
    if rule.code == ADAM:
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
