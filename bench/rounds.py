"""A side's end of the line: it trains a round when it is asked to, and answers with what the round was."""

from __future__ import annotations

import importlib.util
import resource
import sys
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import torch

_SPEC = importlib.util.find_spec("fasttrain")  # not imported: its memory and its start are one side's
PACKAGE = str(_SPEC.submodule_search_locations[0]) if _SPEC and _SPEC.submodule_search_locations else "fasttrain"
READS = {"cpu": "aten::_local_scalar_dense", "cuda": "Memcpy DtoH"}  # what .item(), float(t) and `if t` end in, as the profiler names it


class Stopped(Exception):
    """Nobody wants another round: leaves a framework's own loop."""


class Rounds:
    """``ask`` waits for the next order ("go", "count" or anything else: stop), ``answer`` sends a record."""

    def __init__(self, ask: Callable[[], str], answer: Callable[[Mapping[str, Any]], None], device: str, began: float) -> None:
        self._ask, self._answer, self.device, self._began = ask, answer, device, began
        self.notes: dict[str, Any] = {}  # what a side has to say about itself once
        self.stop: Callable[[], str] | None = None

    def start(self) -> bool:
        """Wait for an order; False when no more rounds are wanted. The clock starts here."""
        order = self._ask()
        if order not in ("go", "count"):
            return False
        self.means: list[float] = []
        self.losses: list[float] = []
        self._counted: dict[str, int] = {}
        self._count = _Count(self.device) if order == "count" else None
        if self._count is not None:
            self._count.begin()
        self._t = time.perf_counter()
        return True

    def logged(self, loss: float) -> None:
        """A loss that the side read as a person's log does."""
        self.losses.append(loss)

    def epoch(self, mean: float) -> None:
        """An epoch's mean loss. What is counted is counted in the round's first epoch."""
        self.means.append(mean)
        if self._count is not None and not self._counted:
            self._counted = self._count.end()

    def finish(self) -> None:
        """The round is over; its clock stops when the device has nothing left to do."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        record: dict[str, Any] = {"seconds": now - self._t, "begun_s": now - self._began, **self.notes}
        record |= {"means": self.means, "losses": self.losses}
        record |= self._counted
        record["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if self.device == "cuda":
            record["device_peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
        self._answer(record)


class _Count:
    """Own Python calls and host reads of one epoch, which is not timed."""

    def __init__(self, device: str) -> None:
        self.device, self.calls = device, 0

    def begin(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        self._profile = profile(activities=[ProfilerActivity.CPU if self.device == "cpu" else ProfilerActivity.CUDA])
        self._profile.__enter__()
        sys.setprofile(self._seen)

    def _seen(self, frame: FrameType, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            self.calls += 1

    def end(self) -> dict[str, int]:
        sys.setprofile(None)
        self._profile.__exit__(None, None, None)
        reads = sum(e.count for e in self._profile.key_averages() if e.key.startswith(READS[self.device]))
        return {"calls": self.calls, "reads": reads}


def watcher(rounds: Rounds, passes: int) -> dict[str, Any]:
    """The hooks of a callback for trainers that own the loop: ``passes`` epochs are a round, and each one's mean loss is read."""

    def on_train_epoch_start(self: Any, trainer: Any, module: Any) -> None:
        if trainer.current_epoch % passes == 0 and not rounds.start():
            raise Stopped

    def on_train_epoch_end(self: Any, trainer: Any, module: Any) -> None:
        rounds.epoch(float(trainer.callback_metrics["loss_epoch"]))
        if (trainer.current_epoch + 1) % passes == 0:
            rounds.finish()

    return {"on_train_epoch_start": on_train_epoch_start, "on_train_epoch_end": on_train_epoch_end}
