"""Hooks around a captured piece see what they see eagerly, as often and in the same order; what they change counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fasttrain
from tests.forms.pairs import (
    ROUNDING,
    WIDTH,
    Acts,
    Indexed,
    StopAfter,
    alike,
    assert_resumes,
    batches,
    both,
    close,
    made,
    own,
    same_weights,
    slow,
    trained,
    where_marked,
)


class One(nn.Module):
    """A small regression that notes what its hooks see."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 1))
        self.seen: list[Any] = []
        self.build()

    def build(self) -> None:
        pass

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)

    def note(self, *values: Any) -> None:
        """Tensors as numbers of four digits."""
        self.seen.append(tuple(float(v.detach()) if isinstance(v, Tensor) else v for v in values))


class Teacher(One):
    """on_before_zero_grad: a moving average of the weights, the target of the loss."""

    def build(self) -> None:
        self.teacher = nn.Linear(WIDTH, 1).requires_grad_(False)
        self.student = nn.Linear(WIDTH, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + (self.student(batch) - self.teacher(batch) - 1).square().mean()

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.note("zero", self.student.weight.sum())
        with torch.no_grad():
            for t, s in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                t.lerp_(s, 0.1)


class Zeroes(One):
    """optimizer_zero_grad: zeros in the place of None."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        self.note(epoch, batch_idx, type(optimizer).__name__)
        optimizer.zero_grad(set_to_none=False)


class AfterBackward(One):
    """on_after_backward: reads p.grad, changes it in place, and replaces it."""

    def on_after_backward(self) -> None:
        self.note(*(p.grad.sum() for p in self.parameters()))
        for p in self.parameters():
            p.grad.mul_(0.5)
        self.net[0].weight.grad = self.net[0].weight.grad + 0.01


class BeforeStep(One):
    """on_before_optimizer_step: the same, once a window."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.note(self.trainer.global_step, *(p.grad.norm() for g in optimizer.param_groups for p in g["params"]))
        for p in self.parameters():
            p.grad.add_(0.01)


class Clips(One):
    """configure_gradient_clipping in place of the trainer's."""

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any = None) -> None:
        self.note(gradient_clip_val, gradient_clip_algorithm)
        nn.utils.clip_grad_norm_(self.parameters(), 0.05)


class WarmsUp(One):
    """optimizer_step: a learning rate by hand."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        self.note(epoch, batch_idx)
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * min(1.0, (self.trainer.global_step + 1) / 6)
        optimizer.step(closure=optimizer_closure)


class Skips(One):
    """optimizer_step: every second step is not made; the closure runs nevertheless."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            self.note(optimizer_closure())


class Apart(One):
    """optimizer_step: closure first, step after."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        self.note(optimizer_closure())
        optimizer.step()


class ParameterHook(One):
    """Hooks on a parameter that change and see its gradient."""

    def build(self) -> None:
        self.net[0].weight.register_hook(lambda g: g * 0.5)
        self.net[0].weight.register_hook(lambda g: self.note(g.sum()))


class AccumulateHook(One):
    """A hook behind a parameter's accumulation."""

    def build(self) -> None:
        self.net[0].weight.register_post_accumulate_grad_hook(self.seen_and_shrunk)

    def seen_and_shrunk(self, p: Tensor) -> None:
        assert p.grad is not None
        self.note(p.grad.sum())
        p.grad.mul_(0.3)


class SecondOrder(One):
    """LBFGS, on a convex problem."""

    def build(self) -> None:
        self.net = nn.Sequential(nn.Linear(WIDTH, 1))  # type: ignore[assignment]

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=4)


AROUND = [Teacher, Zeroes, AfterBackward, BeforeStep, Clips, WarmsUp, Skips, Apart, ParameterHook, AccumulateHook, SecondOrder]


def assert_same_notes(captured: Any, eager: Any) -> None:
    assert len(captured.seen) == len(eager.seen)
    for ours, theirs in zip(captured.seen, eager.seen, strict=True):
        assert alike(ours, theirs), (ours, theirs)


def exact(make: Any) -> dict[str, Any]:
    """LBFGS divides by differences of gradients: in float32 that is mostly rounding."""
    return {"precision": "64-true"} if make is SecondOrder else {}


@pytest.mark.parametrize("make", AROUND)
@pytest.mark.parametrize("window", [pytest.param(1, marks=slow), 4])
def test_a_hook_around_a_captured_piece_is_called_as_eagerly(make: Any, window: int) -> None:
    """On the compile rung: weights, what the hooks saw, and how often; not while the step is tried."""
    eager, captured = both(make, accumulate_grad_batches=window, **exact(make))
    assert captured.result.capture.rung == "compile"
    assert_same_notes(captured, eager)


