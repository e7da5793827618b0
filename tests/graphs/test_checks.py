"""A branch on data that does nothing but raise: one whole graph, and the user's own exception at the step that earns it."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fasttrain
from fasttrain.errors import CaptureError, DataError
from fasttrain.graphs.speculated import FOLLOWED
from tests.parity.modules import assert_finite

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
GOOD, BAD = 5, 3  # batches before the first bad one, and from it on


class NotFinite(Exception):
    """Somebody's own."""


class Net(nn.Module):
    """Two layers and a table; ``check`` looks at the batch and at the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.table = nn.Linear(8, 16), nn.Linear(16, 4), nn.Embedding(4, 16)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.check(x, y, batch_idx)
        loss = F.cross_entropy(self.b(torch.tanh(self.a(x)) + self.table(y)), y)
        self.check_loss(loss)
        print("step")
        return loss

    def check(self, x: Tensor, y: Tensor, batch_idx: int) -> None:
        """Nothing is wrong."""

    def check_loss(self, loss: Tensor) -> None:
        """Nothing is wrong."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def batches(bad: bool) -> list[Any]:
    g = torch.Generator().manual_seed(3)
    made = [(torch.randn(8, 8, generator=g), torch.randint(4, (8,), generator=g)) for _ in range(GOOD + BAD)]
    for x, y in made[GOOD:] if bad else ():
        x[2, 3], y[1] = math.nan, 7  # no row of the table
    return made


def fit(make: type[Net], capture: str, *, bad: bool = False, **options: Any) -> tuple[Any, Net, Exception | None]:
    torch.manual_seed(0)
    module, trained = make(), None
    trainer = fasttrain.compile_fit(module, capture=capture, nonfinite="ignore", **QUIET | options)
    try:
        trained = trainer.fit(batches(bad))
    except Exception as error:
        return None, module, error
    return trained, module, None


class Early(Net):
    """Before what the data would break."""

    def check(self, x: Tensor, y: Tensor, batch_idx: int) -> None:
        if (y >= 4).any():
            worst = y.max()
            raise NotFinite(f"batch {batch_idx}: no class {worst}")


class Late(Net):
    """After the forward pass; the table is left alone."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch[0], batch[1].clamp(max=3)), batch_idx)

    def check_loss(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise NotFinite("loss")


class Otherwise(Late):
    def check_loss(self, loss: Tensor) -> None:
        if torch.isfinite(loss):
            pass
        else:
            raise NotFinite("loss")


class EitherOr(Early):
    def check(self, x: Tensor, y: Tensor, batch_idx: int) -> None:
        if (y < 0).any() or torch.isnan(x).any():
            raise NotFinite("x or y")


class Two(Early):
    def check(self, x: Tensor, y: Tensor, batch_idx: int) -> None:
        if (y < 0).any():
            raise NotFinite("negative")
        super().check(x, y, batch_idx)


class Below(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if x.isnan().any():
                raise NotFinite("in a submodule")
        return super().forward(x)


class InSubmodule(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a = Below(8, 16)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch[0], batch[1].clamp(max=3)), batch_idx)


class Compared(Early):
    def check(self, x: Tensor, y: Tensor, batch_idx: int) -> None:
        if not torch.equal(x, x.clone()):  # nan is not nan
            raise NotFinite("not itself")


class Asserted(Early):
    def check(self, x: Tensor, y: Tensor, batch_idx: int) -> None:
        torch._assert((y < 4).all(), "no such class")


class Plainly(Early):
    def check(self, x: Tensor, y: Tensor, batch_idx: int) -> None:
        assert_finite(x)


class AsNumbers(Late):
    def check_loss(self, loss: Tensor) -> None:
        if loss.item() != loss.item():
            raise NotFinite("loss")


class AsBool(Late):
    def check_loss(self, loss: Tensor) -> None:
        if bool(loss.isnan()):
            raise NotFinite("loss")


class BoolItem(Late):
    def check_loss(self, loss: Tensor) -> None:
        if loss.isnan().item():
            raise NotFinite("loss")


class WithFinally(Late):
    def check_loss(self, loss: Tensor) -> None:
        try:
            if loss.isnan():
                raise NotFinite("loss")
        finally:
            loss = loss * 2


KINDS = [Early, Late, Otherwise, EitherOr, Two, InSubmodule, Compared, Asserted, Plainly, AsNumbers, AsBool, BoolItem, WithFinally]


@pytest.mark.parametrize("make", KINDS)
def test_a_check_is_part_of_the_graph(make: type[Net], capsys: pytest.CaptureFixture[str]) -> None:
    """Whole and past the guards, and equal to eager. At a bad batch: the eager exception, no weight written, nothing said twice."""
    captured, module, _ = fit(make, "compile", limit_train_batches=GOOD)
    assert (captured.capture.whole, captured.capture.traces, captured.capture.direct) == (True, 1, True), captured.capture.obstacles
    for p, q in zip(module.parameters(), fit(make, "eager", limit_train_batches=GOOD)[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=1e-6)
    expected = fit(make, "eager", bad=True)[2]
    capsys.readouterr()
    _, stopped, error = fit(make, "compile", bad=True)
    assert capsys.readouterr().out.splitlines() == ["step"] * GOOD
    assert expected is not None
    assert (type(error), str(error)) == (type(expected), str(expected))
    assert all(torch.equal(p, q) for p, q in zip(stopped.parameters(), module.parameters(), strict=True))


def test_a_failed_check_within_a_window() -> None:
    """The window's gradients so far move nothing."""
    expected = fit(Early, "eager", bad=True, accumulate_grad_batches=2)
    _, stopped, error = fit(Early, "compile", bad=True, accumulate_grad_batches=2)
    _, before, _ = fit(Early, "compile", limit_train_batches=GOOD - 1, accumulate_grad_batches=2)
    assert str(error) == str(expected[2]) == f"batch {GOOD}: no class 7"
    assert all(torch.equal(p, q) for p, q in zip(stopped.parameters(), before.parameters(), strict=True))


