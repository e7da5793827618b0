"""What somebody changes while a captured run goes on - who trains, the optimizer's methods, the optimizer - is seen, as eagerly."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fasttrain
from fasttrain.errors import CaptureError
from tests.graphs.test_obstacles import QUIET, TORCH, Net, batches, both


class Freezes(Net):
    """One layer begins (or ceases) to train in the step's own code."""

    trains = False

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.a.requires_grad_(self.trains)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.steps += 1
        if self.steps == 5:
            self.a.requires_grad_(not self.trains)
        return self.loss(batch)


class Ends(Freezes):
    trains = True


class FreezesBehindTheLoss(Ends):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.steps += 1
        if self.steps == 5:
            self.a.requires_grad_(False)
        return loss


class FreezesInManual(Freezes):
    """Gathered over three batches, by hand."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        if batch_idx % 3 == 2:
            self.optimizers().step()
            self.optimizers().zero_grad()
        return loss


class FreezesBesideAHook(Freezes):
    def on_after_backward(self) -> None: ...


@pytest.mark.parametrize("make", [Freezes, Ends, FreezesBehindTheLoss, FreezesInManual, FreezesBesideAHook])
def test_the_step_itself_says_what_trains(make: type[Net]) -> None:
    """From that very step on, with torch's gradients."""
    both(make)


@pytest.mark.parametrize("make", [Freezes, Ends])
def test_in_the_middle_of_a_window(make: type[Net]) -> None:
    both(make, accumulate_grad_batches=4)


def halves(module: Net, before: Callable[..., Any]) -> Callable[..., Any]:
    """Halves the gradients it finds."""

    @functools.wraps(before)
    def halved(*args: Any, **kwargs: Any) -> Any:
        for p in module.parameters():
            if p.grad is not None:
                p.grad.mul_(0.5)
        return before(*args, **kwargs) if before.__name__ == "step" else None

    return halved


class Replaces(Net):
    """A hook puts its own ``zero_grad`` (which keeps half of every gradient) or ``step`` on the optimizer."""

    name = "zero_grad"

    def __init__(self) -> None:
        super().__init__()
        self.ends = 0

    def configure_optimizers(self) -> Any:
        self.made = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return self.made

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends += 1
        if self.ends == 4:
            setattr(self.made, self.name, halves(self, getattr(self.made, self.name)))


class ReplacesStep(Replaces):
    name = "step"


class InManual(Replaces):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class StepInManual(InManual):
    name = "step"


class OnWhatIsGiven(InManual):
    """The object that ``optimizers()`` gives, not the optimizer."""

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends += 1
        if self.ends == 4:
            self.optimizers().step = halves(self, self.optimizers().step)


class StepHookInManual(InManual):
    def on_train_batch_end(self, *_: Any) -> None:
        self.ends += 1
        if self.ends == 4:
            self.made.register_step_pre_hook(lambda *_: [p.grad.mul_(0.5) for p in self.parameters()] and None)


class FromTheBeginning(Replaces):
    def configure_optimizers(self) -> Any:
        made = super().configure_optimizers()
        made.zero_grad = halves(self, made.zero_grad)
        return made

    def on_train_batch_end(self, *_: Any) -> None: ...


class FromTheBeginningInManual(FromTheBeginning):
    automatic_optimization = False
    training_step = InManual.training_step


class InAGenerator(ReplacesStep):
    def training_step(self, batch: Any, batch_idx: int) -> Iterator[Tensor]:
        yield self.loss(batch)


class AroundASchedulers(Replaces):
    """``functools.wraps`` copies the mark by which torch's schedulers know their own wrapper."""

    def configure_optimizers(self) -> Any:
        made = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.StepLR(made, 4)
        made.step = halves(self, made.step)
        return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_end(self, *_: Any) -> None: ...


