"""The share of time in which the GPU ran anything, sampled while a side's round runs; nothing without a CUDA device."""

from __future__ import annotations

import statistics
import threading
from typing import Any

EVERY_S = 0.05  # the driver's own window is a sixth of a second to a second


class Busy:
    """Within it, ``share()`` gives the mean since it was last asked, ``{"busy": 0.93}``, or nothing where it cannot be known."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._seen: list[float] = []
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Busy:
        if self._device == "cuda":
            try:
                import pynvml
            except ImportError:  # nvidia-ml-py
                return self
            pynvml.nvmlInit()
            self._thread = threading.Thread(target=self._sample, args=(pynvml,), daemon=True)
            self._thread.start()
        return self

    def _sample(self, nvml: Any) -> None:
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
        while not self._over.wait(EVERY_S):
            self._seen.append(nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)

    def share(self) -> dict[str, float]:
        seen, self._seen = self._seen, []
        return {"busy": statistics.mean(seen)} if seen else {}

    def __exit__(self, *ended: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