class Draws(Net):
    def check_loss(self, loss: Tensor) -> None:
        drawn = torch.randn(())
        if drawn > 0.9:
            raise NotFinite(f"drew {drawn:.6f}")


def test_a_check_of_what_was_drawn() -> None:
    """The step that says why draws the same numbers again."""
    expected, (_, _, error) = fit(Draws, "eager")[2], fit(Draws, "compile")
    assert isinstance(expected, NotFinite)
    assert str(error) == str(expected)


class Forks(Early):
    """A branch that raises only sometimes."""

    def check(self, x: Tensor, y: Tensor, batch_idx: int) -> None:
        if (y >= 4).any():
            if x.isnan().any():
                raise NotFinite("both")
            y.clamp_(max=3)


class Caught(Late):
    def check_loss(self, loss: Tensor) -> None:
        try:
            if loss.isnan():
                raise NotFinite("loss")
        except NotFinite:
            self.caught = True


class Suppressed(Late):
    def check_loss(self, loss: Tensor) -> None:
        with contextlib.suppress(NotFinite):
            if loss.isnan():
                raise NotFinite("loss")


@pytest.mark.parametrize("make", [Forks, Caught, Suppressed])
def test_what_may_go_on_is_no_check(make: type[Net]) -> None:
    """A fork in the branch that raises, somebody who catches: it is followed (graphs/speculated.py), and ends as the eager one does."""
    captured, _, _ = fit(make, "compile")
    assert FOLLOWED in [o.reason for o in captured.capture.obstacles]
    expected, error = fit(make, "eager", bad=True), fit(make, "compile", bad=True)
    assert (type(error[2]), str(error[2])) == (type(expected[2]), str(expected[2]))
    assert getattr(error[1], "caught", False) == getattr(expected[1], "caught", False)


class OnPython(Net):
    """Nothing that only the data decides."""

    def check(self, x: Tensor, y: Tensor, batch_idx: int) -> None:
        if x.shape[1] != 8 or self.a.out_features != 16:
            raise NotFinite("sizes")


def test_a_check_of_sizes_costs_nothing() -> None:
    """It is a guard, as before."""
    captured, _, _ = fit(OnPython, "compile")
    assert (captured.capture.whole, captured.capture.direct) == (True, True)


def test_the_first_batch_fails() -> None:
    """Before anything is traced, in a sentence about the batch."""
    module = Early()
    with pytest.raises(DataError, match="no class 7"):
        fasttrain.compile_fit(module, capture="compile", **QUIET).fit(batches(True)[GOOD:])


class OnlyCaptured(Net):
    """A check that fails in the traced step alone."""

    def check(self, x: Tensor, y: Tensor, batch_idx: int) -> None:
        most = 1e3 if torch.compiler.is_compiling() else 1e9
        if (x.abs() > most).any():
            raise NotFinite("large")


def test_a_check_that_fails_only_captured() -> None:
    """Said with its place: no step is taken twice in silence."""
    made = batches(False)
    made[GOOD][0].mul_(1e6)
    with pytest.raises(CaptureError, match=r"test_checks.py:\d+ fails"):
        fasttrain.compile_fit(OnlyCaptured(), capture="compile", **QUIET).fit(made)


class Yields(Early):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        yield super().training_step(batch, batch_idx)


class Manual(Early):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


@pytest.mark.parametrize("make", [Yields, Manual])
def test_where_the_update_is_in_the_graph_nothing_is_lifted(make: type[Net]) -> None:
    """It would be done before anybody heard of the check."""
    trained, _, error = fit(make, "auto", deterministic=True)
    assert error is None
    assert not trained.capture.whole
    assert str(fit(make, "auto", bad=True, deterministic=True)[2]) == f"batch {GOOD}: no class 7"


class Validates(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if batch[0].isnan().any():
            raise NotFinite(f"validation {batch_idx}")
        self.log("x", batch[0].mean())


def test_a_check_in_evaluation() -> None:
    """The user's own exception too."""
    trainer = fasttrain.compile_fit(Validates(), capture="compile", **QUIET)
    with pytest.raises(NotFinite, match=f"validation {8 * 9 + GOOD}"):
        trainer.fit(batches(False), batches(False) * 9 + batches(True))


def test_a_run_goes_on_captured_behind_a_failed_check() -> None:
    """In a loop of one's own that skips what it cannot train on."""
    trainer = fasttrain.compile_fit(Early(), capture="compile", **QUIET)
    good, bad = batches(False), batches(True)[GOOD]
    for batch in good[:3]:
        trainer.step(batch)
    for _ in range(2):
        with pytest.raises(NotFinite, match="no class 7"):
            trainer.step(bad)
        trainer.step(good[3])
