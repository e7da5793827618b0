"""What public modules do in a step, one small module each: whole in one graph, or as it says, with the eager result."""

from __future__ import annotations

import collections
import os
import random
import time
from collections import namedtuple
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fasttrain
from tests.graphs.test_obstacles import QUIET, Net, batches, both


class OnlyTheBatch(Net):
    def training_step(self, batch: Any) -> Tensor:
        return self.loss(batch)


class Reads(Net):
    """Host values: the trainer's, hyperparameters, the environment, arrays and dicts by name."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = {"weights": {"a": 0.5}, "names": ["a", "b"]}
        self.table = np.array([0.5, 2.0])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        scale = self.settings["weights"][self.settings["names"][0]] * float(self.table[1])
        if self.trainer.max_epochs > 5 or os.environ.get("NO_SUCH_SETTING"):
            scale = 0.0
        return self.loss(batch) * scale


class ReadsTheClock(Net):
    """A timer around the forward pass; its reading goes nowhere near the loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        started = time.perf_counter()
        loss = self.loss(batch)
        self.took = time.perf_counter() - started
        return loss


class Switches(Net):
    """Another loss from the second epoch on."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        return loss if self.trainer.current_epoch < 1 else loss + 1e-2 * self.a.weight.square().sum()


class Checkpoints(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        h = checkpoint(lambda x: torch.tanh(self.a(x)), x, use_reentrant=False)
        return F.cross_entropy(self.b(h), y)


class Doubles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * 2 + 0 * x


class OwnFunction(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.b(Doubles.apply(torch.tanh(self.a(x)))), y)


class Normed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(self.a)
        self.b = nn.utils.parametrizations.spectral_norm(self.b)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)


class Functional(Net):
    """Per-sample losses by ``torch.func``."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        def of_one(x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.b(torch.tanh(self.a(x[None]))), y[None])

        return torch.func.vmap(of_one)(*batch).mean()


class ReplacesABuffer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * batch[0].mean(0)
        return self.loss((batch[0] - self.mean, batch[1]))


class Lazy(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.LazyLinear(16)  # type: ignore[assignment]

    def configure_optimizers(self) -> Any:
        self.a(torch.zeros(1, 8))
        return super().configure_optimizers()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)


class Teaches(Net):
    """Two forward passes, one without gradients whose result is a target; the teacher follows at the end of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(8, 16).requires_grad_(False)
        self.teacher.load_state_dict(self.a.state_dict())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        with torch.no_grad():
            target = torch.tanh(self.teacher(x * 0.9))
        return self.loss(batch) + F.mse_loss(torch.tanh(self.a(x)), target.detach())

    def follow(self) -> None:
        with torch.no_grad():
            for slow, quick in zip(self.teacher.parameters(), self.a.parameters(), strict=True):
                slow.lerp_(quick, 0.1)


class TeachesAtTheEnd(Teaches):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.follow()


class TeachesBeforeZeroing(Teaches):
    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.follow()


class ReturnsMore(Net):
    """Outputs with a graph, and one that is None."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        return {"loss": loss, "scores": self.a(batch[0]), "extra": None}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert outputs["extra"] is None
        assert not outputs["scores"].requires_grad


class Backward(Net):
    """A module that listens to its backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.heard = 0
        self.a.register_full_backward_hook(self.hear)

    def hear(self, module: nn.Module, given: Any, taken: Any) -> None:
        self.heard += 1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)


WHOLE = [OnlyTheBatch, Reads, Switches, Checkpoints, OwnFunction, Normed, Functional, ReplacesABuffer, Lazy]
WHOLE += [TeachesAtTheEnd, ReturnsMore]


@pytest.mark.parametrize("make", WHOLE)
def test_whole(make: type[Net]) -> None:
    _, captured, _, _ = both(make, max_epochs=3)
    assert captured.capture.whole
    assert captured.capture.traces <= 2


class DrawsByNumpy(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return self.loss((x + torch.from_numpy(np.random.randn(*x.shape)).float() * 0.1, y))


def test_numpys_random_numbers_are_the_eager_ones() -> None:
    left = []
    for capture in ("eager", "compile"):
        torch.manual_seed(0)
        np.random.seed(7)
        module = DrawsByNumpy()
        fasttrain.compile_fit(module, capture=capture, **QUIET).fit(batches())
        left.append((module, np.random.rand(), torch.rand(())))
    assert left[0][1:] == left[1][1:]
    for p, q in zip(left[0][0].parameters(), left[1][0].parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=2e-5, atol=1e-6)


class Draws(Net):
    """Python's own random numbers: in a graph they were others, and ``uniform`` gave none at all."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return self.loss((x * random.uniform(0.5, 1.5), y)) * random.randint(1, 3)