@pytest.mark.parametrize("make", [ParameterHook, AccumulateHook, BeforeStep, AfterBackward])
def test_a_batch_of_another_size_is_no_exception(make: Any) -> None:
    """A short last batch, which no graph was made for."""
    eager, captured = both(make, lambda: batches(last=3))
    assert_same_notes(captured, eager)


@pytest.mark.parametrize("make", [BeforeStep, *(pytest.param(m, marks=slow) for m in (AfterBackward, Clips, WarmsUp, SecondOrder))])
def test_auto_captures_around_hooks_too(make: Any) -> None:
    """capture="auto", nothing measured."""
    eager, captured = both(make, capture="captured", **exact(make))
    assert captured.result.capture.rung == "compile"
    assert_same_notes(captured, eager)


@pytest.mark.parametrize("make", [ParameterHook, AccumulateHook])
def test_auto_keeps_gradient_hooks_right(make: Any) -> None:
    """On whichever rung."""
    eager, captured = both(make, capture="captured")
    assert_same_notes(captured, eager)


@pytest.mark.parametrize("make", [BeforeStep, *(pytest.param(m, marks=slow) for m in (Clips, WarmsUp))])
def test_measuring_calls_no_hook(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """capture="auto" that times both rungs: hooks hear of the batches that are trained and of nothing else."""
    from fasttrain.graphs import auto, decisions

    monkeypatch.setattr(decisions, "_folder", lambda: tmp_path)
    monkeypatch.setattr(auto, "can_compile_ahead", lambda *given: False)  # at the first batch
    ours = trained(make, batches(), "auto", max_epochs=-1, callbacks=[StopAfter(9)])
    theirs = trained(make, batches(), max_epochs=-1, callbacks=[StopAfter(9)])
    assert "captured/1" in ours.result.capture.timings_us
    assert_same_notes(ours, theirs)
    same_weights(ours, theirs, ROUNDING)


class Listens(fasttrain.Callback):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append("zero")

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append("backward")

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append(trainer.global_step)
        for p in pl_module.parameters():
            p.grad.mul_(0.5)


@pytest.mark.parametrize("window", [pytest.param(1, marks=slow), 4])
def test_callbacks_stand_around_a_captured_piece_too(window: int) -> None:
    """The same calls in the same order, and their change of the gradients counts."""
    listeners: list[Listens] = []

    def one() -> list[Listens]:
        listeners.append(Listens())
        return [listeners[-1]]

    _, captured = both(One, callbacks=one, accumulate_grad_batches=window)
    assert captured.result.capture.rung == "compile"
    assert listeners[0].seen == listeners[1].seen


@pytest.mark.parametrize(
    "precision",
    [pytest.param("16-mixed", marks=slow), pytest.param("bf16-true", marks=slow), "64-true"],
)
@pytest.mark.parametrize("make", [AfterBackward, BeforeStep, pytest.param(Clips, marks=slow)])
def test_every_precision_around_a_captured_piece(make: Any, precision: str) -> None:
    """fp16: hooks behind backward see scaled gradients, hooks before the step unscaled ones."""
    eager, captured = both(make, precision=precision, ratio={"64-true": 1e-10}.get(precision, 5e-2))
    assert captured.result.capture.rung == "compile"
    assert len(captured.seen) == len(eager.seen)
    assert alike(captured.seen[0], eager.seen[0], 0.2), (captured.seen[0], eager.seen[0])


def test_the_trainers_clipping_stands_behind_the_hooks() -> None:
    """gradient_clip_val with on_before_optimizer_step: the hook sees gradients before the clip."""
    eager, captured = both(BeforeStep, gradient_clip_val=0.05)
    assert_same_notes(captured, eager)
    assert max(eager.seen[0][1:]) > 0.05


class ClipsByVerb(One):
    """The documented way: self.clip_gradients within configure_gradient_clipping."""

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any = None) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=gradient_clip_val, gradient_clip_algorithm=gradient_clip_algorithm)


@pytest.mark.parametrize("capture", ["eager", "compile"])
def test_a_module_clips_by_the_verb_in_its_hook(capture: str) -> None:
    ours = trained(ClipsByVerb, batches(), capture, gradient_clip_val=0.05)
    same_weights(ours, trained(One, batches(), gradient_clip_val=0.05), close(capture))


class NotFinite(BeforeStep):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * where_marked(batch, float("nan"))


@pytest.mark.parametrize("window", [pytest.param(1, marks=slow), 4])
def test_a_step_that_is_not_finite_is_skipped_behind_the_hooks(window: int) -> None:
    """nonfinite="skip": the hook is called, the update is not made."""
    eager, captured = both(NotFinite, lambda: batches(marked=3), nonfinite="skip", accumulate_grad_batches=window)
    assert len(eager.seen) == len(captured.seen) == (20 if window == 1 else 6)
    assert eager.result.ledger.skipped_steps == captured.result.ledger.skipped_steps == 2
    assert all(bool(p.isfinite().all()) for p in captured.parameters())


