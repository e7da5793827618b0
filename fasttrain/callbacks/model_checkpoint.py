"""ModelCheckpoint: decides when a checkpoint is written, what it is called and which older one goes."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal
from weakref import proxy

import torch
from torch import Tensor

from fasttrain.callbacks.agree import all_ranks, from_rank_zero
from fasttrain.callbacks.callback import Checkpoint
from fasttrain.callbacks.checkpoint_files import default_dir, link, remove
from fasttrain.callbacks.checkpoint_name import checkpoint_name
from fasttrain.callbacks.checkpoint_settings import check_settings
from fasttrain.callbacks.moments import has_validation, is_idle, validates_once_per_epoch, validation_follows
from fasttrain.callbacks.plain import named
from fasttrain.callbacks.top_k import Kept, as_state, entered, enters, from_state, leaves
from fasttrain.callbacks.trainer_view import TrainerView
from fasttrain.errors import FasttrainWarning, OptionError, reject

_LOG = logging.getLogger(__name__)
CHECKPOINT_ON = "checkpoint_on"


class ModelCheckpoint(Checkpoint):
    """Writes checkpoint directories and keeps the `save_top_k` best by `monitor`.

    Without a `monitor` the newest is kept, or, where the steps return Results with `checkpoint_on`, the best by that.

    When: every `every_n_train_steps` optimizer steps, or every `train_time_interval`, or every `every_n_epochs`
    epochs (the default, 1): at the end of the epoch when validation is once an epoch or absent, else after each
    validation; `save_on_train_epoch_end` decides it by hand. One rhythm per callback; use several for several.

    A step-triggered save with a monitor uses the newest value of the metric, and `metric_steps[path]` tells which
    step that is of; it waits for a validation that follows the very batch, and for a metric that does not exist yet.

    Where: `dirpath`, else `checkpoints` in the first logger's directory, else in `default_root_dir`. A name that is
    taken gets `-v1`, `-v2`, ... unless `enable_version_counter=False`. `save_last` keeps a second one named `last`
    (with "link" a symbolic link) of the newest and of the end of training.

    The attributes change only after the write is complete; only directories this callback wrote are ever removed.

    Attributes:
        best_model_path, best_model_score, best_k_models, kth_best_model_path, kth_value, last_model_path,
        current_score, metric_steps (path -> global_step of its score).

    Raises:
        OptionError: arguments that are wrong or contradict each other, or a `monitor` that names no metric.

    Example::

        ModelCheckpoint(monitor="val_loss", save_top_k=3, filename="{epoch:02d}-{val_loss:.2f}", save_last=True)
    """

    CHECKPOINT_NAME_LAST = "last"
    STARTING_VERSION = 1

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        verbose: bool = False,
        save_last: bool | Literal["link"] | None = None,
        save_top_k: int = 1,
        save_on_exception: bool = False,
        save_weights_only: bool = False,
        mode: str = "min",
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        enable_version_counter: bool = True,
    ) -> None:
        if every_n_train_steps is None and every_n_epochs is None and train_time_interval is None:
            every_n_epochs = 1
        self.dirpath = os.path.realpath(os.path.expanduser(dirpath)) if dirpath else None
        self.filename = filename
        self.monitor = monitor
        self.verbose = verbose
        self.save_last = save_last
        self.save_top_k = save_top_k
        self.save_on_exception = save_on_exception
        self.save_weights_only = save_weights_only
        self.mode = mode
        self.auto_insert_metric_name = auto_insert_metric_name
        self.every_n_train_steps = every_n_train_steps or 0
        self.train_time_interval = train_time_interval
        self.every_n_epochs = every_n_epochs or 0
        self.save_on_train_epoch_end = save_on_train_epoch_end
        self.enable_version_counter = enable_version_counter
        check_settings(
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            save_last=save_last,
            every_n_train_steps=self.every_n_train_steps,
            every_n_epochs=self.every_n_epochs,
            train_time_interval=train_time_interval,
        )
        self._kept = Kept()
        self._during_save: Kept | None = None  # what the record will be: the checkpoint being written must hold that
        self._waiting = False  # a step-triggered save waits for its metric
        self._validated = False
        self._warned = False
        self._checked_at: float | None = None

    @property
    def best_model_path(self) -> str:
        return self._kept.best_path

    @property
    def last_model_path(self) -> str:
        return self._kept.last_path

    @property
    def kth_best_model_path(self) -> str:
        return self._kept.kth_path

    @property
    def best_model_score(self) -> Tensor | None:
        return _as_tensor(self._kept.best_score)

    @property
    def current_score(self) -> Tensor | None:
        return _as_tensor(self._kept.current_score)

    @property
    def kth_value(self) -> Tensor:
        worst = torch.inf if self.mode == "min" else -torch.inf
        return torch.tensor(worst if self._kept.kth_score is None else self._kept.kth_score, dtype=torch.float64)

    @property
    def best_k_models(self) -> dict[str, Tensor]:
        return {path: torch.tensor(score, dtype=torch.float64) for path, score in self._kept.scores.items()}

    @property
    def metric_steps(self) -> dict[str, int]:
        return dict(self._kept.metric_steps)

    @property
    def state_key(self) -> str:
        return self._generate_state_key(
            monitor=self.monitor,
            mode=self.mode,
            every_n_train_steps=self.every_n_train_steps,
            every_n_epochs=self.every_n_epochs,
            train_time_interval=self.train_time_interval,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"monitor": self.monitor, "dirpath": self.dirpath} | as_state(self._during_save or self._kept)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues the ranking; in another directory only `best_model_path` is taken over."""
        loaded, before = from_state(state_dict), state_dict.get("dirpath", self.dirpath)
        if before != self.dirpath:
            message = (
                f"The checkpoint directory was {before!r} and is {self.dirpath!r}: the ranking starts anew and only "
                "best_model_path is taken over. Give the same dirpath to continue it."
            )
            warnings.warn(message, FasttrainWarning, stacklevel=2)
            loaded = Kept(best_path=loaded.best_path)
        self._commit(loaded)

    @property
    def idle_hooks(self) -> frozenset[str]:
        by_batch = self.every_n_train_steps > 0 or self.train_time_interval is not None
        return frozenset() if by_batch else frozenset({"on_train_batch_end"})

    def setup(self, trainer: TrainerView, pl_module: Any, stage: str) -> None:
        self.dirpath = from_rank_zero(self.dirpath or default_dir(trainer), trainer.world_size)

    def on_train_start(self, trainer: TrainerView, pl_module: Any) -> None:
        self._checked_at = time.monotonic()
        self._waiting = self._validated = False

    def on_train_batch_end(self, trainer: TrainerView, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self._is_due(trainer) or self._must_skip(trainer):
            return
        monitor = self._ranked_by(trainer.callback_metrics)
        if monitor is not None and self._should_wait(trainer, monitor):
            self._waiting = True
        else:
            self._save(trainer)

    def on_validation_end(self, trainer: TrainerView, pl_module: Any) -> None:
        if is_idle(trainer):
            return
        self._validated = True
        if self._must_skip(trainer):
            return
        if self._waiting and self._ranked_by(trainer.callback_metrics) in trainer.callback_metrics:
            self._save(trainer)
        elif not self._waiting and not self._saves_at_epoch_end(trainer):
            self._save_for_epoch(trainer)

    def on_train_epoch_end(self, trainer: TrainerView, pl_module: Any) -> None:
        if self._must_skip(trainer):
            return
        if self._waiting and (self._validated or self._ranked_by(trainer.callback_metrics) in trainer.callback_metrics):
            self._save(trainer)
        elif not self._waiting and self._saves_at_epoch_end(trainer):
            self._save_for_epoch(trainer)

    def on_train_end(self, trainer: TrainerView, pl_module: Any) -> None:
        if is_idle(trainer) or trainer.global_step == 0:
            return
        if self._waiting and not self._must_skip(trainer):
            self._save(trainer)
        stale = self._kept.last_step != trainer.global_step if self.save_last is True else not self._kept.saved_path
        if self.save_last and stale:
            self._forget(trainer, self._save_last(trainer, self._values(trainer)))

    def on_exception(self, trainer: TrainerView, pl_module: Any, exception: BaseException) -> None:
        if not self.save_on_exception or self._must_skip(trainer):
            return
        values = self._values(trainer)
        path = self.format_checkpoint_name(values)
        self._write(trainer, path, self._saved(trainer, path))
        self._forget(trainer, self._save_last(trainer, values))
        _LOG.info("%s: %s; saved %s", type(exception).__name__, exception, path)

    def format_checkpoint_name(self, metrics: dict[str, Any], filename: str | None = None, ver: int | None = None) -> str:
        """The path for these values, with `-v{ver}` at the end if given."""
        name = checkpoint_name(filename or self.filename, metrics, insert_name=self.auto_insert_metric_name)
        name = name if ver is None else f"{name}-v{ver}"
        return os.path.join(self.dirpath, name) if self.dirpath else name

    def _is_due(self, trainer: TrainerView) -> bool:
        if self.train_time_interval is not None:
            now, limit = time.monotonic(), self.train_time_interval.total_seconds()
            due = from_rank_zero(self._checked_at is not None and now - self._checked_at >= limit, trainer.world_size)
            self._checked_at = now if due else self._checked_at
            return due
        return self.every_n_train_steps > 0 and trainer.global_step % self.every_n_train_steps == 0

    def _must_skip(self, trainer: TrainerView) -> bool:
        return is_idle(trainer) or self._kept.saved_step == trainer.global_step

    def _ranked_by(self, metrics: Mapping[str, Any]) -> str | None:
        return CHECKPOINT_ON if self.monitor is None and CHECKPOINT_ON in metrics else self.monitor

    def _should_wait(self, trainer: TrainerView, monitor: str) -> bool:
        """Whether the metric is missing, or a newer value of it comes before the next batch."""
        if monitor not in trainer.callback_metrics:
            return True
        is_current = trainer.metric_step(monitor) == trainer.global_step
        return not is_current and validation_follows(trainer)

    def _saves_at_epoch_end(self, trainer: TrainerView) -> bool:
        if self.save_on_train_epoch_end is not None:
            return self.save_on_train_epoch_end
        if isinstance(trainer.val_check_interval, str | dict | timedelta) or trainer.check_val_every_n_epoch != 1:
            return False
        return not has_validation(trainer) or validates_once_per_epoch(trainer)

    def _save_for_epoch(self, trainer: TrainerView) -> None:
        due = self.every_n_epochs > 0 and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        values = self._values(trainer)
        gone = self._save_top_k(trainer, values) if due else ()
        linked = self.save_last == "link" and bool(self._kept.saved_path)
        if linked or self._kept.saved_step == trainer.global_step:
            gone += self._save_last(trainer, values)
        self._forget(trainer, gone)

    def _save(self, trainer: TrainerView) -> None:
        self._waiting = False
        values = self._values(trainer)
        self._forget(trainer, self._save_top_k(trainer, values) + self._save_last(trainer, values))

    def _save_top_k(self, trainer: TrainerView, values: dict[str, Any]) -> tuple[str, ...]:
        """Writes if this one is worth it; gives back the paths that are no longer wanted."""
        if self.save_top_k == 0:
            return ()
        monitor = self._ranked_by(values)
        if monitor is None:
            old = self._kept.best_path
            path = self._free_path(trainer, values, mine=old)
            self._write(trainer, path, replace(self._saved(trainer, path), best_path=path), values)
            return (old,) if self.save_top_k == 1 else ()
        if monitor not in values:
            self._complain(trainer, monitor)
            return ()
        score, k = float(values[monitor]), self.save_top_k  # host read: one number, when a save is due
        if not all_ranks(enters(self._kept, score, k=k, mode=self.mode), trainer.world_size):
            self._tell(trainer, f"{monitor} = {score:.6g} is not among the best {k}")
            return ()
        unranked = self._kept.best_path if self.monitor is None and k == 1 and not self._kept.scores else ""
        old = leaves(self._kept, k=k) or unranked  # saved before ``checkpoint_on`` was known
        path = self._free_path(trainer, values, mine=old)
        step = trainer.metric_step(monitor)
        after = entered(self._saved(trainer, path), path, score, step, k=k, mode=self.mode)
        self._write(trainer, path, after, values)
        self._tell(trainer, f"{monitor} = {score:.6g} (of step {step}), saved {path}")
        return (old,)

    def _save_last(self, trainer: TrainerView, values: dict[str, Any]) -> tuple[str, ...]:
        if not self.save_last:
            return ()
        old, path = self._kept.last_path, self._last_path(trainer, values)
        if self.save_last == "link" and self._kept.saved_path and self.save_top_k != 0:
            if trainer.is_global_zero and os.path.abspath(self._kept.saved_path) != os.path.abspath(path):
                link(self._kept.saved_path, path, replace_directory=path == old)
            self._commit(replace(self._kept, last_path=path, last_step=self._kept.saved_step))
        else:
            if trainer.is_global_zero and os.path.islink(path):
                os.unlink(path)  # or the write would go through it
            after = replace(self._saved(trainer, path), last_path=path, last_step=trainer.global_step)
            self._write(trainer, path, after)
        return (old,)

    def _saved(self, trainer: TrainerView, path: str) -> Kept:
        return replace(self._kept, saved_path=path, saved_step=trainer.global_step)

    def _write(self, trainer: TrainerView, path: str, after: Kept, values: dict[str, Any] | None = None) -> None:
        """Writes, then adopts `after`; what is written also knows of the `last` that follows it, given `values`."""
        self._during_save = after
        if self.save_last and values is not None:
            last = self._last_path(trainer, values)
            self._during_save = replace(after, last_path=last, last_step=trainer.global_step)
        try:
            trainer.save_checkpoint(path, self.save_weights_only)
        finally:
            self._during_save = None
        self._commit(after)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                tell = getattr(logger, "after_save_checkpoint", None)
                if tell is not None:
                    tell(proxy(self))

    def _commit(self, kept: Kept) -> None:
        self._kept = kept

    def _values(self, trainer: TrainerView) -> dict[str, Any]:
        """The metrics and, as whole numbers, `epoch` and `step` (logged ones win)."""
        values: dict[str, Any] = dict(trainer.callback_metrics)
        for name, own in (("epoch", trainer.current_epoch), ("step", trainer.global_step)):
            values[name] = int(values[name]) if name in values else own
        return values

    def _last_path(self, trainer: TrainerView, values: dict[str, Any]) -> str:
        return self._free_path(trainer, values, mine=self._kept.last_path, filename=self.CHECKPOINT_NAME_LAST)

    def _free_path(self, trainer: TrainerView, values: dict[str, Any], *, mine: str, filename: str | None = None) -> str:
        """The first path that nothing is at, or that is `mine` and about to be replaced."""
        path, version = self.format_checkpoint_name(values, filename), self.STARTING_VERSION
        while self.enable_version_counter and path != mine and self._exists(trainer, path):
            path, version = self.format_checkpoint_name(values, filename, version), version + 1
        return path

    def _exists(self, trainer: TrainerView, path: str) -> bool:
        return from_rank_zero(trainer.is_global_zero and os.path.lexists(path), trainer.world_size)

    def _forget(self, trainer: TrainerView, paths: tuple[str, ...]) -> None:
        """Removes what is no longer listed, is in our directory and is not what the run resumed from."""
        resumed = getattr(trainer, "ckpt_path", None)
        spared = {self._kept.best_path, self._kept.last_path, self._kept.saved_path, *self._kept.scores}
        spared |= {os.path.abspath(resumed)} if resumed else set()
        for path in paths:
            inside = bool(path) and Path(self.dirpath or "").absolute() in Path(path).absolute().parents
            if inside and path not in spared and os.path.abspath(path) not in spared and trainer.is_global_zero:
                remove(path)

    def _complain(self, trainer: TrainerView, monitor: str) -> None:
        then = f"Log it with self.log({monitor!r}, value) or name another."
        wanted = f"one of the metrics that exist: {named(trainer.callback_metrics)}"
        message = reject("ModelCheckpoint(monitor)", repr(monitor), wanted, then)
        if self._validated:
            raise OptionError(message)
        if not self._warned:
            self._warned = True
            warnings.warn(f"{message} Nothing is saved without it.", FasttrainWarning, stacklevel=2)

    def _tell(self, trainer: TrainerView, text: str) -> None:
        if self.verbose and trainer.is_global_zero:
            _LOG.info("Epoch %d, step %d: %s", trainer.current_epoch, trainer.global_step, text)


def _as_tensor(score: float | None) -> Tensor | None:
    return None if score is None else torch.tensor(score, dtype=torch.float64)
