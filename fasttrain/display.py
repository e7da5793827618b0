"""Between the loop and the progress bar: what to show, and when the next look is due."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import Any

import torch
from torch import Tensor

from fasttrain.facade import TrainerFacade
from fasttrain.progress import Progress, Silent, Snapshot


class Display:
    """Reads the run at most every ``interval`` seconds; ``due`` is the next time. Host reads happen here only."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._silent = isinstance(bar, Silent)
        self.recent: deque[Tensor | None] = deque(maxlen=20)  # the running loss is the mean of the last 20 steps
        self.due = math.inf
        self.rung = ""
        self._mark = (0.0, 0)
        self._rate: float | None = None
        self._unit = ("it", 1)  # a module's progress_unit: what the rate counts, how many of them in a batch

    def start(self, facade: TrainerFacade) -> None:
        self._unit = getattr(facade.lightning_module, "progress_unit", self._unit)
        fn = facade.state.fn or "fit"
        self._bar.start(Snapshot(stage="train" if fn == "fit" else fn, max_epochs=_epochs(facade), total_batches=_total(facade)))
        self.due = math.inf if self._silent else 0.0
        self.restart_clock(facade)

    def restart_clock(self, facade: TrainerFacade) -> None:
        """The rate counts training alone: called where something else took time, a compile or a validation."""
        self._mark = (time.perf_counter(), facade.progress.batches_seen)

    def back_to_training(self, facade: TrainerFacade, deadline: float) -> None:
        """After a validation in mid-epoch: its line gives way to training's. At the epoch's end ``epoch_end`` does that."""
        self.restart_clock(facade)
        if not self._silent and facade.progress.batches_done != _total(facade):
            self.train(facade, time.perf_counter(), deadline)

    def epoch_end(self, facade: TrainerFacade, deadline: float) -> None:
        """The epoch's last word, its own metrics in it: also where no update was due since its first batches."""
        if not self._silent:
            self.train(facade, time.perf_counter(), deadline)

    def line(self, text: str) -> None:
        self._bar.line(text)

    def train(self, facade: TrainerFacade, now: float, deadline: float = math.inf) -> None:
        """Show the training stage; called by the loop when ``now`` has passed ``due``."""
        progress = facade.progress
        then, seen = self._mark
        if now - then >= 1.0 or (self._rate is None and progress.batches_seen > seen):
            rate = (progress.batches_seen - seen) / max(now - then, 1e-9)
            self._rate = rate if self._rate is None else 0.5 * (self._rate + rate)
            self._mark = (now, progress.batches_seen)
        self._bar.update(
            Snapshot(
                stage="train",
                epoch=progress.epoch,
                max_epochs=_epochs(facade),
                batch=progress.batches_done,
                total_batches=_total(facade),
                global_step=progress.global_step,
                loss=self.running_loss(),
                metrics=facade.progress_bar_metrics,
                batches_per_s=self._rate,
                unit=self._unit[0],
                units_per_batch=self._unit[1],
                seconds_left=_left(facade, self._rate, now, deadline),
                rung=self.rung,
            )
        )
        self.due = now + self._bar.interval

    def evaluate(self, facade: TrainerFacade, stage: str, batch: int, total: float, now: float) -> None:
        """Show an evaluation stage."""
        self._bar.update(
            Snapshot(
                stage=stage,
                epoch=facade.progress.epoch,
                max_epochs=_epochs(facade),
                batch=batch,
                total_batches=None if math.isinf(total) else int(total),
                global_step=facade.progress.global_step,
                rung=self.rung,
            )
        )
        self.due = now + self._bar.interval

    def running_loss(self) -> float | None:
        """Host read: the mean of the last 20 losses."""
        losses = [x for x in self.recent if x is not None]
        return float(torch.stack(losses).float().mean()) if losses else None

    def stop(self) -> None:
        self._bar.stop(None)
        self.due = math.inf


def _total(facade: TrainerFacade) -> int | None:
    """Batches in this epoch, or to ``max_steps`` where that comes first; None when nothing says."""
    progress, options, total = facade.progress, facade.options, facade.num_training_batches
    if options.max_steps != -1:
        window = options.window(progress.epoch)
        left = (options.max_steps - progress.global_step) * window - progress.window_open
        total = min(total, progress.batches_done + max(0, left))
    return None if math.isinf(total) else int(total)


def _epochs(facade: TrainerFacade) -> int | None:
    return None if facade.options.max_epochs == -1 else facade.options.max_epochs


def _left(facade: TrainerFacade, rate: float | None, now: float, deadline: float) -> float | None:
    """Seconds until the first of the limits is reached; None when nothing bounds the run."""
    progress, options = facade.progress, facade.options
    bounds = [deadline - now]
    if rate:
        if options.max_epochs != -1 and not math.isinf(facade.num_training_batches):
            bounds.append((options.max_epochs * facade.num_training_batches - progress.batches_seen) / rate)
        if options.max_steps != -1:
            bounds.append((options.max_steps - progress.global_step) * options.window(progress.epoch) / rate)
    left: Any = min(bounds)
    return None if math.isinf(left) else max(0.0, left)
