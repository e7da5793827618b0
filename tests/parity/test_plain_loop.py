"""The eager rung is the loop one writes by hand, bit for bit; this file writes those loops out."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain import compile_fit
from tests.parity import modules as m
from tests.parity.harness import BARE, Case, assert_same_weights, fast_fit


def net(p: float = 0.0) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(m.WIDTH, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(p), nn.Linear(16, m.CLASSES))


def by_hand(
    model: nn.Module,
    loader: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int = 2,
    window: int = 1,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    by_step: Any = None,
    by_epoch: Any = None,
) -> list[Tensor]:
    """A training loop as the textbooks have it; a short last window is divided by its own length."""
    losses = []
    for _ in range(epochs):
        batches = len(loader)  # type: ignore[arg-type]
        for i, (x, y) in enumerate(loader):
            length = min(window, batches - i // window * window)
            loss = F.cross_entropy(model(x), y)
            losses.append(loss.detach())
            if i % window == 0:
                optimizer.zero_grad()
            (loss / length if length > 1 else loss).backward()
            if (i + 1) % window == 0 or i + 1 == batches:
                if clip_norm:
                    nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
                if clip_value:
                    nn.utils.clip_grad_value_(model.parameters(), clip_value)
                optimizer.step()
                if by_step:
                    by_step.step()
        if by_epoch:
            by_epoch.step()
    return losses


def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("clip", [{}, {"clip_norm": 0.5}, {"clip_value": 0.01}])
def test_eager_is_the_loop_by_hand(window: int, clip: dict[str, float], p: float, workers: int) -> None:
    """Weights, buffers and the global random stream, with dropout, windows (the last one short), clipping and workers."""
    loader = partial(m.labelled, num_workers=workers)
    theirs, ours = net(p), net(p)
    torch.manual_seed(7)
    by_hand(theirs, loader(), optimizer_for(theirs), window=window, **clip)
    after = torch.get_rng_state()
    torch.manual_seed(7)
    options = {"gradient_clip_val": next(iter(clip.values()), None), "gradient_clip_algorithm": "value" if "clip_value" in clip else "norm"}
    options |= {"max_epochs": 2, "capture": "eager", "accumulate_grad_batches": window}
    trainer = compile_fit(ours, loss=F.cross_entropy, optimizer=optimizer_for(ours), **BARE | options)
    trainer.fit(loader())
    assert_same_weights(ours.state_dict(), theirs.state_dict())
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("capture", ["eager", "compile"])
def test_schedulers_move_as_in_the_loop_by_hand(interval: str, capture: str) -> None:
    """A learning rate that changes every step or every epoch reaches every rung."""
    module = m.StepScheduled() if interval == "step" else m.Base()
    theirs = m.Base()
    torch.manual_seed(3)
    with torch.no_grad():
        for p, q in zip(module.parameters(), theirs.parameters(), strict=True):
            q.copy_(p)
    opt = torch.optim.SGD(theirs.parameters(), lr=0.2, momentum=0.9)
    rule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    if interval == "epoch":
        mine = torch.optim.SGD(module.parameters(), lr=0.2, momentum=0.9)
        module.configure_optimizers = lambda: ([mine], [torch.optim.lr_scheduler.ExponentialLR(mine, 0.9)])  # type: ignore[method-assign]
    torch.manual_seed(7)
    by_hand(theirs, m.labelled(), opt, **{f"by_{interval}": rule})
    torch.manual_seed(7)
    compile_fit(module, **BARE | {"max_epochs": 2, "capture": capture}).fit(m.labelled())
    assert_same_weights(module.state_dict(), theirs.state_dict(), 0.0 if capture == "eager" else 2e-5)


@pytest.mark.parametrize("capture", ["eager", "compile"])
@pytest.mark.parametrize("window", [1, 4])
def test_fp16_is_torchs_grad_scaler(capture: str, window: int) -> None:
    """16-mixed is autocast and torch.amp.GradScaler, overflowed first steps included; fp16 rounds at 1e-3."""
    case = Case(m.Classifier, options={"precision": "16-mixed", "accumulate_grad_batches": window, "gradient_clip_val": 0.5})
    ours = fast_fit(case, capture=capture)
    torch.manual_seed(0)
    model, scaler = m.Classifier(), torch.amp.GradScaler("cpu")
    optimizer = model.configure_optimizers()
    torch.manual_seed(7)
    taken = 0
    for _ in range(3):
        loader = m.labelled()
        for i, (x, y) in enumerate(loader):
            length = min(window, len(loader) - i // window * window)
            with torch.autocast("cpu", torch.float16):
                loss = F.cross_entropy(model(x), y) / length
            if i % window == 0:
                optimizer.zero_grad()
            scaler.scale(loss).backward()
            if (i + 1) % window == 0 or i + 1 == len(loader):
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                before = scaler.get_scale()
                scaler.step(optimizer)
                scaler.update()
                taken += scaler.get_scale() >= before
    assert ours.steps == taken
    assert_same_weights(ours.weights, {k: v.detach() for k, v in model.state_dict().items()}, 1e-5 if capture == "eager" else 2e-2)


class Overflows(m.Classifier):
    """Its third loss overflows fp16 when it is scaled."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * (1e36 if self.global_step == 2 and batch_idx == 2 else 1.0)


