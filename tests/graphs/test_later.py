"""Values that only the host knows - clocks, counters, ``.item()`` kept or logged - and what happens where a graph wants one."""

from __future__ import annotations

import collections
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fasttrain

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}


class Net(nn.Module):
    """One layer; subclasses keep something."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 1)
        self.n, self.total, self.best = 0, 0.0, float("inf")
        self.last: Any = None
        self.history: list[Any] = []
        self.stats: dict[str, Any] = {"n": 0, "loss": []}
        self.counts, self.recent = collections.Counter[str](), collections.deque[float](maxlen=3)
        self.times: list[float] = []
        self.log: Any

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.mse_loss(self.a(batch[0]), batch[1])
        told = self.tell(loss)
        return loss if told is None else told

    def tell(self, loss: Tensor) -> Any:
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def state(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("n", "total", "best", "last", "history", "stats", "counts", "recent")}


def batches(n: int = 6) -> list[Any]:
    g = torch.Generator().manual_seed(3)
    return [(torch.randn(8, 4, generator=g), torch.randn(8, 1, generator=g)) for _ in range(n)]


def fit(make: type[Net], capture: str) -> tuple[Any, Net]:
    torch.manual_seed(0)
    module = make()
    return fasttrain.compile_fit(module, capture=capture, **QUIET).fit(batches()), module


def compared(make: type[Net]) -> tuple[Any, Net]:
    """The captured run, all that it logged and kept, and its weights, those of the eager run."""
    (told, eager), (result, module) = fit(make, "eager"), fit(make, "compile")
    torch.testing.assert_close(list(module.parameters()), list(eager.parameters()))
    torch.testing.assert_close(module.state(), eager.state(), rtol=1e-5, atol=1e-6)
    for name, value in eager.state().items():
        assert type(getattr(module, name)) is type(value), name
    assert result.metrics == pytest.approx(told.metrics)
    return result, module


class Logs(Net):
    def tell(self, loss: Tensor) -> None:
        self.log("item", loss.item(), on_epoch=True)
        self.log("float", float(loss.detach()) * 2 + 1)
        self.log("tensor", loss)
        self.log("largest", max(loss.item(), 3.0))


class KeepsNumbers(Net):
    """In every kind of place, in the order of the program."""

    def tell(self, loss: Tensor) -> None:
        self.n += 1
        self.history.append({"loss": round(loss.item(), 4), "n": self.n})
        self.history.append(loss.detach().tolist())
        self.total += loss.item() * 8
        self.best = min(self.best, loss.item())
        self.stats["n"] += 1
        self.stats["loss"].append(float(loss.detach()))
        self.stats["mean"] = self.total / self.n
        self.counts["steps"] += 2
        self.recent.append(self.total)
        self.log("mean", self.total / self.n)


class KeepsTensors(Net):
    """One that nothing in the step reads, and one that a graph cannot do without."""

    def tell(self, loss: Tensor) -> None:
        self.last = loss.detach()
        self.history.append(loss.detach().cpu().numpy())


class LeavesItsState(Net):
    """With its graph, which the backward pass uses up."""

    def tell(self, loss: Tensor) -> None:
        self.last = loss * 3


class AddsUp(Net):
    """A number at first, then a tensor, on the host."""

    def tell(self, loss: Tensor) -> None:
        self.n += 1
        self.total = self.total + loss.detach()


class Averages(Net):
    """A running mean that is logged."""

    def tell(self, loss: Tensor) -> None:
        self.total = 0.9 * self.total + 0.1 * loss.item()
        self.log("smooth", self.total)


@pytest.mark.parametrize("make", [Logs, KeepsNumbers, KeepsTensors, LeavesItsState, Averages])
def test_kept_and_logged(make: type[Net]) -> None:
    """One graph, one trace, past its guards; values, their types and their order are the eager run's."""
    result, _ = compared(make)
    assert (result.capture.whole, result.capture.direct, result.capture.traces) == (True, True, 1), result.capture


def test_a_number_that_becomes_a_tensor() -> None:
    """Right, on whatever road."""
    result, module = compared(AddsUp)
    assert isinstance(module.total, Tensor)
    assert result.capture.whole


class Scales(Net):
    """The counter is a factor of the loss."""

    def tell(self, loss: Tensor) -> Tensor:
        self.n += 1
        self.history.append(loss.item())
        return loss * (1.0 + self.n)


class Decays(Net):
    def tell(self, loss: Tensor) -> Tensor:
        self.best = min(self.best, 4.0) * 0.5
        return loss * self.best


