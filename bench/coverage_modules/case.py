"""What one public module is trained with: how it is made, its batches, and for a plain module its loss and optimizer."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A module ready to be trained. Only a plain module has ``loss(module, batch)`` and ``optimizer(parameters)``."""

    module: nn.Module
    batches: Sequence[Any]  # the distinct ones, gone through in order and again
    loss: Callable[..., Tensor] | None = None
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)  # for both trainers, by Lightning's names


@dataclass(frozen=True, kw_only=True)
class Case:
    """One public module. ``needs`` are the packages to import, the one the module is from first."""

    name: str
    needs: tuple[str, ...]
    make: Callable[[], Subject]  # imports what it needs itself; seeded by the caller
    early: int | None = None  # losses to be compared, where rounding grows from step to step; None: all of them

    def missing(self) -> str:
        """Why this case cannot run here; empty when it can."""
        gone = [n for n in self.needs if importlib.util.find_spec(n) is None]
        return f"not installed: {', '.join(gone)}" if gone else ""


class _HandedOver(Exception):
    """A package has called ``Trainer.fit``."""


def handed_to_trainer(family: str, train: Callable[[], Any], batches: int = 8) -> Subject:
    """What a package's own ``train()`` hands to the Trainer of ``family``: its module and its first batches."""
    trainer: Any = importlib.import_module(family).Trainer
    seen: dict[str, Any] = {}

    def fit(self: Any, model: Any, train_dataloaders: Any = None, val_dataloaders: Any = None, datamodule: Any = None, **_: Any) -> None:
        seen.update(module=model, loader=train_dataloaders if train_dataloaders is not None else datamodule)
        raise _HandedOver

    with mock.patch.object(trainer, "fit", fit), contextlib.suppress(_HandedOver):
        train()
    source = seen["loader"]
    if hasattr(source, "train_dataloader"):
        source.setup("fit")
        source = source.train_dataloader()
    kept: list[Any] = []
    while len(kept) < batches:
        kept += itertools.islice(source, batches - len(kept))
    return Subject(module=seen["module"], batches=kept)


class Repeated(Dataset[Any]):
    """``steps`` of the batches, in order; ``fetched`` says when each was asked for."""

    def __init__(self, batches: Sequence[Any], steps: int) -> None:
        self.batches, self.steps = batches, steps
        self.fetched: list[float] = []

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, i: int) -> Any:
        if not 0 <= i < self.steps:
            raise IndexError(i)
        self.fetched.append(time.perf_counter())
        return self.batches[i % len(self.batches)]


def loader(subject: Subject, steps: int) -> DataLoader[Any]:
    """``steps`` ready batches an epoch, in order; its own generator, so that the global one is the module's alone."""
    return DataLoader(Repeated(subject.batches, steps), batch_size=None, collate_fn=lambda b: b, generator=torch.Generator())
