"""The fp16 loss scale of a run: counted on the host, or by kernels that nobody waits for."""

from __future__ import annotations

from typing import Any

import torch

from fasttrain.kernels.device_scale import DeviceScale


class LossScale:
    """The fp16 loss scale: grows after 2000 clean steps, halves on an overflow (torch.amp.GradScaler's rule).

    ``alone``: one optimizer's. Only such a scale may be lent to kernels, which move it by themselves at every step; from then on
    ``value`` and ``clean_steps`` are what ``read`` last found.
    """

    def __init__(self, device: torch.device, *, alone: bool = False) -> None:
        self.growth_interval = 2000
        self.value, self.clean_steps, self.alone, self.lent = 65536.0, 0, alone, False
        self._cells = DeviceScale(device, value=self.value, interval=self.growth_interval)
        self.tensor = self._cells.value
        self._gathering = False
        self._found: bool | None = None

    def read(self) -> None:
        """Host read, where it was lent."""
        if self.lent:
            self.value, self.clean_steps = float(self.tensor), int(self._cells.clean_steps)

    def lend(self) -> DeviceScale:
        """To kernels that read it and move it on."""
        if not self.lent:
            self._cells.clean_steps.fill_(self.clean_steps)
        self.lent = True
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
        if self.lent:
            self.read()
        if found_inf:
            self._write(self.value * 0.5, 0)
        elif self.clean_steps + 1 < self.growth_interval and not self.lent:
            self.clean_steps += 1
        elif self.clean_steps + 1 < self.growth_interval:
            self._write(self.value, self.clean_steps + 1)
        else:
            self._write(self.value * 2.0, 0)

    def state_dict(self) -> dict[str, Any]:
        """The two numbers. Host read, where it was lent: for a checkpoint."""
        self.read()
        return {"scale": self.value, "clean_steps": self.clean_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """In place, so that a captured graph sees it."""
        self._write(float(state["scale"]), int(state["clean_steps"]))

    def _write(self, value: float, clean_steps: int) -> None:
        self.value, self.clean_steps = value, clean_steps
        self.tensor.fill_(value)
        if self.lent:
            self._cells.clean_steps.fill_(clean_steps)
