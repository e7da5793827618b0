"""What a fused update knows of optimizers: which it can stand for, their hyperparameters, the state they would make.

State is exactly what torch.optim would have made (torch 2.13, `SGD._init_group` and `Adam._init_group`; Lion's is that of
lion-pytorch 0.2), so that `optimizer.state_dict()` loads into the stock updates, and theirs here, in mid-training.
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

from fasttrain.kernels.layout import overlapping

SGD_RULE, ADAM_RULE, LION_RULE = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class Hyper:
    """The hyperparameters of one parameter group but lr; what its rule does not know stays at its default."""

    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0
    weight_decay: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    amsgrad: bool = False
    maximize: bool = False
    decoupled: bool = False


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One family of updates: its number, and how its hyperparameters but lr are read."""

    code: int
    read: Callable[[Mapping[str, Any]], tuple[Any, ...]]  # compared at every step, so that a change is seen
    hyper: Callable[[Mapping[str, Any]], Hyper]
    slots: Callable[[Mapping[str, Any]], tuple[str, ...]]  # the state a step of this group needs, in the kernels' order


def _hyper_of_sgd(group: Mapping[str, Any]) -> Hyper:
    return Hyper(
        momentum=group["momentum"],
        dampening=group["dampening"],
        weight_decay=group["weight_decay"],
        nesterov=bool(group["nesterov"]),
        maximize=bool(group["maximize"]),
    )


def _hyper_of_adam(group: Mapping[str, Any]) -> Hyper:
    return Hyper(
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        amsgrad=bool(group["amsgrad"]),
        maximize=bool(group["maximize"]),
        decoupled=bool(group["decoupled_weight_decay"]),
    )


def _hyper_of_lion(group: Mapping[str, Any]) -> Hyper:
    beta1, beta2 = group["betas"]
    maximize = bool(group.get("maximize", False))
    return Hyper(beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], maximize=maximize, decoupled=True)


_SGD = Rule(
    code=SGD_RULE,
    read=itemgetter("momentum", "weight_decay", "dampening", "nesterov", "maximize"),
    hyper=_hyper_of_sgd,
    slots=lambda group: ("momentum_buffer",) if group["momentum"] != 0 else (),
)
_ADAM = Rule(
    code=ADAM_RULE,
    read=itemgetter("betas", "eps", "weight_decay", "amsgrad", "maximize"),
    hyper=_hyper_of_adam,
    slots=lambda group: ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq"),
)
_LION = Rule(
    code=LION_RULE,
    read=lambda group: (group["betas"], group["weight_decay"], group.get("maximize", False)),
    hyper=_hyper_of_lion,
    slots=lambda group: ("exp_avg",),
)
# What a Lion's group may hold: torch's own bookkeeping, and options that change nothing of the rule where they are off.
_LION_KEYS = {"params", "lr", "betas", "weight_decay", "maximize", "param_names", "initial_lr", "max_lr", "min_lr", "name"}
_LION_INERT = {"foreach", "fused", "use_triton"}
_LION_OFF = {"capturable": False, "differentiable": False, "cautious_factor": 1.0, "decoupled_weight_decay": False}


def rule_of(optimizer: Optimizer) -> Rule | None:
    """The rule of a torch SGD, Adam or AdamW, of a subclass that leaves their step alone, or of a class named Lion."""
    for base, rule in ((SGD, _SGD), (Adam, _ADAM)):
        if isinstance(optimizer, base):
            return rule if all(_is_torchs_own(type(optimizer), name) for name in ("step", "_init_group")) else None
    return _LION if type(optimizer).__name__ == "Lion" and _lion_obstacle(optimizer) is None else None


def _is_torchs_own(cls: type, name: str) -> bool:
    """Where is ``name`` defined? Function identity does not tell: torch wraps ``step`` class by class as it goes."""
    owner = next(c for c in cls.__mro__ if name in vars(c))
    return owner.__module__.startswith("torch.optim.")


def _is_schedulers(step: Any) -> bool:
    """Is it what a scheduler of torch's has put around torch's own step? ``functools.wraps`` copies the mark, not the globals."""
    outer, inner = (str(getattr(f, "__globals__", {}).get("__name__")) for f in (step, getattr(step, "__wrapped__", None)))
    return outer == "torch.optim.lr_scheduler" and inner.startswith("torch.optim")


