"""The fp16 loss scale of a run: counted on the host, or by kernels that nobody waits for."""

from __future__ import annotations

import math
from typing import Any

import torch

from fasttrain.kernels.device_scale import DeviceScale


class LossScale:
    """The fp16 loss scale: grows after 2000 clean steps, halves on an overflow (torch.amp.GradScaler's rule).

    ``alone``: one optimizer's. Only such a scale may be lent to kernels, which move it by themselves at every step; from then on
    ``value`` and ``clean_steps`` are read from the device whenever somebody asks.
    """

    def __init__(self, device: torch.device, *, alone: bool = False) -> None:
        self.growth_interval = 2000
        self._value, self._clean_steps, self.alone, self._lent = 65536.0, 0, alone, False
        self._cells = DeviceScale(device, value=self._value, interval=self.growth_interval)
        self.tensor = self._cells.value
        self._gathering = False
        self._found: bool | None = None

    @property
    def value(self) -> float:
        """Host read, where it was lent."""
        return float(self.tensor) if self._lent else self._value

    @property
    def clean_steps(self) -> int:
        """Host read, where it was lent."""
        return int(self._cells.clean_steps) if self._lent else self._clean_steps

    def lend(self) -> DeviceScale:
        """To kernels that read it and move it on."""
        if not self._lent:
            self._cells.clean_steps.fill_(self._clean_steps)
        self._lent = True
        return self._cells

    def gather(self) -> None:
        """Several updates follow that all use this value: it moves once, in ``settle``."""
        self._gathering, self._found = True, None

    def settle(self) -> None:
        """The updates since ``gather`` are over: one overflow among them lowers the scale."""
        self._gathering = False
        if self._found is not None:
            self.update(found_inf=self._found)

    def update(self, *, found_inf: bool) -> None:
        """By a step that the host has judged. Host read, where it was lent."""
        if self._gathering:
            self._found = found_inf or bool(self._found)
            return
        value, clean = self.value, self.clean_steps + 1
        if found_inf:
            self._write(value * 0.5, 0)
        elif clean < self.growth_interval:
            self._write(value, clean)
        else:
            self._write(value * 2.0, 0)

    def state_dict(self) -> dict[str, Any]:
        """The two numbers. Host read, where it was lent: for a checkpoint."""
        return {"scale": self.value, "clean_steps": self.clean_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """In place, so that a captured graph sees it."""
        self._value = math.nan  # written in any case
        self._write(float(state["scale"]), int(state["clean_steps"]))

    def _write(self, value: float, clean_steps: int) -> None:
        if value != self._value or self._lent:
            self.tensor.fill_(value)
        if self._lent:
            self._cells.clean_steps.fill_(clean_steps)
        self._value, self._clean_steps = value, clean_steps
