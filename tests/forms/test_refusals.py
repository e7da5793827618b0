"""What does not fit together is said in a sentence that names it, before anything is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler

import fasttrain
from tests.forms.pairs import Indexed, Manual, Nets, Yielding, batches, close, made, same_weights, slow, trained


class OneLoss(Nets):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch, 0)


class NamedOnly(Nets):
    """optimizer_idx where it can only be given by name."""

    def training_step(self, batch: Tensor, *, optimizer_idx: int, batch_idx: int) -> Tensor:
        return self.loss(batch + 0 * batch_idx, optimizer_idx)


class Few(Nets):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        yield self.loss(batch, 0)


class Many(Yielding):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        yield from super().training_step(batch, batch_idx)
        yield self.loss(batch, 0)


class FewLater(Nets):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        yield self.loss(batch, 0)
        if batch_idx != 4:
            yield self.loss(batch, 1)


class ManyLater(Yielding):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        yield from super().training_step(batch, batch_idx)
        if batch_idx == 4:
            yield self.loss(batch, 0)


class Numbers(Nets):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        yield 1.0
        yield 2.0


class Vectors(Nets):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        yield self.dis(batch)
        yield self.gen(batch)


class Detached(Nets):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        yield self.loss(batch, 0).detach()
        yield self.loss(batch, 1)


class Infinite(Nets):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        yield self.loss(batch, 0)
        yield self.loss(batch, 1) * float("inf")


class Three(Yielding):
    def by_hand(self) -> list[torch.optim.Optimizer]:
        return [*super().by_hand(), torch.optim.SGD(self.gen.parameters(), lr=0.1)]


class NoOptimizer(Indexed):
    def configure_optimizers(self) -> Any:
        return []


class InADict(Indexed):
    def configure_optimizers(self) -> Any:
        return {"optimizer": self.by_hand()}


class Foreign(Indexed):
    """A scheduler of an optimizer that is not returned."""

    def configure_optimizers(self) -> Any:
        return self.by_hand(), [lr_scheduler.StepLR(torch.optim.SGD(self.parameters(), lr=0.1), 1)]


class ForeignManual(Manual):
    configure_optimizers = Foreign.configure_optimizers


class Empty(Indexed):
    """The second optimizer is over another module's parameters."""

    def by_hand(self) -> list[torch.optim.Optimizer]:
        return [super().by_hand()[0], torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1)]


class Frozen(Indexed):
    """Nothing that the second optimizer holds trains."""

    def by_hand(self) -> list[torch.optim.Optimizer]:
        self.gen.requires_grad_(False)
        return super().by_hand()


class FrozenLate(Indexed):
    """The same, frozen when the optimizers are there."""

    def on_fit_start(self) -> None:
        self.gen.requires_grad_(False)


class FrozenLateYields(Yielding):
    on_fit_start = FrozenLate.on_fit_start


@pytest.mark.parametrize("capture", ["eager", "compile"])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (OneLoss, r"2 optimizers, and a training_step that returns one loss.*optimizer_idx.*yield.*automatic_optimization = False"),
        (Few, r"it yielded 1 losses and configure_optimizers returned 2 optimizers"),
        (Many, r"yielded more than 2"),
        (Three, r"it yielded 2 losses and configure_optimizers returned 3 optimizers"),
        (Numbers, r"float 1.0; wanted a scalar tensor"),
        (Vectors, r"shape \[6, 1\]; wanted one number"),
        (Detached, r"without a gradient"),
        (Infinite, r"inf on the first batch"),
        (NoOptimizer, r"no optimizer"),
        (InADict, r"got list"),
        (Foreign, r"StepLR of another optimizer"),
        (ForeignManual, r"StepLR of another optimizer"),
        (Empty, r"none of them belongs to Empty"),
        (Frozen, r"no parameter of the optimizer trains"),
        (FrozenLate, r"no parameter of optimizer 1 trains"),
        (FrozenLateYields, r"no parameter of optimizer 1 trains"),
    ],
)
def test_a_module_that_cannot_be_trained_is_refused(make: Any, words: str, capture: str) -> None:
    """On every rung, before a weight has moved."""
    module = made(make)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(fasttrain.ModuleError, match=rf"(?s){words}"):
        fasttrain.compile_fit(module, capture=capture, max_epochs=1, logger=False, enable_checkpointing=False).fit(batches(3))
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


@pytest.mark.parametrize("capture", ["eager", pytest.param("compile", marks=slow)])
def test_an_index_that_can_only_be_named(capture: str) -> None:
    """Handed over by name, as the number of the batch is."""
    ours = trained(NamedOnly, batches(3), capture)
    same_weights(ours, trained(Indexed, batches(3)), close(capture))


def test_an_index_in_any_place_and_with_a_default() -> None:
    """By its name, wherever it stands."""

    class Swapped(Nets):
        def training_step(self, batch: Tensor, optimizer_idx: int, batch_idx: int = 0) -> Tensor:
            return self.loss(batch, optimizer_idx)

    class Default(Nets):
        def training_step(self, batch: Tensor, batch_idx: int, optimizer_idx: Any = None) -> Tensor:
            return self.loss(batch, optimizer_idx)

    wanted = trained(Indexed, batches(3)).state_dict()
    for make in (Swapped, Default):
        assert all(torch.equal(v, wanted[k]) for k, v in trained(make, batches(3)).state_dict().items())


