"""EarlyStopping: asks the training to stop when a metric no longer improves."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from fasttrain.callbacks.agree import any_rank
from fasttrain.callbacks.callback import Callback
from fasttrain.callbacks.moments import has_validation, is_idle, validates_once_per_epoch
from fasttrain.callbacks.plain import as_plain, named
from fasttrain.callbacks.trainer_view import TrainerView
from fasttrain.errors import OptionError, reject

_LOG = logging.getLogger(__name__)
EARLY_STOP_ON = "early_stop_on"


class EarlyStoppingReason(Enum):
    """Why training was stopped."""

    NOT_STOPPED = 0
    STOPPING_THRESHOLD = 1
    DIVERGENCE_THRESHOLD = 2
    PATIENCE_EXHAUSTED = 3
    NON_FINITE_METRIC = 4


class EarlyStopping(Callback):
    """Stops when `monitor` has not improved by more than `min_delta` in `patience` checks.

    Without a `monitor` it is `early_stop_on` of the EvalResult that a step returns, else that of the TrainResult.

    One check at the end of each epoch when validation is once an epoch, else one after each validation;
    `check_on_train_epoch_end` decides it by hand. A value past `stopping_threshold` (good enough) or
    `divergence_threshold` (hopeless) stops at once, and so does one that is not finite when `check_finite`.
    With several ranks, one that wants to stop stops all. With `strict`, a metric that does not exist is an error.

    Attributes:
        best_score: 0-d tensor, the best value so far.
        wait_count: checks since then.
        stopped_epoch, stopping_reason, stopping_reason_message: when and why.

    Raises:
        OptionError: `mode` or `patience` is wrong, or `monitor` names no metric (the message lists those that exist).

    Example::

        EarlyStopping("val_loss", patience=5, min_delta=1e-3)
    """

    def __init__(
        self,
        monitor: str | None = None,
        min_delta: float = 0.0,
        patience: int = 3,
        verbose: bool = False,
        mode: str = "min",
        strict: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_on_train_epoch_end: bool | None = None,
        log_rank_zero_only: bool = False,
    ) -> None:
        if mode not in ("min", "max"):
            raise OptionError(reject("EarlyStopping(mode)", repr(mode), '"min" or "max"', "Say which way is better."))
        if monitor is not None and (not isinstance(monitor, str) or not monitor):
            raise OptionError(reject("EarlyStopping(monitor)", repr(monitor), "the name of a metric", "Name it."))
        if patience < 0:
            then = "Count the checks without improvement that are allowed."
            raise OptionError(reject("EarlyStopping(patience)", patience, "0 or more", then))
        self.monitor = monitor
        self.min_delta = min_delta if mode == "max" else -min_delta
        self.patience = patience
        self.verbose = verbose
        self.mode = mode
        self.strict = strict
        self.check_finite = check_finite
        self.stopping_threshold = stopping_threshold
        self.divergence_threshold = divergence_threshold
        self.check_on_train_epoch_end = check_on_train_epoch_end
        self.log_rank_zero_only = log_rank_zero_only
        self.wait_count = 0
        self.stopped_epoch = 0
        self.best_score = torch.tensor(torch.inf if mode == "min" else -torch.inf)
        self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
        self.stopping_reason_message: str | None = None
        self._validated = False

    @property
    def state_key(self) -> str:
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    @property
    def monitor_op(self) -> Callable[[Any, Any], Any]:
        """Whether the first is better than the second."""
        return operator.lt if self.mode == "min" else operator.gt

    def state_dict(self) -> dict[str, Any]:
        return {
            "wait_count": self.wait_count,
            "stopped_epoch": self.stopped_epoch,
            "best_score": as_plain(self.best_score),
            "patience": self.patience,
            "stopping_reason": self.stopping_reason.value,
            "stopping_reason_message": self.stopping_reason_message,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.wait_count = int(state_dict["wait_count"])
        self.stopped_epoch = int(state_dict["stopped_epoch"])
        # float64 holds every narrower value exactly, so a resumed comparison has the same outcome
        self.best_score = torch.tensor(float(state_dict["best_score"]), dtype=torch.float64)
        self.patience = int(state_dict["patience"])
        self.stopping_reason = EarlyStoppingReason(state_dict.get("stopping_reason", 0))
        self.stopping_reason_message = state_dict.get("stopping_reason_message")

    def on_train_epoch_end(self, trainer: TrainerView, pl_module: Any) -> None:
        if self._checks_at_epoch_end(trainer) and not is_idle(trainer):
            self._check(trainer)

    def on_validation_end(self, trainer: TrainerView, pl_module: Any) -> None:
        if is_idle(trainer):
            return
        self._validated = True
        if not self._checks_at_epoch_end(trainer):
            self._check(trainer)

    def _checks_at_epoch_end(self, trainer: TrainerView) -> bool:
        if self.check_on_train_epoch_end is not None:
            return self.check_on_train_epoch_end
        # What only the training step sets is known when its epoch ends, however often there is validation.
        of_training = self.monitor is None and f"val_{EARLY_STOP_ON}" not in trainer.callback_metrics
        return of_training or validates_once_per_epoch(trainer)

    def _check(self, trainer: TrainerView) -> None:
        current = self._current(trainer)
        if current is None:
            return
        reason, message = self._judge(current)
        stop = any_rank(reason is not EarlyStoppingReason.NOT_STOPPED, trainer.world_size)
        if reason is not EarlyStoppingReason.NOT_STOPPED:
            self.stopping_reason = reason
        if stop:
            trainer.should_stop = True
            self.stopped_epoch = trainer.current_epoch
            self.stopping_reason_message = message or "Another rank asked to stop."
        if message and self.verbose and (trainer.is_global_zero or not self.log_rank_zero_only):
            _LOG.info(message)

    def _current(self, trainer: TrainerView) -> Tensor | None:
        metrics = trainer.callback_metrics
        value = metrics.get(self.monitor or EARLY_STOP_ON)
        if value is not None:
            return value.detach().squeeze().cpu()  # host read: one number, when a check is due
        if self.monitor is None and not self._validated and has_validation(trainer):
            return None  # validation may bring it
        message = reject(
            "EarlyStopping(monitor)",
            repr(self.monitor),
            f"one of the metrics that exist: {named(metrics)}",
            f"Log it with self.log({self.monitor!r}, value), name another, or pass strict=False."
            if self.monitor is not None
            else "Name one, or set early_stop_on in the TrainResult or EvalResult that a step returns.",
        )
        if self.strict:
            raise OptionError(message)
        if self.verbose:
            _LOG.warning(message)
        return None

    def _judge(self, current: Tensor) -> tuple[EarlyStoppingReason, str | None]:
        """The verdict on one value (0-d), in the metric's own precision; keeps the best and counts the rest."""
        better, name, value = self.monitor_op, self.monitor or EARLY_STOP_ON, f"{current.item():.6g}"
        if self.check_finite and not torch.isfinite(current):
            message = f"{name} = {value} is not finite; the best before was {self.best_score.item():.6g}."
            return EarlyStoppingReason.NON_FINITE_METRIC, message
        if self.stopping_threshold is not None and better(current, self.stopping_threshold):
            message = f"{name} = {value} reached the stopping threshold {self.stopping_threshold}."
            return EarlyStoppingReason.STOPPING_THRESHOLD, message
        if self.divergence_threshold is not None and better(-current, -self.divergence_threshold):
            message = f"{name} = {value} passed the divergence threshold {self.divergence_threshold}."
            return EarlyStoppingReason.DIVERGENCE_THRESHOLD, message
        if better(current - self.min_delta, self.best_score):
            message = f"{name} improved from {self.best_score.item():.6g} to {value}."
            self.best_score, self.wait_count = current, 0
            return EarlyStoppingReason.NOT_STOPPED, message
        self.wait_count += 1
        if self.wait_count >= self.patience:
            best = f"{self.best_score.item():.6g}"
            message = f"{name} did not improve in the last {self.wait_count} checks; the best was {best}."
            return EarlyStoppingReason.PATIENCE_EXHAUSTED, message
        return EarlyStoppingReason.NOT_STOPPED, None
