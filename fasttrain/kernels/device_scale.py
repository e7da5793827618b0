"""The fp16 loss scale as device tensors: read and moved on by the kernels, never by the host."""

from __future__ import annotations

from typing import Any

import torch


class DeviceScale:
    """`value` (0-d float32) grows after `interval` clean steps and backs off after one that is not: torch.amp.GradScaler's rule.

    A loss is multiplied by `value` in the step; `TritonTail(scale=...)` divides gradients by it and moves it on.
    """

    def __init__(
        self, device: torch.device | str, *, value: float = 65536.0, growth: float = 2.0, backoff: float = 0.5, interval: int = 2000
    ) -> None:
        self.value = torch.full((), value, device=device)
        self.clean_steps = torch.zeros((), dtype=torch.int32, device=device)
        self.rule = (growth, backoff, float(interval))

    def state_dict(self) -> dict[str, Any]:
        """The two numbers. Host read: for a checkpoint."""
        return {"scale": float(self.value), "clean_steps": int(self.clean_steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """In place, so that a captured graph sees it."""
        self.value.fill_(float(state["scale"]))
        self.clean_steps.fill_(int(state["clean_steps"]))
