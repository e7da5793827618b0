"""What a step does on the host - prints, messages, warnings, lists - lifted behind its graph: nobody sees a difference."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fasttrain

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
log = logging.getLogger("tests.lifted")


class Net(nn.Module):
    """Two layers; subclasses say or keep something in the step."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
        self.seen: list[Any] = []
        self.history: dict[str, list[Any]] = {"loss": []}

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.b(torch.tanh(self.a(x))), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.tell(loss, batch_idx)
        return loss

    def tell(self, loss: Tensor, batch_idx: int) -> None:
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches(n: int = 8) -> list[Any]:
    g = torch.Generator().manual_seed(3)
    return [(torch.randn(8, 8, generator=g), torch.randint(4, (8,), generator=g)) for _ in range(n)]


def fit(make: type[Net], capture: str, **options: Any) -> tuple[Any, Net]:
    torch.manual_seed(0)
    module = make()
    return fasttrain.compile_fit(module, capture=capture, **QUIET | options).fit(batches()), module


class Prints(Net):
    """A formatted number, and tensors."""

    def tell(self, loss: Tensor, batch_idx: int) -> None:
        print("loss", f"{loss:.3f}", end=";\n")
        print(loss.detach() > 0, self.a.weight.detach().sum() > 0, sep=" ")


class PrintsIndex(Net):
    def tell(self, loss: Tensor, batch_idx: int) -> None:
        print(batch_idx, f"{loss.detach():.3f}")


class PrintsHistory(Net):
    """A tensor with a gradient shows its grad_fn: it is printed where it stands."""

    def tell(self, loss: Tensor, batch_idx: int) -> None:
        print(loss)


class Says(Net):
    def tell(self, loss: Tensor, batch_idx: int) -> None:
        log.info("loss %.3f, %s", loss.detach().item(), loss.detach().round(decimals=3))


class Warns(Net):
    def tell(self, loss: Tensor, batch_idx: int) -> None:
        warnings.warn(f"a loss of {loss:.3f}", RuntimeWarning, stacklevel=2)


class KeepsTensors(Net):
    def tell(self, loss: Tensor, batch_idx: int) -> None:
        self.seen.append(loss.detach())
        self.history["loss"].append((loss.detach() * 2, "twice"))


class KeepsNumbers(Net):
    def tell(self, loss: Tensor, batch_idx: int) -> None:
        self.seen.append(loss.detach().item())


class KeepsWeights(Net):
    """The list holds the weight itself, which moves on."""

    def tell(self, loss: Tensor, batch_idx: int) -> None:
        self.seen.append(self.a.weight.detach())


class LooksBack(Net):
    """Reads the list that it appends to: no graph knows what is in it."""

    def tell(self, loss: Tensor, batch_idx: int) -> None:
        self.seen.append(loss.detach())
        self.history["loss"].append(len(self.seen))


class StartsAnew(KeepsTensors):
    """The list is another one after the first epoch."""

    def on_train_epoch_end(self) -> None:
        self.first, self.seen = self.seen, []


@pytest.mark.parametrize("make", [Prints, PrintsIndex])
def test_prints(make: type[Net], capsys: pytest.CaptureFixture[str]) -> None:
    """One whole graph; the lines are those of the eager run, nothing of a trial among them."""
    fit(make, "eager")
    eager = capsys.readouterr().out
    captured, _ = fit(make, "compile")
    assert capsys.readouterr().out == eager
    assert len(eager.splitlines()) == 8 * (2 if make is Prints else 1)
    assert captured.capture.whole
    assert all("lifted" in o.done and o.cost_us is not None for o in captured.capture.obstacles), captured.capture.obstacles


def test_a_print_on_the_steady_road() -> None:
    """Its values are outputs of the graph: the steady step is called past the guards."""

    class One(Net):
        def tell(self, loss: Tensor, batch_idx: int) -> None:
            print(f"{loss:.3f}", loss.detach().item())

    captured, _ = fit(One, "compile")
    assert captured.capture.direct


def test_what_cannot_be_lifted_stays(capsys: pytest.CaptureFixture[str]) -> None:
    """It cuts the step, and is printed there."""
    captured, _ = fit(PrintsHistory, "compile")
    assert capsys.readouterr().out.count("grad_fn") == 8
    assert not captured.capture.whole
    assert "print" in captured.capture.obstacles[0].reason


