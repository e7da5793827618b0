"""verify=n in every form: a right capture passes, a wrong one is named, and the run goes on eagerly and right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttrain import CaptureError
from tests.forms.pairs import FORMS, ROUNDING, WIDTH, Nets, batches, loss_scale, mixed, same_weights, slow, trained, where_marked
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


@pytest.mark.parametrize("form", [pytest.param("indexed", marks=slow), "generator", pytest.param("manual", marks=slow)])
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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wrong", [pytest.param(WrongCritic, marks=slow), WrongGenerator])
def test_a_wrong_capture_is_found_at_the_start(form: str, wrong: Any) -> None:
    """One look at its gradients, or at what they have moved, before the first step; without verify=n too."""
    with pytest.raises(CaptureError, match="the gradient of"):
        trained(mixed(form, wrong), batches(), "compile")


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


@pytest.mark.parametrize("window", [1, pytest.param(3, marks=slow)])
@pytest.mark.parametrize("wrong", [WrongCritic, WrongGenerator])
def test_turns_are_captured_together(wrong: Any, window: int) -> None:
    """One optimizer's turn is wrong: the other is eager too, as the report says, and nothing is said to be verified."""

    class Noted(wrong):  # type: ignore[misc]
        def loss(self, x: Tensor, i: int) -> Tensor:
            if not torch.compiler.is_compiling():
                self.seen.append(i)
            return super().loss(x, i)

    ours = trained(mixed("indexed", Noted), batches(), "compile", verify=3, accumulate_grad_batches=window)
    assert ours.seen[-20:] == [0, 1] * 10
    assert ours.result.capture.rung == "eager"
    assert "steps verified" not in ours.result.capture.why
    same_weights(ours, trained(mixed("indexed", wrong), batches(), accumulate_grad_batches=window), ROUNDING)


# -- fp16 -------------------------------------------------------------------------------------------------------------
class One(Nets):
    """One optimizer over the critic."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch, 0)

    def by_hand(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(self.dis.parameters(), lr=2e-2)]


def in_form(form: str, *bases: type) -> Any:
    return type("Made", (*bases, One if form == "one" else FORMS[form]), {})


class Both(Nets):
    """The critic's gradient overflows in the marked batch."""

    def of_critic(self, x: Tensor, fake: Tensor) -> Tensor:
        loss, weights = super().of_critic(x, fake), self.dis[0].bias.sum() * where_marked(x, 1e36).sub(1.0)
        return loss + (weights - weights.detach())


class Alone(Both):
    """But only while it is traced."""

    def of_critic(self, x: Tensor, fake: Tensor) -> Tensor:
        return super().of_critic(x, fake) if torch.compiler.is_compiling() else super(Both, self).of_critic(x, fake)


ONE_AND_FORMS = ["one", pytest.param("indexed", marks=slow), "generator", pytest.param("manual", marks=slow)]


@pytest.mark.parametrize("form", ONE_AND_FORMS)
def test_the_loss_scale_moves_as_without_verify(form: str) -> None:
    """Halved once where both sides overflow, and every clean step counted once."""
    make = in_form(form, Both)
    ours = trained(make, batches(marked=2), "compile", verify=5, precision="16-mixed", max_epochs=1)
    assert ours.result.capture.rung == "compile", ours.result.capture.obstacles
    assert loss_scale(ours) == (32768.0, 7)


@pytest.mark.parametrize("form", ONE_AND_FORMS)
def test_one_side_that_overflows_once_is_no_difference(form: str) -> None:
    """At the edge of fp16 rounding decides it: the eager side is taken, and that step is not one of those verified."""
    make = in_form(form, Alone)
    ours = trained(make, batches(marked=2), "compile", verify=5, precision="16-mixed", max_epochs=1)
    assert ours.result.capture.rung == "compile", ours.result.capture.obstacles
    assert "5 steps verified" in ours.result.capture.why
    assert loss_scale(ours) == (65536.0, 10)
    same_weights(ours, trained(make, batches(marked=2), precision="16-mixed", max_epochs=1), 2e-2)


@pytest.mark.parametrize("form", ONE_AND_FORMS)
def test_one_side_that_overflows_again_is_a_difference(form: str) -> None:
    """A capture that never makes a step is found, and costs the run none."""
    make, every = in_form(form, Alone), [x.index_fill(0, torch.tensor([0]), 60.0) for x in batches()]
    ours = trained(make, every, "compile", verify=5, precision="16-mixed", max_epochs=1)
    assert ours.result.capture.rung == "eager"
    assert any("overflows, twice running" in str(o) for o in ours.result.capture.obstacles)
    assert ours.result.steps == 10
    same_weights(ours, trained(make, every, precision="16-mixed", max_epochs=1), 2e-2)


# -- in pieces --------------------------------------------------------------------------------------------------------
class Reads(Nets):
    """Branches on data: it is cut."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        h = torch.tanh(self.gen(torch.dropout(batch, 0.3, self.training)))
        h = h * 2 if float(h.detach().sum()) > 0 else h
        return self.of_critic(batch, h) + h.square().mean()

    def by_hand(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(self.parameters(), lr=2e-2)]


class WrongReads(Reads):
    """With code of its own, which nobody has compiled before."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        h = torch.tanh(self.gen(batch))
        h = h * 3 if float(h.detach().sum()) > 0 else h
        loss = self.of_critic(batch, h) + h.square().mean()
        return loss * 1.5 if torch.compiler.is_compiling() else loss


class ManualReads(Nets):
    automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        critic, generator = self.optimizers()
        for optimizer, loss in ((critic, self.of_critic), (generator, self.of_generator)):
            fake = self.fake(batch)
            fake = fake * 2 if float(fake.detach().sum()) > 0 else fake
            optimizer.zero_grad()
            self.manual_backward(loss(batch, fake))
            optimizer.step()


class WrongManualReads(ManualReads):
    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer, _ = self.optimizers()
        fake = self.fake(batch)
        fake = fake * 3 if float(fake.detach().sum()) > 0 else fake
        loss = self.of_critic(batch, fake)
        optimizer.zero_grad()
        self.manual_backward(loss * 1.5 if torch.compiler.is_compiling() else loss)
        optimizer.step()


@pytest.mark.parametrize("make", [Reads, pytest.param(ManualReads, marks=slow)])
@pytest.mark.parametrize("window", [1, 3])
def test_a_right_step_in_pieces_passes(make: Any, window: int) -> None:
    """And trains as it would have."""
    window = 1 if make is ManualReads else window
    ours, without = (trained(make, batches(last=3), "compile", verify=n, accumulate_grad_batches=window) for n in (3, 0))
    assert not ours.result.capture.whole
    assert "3 steps verified" in ours.result.capture.why, ours.result.capture.obstacles
    same_weights(ours, without, 1e-4)  # one of them may run what the other has compiled


@pytest.mark.parametrize("make", [WrongReads, pytest.param(WrongManualReads, marks=slow)])
def test_a_wrong_step_in_pieces_is_found(make: Any) -> None:
    """Named, and the weights are those of an eager run."""
    ours = trained(make, batches(), "compile", verify=3)
    assert ours.result.capture.rung == "eager"
    assert any("verify found a difference at step 0" in str(o) for o in ours.result.capture.obstacles)
    same_weights(ours, trained(make, batches()), ROUNDING)


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
