"""No speed is printed for a side that trained to other losses."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from bench.losses import FIRST, LAST, disagreement, trail
from bench.measure import _judged
from bench.rounds import Rounds
from bench.sides import loop
from bench.sides.captured import Captured, Gathered
from bench.sides.job import Job
from bench.workloads import FLOAT32, WORKLOADS, Size


def run(name: str, train: Any = loop.plain, *, size: Size | None = None, spoil: float = 1.0, rounds: int = 2) -> list[dict[str, Any]]:
    """The records of a few real rounds in this process; ``spoil`` makes every learning rate so many times as large."""
    words, records = itertools.chain(["go"] * rounds, itertools.repeat("stop")), []
    w = WORKLOADS[name]
    job = Job.make(w, size or w.quick, "cpu", Rounds(lambda: next(words), records.append, "cpu", 0.0))
    make = job.model.optimizer if w.form != "turns" else job.model.optimizers_of

    def spoilt(**extra: Any) -> Any:
        made = make(**extra)
        for optimizer in made if isinstance(made, list) else [made]:
            for group in optimizer.param_groups:
                group["lr"] *= spoil
        return made

    setattr(job.model, "optimizer" if w.form != "turns" else "optimizers_of", spoilt)
    train(job)
    return records


def test_alike() -> None:
    """The same loop with a fused optimizer trains alike: nothing is said."""
    a = trail(run("autoencoder"))
    b = trail(run("autoencoder", lambda job: loop.plain(job, fused=True)))
    assert len(a["losses"]["first"]) == FIRST
    assert len(a["losses"]["last"]) == LAST
    assert disagreement("plain", a, "plain-fused", b, FLOAT32) == ""


def test_wrong_side_is_refused() -> None:
    """Another learning rate is found, and the sentence names both sides and both numbers."""
    a, b = trail(run("autoencoder")), trail(run("autoencoder", spoil=3.0))
    said = disagreement("plain", a, "mine", b, FLOAT32)
    i = next(i for i, (x, y) in enumerate(zip(a["losses"]["first"], b["losses"]["first"], strict=True)) if abs(x - y) > 2e-3 * x)
    assert "mine and plain do not train alike" in said
    assert f"{b['losses']['first'][i]:.6g} of mine" in said
    assert f"{a['losses']['first'][i]:.6g} of plain" in said


def test_late_difference_is_refused() -> None:
    """Losses that agree at first and not in the end are refused too; so are fewer of them, nan, and none of a kind."""
    a = trail(run("autoencoder"))
    late = {k: {"first": v["first"], "last": [2 * x for x in v["last"]]} for k, v in a.items()}
    assert "the 4 last" in disagreement("plain", a, "mine", late, FLOAT32)
    fewer = {k: {"first": v["first"], "last": v["last"][1:]} for k, v in a.items()}
    assert "not the same training" in disagreement("plain", a, "mine", fewer, FLOAT32)
    nan = {k: {"first": [float("nan")] * len(v["first"]), "last": v["last"]} for k, v in a.items()}
    assert "do not train alike" in disagreement("plain", a, "mine", nan, FLOAT32)
    assert "no loss of the same kind" in disagreement("plain", a, "mine", {}, FLOAT32)


def test_refused_side_has_no_speed() -> None:
    """The record of a side that disagrees keeps its losses and loses its microseconds; one that agrees keeps both."""
    w = WORKLOADS["autoencoder"]
    good, bad = trail(run("autoencoder")), trail(run("autoencoder", spoil=3.0))
    found = _judged(w, {"plain": {"us": 5.0, "trail": good}, "fabric": {"us": 1.0, "trail": bad}, "ignite": {"us": 6.0, "trail": good}})
    assert "us" not in found["fabric"]
    assert "autoencoder: fabric and plain do not train alike" in found["fabric"]["refused"]
    assert found["ignite"]["us"] == 6.0


@pytest.mark.parametrize("name", ["autoencoder", "autoencoder+accumulate+clip", "lstm_tbptt", "dcgan", "resnet18"])
def test_hand_captured_is_plain(name: str) -> None:
    """The loop for CUDA graphs, its pieces called in place of replayed, trains as the plain one: warm steps put back, rows in order."""

    def called(job: Job) -> None:
        with torch.compiler.set_stance("force_eager"):
            loop.train(job, Captured(job, lambda piece: piece), Gathered(job))

    w = WORKLOADS[name]
    assert disagreement("plain", trail(run(name)), "captured-by-hand", trail(run(name, called)), w.agree) == ""
