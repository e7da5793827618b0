"""What a callback may read of the running training: one protocol, no behaviour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor


class RunState(Protocol):
    """Which entry point is running."""

    @property
    def fn(self) -> str | None:
        """ "fit", "validate", "test" or "predict"."""


class TrainerView(Protocol):
    """The attributes our own callbacks use; the loop's facade has more."""

    should_stop: bool

    @property
    def current_epoch(self) -> int: ...
    @property
    def global_step(self) -> int: ...
    @property
    def batch_idx(self) -> int: ...
    @property
    def callback_metrics(self) -> Mapping[str, Tensor]: ...
    @property
    def is_global_zero(self) -> bool: ...
    @property
    def world_size(self) -> int: ...
    @property
    def sanity_checking(self) -> bool: ...
    @property
    def fast_dev_run(self) -> bool | int: ...
    @property
    def default_root_dir(self) -> str: ...
    @property
    def loggers(self) -> Sequence[Any]: ...
    @property
    def optimizers(self) -> Sequence[Any]: ...
    @property
    def lr_scheduler_configs(self) -> Sequence[Any]: ...
    @property
    def log_every_n_steps(self) -> int: ...
    @property
    def state(self) -> RunState: ...
    @property
    def val_check_interval(self) -> int | float | str | timedelta | Mapping[str, int] | None: ...
    @property
    def check_val_every_n_epoch(self) -> int | None: ...
    @property
    def num_training_batches(self) -> int | float: ...
    @property
    def num_val_batches(self) -> Sequence[int | float]: ...
    @property
    def val_enabled(self) -> bool: ...

    def metric_step(self, name: str) -> int | None:
        """The global_step at which that metric was last updated."""

    def save_checkpoint(self, path: str | Path, weights_only: bool = False) -> Path:
        """Writes a checkpoint directory at `path`, whole or not at all."""