def _lion_obstacle(optimizer: Optimizer) -> str | None:
    """torch has no Lion: any class of that name is taken whose groups are lion-pytorch's and have nothing more switched on."""
    for name in ("decoupled_wd", "use_gc"):
        if getattr(optimizer, name, False):
            return f"this Lion has {name} on"
    for i, group in enumerate(optimizer.param_groups):
        if missing := {"lr", "betas", "weight_decay"} - group.keys():
            return f"parameter group {i} of this Lion has no {min(missing)}"
        for name in sorted(group.keys() - _LION_KEYS - _LION_INERT):
            if name not in _LION_OFF or group[name] != _LION_OFF[name]:
                return f"parameter group {i} of this Lion has {name}={group[name]!r}, which the fused rule does not know"
    return None


def obstacle(
    optimizer: Optimizer,
    unfit: Callable[[Tensor], str | None],
    lr_fits: Callable[[Tensor], bool],
    unfit_state: Callable[[Rule, Mapping[str, Any], Mapping[str, Any], Tensor], str | None],
    *,
    capturable: bool,
) -> str | None:
    """Why this optimizer cannot be updated by kernels, in one sentence; None when it can.

    `unfit` judges a parameter, `lr_fits` a learning rate that is a tensor, `unfit_state` what a parameter's state holds.
    """
    name = type(optimizer).__name__
    rule = rule_of(optimizer)
    if rule is None:
        if name == "Lion" and (reason := _lion_obstacle(optimizer)):
            return reason
        return f"{name} is not torch.optim.SGD, Adam or AdamW (nor a Lion), or it overrides their step"
    replaced = vars(optimizer).get("step")
    if replaced is not None and not _is_schedulers(replaced):
        return f"the step of this {name} was replaced on the object"
    if (
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
    ):
        return f"{name} has step hooks, which a fused update would not call"
    for i, group in enumerate(optimizer.param_groups):
        where = f"parameter group {i}"
        for option in ("differentiable",) if capturable else ("differentiable", "capturable"):
            if group.get(option):
                return f"{where} has {option}=True"
        if isinstance(lr := group["lr"], Tensor) and not lr_fits(lr):
            return f"{where} has a learning rate of dtype {lr.dtype} on {lr.device}"
        for value in rule.read(group):
            if any(isinstance(part, Tensor) for part in (value if isinstance(value, tuple) else (value,))):
                return f"{where} has a tensor among its hyperparameters"
        for j, param in enumerate(group["params"]):
            state = optimizer.state.get(param) or {}
            reason = unfit(param) or (None if is_missing(state, rule, group) else unfit_state(rule, group, state, param))
            if reason is not None:
                return f"parameter {j} of group {i} {reason}"
    params = [param for group in optimizer.param_groups for param in group["params"]]
    shared = overlapping(params)
    return None if shared is None else f"parameters {shared[0]} and {shared[1]} of the optimizer share memory"


def is_missing(state: Mapping[str, Any], rule: Rule, group: Mapping[str, Any]) -> bool:
    """Whether torch would make this parameter's state at its next step."""
    if rule.code == ADAM_RULE:
        return not state
    slots = rule.slots(group)
    return bool(slots) and state.get(slots[0]) is None


def make_state(rule: Rule, group: Mapping[str, Any], param: Tensor) -> dict[str, Tensor]:
    """What torch would put into `optimizer.state[param]`; SGD's buffer is left for the first step to fill."""
    if rule.code == SGD_RULE:
        return {"momentum_buffer": torch.empty_like(param, memory_format=torch.preserve_format, requires_grad=False)}
    zeros = {name: torch.zeros_like(param, memory_format=torch.preserve_format).detach() for name in rule.slots(group)}
    if rule.code == LION_RULE:
        return zeros
    wide = torch.get_default_dtype() == torch.float64 and not group["fused"]
    return {"step": torch.zeros((), dtype=torch.float64 if wide else torch.float32), **zeros}
