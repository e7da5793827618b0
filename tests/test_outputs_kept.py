"""What steps return lives as long as somebody reads it: to the epoch's end for an ``*_epoch_end`` hook, else not at all."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fasttrain import EvalResult, TrainResult
from tests.parity import modules as m
from tests.parity.harness import Case, fast_fit

BATCHES, ODD = 12, 1237  # no other tensor has so many elements
OPTIONS = {"max_epochs": 2, "num_sanity_val_steps": 0}


def alive() -> int:
    """How many of the tensors that the steps returned are in memory."""
    return sum(type(t) is Tensor and t.numel() == ODD for t in gc.get_objects())


def loader() -> Any:
    return m.labelled(BATCHES * 4, 4)


class Returns(m.Base):
    """Steps that return more than a loss: in Result objects, or in dicts."""

    def build(self) -> None:
        super().build()
        self.alive: dict[str, list[int]] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out = self(batch[0])
        loss, big = F.cross_entropy(out, batch[1]), out.sum() * torch.ones(ODD)
        if not self.kw["results"]:
            return {"loss": loss, "big": big}
        result = TrainResult(loss)
        result.log("train_loss", loss, on_epoch=True)
        result.big = big
        return result

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        big = self(batch[0]).sum() * torch.ones(ODD)
        if not self.kw["results"]:
            return {"big": big}
        result = EvalResult()
        result.log("val_big", big.mean())
        result.big = big
        return result

    def note(self, where: str) -> None:
        self.alive.setdefault(where, []).append(alive())

    def on_train_epoch_start(self) -> None:
        self.note("start")

    def on_validation_epoch_end(self) -> None:
        self.note("validated")

    def on_train_epoch_end(self) -> None:
        self.note("trained")


class ReadsEachBatch(Returns):
    """Hooks that read each output when its batch is done, and keep nothing."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert outputs["big"].numel() == ODD

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        assert outputs["big"].numel() == ODD


class ReadsEpochs(Returns):
    """Hooks that are handed all of an epoch."""

    def training_epoch_end(self, outputs: Any) -> None:
        self._count(outputs)
        self.note("training_epoch_end")

    def validation_epoch_end(self, outputs: Any) -> None:
        self._count(outputs)
        self.note("validation_epoch_end")

    def _count(self, outputs: Any) -> None:
        kept = outputs.big.numel() if self.kw["results"] else sum(o["big"].numel() for o in outputs)
        assert kept == BATCHES * ODD


@pytest.mark.parametrize("capture", ["eager", "compile"])
@pytest.mark.parametrize("results", [True, False])
@pytest.mark.parametrize("make", [Returns, ReadsEachBatch])
def test_outputs_that_no_epoch_end_hook_reads_are_not_kept(make: Any, results: bool, capture: str) -> None:
    """At the end of an epoch at most the last batch's output of each loop is in memory, of twelve."""
    ours = fast_fit(Case(lambda: make(results=results), loader, loader, OPTIONS), capture=capture)
    assert ours.rung == capture
    seen = ours.module.alive
    assert [len(v) for v in seen.values()] == [2, 2, 2]
    assert max(n for v in seen.values() for n in v) <= 2, seen  # the last of either loop


@pytest.mark.parametrize("capture", ["eager", "compile"])
@pytest.mark.parametrize("results", [True, False])
def test_outputs_are_kept_for_the_epoch_end_hook_and_gone_after_it(results: bool, capture: str) -> None:
    """All twelve while the hook runs, which shows that they can be counted; none of them when the next thing happens."""
    ours = fast_fit(Case(lambda: ReadsEpochs(results=results), loader, loader, OPTIONS), capture=capture)
    assert ours.rung == capture
    seen = ours.module.alive
    assert min(seen["training_epoch_end"]) >= BATCHES, seen
    assert min(seen["validation_epoch_end"]) >= 2 * BATCHES, seen
    assert max(seen["validated"]) <= BATCHES + 1, seen  # the training epoch's, whose hook is still to come
    assert max(seen["start"] + seen["trained"]) <= 1, seen
