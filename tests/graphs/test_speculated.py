"""A branch on data that goes one way nearly always: one whole graph, and the eager result at every step that goes another."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fasttrain
from fasttrain.graphs.speculated import FOLLOWED

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
SEEDED = 0  # of the weights; the batches have their own
STEPS = 24
SOME, MANY = (3, 11, 12), range(3, STEPS, 2)  # batches that go the other way


class Net(nn.Module):
    """Running statistics, dropout, a counter of its own, and a branch in ``bend`` that a batch with a large number takes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.drop, self.b = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 4)
        self.register_buffer("seen", torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.seen.add_(1)
        h = self.bend(self.drop(torch.relu(self.norm(self.a(x)))), x)
        return F.cross_entropy(self.b(h), y)

    def bend(self, h: Tensor, x: Tensor) -> Tensor:
        if (x > 3).any():
            h = h * 0.5
        return h

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def batches(other: Collection[int] = (), steps: int = STEPS) -> list[Any]:
    g = torch.Generator().manual_seed(3)
    made = [(torch.randn(16, 8, generator=g).clamp(-2, 2), torch.randint(4, (16,), generator=g)) for _ in range(steps)]
    for i in other:
        made[i][0][0, 0] = 4.0
    return made


def fit(make: type[nn.Module], capture: str, other: Collection[int] = (), **options: Any) -> tuple[Any, nn.Module, Tensor, str]:
    """The result, the module, where the random stream stands, and what is explained."""
    torch.manual_seed(SEEDED)
    module = make()
    trainer = fasttrain.compile_fit(module, capture=capture, **QUIET | options)
    result = trainer.fit(batches(other))
    return result, module, torch.get_rng_state(), trainer.explain()


def same_training(make: type[nn.Module], other: Collection[int] = (), **options: Any) -> tuple[Any, str]:
    """Captured against eager: weights and statistics to rounding, counters and the random stream to the bit."""
    result, module, stream, said = fit(make, "compile", other, **options)
    _, expected, wanted, _ = fit(make, "eager", other, **options)
    for (name, value), want in zip(module.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(value, want, rtol=2e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    assert torch.equal(module.get_buffer("seen"), torch.tensor(float(STEPS)))
    assert torch.equal(stream, wanted)
    return result, said


def followed(result: Any) -> list[str]:
    return [o.where.rpartition("/")[2].split(":")[0] + " " + o.advice for o in result.capture.obstacles if o.reason == FOLLOWED]


class NoGrad(Net):
    def bend(self, h: Tensor, x: Tensor) -> Tensor:
        with torch.no_grad():
            large = bool((x > 3).any())
        return h * 0.5 if large else h


class Item(Net):
    def bend(self, h: Tensor, x: Tensor) -> Tensor:
        return h * 0.5 if (x > 3).any().item() and x.shape[0] == 16 else h


class Compared(Net):
    """Whole tensors, and a truth that is kept before it is used."""

    def bend(self, h: Tensor, x: Tensor) -> Tensor:
        same, near = torch.equal(x, x.clamp(max=3)), torch.allclose(x, x.clamp(max=3))
        return h if same and near else h * 0.5


class Kept(Net):
    """``or`` gives a tensor back, ``not`` a truth."""

    def bend(self, h: Tensor, x: Tensor) -> Tensor:
        either, small = (x > 3).any() or x.sum(), not (x > 3).any()
        return h + 0.01 * either if small else h * 0.5


class Returns(Net):
    """Early; and what warns goes on."""

    def bend(self, h: Tensor, x: Tensor) -> Tensor:
        if (x > 3).any():
            warnings.warn("large", stacklevel=1)
            return h * 0.5
        return h + 0.0


class Caught(Net):
    def bend(self, h: Tensor, x: Tensor) -> Tensor:
        try:
            if (x > 3).any():
                raise ValueError("large")
        except ValueError:
            h = h * 0.5
        return h


class Below(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5 if (x.detach().abs() > 3).any() else super().forward(x)


class Super(Net):
    """Where Dynamo counts instructions otherwise than the interpreter."""

    def __init__(self) -> None:
        super().__init__()
        self.a = Below(8, 16)

    def bend(self, h: Tensor, x: Tensor) -> Tensor:
        return super().bend(h, x)


class Loop(Net):
    """Over data: rolled out as often as it went in the first step."""

    def bend(self, h: Tensor, x: Tensor) -> Tensor:
        scale = x.abs().max()
        while scale > 0.6:
            scale, h = scale / 2, h * 0.9
        return h


class Shared(Net):
    """One place, asked twice in a step with two answers."""

    def bend(self, h: Tensor, x: Tensor) -> Tensor:
        for limit in (-9.0, 3.0):
            if (x > limit).any():
                h = h * 0.7
        return h


class Number(Net):
    """A float, an int, both, and neither of them a constant."""

    def bend(self, h: Tensor, x: Tensor) -> Tensor:
        many, top = (x > 3).sum().item(), x.max().item()
        small = many * 0.5 < 0.3 and float(many) / 2 < top
        return h if small and not many and top != 4 else h * 0.5


class Counted(Net):
    """How many rows a mask has picked; what follows depends on it."""

    def bend(self, h: Tensor, x: Tensor) -> Tensor:
        rows, large = h[x[:, 0] < 3], x[x > 3]
        if len(rows) >= 16 and large.numel() == 0:
            h = h + 0.1 * rows[:16].mean(0)
        return h if rows.shape[0] >= 16 else h * 0.5


KINDS = [Net, NoGrad, Item, Compared, Kept, Returns, Caught, Super, Loop, Shared, Number, Counted]


@pytest.mark.filterwarnings("ignore:large")
@pytest.mark.parametrize("make", KINDS)
def test_a_branch_is_followed(make: type[nn.Module]) -> None:
    """One whole graph, traced once; the batches that go another way train as eagerly, each counted once."""
    result, said = same_training(make, SOME)
    assert (result.capture.whole, result.capture.pieces, result.capture.traces) == (True, 1, 1), result.capture.obstacles
    assert any(f"in 3 of {STEPS} steps, which ran op by op" in place for place in followed(result)), followed(result)
    assert all(place.startswith("test_speculated.py") for place in followed(result))
    assert "  dealt with:" in said
    assert "in the way" not in said


def test_nothing_goes_another_way() -> None:
    """Nothing is said of failures, and the steady steps are called past the guards."""
    result, _ = same_training(Net)
    assert followed(result) == ["test_speculated.py "]
    assert result.capture.direct


def test_a_branch_that_goes_both_ways() -> None:
    """It is given up after five failures in a window, and the run is the eager run all the same."""
    result, said = same_training(Net, MANY)
    assert not result.capture.whole
    said_of_it = f"It went another way in 5 of {STEPS} steps, which ran op by op. It is no longer followed."
    assert followed(result) == [f"test_speculated.py {said_of_it}"]
    assert "in the way" in said


class Random(Net):
    """No data, but chance."""

    def bend(self, h: Tensor, x: Tensor) -> Tensor:
        return h * 0.5 if torch.rand(()) > 0.5 else h


def test_a_branch_on_chance_is_given_up_before_training() -> None:
    """The few steps that a capture tries show it: the step is cut there."""
    result, _ = same_training(Random)
    assert not result.capture.whole
    assert not followed(result)


def test_windows_of_batches() -> None:
    """A failed call in the middle of a window leaves the gradients gathered so far."""
    result, _ = same_training(Net, SOME, accumulate_grad_batches=4)
    assert result.capture.whole


class Hooked(Net):
    def on_after_backward(self) -> None:
        self.heard = getattr(self, "heard", 0) + 1


def test_hooks_around_the_captured_piece() -> None:
    """They see every step's gradients, and nothing twice."""
    result, module, _, _ = fit(Hooked, "compile", SOME)
    assert result.capture.pieces == 1
    assert module.heard == STEPS
    same_training(Hooked, SOME)


class WritesBatch(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch[0].mul_(0.5)
        loss = super().training_step(batch, batch_idx)
        if (batch[0] > 1.5).any():
            loss = loss * 2
        return loss


def test_what_a_failed_graph_wrote_is_put_back() -> None:
    """Its batch too."""
    result, _ = same_training(WritesBatch, SOME)
    assert any("in 3 of" in place for place in followed(result))


class Indexed(nn.Module):
    """An index that only the branch makes one: where it is not taken, the graph must not end the process in a loop on two threads."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.b = nn.Embedding(4, 32), nn.Linear(32, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        rows = batch[0]
        if (rows >= 4).any():
            rows = rows.clamp(max=3)
        return F.cross_entropy(self.b(self.table(rows).sin()), rows)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def test_what_a_branch_keeps_from_happening() -> None:
    """An index out of range in the graph is a step that goes another way."""
    made = [(torch.arange(20_000) % 4,) for _ in range(6)]
    made[4][0][-7] = 9
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        module = Indexed()
        result = fasttrain.compile_fit(module, capture="compile", **QUIET).fit(made)
    finally:
        torch.set_num_threads(threads)
    assert result.capture.threads == 2
    assert followed(result) == ["test_speculated.py It went another way in 1 of 6 steps, which ran op by op."]


def _steps(trainer: Any, made: list[Any]) -> list[Tensor]:
    return [trainer.step(batch) for batch in made]


def test_two_runs_are_the_same_bits() -> None:
    """Failures, a branch given up and all."""
    (_, a, _, _), (_, b, _, _) = fit(Net, "compile", MANY), fit(Net, "compile", MANY)
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_resumed_run_follows_what_the_saved_one_did(tmp_path: Path) -> None:
    """Whatever its own first step does: bit for bit, with failures before and after the checkpoint."""
    other = (3, 9, 12)
    whole = fit(Net, "compile", other)[1]
    for part in (9, -1):
        torch.manual_seed(SEEDED)
        module = Net()
        options = QUIET | {"enable_checkpointing": True, "default_root_dir": tmp_path, "max_steps": part}
        options["callbacks"] = [fasttrain.ModelCheckpoint(dirpath=tmp_path / "kept", save_last=True, every_n_train_steps=9)]
        trainer = fasttrain.compile_fit(module, capture="compile", **options)
        result = trainer.fit(batches(other), ckpt_path=None if part == 9 else "last")
    assert f"in 3 of {STEPS} steps" in followed(result)[0]
    assert all(torch.equal(p, q) for p, q in zip(whole.state_dict().values(), module.state_dict().values(), strict=True))


def test_auto_follows_too() -> None:
    """And a loop of one's own."""
    result, _, _, _ = fit(Net, "auto", SOME, deterministic=True)
    assert result.capture.whole
    torch.manual_seed(SEEDED)
    module = Net()
    trainer = fasttrain.compile_fit(module, capture="compile", **QUIET)
    losses = _steps(trainer, batches(SOME))
    torch.manual_seed(SEEDED)
    eagerly = _steps(fasttrain.compile_fit(Net(), capture="eager", **QUIET), batches(SOME))
    torch.testing.assert_close(losses, eagerly, rtol=2e-5, atol=1e-6)
    assert "in 3 of 24 steps" in trainer.explain()