def test_messages_have_their_place(caplog: pytest.LogCaptureFixture) -> None:
    """Level, text, file, line and function of every record are the eager run's."""
    caplog.set_level(logging.INFO, log.name)
    told = []
    for capture in ("eager", "compile"):
        caplog.clear()
        result, _ = fit(Says, capture)
        told.append([(r.levelno, r.getMessage(), r.filename, r.lineno, r.funcName) for r in caplog.records if r.name == log.name])
    assert told[0] == told[1]
    assert len(told[0]) == 9  # the first batch is looked at too
    assert (result.capture.whole, result.capture.direct) == (True, True)


def test_warnings_have_their_place() -> None:
    """Each with its text, category, file and line, under every filter."""
    for action in ("always", "default", "once"):
        told = []
        for capture in ("eager", "compile"):
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter(action)  # type: ignore[arg-type]
                globals().pop("__warningregistry__", None)
                result, _ = fit(Warns, capture)
            told.append([(str(w.message), w.category, w.filename, w.lineno) for w in seen if w.category is RuntimeWarning])
        assert result.capture.whole
        assert told[0] == told[1], action
        assert len(told[0]) >= 7  # two losses may be told alike


@pytest.mark.parametrize("make", [KeepsTensors, KeepsNumbers, KeepsWeights])
def test_lists_grow(make: type[Net]) -> None:
    """By one a step, in order; whole, and past the guards."""
    (_, eager), (result, module) = fit(make, "eager"), fit(make, "compile")
    assert (result.capture.whole, result.capture.direct, result.capture.traces) == (True, True, 1)
    assert len(module.seen) == len(eager.seen) == 8
    torch.testing.assert_close(module.seen, eager.seen)
    torch.testing.assert_close(module.history, eager.history) if make is not KeepsTensors else None
    if make is KeepsWeights:
        assert all(torch.equal(w, module.a.weight) for w in module.seen)
    if make is KeepsTensors:
        assert [(v.item(), s) for v, s in module.history["loss"]] == [(pytest.approx(2 * s.item()), "twice") for s in eager.seen]
        assert not module.seen[0].requires_grad


def test_a_list_that_is_read() -> None:
    """It stays in the trace, whatever that does to the graph; the numbers are right."""
    (_, eager), (_, module) = fit(LooksBack, "eager"), fit(LooksBack, "compile")
    torch.testing.assert_close(module.seen, eager.seen)
    assert module.history == eager.history == {"loss": list(range(1, 9))}


def test_a_list_that_is_replaced() -> None:
    """Between two epochs: the new list grows, the old one is left alone, and nothing is traced anew."""
    result, module = fit(StartsAnew, "compile", max_epochs=2)
    assert (len(module.first), len(module.seen), result.capture.traces) == (8, 0, 1)  # type: ignore[arg-type]
    _, eager = fit(StartsAnew, "eager", max_epochs=2)
    torch.testing.assert_close(module.first, eager.first)
    assert len(module.history["loss"]) == len(eager.history["loss"]) == 16


def test_prints_of_several_optimizers(capsys: pytest.CaptureFixture[str]) -> None:
    """By hand, the updates inside the graph: a weight is printed as it was when it was printed."""

    class ByHand(Net):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            optimizer = self.optimizers()  # type: ignore[operator]
            loss = self.loss(batch)
            print(f"{self.a.weight.detach().sum():.4f}")
            optimizer.zero_grad()
            self.manual_backward(loss)  # type: ignore[operator]
            optimizer.step()
            print(f"{self.a.weight.detach().sum():.4f}")

    fit(ByHand, "eager")
    eager = capsys.readouterr().out
    fit(ByHand, "compile")
    assert [float(v) for v in capsys.readouterr().out.split()] == pytest.approx([float(v) for v in eager.split()], abs=2e-4)
    assert len(eager.split()) == 16


class Breaks(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.args and record.args[0] == 3:  # type: ignore[index]
            raise BrokenPipeError("nobody listens")


def test_an_error_of_host_work_is_the_users() -> None:
    """Not the tracer's: it ends the fit, and no step is run a second time."""

    class Counts(Net):
        def tell(self, loss: Tensor, batch_idx: int) -> None:
            self.seen.append(loss.detach())
            log.info("batch %d", batch_idx)

    handler, level = Breaks(), log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        for rung in ("eager", "compile"):
            module = Counts()
            with pytest.raises(BrokenPipeError, match="nobody listens"):
                fasttrain.compile_fit(module, capture=rung, **QUIET).fit(batches(6))
            assert len(module.seen) == 4
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
