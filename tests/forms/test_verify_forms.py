"""verify=n in every form: a right capture passes, a wrong one is named, and the run goes on eagerly and right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.forms.pairs import FORMS, ROUNDING, WIDTH, Nets, batches, bug, mixed, same_weights, slow, trained
from tests.forms.test_splits import Cell, sequences


class Dropping(Nets):
    """Dropout: both sides must draw the same masks."""

    def fake(self, x: Tensor) -> Tensor:
        return super().fake(nn.functional.dropout(x, 0.3))


class Normed(Nets):
    """A bias in front of a batch norm: its gradient is zero but for cancellation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def fake(self, x: Tensor) -> Tensor:
        return self.norm(super().fake(x))


@pytest.mark.parametrize("steps", [pytest.param(1, marks=slow), 5])
@pytest.mark.parametrize("form", FORMS)
def test_a_right_capture_passes(form: str, steps: int) -> None:
    """It stays captured, says that it was verified, and computes what it would have computed."""
    make = mixed(form, Dropping)
    ours = trained(make, batches(last=3), "compile", verify=steps)
    assert ours.result.capture.rung == "compile", ours.result.capture.obstacles
    assert f"{steps} steps verified" in ours.result.capture.why
    same_weights(ours, trained(make, batches(last=3), "compile"), ROUNDING)


@pytest.mark.parametrize(
    "form",
    [
        pytest.param("indexed", marks=slow),
        pytest.param("generator", marks=bug("slots that are zero but for cancellation are called a difference")),
        pytest.param("manual", marks=[slow, bug("slots that are zero but for cancellation are called a difference")]),
    ],
)
def test_cancellation_is_no_difference(form: str) -> None:
    """Batch norm behind a bias: what is left of its gradient is noise on both sides."""
    ours = trained(mixed(form, Normed), batches(), "compile", verify=5)
    assert ours.result.capture.rung == "compile", ours.result.capture.obstacles


@pytest.mark.parametrize("form", [pytest.param("indexed", marks=slow), "generator"])
def test_a_right_capture_passes_in_windows(form: str) -> None:
    """Gathered gradients too."""
    ours = trained(FORMS[form], batches(last=3), "compile", verify=3, accumulate_grad_batches=4)
    assert ours.result.capture.rung == "compile", ours.result.capture.obstacles
    same_weights(ours, trained(FORMS[form], batches(last=3), accumulate_grad_batches=4), ROUNDING)


class WrongCritic(Nets):
    """Half as much again, but only while it is traced."""

    def of_critic(self, x: Tensor, fake: Tensor) -> Tensor:
        loss = super().of_critic(x, fake)
        return loss * 1.5 if torch.compiler.is_compiling() else loss


class WrongGenerator(Nets):
    def of_generator(self, x: Tensor, fake: Tensor) -> Tensor:
        loss = super().of_generator(x, fake)
        return loss * 1.5 if torch.compiler.is_compiling() else loss


class WrongBuffer(Nets):
    """The losses are right, what is counted is not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def of_critic(self, x: Tensor, fake: Tensor) -> Tensor:
        self.count.add_(2.0 if torch.compiler.is_compiling() else 1.0)  # type: ignore[operator]
        return super().of_critic(x, fake)


QUICK = {("indexed", WrongCritic), ("generator", WrongGenerator), ("manual", WrongBuffer)}


@pytest.mark.parametrize(
    ("form", "wrong"),
    [
        pytest.param(form, wrong, marks=() if (form, wrong) in QUICK else slow)
        for form in FORMS
        for wrong in (WrongCritic, WrongGenerator, WrongBuffer)
    ],
)
def test_a_wrong_capture_is_found(form: str, wrong: Any) -> None:
    """Planted in either turn, or in a buffer: named, and the weights are those of an eager run."""
    make = mixed(form, wrong)
    ours = trained(make, batches(), "compile", verify=3)
    same_weights(ours, trained(make, batches()), ROUNDING)
    assert ours.result.capture.rung == "eager"
    assert any("verify found a difference at step 0" in str(o) for o in ours.result.capture.obstacles)
    assert ours.result.steps == 20


@slow
def test_a_wrong_capture_is_found_in_a_window() -> None:
    """In the second batch of a window of three, where the first was right: the gathered gradient goes over."""

    class Later(WrongCritic):
        def of_critic(self, x: Tensor, fake: Tensor) -> Tensor:
            return super(WrongCritic, self).of_critic(x, fake)

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            fake = self.fake(batch)
            loss = self.of_critic(batch, fake)
            yield loss * 1.5 if batch_idx == 1 and torch.compiler.is_compiling() else loss
            yield self.of_generator(batch, fake)

    ours = trained(Later, batches(), "compile", verify=3, accumulate_grad_batches=3)
    same_weights(ours, trained(Later, batches(), accumulate_grad_batches=3), ROUNDING)
    assert ours.result.capture.rung == "eager"


@slow
def test_a_wrong_capture_is_found_in_splits() -> None:
    """Truncated backpropagation through time."""

    class Wrong(Cell):
        def through(self, x: Tensor, hidden: Any) -> Any:
            hidden, loss = super().through(x, hidden)
            return hidden, loss * 1.5 if torch.compiler.is_compiling() else loss

    ours = trained(Wrong, sequences(), "compile", verify=3)
    same_weights(ours, trained(Wrong, sequences()), ROUNDING)
    assert ours.result.capture.rung == "eager"


def test_what_was_not_verified_is_not_said_to_be() -> None:
    """One optimizer's turn is wrong: the report does not say that steps were verified."""
    ours = trained(mixed("indexed", WrongCritic), batches(), "compile", verify=3)
    assert "steps verified" not in ours.result.capture.why


class Hooked(Nets):
    def training_step(self, batch: Tensor, batch_idx: int, optimizer_idx: int) -> Tensor:
        return self.loss(batch, optimizer_idx)

    def on_after_backward(self) -> None:
        self.seen.append(sum(float(p.grad.sum()) for p in self.parameters() if p.grad is not None))


def test_verify_calls_no_hook_twice() -> None:
    """Hooks around a captured piece hear of every turn once, verified or not."""
    ours = trained(Hooked, batches(), "compile", verify=3)
    assert len(ours.seen) == 40
    same_weights(ours, trained(Hooked, batches()), ROUNDING)
