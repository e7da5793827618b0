"""``explain()``: each obstacle by file and line, what was done about it, what it takes of a step, and the change that would remove it."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

import fasttrain
from tests.graphs.test_obstacles import QUIET, Net, batches


class Sleeps(Net):
    """Two places where the trace ends; the second takes 2 ms."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        h = _much(self.a(x))
        if float(h.detach().mean()) > 1e6:  # the first
            h = h * 2
        h = _much(h)
        time.sleep(2e-3)  # the second
        h = _much(h)
        return F.cross_entropy(self.b(h), y)


class Talks(Net):
    """Nothing ends the trace."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if (batch[0] > 1e9).any():
            raise ValueError("too large")
        print("batch", batch_idx)
        return self.loss(batch)


def _much(h: Tensor) -> Tensor:
    """Enough operations to be compiled."""
    for _ in range(4):
        h = (h.sin() * 0.5 + h.cos() * 0.5).tanh()
    return h


def test_every_break_is_named_with_its_cost(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = fasttrain.compile_fit(Sleeps(), capture="compile", **QUIET)
    found = {int(o.where.split(":")[1]): o for o in trainer.fit(batches(3)).capture.obstacles}
    first = Sleeps.training_step.__code__.co_firstlineno
    branch, rest = (next(o for line, o in found.items() if line == first + n) for n in (3, 6))
    assert branch.where.split(":")[0] == rest.where.split(":")[0] == __file__
    assert branch.cost_us is not None
    assert rest.cost_us is not None
    assert rest.cost_us > 2000 > branch.cost_us > 0
    text = trainer.explain()
    assert "in the way" not in text
    assert f"{rest.cost_us:.0f} us a step" in text


def test_what_was_dealt_with_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """A whole step can have obstacles: none of them is in the way."""
    trainer = fasttrain.compile_fit(Talks(), capture="compile", **QUIET)
    report = trainer.fit(batches(3)).capture
    assert report.whole
    done = {o.reason: o for o in report.obstacles}
    assert "checked in the graph" in done["a branch on data that raises."].done
    assert (done["print in the step."].cost_us or 0) > 0
    assert "in the way" not in trainer.explain()


class Counts(Net):
    """Its counter is Python's, and the loss takes it up: guards are evaluated every step."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.calls += 1
        return self.loss(batch) * self.calls


def test_guards_have_a_cost() -> None:
    trainer = fasttrain.compile_fit(Counts(), capture="compile", **QUIET)
    report = trainer.fit(batches(6)).capture
    assert not report.direct
    assert 0 < report.guards_us < 1e5
    assert f"{report.guards_us:.0f} us" in trainer.explain()
