"""track_grad_norm: the fused update's norms are those of the eager rung, step by step, and change nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fasttrain
from fasttrain.graphs.norms import GradientNorms
from tests.forms.pairs import FORMS, Nets, batches, same_weights, slow, trained, where_marked


class Net(Nets):
    """One optimizer; one weight has no gradient, and a gradient or the loss may be made infinite in the marked batch."""

    wrong = ""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.of_critic(batch, self.fake(batch)) + self.fake(batch).float().square().mean()
        if self.wrong == "gradient":
            loss = loss + torch.sqrt(self.dis[0].bias.sum() * 0.0 + where_marked(batch, 0.0))
        return loss * where_marked(batch, math.nan) if self.wrong == "loss" else loss

    def by_hand(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(self.parameters(), lr=1e-2)]


class BadLoss(Net):
    wrong = "loss"


class Told(fasttrain.Callback):
    """The norms after every batch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.seen.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("grad_")})


def told(make: Any, capture: str, data: Any = None, **options: Any) -> tuple[Any, list[dict[str, float]]]:
    told = Told()
    module = trained(make, data or batches(last=3), capture, callbacks=[told], **options)
    return module, told.seen


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"gradient_clip_val": 0.1},
    "clipped by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "a window": {"accumulate_grad_batches": 4, "gradient_clip_val": 0.1},
    "skip": {"nonfinite": "skip"},
    "ignore": {"nonfinite": "ignore"},
    "64-true": {"precision": "64-true"},
    "16-mixed": {"precision": "16-mixed"},
}


QUICK = {("plain", 2), ("clipped", 2), ("clipped", "inf"), ("16-mixed", 2)}


@pytest.mark.parametrize(
    ("case", "norm"), [pytest.param(c, n, marks=() if (c, n) in QUICK else slow) for c in CASES for n in (2, "inf")]
)
def test_captured_norms_are_the_eager_ones(case: str, norm: Any) -> None:
    """After every batch, by name; and the weights are those of a run that tracks nothing, bit for bit."""
    _, wanted = told(Net, "eager", track_grad_norm=norm, **CASES[case])
    ours, got = told(Net, "compile", track_grad_norm=norm, **CASES[case])
    rel = 1e-2 if case == "16-mixed" else 1e-4
    assert len(got) == 20
    assert {*got[-1]} == {f"grad_{float(norm)}_norm/{n}" for n, p in ours.named_parameters() if "unused" not in n} | {
        f"grad_{float(norm)}_norm_total"
    }
    for a, b in zip(got, wanted, strict=True):
        assert a == pytest.approx(b, rel=rel, abs=1e-6)
    same_weights(ours, told(Net, "compile", **CASES[case])[0])


@pytest.mark.parametrize("capture", ["eager", "compile"])
def test_a_refused_step_is_told_of_as_ever(capture: str) -> None:
    """A loss that is nan: its norms are nan, and the weights stay."""
    ours, got = told(BadLoss, capture, batches(marked=3), track_grad_norm=2, nonfinite="skip", max_epochs=1)
    assert [math.isnan(g["grad_2.0_norm_total"]) for g in got] == [i == 3 for i in range(10)]
    assert ours.result.steps == 9
    same_weights(ours, told(BadLoss, capture, batches(marked=3), nonfinite="skip", max_epochs=1)[0])


@pytest.mark.parametrize("capture", ["eager", "compile"])
@pytest.mark.parametrize("tracked", [None, 2])
def test_tracking_refuses_nothing(tracked: int | None, capture: str) -> None:
    """An infinite gradient under a finite loss: whether it is refused does not hang on who looks at norms."""

    class BadGradient(Net):
        wrong = "gradient"

    ours = trained(BadGradient, batches(marked=9), capture, max_epochs=1, track_grad_norm=tracked)
    assert ours.result.steps == 10
    assert not all(p.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("norm", [2, "inf", 1])
def test_the_kernel_measures_where_it_can(norm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pass over the gradients of ten steps beside the fused update's own, but for norms it does not know."""
    passes: list[int] = []
    real = GradientNorms.__call__
    monkeypatch.setattr(GradientNorms, "__call__", lambda self, *given: (passes.append(1), real(self, *given))[1])
    trained(Net, batches(), "compile", track_grad_norm=norm, max_epochs=1)
    assert (len(passes) >= 10) == (norm == 1)
    assert norm == 1 or len(passes) == 1  # the eager step that the capture is compared with


@pytest.mark.parametrize("form", ["one", "generator"])
def test_verify_tells_nothing_twice(form: str) -> None:
    """The eager twin's norms are nobody's news: the epoch's mean is the same."""
    make = Net if form == "one" else FORMS[form]
    ours, without = (trained(make, batches(), "compile", track_grad_norm=2, verify=n, max_epochs=1) for n in (4, 0))
    means = [{k: v for k, v in m.result.metrics.items() if "norm" in k} for m in (ours, without)]
    assert means[0]
    assert means[0] == pytest.approx(means[1], rel=1e-4)
