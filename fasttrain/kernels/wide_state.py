"""float32 state beside bfloat16 and float16 parameters, and what keeps `load_state_dict` from rounding it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

MASTER = "master_param"  # in optimizer.state[param]: the weights in float32


def make_slots(slots: Sequence[str], param: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Zeros for every slot, in the parameter's memory order."""
    return {name: torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format).detach() for name in slots}


def make_master(param: Tensor) -> Tensor:
    """The weights in float32, in the parameter's memory order."""
    return torch.empty_like(param, dtype=torch.float32, memory_format=torch.preserve_format).copy_(param.detach()).detach()


def keep_wide(optimizer: Optimizer) -> tuple[Any, Any]:
    """Has `load_state_dict` keep float32 what was saved in float32: torch casts state to its parameter's dtype.

    Gives back the handles of the two hooks.
    """
    wide: dict[int, dict[str, Tensor]] = {}

    def before(_: Optimizer, state_dict: dict[str, Any]) -> None:
        wide.clear()
        for index, slots in state_dict["state"].items():
            if MASTER in slots:
                wide[index] = {name: value for name, value in slots.items() if isinstance(value, Tensor) and name != "step"}

    def after(loaded: Optimizer) -> None:
        params = [param for group in loaded.param_groups for param in group["params"]]
        for index, held in wide.items():
            for name, value in held.items():
                loaded.state[params[index]][name] = value.detach().to(params[index].device, copy=True)
        wide.clear()

    return optimizer.register_load_state_dict_pre_hook(before), optimizer.register_load_state_dict_post_hook(after)