def test_pythons_random_numbers_are_the_eager_ones() -> None:
    """Drawn outside of any graph, as many as eagerly."""
    left = []
    for capture in ("eager", "compile"):
        torch.manual_seed(0)
        random.seed(7)
        module = Draws()
        result = fasttrain.compile_fit(module, capture=capture, **QUIET).fit(batches())
        left.append((result, module, random.random()))
    (_, a, one), (captured, b, other) = left
    assert one == other
    assert captured.capture.rung == "compile"
    assert "a number that Python draws" in captured.capture.obstacles[0].reason
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("make", [ReadsTheClock, TeachesBeforeZeroing])
def test_between_or_in_pieces(make: type[Net]) -> None:
    _, captured, _, _ = both(make, max_epochs=2)
    assert captured.capture.rung == "compile"


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_a_backward_hook_is_heard() -> None:
    """Of every step, eagerly, and explained."""
    module = Backward()
    result = fasttrain.compile_fit(module, deterministic=True, **QUIET).fit(batches(5))
    assert result.capture.rung == "eager"
    assert "backward hook" in str(result.capture.obstacles[0])
    assert module.heard == 5


class Peculiar(tuple):  # type: ignore[type-arg]
    """e3nn's ``Irreps``: nobody may ask how long it is."""

    def __len__(self) -> int:
        raise NotImplementedError


def test_an_attribute_that_answers_no_question() -> None:
    class Keeps(OnlyTheBatch):
        def __init__(self) -> None:
            super().__init__()
            self.irreps = Peculiar((1, 2))

        def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
            return super().training_step(batch) * sum(self.irreps)

    assert both(Keeps)[1].capture.whole


class LogsUnderInference(Net):
    """scvi's: what it logs is computed in inference mode, from tensors of the step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.told(loss, batch[0])
        return loss

    @torch.inference_mode()
    def told(self, loss: Tensor, x: Tensor) -> None:
        self.log("loss", loss.detach(), on_epoch=True)  # type: ignore[operator]
        self.log("count", float(self.trainer.global_step), on_epoch=True)  # type: ignore[operator]
        print("mean", float(x.mean()))


def test_inference_mode_in_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    """In a graph it is no_grad; a float made of the step's number is the host's, or it would be frozen."""
    eager, captured, _, _ = both(LogsUnderInference)
    assert captured.capture.whole
    assert eager.metrics["count"] == captured.metrics["count"]
    said = [float(line.removeprefix("mean ")) for line in capsys.readouterr().out.splitlines()]
    assert len(said) == 24
    assert said[:12] == pytest.approx(said[12:], abs=1e-6)


class MakesAClass(Net):
    """pytorch-forecasting's: the first step makes a class for the network's output, and keeps it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not hasattr(self, "kind"):
            self.kind = namedtuple("Out", ["loss"])
        return self.kind(self.loss(batch)).loss


def test_a_class_made_on_the_way_stays() -> None:
    assert both(MakesAClass)[1].capture.whole


class Named(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass
class Held:
    x: Tensor
    y: Tensor
    name: str = "rows"


@pytest.mark.parametrize("form", [lambda x, y: {"in": {"x": x}, "y": [y, None]}, Named, Held])
def test_batches_of_every_form(form: Any) -> None:
    class Unpacks(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if isinstance(batch, dict):
                return self.loss((batch["in"]["x"], batch["y"][0]))
            return self.loss((batch.x, batch.y))

    weights = []
    for capture in ("eager", "compile"):
        torch.manual_seed(0)
        module = Unpacks()
        result = fasttrain.compile_fit(module, capture=capture, **QUIET).fit([form(*b) for b in batches()])
        assert capture == "eager" or result.capture.whole
        weights.append(module.a.weight.detach())
    torch.testing.assert_close(*weights, rtol=2e-5, atol=1e-6)


class KeepsTheLast(Net):
    """The mean of the last three losses, kept in a deque that holds no more."""

    def __init__(self) -> None:
        super().__init__()
        self.recent: collections.deque[Tensor] = collections.deque(maxlen=3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.recent.append(loss.detach())
        return loss * (1 + torch.stack(list(self.recent)).mean())


class ClampsData(Net):
    """A critic's weights between two bounds, by assignment."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.b.weight.data = self.b.weight.data.clamp(-0.1, 0.1)
        return self.loss(batch)


class SwapsALayer(Net):
    """In its sixth step; steps that are tried go that far."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(8, 16)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 5:
            self.a = self.other
        return self.loss(batch)


@pytest.mark.parametrize("make", [KeepsTheLast, ClampsData, SwapsALayer])
def test_what_a_tracer_gets_wrong_is_left_to_torch(make: type[Net]) -> None:
    """Each was captured before, with other weights."""
    both(make)


def test_layers_are_put_back_after_steps_that_were_tried() -> None:
    weights = []
    for capture in ("eager", "auto"):
        torch.manual_seed(0)
        module = SwapsALayer()
        fasttrain.compile_fit(module, capture=capture, **QUIET).fit(batches())
        weights.append(dict(module.named_parameters()))
    torch.testing.assert_close(weights[1], weights[0])