def test_an_index_before_the_number_of_the_batch() -> None:
    """training_step(batch, optimizer_idx, batch_idx)."""

    class Before(Nets):
        def training_step(self, batch: Tensor, optimizer_idx: int, batch_idx: int) -> Tensor:
            self.seen.append(batch_idx)
            return self.loss(batch, optimizer_idx)

    assert trained(Before, batches(3), max_epochs=1).seen[-6:] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("capture", ["eager", pytest.param("compile", marks=slow)])
@pytest.mark.parametrize("make", [FewLater, ManyLater])
def test_a_generator_that_changes_its_mind(make: Any, capture: str) -> None:
    """In the fifth batch: the same sentence in mid-run, captured or not."""
    with pytest.raises(fasttrain.ModuleError, match=r"is a generator: it yielded"):
        trained(make, batches(), capture)


@pytest.mark.parametrize("given", [(5, None), (None, 1), (0, 1), (5, 1.5), ("5", 1), (True, 1), (-1, 1)])
def test_frequencies_are_whole_numbers_for_all_or_none(given: Any) -> None:
    class Frequent(Indexed):
        def configure_optimizers(self) -> Any:
            return [{"optimizer": o} | ({} if n is None else {"frequency": n}) for o, n in zip(self.by_hand(), given, strict=True)]

    with pytest.raises(fasttrain.ModuleError, match=r"frequency: got .*integer >= 1 for every optimizer, or for none"):
        trained(Frequent, batches(3))


@pytest.mark.parametrize("make", [Yielding, Manual])
def test_frequencies_belong_to_the_indexed_form(make: Any) -> None:
    class Frequent(make):
        def configure_optimizers(self) -> Any:
            return [{"optimizer": o, "frequency": 2} for o in self.by_hand()]

    with pytest.raises(fasttrain.ModuleError, match=r"frequency.*take optimizer_idx"):
        trained(Frequent, batches(3))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"accumulate_grad_batches": 2}, "step every k batches in training_step"),
        ({"accumulate_grad_batches": {0: 1, 1: 2}}, "step every k batches in training_step"),
        ({"gradient_clip_val": 1.0}, "self.clip_gradients"),
    ],
)
def test_what_a_manual_step_does_itself_is_no_option(options: dict[str, Any], words: str) -> None:
    with pytest.raises(fasttrain.OptionError, match=words):
        trained(Manual, batches(3), **options)


@pytest.mark.parametrize("given", [lambda module, batch, batch_idx: 0, 3, Yielding])
def test_turns_are_a_generator_function(given: Any) -> None:
    with pytest.raises(fasttrain.ModuleError, match=r"turns: got .*generator function turns\(module, batch, batch_idx\)"):
        trained(Nets, batches(3), turns=given)


def test_verbs_before_training() -> None:
    """In setup, where there is no optimizer yet."""

    class Early(Manual):
        def setup(self, stage: str) -> None:
            self.manual_backward(self.loss(batches(1)[0], 0))

    with pytest.raises(fasttrain.ModuleError, match="belong into training_step"):
        trained(Early, batches(3))


def test_a_foreign_optimizer_cannot_be_toggled() -> None:
    class Toggles(Manual):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            self.toggle_optimizer(torch.optim.SGD(self.parameters(), lr=0.1))

    with pytest.raises(fasttrain.ModuleError, match=r"SGD; wanted one of self.optimizers\(\)"):
        trained(Toggles, batches(3))


def test_a_module_is_put_back_after_training() -> None:
    """The verbs are gone from an nn.Module, and nothing requires less than it did."""
    module = trained(Manual, batches(3))
    assert not hasattr(module, "optimizers")
    assert all(p.requires_grad for p in module.parameters())


class Unrelated(Indexed):
    """The generator's turn gives a loss of the critic alone."""

    def of_generator(self, x: Tensor, fake: Tensor) -> Tensor:
        return self.score(x).mean()


class UnrelatedYields(Yielding):
    """The same, where the critic requires a gradient all the time."""

    of_generator = Unrelated.of_generator


@pytest.mark.parametrize("make", [Unrelated, UnrelatedYields])
@pytest.mark.parametrize("capture", ["eager", "compile"])
def test_a_loss_that_does_not_depend_on_its_optimizer(make: Any, capture: str) -> None:
    """Which optimizer's loss it is, and that nothing of it trains."""
    with pytest.raises(fasttrain.ModuleError, match="wanted one that depends on a trainable parameter of optimizer 1, SGD"):
        trained(make, batches(3), capture)


class SecondOrderYields(Yielding):
    def by_hand(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.LBFGS(self.dis.parameters()), super().by_hand()[1]]


class StepsItself(Yielding):
    """optimizer_step is overridden, and nobody would call it."""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append("called")


class BackwardItself(Yielding):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.seen.append("called")
        loss.backward()


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(SecondOrderYields),
        pytest.param(StepsItself),
        pytest.param(BackwardItself),
    ],
)
def test_what_a_generator_cannot_have_is_refused_or_honoured(make: Any) -> None:
    """A closure that runs the step again, hooks that stand where the yield is: in a sentence, or called."""
    try:
        module = trained(make, batches(3))
    except fasttrain.DataError as error:
        raise AssertionError(str(error)) from error
    except fasttrain.FasttrainError:
        return
    assert "called" in module.seen