def test_layers_frozen_in_mid_run() -> None:
    """The set of gradients that a hook sees follows what trains."""

    class Follows(One):
        def on_after_backward(self) -> None:
            self.note(*(n for n, p in self.named_parameters() if p.grad is not None))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def freeze(trainer: Any, module: Any, n: int) -> None:
        module.net[0].requires_grad_(n // 4 % 2 == 0)

    eager, captured = both(Follows, callbacks=lambda: [Acts(freeze)])
    assert captured.seen == eager.seen


@pytest.mark.parametrize("capture", ["eager", pytest.param("compile", marks=slow)])
@pytest.mark.parametrize("make", [Teacher, AfterBackward, AccumulateHook, WarmsUp, Skips, SecondOrder])
def test_a_run_with_hooks_resumes_in_mid_window(make: Any, capture: str, tmp_path: Path) -> None:
    """Windows of four, saved after 3, 6 and 13 batches: bit for bit."""
    assert_resumes(make, [3, 6, 13], tmp_path, capture, accumulate_grad_batches=4)


# -- several optimizers -----------------------------------------------------------------------------------------------
class Alternates(Indexed):
    """optimizer_step: the critic every 2 batches, the generator every 4."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_idx: int, optimizer_closure: Any) -> None:
        if batch_idx % (2, 4)[optimizer_idx] == 0:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


@pytest.mark.parametrize("capture", ["eager", "compile", pytest.param("captured", marks=slow)])
def test_optimizers_that_step_in_other_batches(capture: str) -> None:
    """A every 2 batches and B every 4: the loop by hand."""
    ours = trained(Alternates, batches(), capture)
    module = made(Indexed)
    optimizers = module.by_hand()
    for _ in range(2):
        for i, batch in enumerate(batches()):
            for k, optimizer in enumerate(optimizers):
                optimizer.zero_grad()
                module.loss(batch, k).backward(inputs=own(optimizer))
                if i % (2, 4)[k] == 0:
                    optimizer.step()
    assert ours.result.capture.rung == ("eager" if capture == "eager" else "compile")
    same_weights(ours, module, close("eager" if capture == "eager" else "compile"))


class HookedPair(Indexed):
    """Every hook around a step, with the optimizer's index."""

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.seen.append(("zero", type(optimizer).__name__))

    def on_after_backward(self) -> None:
        self.seen.append("backward")

    def on_before_optimizer_step(self, optimizer: Any, optimizer_idx: int) -> None:
        self.seen.append(("step", optimizer_idx))
        for p in own(optimizer):
            p.grad.mul_(0.5)

    def configure_gradient_clipping(self, optimizer: Any, optimizer_idx: int, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
        self.seen.append(("clip", optimizer_idx, gradient_clip_val))
        nn.utils.clip_grad_norm_(own(optimizer), (0.05, 0.01)[optimizer_idx])


@pytest.mark.parametrize("capture", ["compile", pytest.param("captured", marks=slow)])
def test_hooks_are_told_whose_turn_it_is(capture: str) -> None:
    """In order, for both optimizers, as on the eager rung."""
    eager, captured = both(HookedPair, capture=capture, accumulate_grad_batches=2, gradient_clip_val=0.5)
    assert captured.result.capture.rung == "compile"
    assert captured.seen == eager.seen
    assert eager.seen[:9] == [
        ("zero", "Adam"), "backward", ("zero", "SGD"), "backward",
        "backward", ("step", 0), ("clip", 0, 0.5), "backward", ("step", 1),
    ]  # fmt: skip


@slow
def test_an_optimizer_of_second_order_among_others() -> None:
    """LBFGS for the critic, SGD for the generator: captured and eager agree, and the toggle holds in every evaluation."""

    class Mixed(Indexed):
        def by_hand(self) -> list[torch.optim.Optimizer]:
            return [torch.optim.LBFGS(self.dis.parameters(), lr=0.1, max_iter=3), torch.optim.SGD(self.gen.parameters(), lr=0.1)]

    ours, _ = both(Mixed, precision="64-true", ratio=1e-6)
    module = made(Mixed).double()
    critic, generator = module.by_hand()
    for _ in range(2):
        for batch in (b.double() for b in batches()):

            def closure() -> Tensor:
                critic.zero_grad()
                loss = module.loss(batch, 0)  # noqa: B023
                loss.backward(inputs=own(critic))
                return loss

            critic.step(closure)  # type: ignore[arg-type]
            generator.zero_grad()
            module.loss(batch, 1).backward(inputs=own(generator))
            generator.step()
    same_weights(ours, module)
