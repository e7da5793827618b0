"""What a steady step of several optimizers may cost: few Python calls, no host read, one trace."""

from __future__ import annotations

import os
import sys
from types import FrameType
from typing import Any

import pytest
from torch import Tensor

import fasttrain
from tests.forms.pairs import FORMS, QUIET, Manual, Nets, batches, made, mixed, slow, trained
from tests.laws.test_steady_step import Counted, _Reads

PACKAGE = os.path.dirname(fasttrain.__file__)
# Measured 2026-11-20: 41, 39 and 64, of which 10 a parameter of both networks and verb are gradients moved under manual optimization.
MOST = {"indexed": 45, "generator": 45, "manual": 70}


class Logging(Nets):
    """Two logged values a batch."""

    def of_critic(self, x: Tensor, fake: Tensor) -> Tensor:
        loss = super().of_critic(x, fake)
        self.log("critic", loss, on_epoch=True)
        return loss

    def of_generator(self, x: Tensor, fake: Tensor) -> Tensor:
        loss = super().of_generator(x, fake)
        self.log("generator", loss)
        return loss


@pytest.mark.parametrize("form", FORMS)
def test_few_python_calls(form: str) -> None:
    """A steady captured batch of two optimizers, called past the guards, never traced again."""
    calls: list[str] = []

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            calls.append(frame.f_code.co_qualname)

    data = Counted(batches(60), 20, 50, lambda: sys.setprofile(profile), lambda: sys.setprofile(None))
    trainer = fasttrain.compile_fit(made(mixed(form, Logging)), max_epochs=1, capture="compile", **QUIET)
    try:
        result = trainer.fit(data)
    finally:
        sys.setprofile(None)
    assert result.capture.direct, trainer.explain()
    assert result.capture.traces == (2 if form == "indexed" else 1)
    assert len(calls) / 30 <= MOST[form], {n: calls.count(n) / 30 for n in set(calls)}


@pytest.mark.parametrize("form", FORMS)
def test_no_host_read(form: str) -> None:
    """Losses, logged values, clipping: nothing is read before somebody asks."""
    mode, stack = _Reads(), []

    def on() -> None:
        mode.__enter__()
        stack.append(mode)

    options = {} if form == "manual" else {"gradient_clip_val": 1.0}
    data = Counted(batches(60), 20, 50, on, lambda: stack.pop().__exit__(None, None, None))
    fasttrain.compile_fit(made(mixed(form, Logging)), max_epochs=1, capture="compile", **QUIET, **options).fit(data)
    assert mode.seen == []


@slow
@pytest.mark.parametrize("form", FORMS)
def test_one_trace_a_turn(form: str) -> None:
    """Four epochs with validation and a short last batch: a trace a turn (or one for all), and no recompile."""

    class Validated(Logging):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("val", self.score(batch).mean())

    ours = trained(mixed(form, Validated), batches(8, last=3), "compile", val=batches(2), max_epochs=4)
    assert ours.result.capture.traces == (2 if form == "indexed" else 1)
    assert not ours.result.capture.obstacles


def test_branches_on_the_number_of_the_batch_are_traced_once_each() -> None:
    """A generator's turn in every fifth batch, over sixty: at most three traces."""

    class Fifth(Manual):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            critic, generator = self.optimizers()
            fake = self.fake(batch)
            critic.zero_grad()
            self.manual_backward(self.of_critic(batch, fake))
            critic.step()
            if batch_idx % 5 == 4:
                generator.zero_grad()
                self.manual_backward(self.of_generator(batch, fake))
                generator.step()

    ours = trained(Fifth, batches(60), "compile", max_epochs=1)
    assert ours.result.capture.rung == "compile"
    assert ours.result.capture.traces <= 3
    assert not ours.result.capture.obstacles


@slow
@pytest.mark.parametrize("form", FORMS)
def test_nothing_grows(form: str) -> None:
    """A hundred batches and another hundred: no tensor is kept a batch."""
    import gc

    counts: list[int] = []

    def count() -> None:
        gc.collect()
        counts.append(sum(1 for o in gc.get_objects() if type(o) is Tensor))

    data = Counted(batches(210), 60, 160, count, count)
    fasttrain.compile_fit(made(FORMS[form]), max_epochs=1, capture="compile", **QUIET).fit(data)
    assert counts[1] <= counts[0] + 5, counts