class InTheStep(ReplacesStep):
    """The tracer drops what a step writes on an optimizer."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 4:
            self.made.step = halves(self, self.made.step)
        return self.loss(batch)

    def on_train_batch_end(self, *_: Any) -> None: ...


@pytest.mark.parametrize(
    "make",
    [Replaces, ReplacesStep, InManual, StepInManual, OnWhatIsGiven, StepHookInManual, FromTheBeginning, FromTheBeginningInManual,
     InAGenerator, AroundASchedulers, InTheStep],
)  # fmt: skip
def test_an_optimizers_own_methods_are_called(make: type[Net]) -> None:
    both(make)


@pytest.mark.parametrize("make", [Replaces, ReplacesStep])
def test_they_see_clipped_gradients_of_a_window(make: type[Net]) -> None:
    both(make, accumulate_grad_batches=2, gradient_clip_val=0.05)


def test_where_they_cannot_be_called_it_is_an_error() -> None:
    """A captured generator has no gradients that a zero_grad could look at."""

    class Generates(Replaces):
        training_step = InAGenerator.training_step

    with pytest.raises(CaptureError, match="zero_grad"):
        fasttrain.compile_fit(Generates(), capture="compile", **QUIET).fit(batches())


class AddsAGroup(Net):
    """In the step: tried, it leaves no group behind."""

    def configure_optimizers(self) -> Any:
        self.made = torch.optim.SGD(self.b.parameters(), lr=0.1, momentum=0.9)
        return self.made

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 2:
            self.made.add_param_group({"params": list(self.a.parameters()), "lr": 0.03})
        return self.loss(batch)


def test_a_group_added_by_the_step() -> None:
    both(AddsAGroup)


class Swaps(Replaces):
    """Another optimizer in ``trainer.optimizers``, put there by a hook."""

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends += 1
        if self.ends == 4:
            self.trainer.optimizers[0] = torch.optim.AdamW(self.parameters(), lr=0.01)


class SwapsInManual(Swaps):
    automatic_optimization = False
    training_step = InManual.training_step


class Assigns(Replaces):
    def on_train_start(self) -> None:
        self.trainer.optimizers = [torch.optim.AdamW(self.parameters(), lr=0.01)]

    def on_train_batch_end(self, *_: Any) -> None: ...


@pytest.mark.parametrize("make", [Swaps, SwapsInManual, Assigns])
def test_another_optimizer_moves_the_weights(make: type[Net]) -> None:
    """As with Lightning, on every rung: the weights are those of a plain loop that changes its optimizer there."""
    _, _, module, _ = both(make)
    torch.manual_seed(0)
    plain = Replaces()
    first, second = plain.configure_optimizers(), torch.optim.AdamW(plain.parameters(), lr=0.01)
    for i, batch in enumerate(batches()):
        optimizer = second if i >= 4 or make is Assigns else first
        optimizer.zero_grad()
        plain.loss(batch).backward()
        optimizer.step()
    torch.testing.assert_close(dict(module.named_parameters()), dict(plain.named_parameters()))


class Changes(Replaces):
    """Once, by a hook: ``change`` is called behind the fourth batch."""

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends += 1
        if self.ends == 4:
            self.change()

    def change(self) -> None: ...


class HooksTheForward(Changes):
    def change(self) -> None:
        self.b.register_forward_hook(lambda module, given, out: out * 2)


class HooksTheBackward(Changes):
    def change(self) -> None:
        self.b.register_full_backward_hook(lambda module, inner, outer: (inner[0] * 2,))


class UnhooksTheForward(Changes):
    def __init__(self) -> None:
        super().__init__()
        self.handle = self.b.register_forward_hook(lambda module, given, out: out * 2)

    def change(self) -> None:
        self.handle.remove()


class MovesBetweenGroups(Changes):
    """The last parameter has a learning rate of its own; their order is as it was."""

    def change(self) -> None:
        self.made.add_param_group({"params": [self.made.param_groups[0]["params"].pop()], "lr": 0.01})


class ChangesADtype(Changes):
    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return torch.nn.functional.cross_entropy(self.b(torch.tanh(self.a(x.to(self.a.weight.dtype))).float()), y)

    def change(self) -> None:
        self.a.double()


@pytest.mark.parametrize("make", [HooksTheForward, HooksTheBackward, UnhooksTheForward, MovesBetweenGroups, ChangesADtype])
def test_what_a_hook_changes_is_seen(make: type[Net]) -> None:
    if make is ChangesADtype and TORCH < (2, 12):
        pytest.skip("torch 2.11 refuses the captured gradient, with an error")
    both(make)


@pytest.mark.parametrize("make", [MovesBetweenGroups, ChangesADtype])
def test_the_fused_update_behind_eager_operations_sees_it_too(make: type[Net]) -> None:
    """Under ``auto``, which captures nothing in so short a run."""
    weights = []
    for capture in ("eager", "auto"):
        torch.manual_seed(0)
        module = make()
        fasttrain.compile_fit(module, capture=capture, **QUIET).fit(batches())
        weights.append(dict(module.named_parameters()))
    torch.testing.assert_close(weights[1], weights[0])
