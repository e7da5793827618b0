"""Timer: how long each stage took, and the end of training when the time is up."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from fasttrain.callbacks.agree import from_rank_zero
from fasttrain.callbacks.callback import Callback
from fasttrain.callbacks.trainer_view import TrainerView
from fasttrain.errors import OptionError, reject

_LOG = logging.getLogger(__name__)
_STAGES = ("train", "sanity_check", "validate", "test", "predict")


def as_seconds(duration: str | timedelta | Mapping[str, int], what: str = "duration") -> float:
    """Seconds of a timedelta, of "DD:HH:MM:SS" or of timedelta's keyword arguments as a dict.

    Raises:
        OptionError: anything else; `what` names the argument.
    """
    if isinstance(duration, timedelta):
        return duration.total_seconds()
    if isinstance(duration, str):
        found = re.fullmatch(r"(\d+):(\d\d):(\d\d):(\d\d)", duration.strip())
        if found:
            days, hours, minutes, seconds = map(int, found.groups())
            return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds).total_seconds()
    elif isinstance(duration, Mapping):
        try:
            return timedelta(**duration).total_seconds()
        except TypeError:
            pass
    then = 'Example: "00:12:00:00" is twelve hours.'
    raise OptionError(reject(what, repr(duration), 'a timedelta, "DD:HH:MM:SS" or a dict such as {"hours": 2}', then))


class Timer(Callback):
    """Stops training after `duration`, checked after each step or epoch (`interval`); a resumed run counts on.

    Raises:
        OptionError: `duration` or `interval` is not of the forms above.

    Example::

        timer = Timer("00:12:00:00")
        timer.time_elapsed("train"), timer.time_remaining()
    """

    def __init__(
        self,
        duration: str | timedelta | Mapping[str, int] | None = None,
        interval: str = "step",
        verbose: bool = True,
    ) -> None:
        if interval not in ("step", "epoch"):
            raise OptionError(reject("Timer(interval)", repr(interval), '"step" or "epoch"', "Say when to look."))
        self._duration = None if duration is None else as_seconds(duration, "Timer(duration)")
        self._interval = interval
        self._verbose = verbose
        self._start_time: dict[str, float | None] = dict.fromkeys(_STAGES)
        self._end_time: dict[str, float | None] = dict.fromkeys(_STAGES)
        self._offset = 0.0

    def start_time(self, stage: str = "train") -> float | None:
        """When the stage began, in seconds of a monotonic clock."""
        return self._start_time[stage]

    def end_time(self, stage: str = "train") -> float | None:
        """When the stage ended, in seconds of a monotonic clock."""
        return self._end_time[stage]

    def time_elapsed(self, stage: str = "train") -> float:
        """Seconds spent in the stage; for "train" with those of the runs it was resumed from."""
        start, end = self.start_time(stage), self.end_time(stage)
        offset = self._offset if stage == "train" else 0.0
        if start is None:
            return offset
        return (time.monotonic() if end is None else end) - start + offset

    def time_remaining(self, stage: str = "train") -> float | None:
        """Seconds left, or None without a duration."""
        return None if self._duration is None else self._duration - self.time_elapsed(stage)

    def state_dict(self) -> dict[str, Any]:
        return {"time_elapsed": {stage: self.time_elapsed(stage) for stage in _STAGES}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._offset = float(state_dict.get("time_elapsed", {}).get("train", 0.0))

    def on_fit_start(self, trainer: TrainerView, pl_module: Any) -> None:
        self._check(trainer)  # a resumed run may have no time left

    def on_train_start(self, trainer: TrainerView, pl_module: Any) -> None:
        self._begin("train")

    def on_train_end(self, trainer: TrainerView, pl_module: Any) -> None:
        self._end_time["train"] = time.monotonic()

    def on_validation_start(self, trainer: TrainerView, pl_module: Any) -> None:
        self._begin("validate")

    def on_validation_end(self, trainer: TrainerView, pl_module: Any) -> None:
        self._end_time["validate"] = time.monotonic()

    def on_test_start(self, trainer: TrainerView, pl_module: Any) -> None:
        self._begin("test")

    def on_test_end(self, trainer: TrainerView, pl_module: Any) -> None:
        self._end_time["test"] = time.monotonic()

    def on_predict_start(self, trainer: TrainerView, pl_module: Any) -> None:
        self._begin("predict")

    def on_predict_end(self, trainer: TrainerView, pl_module: Any) -> None:
        self._end_time["predict"] = time.monotonic()

    def on_train_batch_end(self, trainer: TrainerView, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._interval == "step":
            self._check(trainer)

    def on_train_epoch_end(self, trainer: TrainerView, pl_module: Any) -> None:
        if self._interval == "epoch":
            self._check(trainer)

    def _begin(self, stage: str) -> None:
        self._start_time[stage], self._end_time[stage] = time.monotonic(), None

    def _check(self, trainer: TrainerView) -> None:
        if self._duration is None:
            return
        elapsed = self.time_elapsed()
        if from_rank_zero(elapsed >= self._duration, trainer.world_size):
            trainer.should_stop = True
            if self._verbose and trainer.is_global_zero:
                _LOG.info("The time is up after %s: stopping.", timedelta(seconds=int(elapsed)))