@pytest.mark.parametrize("capture", ["eager", "compile"])
def test_an_overflowed_step_is_no_step(capture: str) -> None:
    """It leaves the weights alone, is not counted, moves no scheduler, and halves the loss scale."""

    class Module(Overflows):
        def configure_optimizers(self) -> Any:
            opt = torch.optim.SGD(self.parameters(), lr=0.1)
            self.rule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
            return [opt], [{"scheduler": self.rule, "interval": "step"}]

    ours = fast_fit(Case(Module, options={"precision": "16-mixed", "max_epochs": 1}), capture=capture)
    assert ours.steps == 5
    assert ours.result.ledger.skipped_steps == 1
    assert ours.module.rule.last_epoch == 5
    assert all(bool(torch.isfinite(w).all()) for w in ours.weights.values())


@pytest.mark.parametrize("capture", ["eager", "compile"])
def test_a_short_last_window_weighs_its_batches_fully(capture: str) -> None:
    """[ours] Six batches in windows of four: the last two are divided by two, not by four."""
    ours = fast_fit(Case(m.Base, options={"accumulate_grad_batches": 4}), capture=capture)
    torch.manual_seed(0)
    model = m.Base()
    torch.manual_seed(7)
    by_hand(model, m.labelled(), model.configure_optimizers(), epochs=3, window=4)
    assert ours.steps == 6
    assert_same_weights(ours.weights, dict(model.state_dict()), 0.0 if capture == "eager" else 2e-5)


def test_a_window_schedule_starts_at_its_epoch() -> None:
    """accumulate_grad_batches={0: 1, 1: 3}: six steps in the first epoch, two in each after."""
    ours = fast_fit(Case(m.Base, options={"accumulate_grad_batches": {0: 1, 1: 3}}))
    assert ours.steps == 6 + 2 + 2


@pytest.mark.parametrize("capture", ["eager", "compile"])
def test_an_iterable_without_length_closes_its_window(capture: str) -> None:
    """[ours] The last window of a stream is rescaled to the batches it had."""
    batches = list(m.labelled(shuffle=False))
    ours = fast_fit(Case(m.Base, lambda: stream(batches), options={"accumulate_grad_batches": 4, "max_epochs": 2}), capture=capture)
    torch.manual_seed(0)
    model = m.Base()
    by_hand(model, batches, model.configure_optimizers(), window=4)
    assert ours.steps == 4
    assert_same_weights(ours.weights, dict(model.state_dict()), 1e-6 if capture == "eager" else 2e-5)


class _Again(torch.utils.data.IterableDataset):
    """The batches again and again, without a length."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


def stream(batches: list[Any]) -> Any:
    return torch.utils.data.DataLoader(_Again(batches), batch_size=None)
