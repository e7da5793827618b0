"""A tensor that a step keeps with its graph: the gradient into that graph comes as it does eagerly, or the capture is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fasttrain
from fasttrain.errors import CaptureError
from tests.graphs.test_obstacles import QUIET, Net, batches, both


class Keeps(Net):
    """The bias of the step before is in the loss; nothing in its graph is used up by a backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.prev = nn.Parameter(torch.zeros(1)), None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch) + 0.3 * self.c.sum()
        if self.prev is not None:
            loss = loss + self.used(self.prev)
        self.prev = self.kept()
        return loss

    def kept(self) -> Any:
        return self.c + 1.0

    def used(self, prev: Any) -> Tensor:
        return prev.sum()


class KeepsATuple(Keeps):
    def kept(self) -> Any:
        return (self.c + 1.0, 2)

    def used(self, prev: Any) -> Tensor:
        return prev[0].sum()


class KeepsAList(Keeps):
    def __init__(self) -> None:
        super().__init__()
        self.prev = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch) + sum((p.sum() for p in self.prev[-1:]), 0.3 * self.c.sum())
        self.prev.append(self.c + 1.0)
        return loss


class KeepsInManual(Keeps):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()


class KeepsInPieces(Keeps):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * 1.5 if loss.item() > 1.3 else loss


@pytest.mark.parametrize("make", [Keeps, KeepsATuple, KeepsAList, KeepsInManual, KeepsInPieces])
def test_a_loss_that_goes_back_into_an_earlier_graph_is_not_captured(make: type[Net]) -> None:
    """``auto`` runs eagerly, whichever it would have chosen; asked for, the capture is refused with what to change."""
    weights = []
    for capture in ("eager", "auto"):
        torch.manual_seed(0)
        module = make()
        result = fasttrain.compile_fit(module, capture=capture, **QUIET).fit(batches(6))
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    torch.testing.assert_close(weights[1], weights[0], rtol=2e-5, atol=1e-6)
    assert result.capture.rung == "eager"
    with pytest.raises(CaptureError, match=r"graph of an earlier step.*\.detach\(\)"):
        fasttrain.compile_fit(make(), capture="compile", **QUIET).fit(batches(6))


def test_the_attribute_is_named() -> None:
    with pytest.raises(CaptureError, match=r"an earlier step, through prev"):
        fasttrain.compile_fit(Keeps(), capture="compile", **QUIET).fit(batches(6))


class KeepsForLater(Keeps):
    """Nothing of it shows while the step is tried."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch) + 0.3 * self.c.sum()
        if batch_idx == 8:
            loss = loss + self.prev.sum()
        self.prev = self.c + 1.0
        return loss


def test_what_shows_later_is_an_error() -> None:
    """The graph is gone by then: no gradient is left out in silence."""
    with pytest.raises(CaptureError, match=r"through prev.*prev\.detach\(\)"):
        fasttrain.compile_fit(KeepsForLater(), capture="compile", **QUIET).fit(batches())


class KeepsAValue(Net):
    """Three ways to use a kept tensor that take no gradient, and one that reads it behind the step."""

    def __init__(self) -> None:
        super().__init__()
        self.prev, self.last, self.seen = None, None, list[bool]()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        out = self.b(torch.tanh(self.a(x)))
        loss = nn.functional.cross_entropy(out, y)
        if self.prev is not None:
            with torch.no_grad():
                weight = self.last.tanh()
            loss = loss * (1 + weight) + 0.1 * (self.prev.detach() * out).mean()
        self.prev, self.last = out, loss
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append(self.last.requires_grad and self.last.grad_fn is not None)


def test_a_kept_value_is_captured_and_looks_as_it_does_eagerly() -> None:
    _, captured, plain, traced = both(KeepsAValue)
    assert captured.capture.whole
    assert traced.seen == plain.seen == [True] * 12


class Twice(Keeps):
    """What is kept is kept of what was kept: the third backward pass goes through the first one's graph."""

    def kept(self) -> Any:
        return self.c + 1.0 if self.prev is None else 0.5 * self.prev.exp() + self.c


class OfOtherWeights(Keeps):
    """No backward pass has used its graph up, but an update has written the weights that it holds."""

    def kept(self) -> Any:
        return (self.c * self.c).sum()


@pytest.mark.parametrize("make", [Twice, OfOtherWeights])
def test_torchs_own_errors_come_at_their_step(make: type[Net]) -> None:
    """And what was tried before has left nothing."""

    weights = []
    for capture in ("eager", "auto"):
        torch.manual_seed(0)
        module = make()
        with pytest.raises(RuntimeError, match=r"second time|modified by an inplace"):
            fasttrain.compile_fit(module, capture=capture, **QUIET).fit(batches(6))
        weights.append(module.a.weight.detach().clone())
    torch.testing.assert_close(*weights)
