"""Keeps the learning rate's end at the end of the time: looks at the speed at each validation, never inside a step."""

from __future__ import annotations

import time
from typing import Any

from fasttrain.callbacks import Callback


class Pace(Callback):
    """Logs ``tokens_per_s`` and, where the machine is slower than planned, ends the cosine at the steps there is time for."""

    def __init__(self, max_time: float, steps: int, tokens_per_step: int) -> None:
        self._left, self._steps, self._tokens = max_time, steps, tokens_per_step
        self._from = (0.0, 0)
        self._train_s = 0.0
        self._is_first = True

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._from = (time.perf_counter(), trainer.global_step)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        compile_s = trainer.capture.compile_s if self._is_first and trainer.capture else 0.0
        self._train_s = max(1e-9, time.perf_counter() - self._from[0] - compile_s)
        self._is_first = False

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        steps_per_s = (trainer.global_step - self._from[1]) / self._train_s
        pl_module.log("tokens_per_s", steps_per_s * self._tokens)
        self._left -= self._train_s
        pl_module.steps = min(self._steps, trainer.global_step + int(max(0.0, self._left) * steps_per_s))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._from = (time.perf_counter(), trainer.global_step)