class DecaysInPieces(Decays):
    """A compiler must not freeze the number in a stretch of a step either."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * 2 if loss > 1e6 else loss


class Turns(Net):
    """A branch on a counter."""

    def tell(self, loss: Tensor) -> Any:
        self.n += 1
        if self.n % 2:
            self.history.append(loss.item())
            return loss * 2
        return None


class KeepsFew(Net):
    """A branch on how long a list is."""

    def tell(self, loss: Tensor) -> None:
        self.history.append(loss.item())
        if len(self.history) > 3:
            self.history.pop(0)


class StartsAtNone(Net):
    def tell(self, loss: Tensor) -> None:
        if self.last is None or self.last > 100.0:
            self.last = 0.0
        self.last += 1.0


class FollowsItself(Net):
    """What the graph computed last time comes into this one."""

    def tell(self, loss: Tensor) -> Tensor:
        before = self.last if isinstance(self.last, Tensor) else torch.zeros(())
        self.last = loss.detach()
        self.n += 1
        return loss + 0.5 * before * loss


class ReadsAgain(Net):
    """A constant is written and read back by the graph."""

    def tell(self, loss: Tensor) -> Tensor:
        self.n = 3
        self.stats["n"] += self.n
        return loss * self.n


class Returns(Net):
    def tell(self, loss: Tensor) -> Any:
        self.n += 1
        return {"loss": loss, "value": loss.item(), "n": self.n}


class Iterates(Net):
    def tell(self, loss: Tensor) -> Any:
        self.history.append(0.5)
        return loss + sum(self.history)


@pytest.mark.parametrize(
    "make", [Scales, Decays, DecaysInPieces, Turns, KeepsFew, StartsAtNone, FollowsItself, ReadsAgain, Returns, Iterates]
)
def test_what_a_graph_wants_is_not_left_to_the_host(make: type[Net]) -> None:
    """A loss, a branch, a returned value made of it: right, whatever becomes of the capture."""
    compared(make)


def test_what_needs_no_host_stays_whole() -> None:
    """Beside a constant that is written and read; where a counter is asked for, a list is still left to the host."""
    for make in (ReadsAgain, FollowsItself):
        assert fit(make, "compile")[0].capture.whole
    assert fit(ReadsAgain, "compile")[0].capture.direct


class Times(Net):
    """From one step's start to the next, and over the work of one."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        started = time.perf_counter()
        loss = F.mse_loss(self.a(batch[0]), batch[1])
        for _ in range(30):
            loss = loss + 0 * (self.a(batch[0].repeat(64, 8)[:, :4]) ** 2).sum()
        self.times.append(time.perf_counter() - started)
        self.log("since", time.time() - self.total)
        self.total = time.time()
        return loss


class TwoNames(Net):
    """One list, written under one name and read under the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stats["loss"] = self.history

    def tell(self, loss: Tensor) -> Any:
        self.history.append(loss.item())
        return loss * (1.0 if len(self.stats["loss"]) < 4 else 0.5)


class FilledLater(Net):
    """A record that is kept first and filled then."""

    def tell(self, loss: Tensor) -> None:
        record: dict[str, float] = {}
        self.history.append(record)
        record["loss"] = loss.item()


class Catches(Net):
    """An error that is part of the plan."""

    def tell(self, loss: Tensor) -> None:
        try:
            self.stats["seen"] += 1
        except KeyError:
            self.stats["seen"] = 1


class InTheDict(Net):
    """One counter under both of its names."""

    def tell(self, loss: Tensor) -> None:
        self.n += 1
        self.__dict__["n"] += 1
        self.history.append(self.n)


class ReadsTheDict(Net):
    def tell(self, loss: Tensor) -> Any:
        self.n += 1
        self.history.append(vars(self)["n"])
        return loss * (1.0 + self.__dict__["n"] / 10)


class OverwritesInTheDict(Net):
    """First by name, with what only the host knows, then behind it."""

    def tell(self, loss: Tensor) -> None:
        self.total = loss.item()
        self.__dict__["total"] = 2.0


class SetsOtherwise(Net):
    """Its own ``__setattr__`` stands between the name and the value."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value * 2 if name == "n" else value)

    def tell(self, loss: Tensor) -> None:
        self.n = (self.n + 1) % 1000
        self.history.append(self.n)


@pytest.mark.parametrize("make", [TwoNames, FilledLater, Catches, InTheDict, ReadsTheDict, OverwritesInTheDict, SetsOtherwise])
def test_what_the_host_is_given_is_what_it_keeps(make: type[Net]) -> None:
    """Whatever that does to the graph."""
    result, _ = compared(make)
    assert result.capture.rung == "compile"


def test_clocks() -> None:
    """A clock read before anything is computed tells the step's start, any other its end."""
    result, module = fit(Times, "compile")
    assert (result.capture.whole, result.capture.direct, result.capture.traces) == (True, True, 1), result.capture
    assert len(module.times) == 6
    assert all(20e-6 < t < 60 for t in module.times)
    assert time.time() - 60 < module.total < time.time()
    assert 0 < result.metrics["since"] < 10


class Keeps(Net):
    def tell(self, loss: Tensor) -> None:
        self.n += 1
        self.history.append(loss.detach())


def test_what_does_not_compile_is_not_compiled_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that the compiler cannot take is no better with less left to the host; each attempt may be minutes."""
    from torch._inductor import graph

    whole: list[bool] = []

    def lower(self: Any, *args: Any, **kwargs: Any) -> Any:
        whole.append(torch._dynamo.config.trace_autograd_ops)  # in pieces it is off
        raise NotImplementedError("a view")

    monkeypatch.setattr(graph.GraphLowering, "run", lower)
    with torch._inductor.config.patch(force_disable_caches=True):
        fit(Keeps, "compile")
    assert sum(whole) == 1  # then in pieces
