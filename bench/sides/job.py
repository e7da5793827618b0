"""What a side is given: the workload, its model, its loader and the line that asks for rounds."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.data import make_loader
from bench.rounds import Rounds
from bench.workloads import Size, Workload

MODEL_SEED, TRAIN_SEED = 1, 11


@dataclass
class Job:
    """Everything before the first batch, made from the same seeds for every side."""

    w: Workload
    size: Size
    device: str
    rounds: Rounds
    model: Any = None
    loader: Any = None

    @classmethod
    def make(cls, w: Workload, size: Size, device: str, rounds: Rounds) -> Job:
        torch.manual_seed(MODEL_SEED)
        model = w.make(**size.model)
        loader = make_loader(model, w.loader, size.batch, size.batches, device)
        torch.manual_seed(TRAIN_SEED)
        return cls(w, size, device, rounds, model, loader)

    @property
    def log_every(self) -> int:
        """Optimizer steps between two losses that are read."""
        return self.w.log_every or max(1, self.size.batches // self.w.window // 4)

    @property
    def dtype(self) -> torch.dtype | None:
        """What autocast computes in; None without it."""
        return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(self.w.precision)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device, dtype=self.dtype) if self.dtype else contextlib.nullcontext()

    def scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device, enabled=self.dtype is torch.float16)

    def to_device(self, batch: Any) -> Any:
        return batch if self.device == "cpu" else [t.to(self.device, non_blocking=True) for t in batch]

    def observed(self, out: Tensor) -> dict[str, Tensor]:
        """The values that are logged beside the loss: none, but in the logging variants."""
        return self.model.observed(out) if self.w.log_every else {}


class Tally:
    """An epoch's sums, on the device: what a person who keeps a loop writes down."""

    def __init__(self, job: Job) -> None:
        self.job, self.every = job, job.log_every
        self.sums: dict[str, Tensor] = {}
        self.batches = self.steps = 0

    def add(self, values: dict[str, Tensor], stepped: bool = True) -> None:
        """``values["loss"]`` and the others of a batch, detached; every so many steps they are read."""
        self.batches += 1
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        if stepped:
            self.steps += 1
            if self.steps % self.every == 0:
                read = {name: float(value) for name, value in values.items()}
                self.job.rounds.logged(read.get("last", read["loss"]))  # of several splits the last one is logged

    def end(self) -> None:
        """The epoch's means are read, and the sums begin anew; the count of steps goes on, as a trainer's does."""
        means = {name: float(value) / self.batches for name, value in self.sums.items()}
        self.job.rounds.epoch(means["loss"])
        self.sums, self.batches = {}, 0
