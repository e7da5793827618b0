"""What may happen to batches, gradients and logged values around a step: every rung trains as a plain loop does."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fasttrain

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}


def rows(n: int = 8) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(5)
    return [(torch.randn(8, 4, generator=g), torch.randn(8, 1, generator=g)) for _ in range(n)]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.bn, self.alpha = nn.BatchNorm1d(4), 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        out = self.net(self.bn(x)) * self.alpha
        return out.square().mean() if y is None else F.mse_loss(out, y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fitted(make: Any, loader: Any, capture: str, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    module = make()
    options = {"max_epochs": 2} | QUIET | options
    result = fasttrain.compile_fit(module, capture=capture, **options).fit(loader(module))
    return module, result


def same(make: Any, loader: Any, **options: Any) -> Any:
    a, _ = fitted(make, loader, "eager", **options)
    b, result = fitted(make, loader, "compile", **options)
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(q, p, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    return result


class Acts:
    """A loader whose own code changes the module between two batches."""

    def __init__(self, module: Any, act: Any) -> None:
        self.module, self.act = module, act

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[Any]:
        for i, batch in enumerate(rows()):
            self.act(self.module, i)
            yield batch


def mode(m: Any, i: int) -> None:
    m.train(i % 4 < 2)


def grad(m: Any, i: int) -> None:
    m.net[0].requires_grad_(i % 4 < 2)


def data(m: Any, i: int) -> None:
    if i % 3 == 2:
        m.net[0].weight.data = m.net[0].weight.data.clone() * 0.5


def number(m: Any, i: int) -> None:
    m.alpha = 1.0 + 0.1 * i


@pytest.mark.parametrize("act", [mode, grad, data, number])
def test_what_a_loader_changes_reaches_the_captured_step(act: Any) -> None:
    same(Small, lambda m: Acts(m, act))


class Scheduler(torch.optim.lr_scheduler.LRScheduler):
    def __init__(self, optimizer: Any, module: Any) -> None:
        self.module = module
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        grad(self.module, self.last_epoch)
        return [g["lr"] * 0.95 for g in self.optimizer.param_groups]


class Scheduled(Small):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": Scheduler(optimizer, self), "interval": "step"}}


def test_what_a_scheduler_changes_reaches_the_captured_step() -> None:
    same(Scheduled, lambda m: rows())


def test_a_plain_list_is_called_past_the_guards() -> None:
    assert same(Small, lambda m: rows()).capture.direct


def test_a_leaf_that_is_none_in_some_batches() -> None:
    same(Small, lambda m: [(x, None if i in (3, 5) else y) for i, (x, y) in enumerate(rows())])


class InPlace(Small):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, z, y = batch
        x.mul_(0.5).add_(1)
        return F.mse_loss(self.net(x) + self.net(z), y)


def test_a_step_that_writes_into_a_batch_whose_tensors_are_one() -> None:
    same(InPlace, lambda m: [(x, x if i % 3 == 2 else x.clone(), y) for i, (x, y) in enumerate(rows())], max_epochs=1)


class Pops(Small):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch["x"].add_(1)
        return F.mse_loss(self.net(x), batch.pop("y"))


@pytest.mark.parametrize("capture", ["eager", "compile"])
def test_the_first_batch_is_looked_at_in_a_copy(capture: str) -> None:
    given = [dict(x=x, y=y) for x, y in rows()]
    module, _ = fitted(Pops, lambda m: given, capture, max_epochs=1)
    torch.manual_seed(0)
    plain = Pops()
    optimizer = plain.configure_optimizers()
    for i, (x, y) in enumerate(rows()):
        optimizer.zero_grad()
        plain.training_step(dict(x=x, y=y), i).backward()
        optimizer.step()
    torch.testing.assert_close(list(module.parameters()), list(plain.parameters()), atol=1e-6, rtol=1e-5)
    assert all("y" not in b for b in given)


class Shared(nn.Module):
    """Two parameters with equal gradients, and one whose gradient is one number everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(4)) for _ in range(3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (batch[0] @ (self.a + self.b)).square().mean() + self.c.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adagrad(self.parameters(), lr=0.1)  # its own update, so that clipping is torch's, in place


@pytest.mark.parametrize("window", [1, 3])
def test_gradients_that_are_one_tensor_are_clipped_once(window: int) -> None:
    same(Shared, lambda m: rows(), gradient_clip_val=0.01, accumulate_grad_batches=window)


class Remembers(Small):
    """Keeps counts in every kind of container."""

    def __init__(self) -> None:
        super().__init__()
        self.nested: dict[str, list[int]] = {"n": []}
        self.default: Any = collections.defaultdict(list)
        self.counter: Any = collections.Counter()
        self.array = np.zeros(2)
        self.tensors = [torch.zeros(2)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.nested["n"].append(1)
        self.default["n"].append(1)
        self.counter["n"] += 1
        self.array[0] += 1
        self.tensors[0].add_(1)
        return super().training_step(batch, batch_idx)


def test_looking_and_measuring_leave_no_trace_in_containers() -> None:
    module, _ = fitted(Remembers, lambda m: rows(), "auto", max_epochs=1)
    counts = [len(module.nested["n"]), len(module.default["n"]), module.counter["n"], module.array[0], float(module.tensors[0][0])]
    assert counts == [8] * 5


class LogsState(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.scale = nn.Parameter(torch.ones(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.count.add_(1)  # type: ignore[operator]
        self.log("count", self.count, on_epoch=True)  # type: ignore[operator]
        return super().training_step(batch, batch_idx) * self.scale


@pytest.mark.parametrize("capture", ["eager", "compile"])
def test_a_logged_buffer_is_logged_as_it_was(capture: str) -> None:
    module = LogsState()
    result = fasttrain.compile_fit(module, capture=capture, max_epochs=1, **QUIET).fit(rows())
    assert math.isclose(result.metrics["count_epoch"], 4.5), result.metrics


@pytest.mark.parametrize("window", [1, 4])
def test_an_epoch_that_ends_with_none_ends_like_any_other(window: int) -> None:
    class Validated(Small):
        validated = 0

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.validated += 1

        def configure_optimizers(self) -> Any:
            self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return {"optimizer": self.optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.5)}

    module = Validated()
    trainer = fasttrain.compile_fit(module, capture="eager", max_epochs=2, accumulate_grad_batches=window, **QUIET)
    result = trainer.fit([*rows(3), None], rows(2))
    assert (module.validated, module.optimizer.param_groups[0]["lr"]) == (4, 0.025)
    assert result.steps == (6 if window == 1 else 2)


class HookedLater(Small):
    """Hooks that are registered in the middle of a run."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 4 and not hasattr(self, "hooked"):
            self.hooked = True
            self.hook()

    def hook(self) -> None:
        self.net[0].weight.register_hook(lambda g: g * 0)

    def configure_optimizers(self) -> Any:
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return self.optimizer


class StepHookedLater(HookedLater):
    def hook(self) -> None:
        def shrink(*_: Any) -> None:
            with torch.no_grad():
                self.net[0].weight.mul_(0.9)

        self.optimizer.register_step_post_hook(shrink)


@pytest.mark.parametrize("make", [HookedLater, StepHookedLater])
def test_hooks_registered_in_mid_run_are_called(make: Any) -> None:
    same(make, lambda m: rows())


class Rows(list):  # type: ignore[type-arg]
    scale = 1.0


class Scaled(Small):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * batch.scale


def test_attributes_of_a_batch_are_read_at_every_step() -> None:
    def loader(module: Any) -> list[Rows]:
        out = [Rows(b) for b in rows()]
        for i, batch in enumerate(out):
            batch.scale = 1.0 + i % 3
        return out

    same(Scaled, loader)
