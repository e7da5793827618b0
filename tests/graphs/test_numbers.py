"""Numbers read out of tensors, and what Python makes of them: no step is decided by what they were in the first."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fasttrain
from tests.graphs.test_obstacles import QUIET

INTS = (1, 1, 1, 1, 5, 2, 3, 7, 0, 4)  # nothing new in the steps that a capture tries
LIST = [1.0, 0.5, 2.0, 3.0, 0.25, 0.75, 1.5, 0.1]
NAN = float("nan")


def _caught(ask: Callable[[], float]) -> float:
    try:
        return ask()
    except (TypeError, ValueError, IndexError, ZeroDivisionError, AssertionError):
        return 4.0


def _asserted(k: int) -> float:
    assert k < 3
    return 1.0


def _range(k: int) -> float:
    total = 1.0
    for _ in range(k):
        total += 0.5
    return total


# Of an int and of a float tensor. What each gives is a factor of the loss.
BRANCHES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "int": lambda k, v: 3.0 if k.item() > 2 else 1.0,
    "int times float": lambda k, v: 3.0 if k.item() * 0.1 > 0.3 else 1.0,
    "list": lambda k, v: LIST[k],  # type: ignore[call-overload]
    "dict": lambda k, v: {1: 1.0, 5: 2.0}.get(k.item(), 3.0),  # type: ignore[call-overload]
    "range": lambda k, v: _range(k.item()),  # type: ignore[arg-type]
    "modulo": lambda k, v: 3.0 if k.item() % 2 == 0 else 1.0,
    "in": lambda k, v: 3.0 if k.item() in (2, 5) else 1.0,
    "double": lambda k, v: 3.0 if v.double().item() > 1 else 1.0,
    "numpy": lambda k, v: 3.0 if k.numpy() * 0.1 > 0.3 else 1.0,
    "tolist": lambda k, v: 3.0 if k.tolist() * 0.1 > 0.3 else 1.0,
    "not a number": lambda k, v: 3.0 if (z := (v if k.numel() > 1 else torch.where(k > 2, v * NAN, v)).item()) != z else 1.0,
    "sum of nan": lambda k, v: 3.0 if (z := torch.where(k > 2, v * NAN, v).item()) - z == 0 else 1.0,
}
VALUES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "product": lambda k, v: k.item() * 0.1 + v.item() ** 2,
    "rounded": lambda k, v: 1 + round(v.item(), 1),
    "remainder": lambda k, v: 1 + v.item() % 1,
    "floored": lambda k, v: 1 + math.floor(k.item() * 0.4) + int(v.item()) + k.item() // 3,
    "written": lambda k, v: 1 + float(f"{v.item():.1f}"),
    "text": lambda k, v: 1 + float(str(v.item())[:3]),
    "most": lambda k, v: max(1.0, torch.where(k > 2, v * NAN, v).item()),
    "division": lambda k, v: _caught(lambda: 2 / k.item()),
    "root": lambda k, v: _caught(lambda: math.sqrt(1 - v.item())),
    "assertion": lambda k, v: _caught(lambda: _asserted(k.item())),  # type: ignore[arg-type]
    "index": lambda k, v: _caught(lambda: LIST[k.item() * 2]),  # type: ignore[call-overload]
    "percent": lambda k, v: _caught(lambda: float("%.1f" % v.item())),  # noqa: UP031
}
EXPRESSIONS = BRANCHES | VALUES


def _none(k: Tensor, v: Tensor) -> float:
    return 0.0


def _both(f: Callable[..., float], g: Callable[..., float]) -> Callable[..., float]:
    return lambda k, v: f(k, v) + 0.3 * g(k, v)


class Net(nn.Module):
    """A factor of the loss, made of the batch's numbers by Python."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 1)
        self.factor = functools.reduce(_both, (EXPRESSIONS[name] for name in names), _none)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, k, v = batch
        loss = F.mse_loss(self.b(torch.tanh(self.a(x))), y)
        return loss.tanh() * (1 + self.factor(k, v)) + 0.01 * loss.sin()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Pieces(Net):
    def on_before_backward(self, loss: Tensor) -> None: ...


def batches() -> list[Any]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 4, generator=g), torch.randn(8, 1, generator=g), torch.tensor(k), torch.tensor(0.31 * k + 0.27)) for k in INTS]


def trained(make: Callable[[], nn.Module], capture: str) -> tuple[Tensor, Any]:
    torch._dynamo.reset()  # torch 2.11 counts what other fits have compiled of this code
    torch.manual_seed(0)
    module = make()
    result = fasttrain.compile_fit(module, capture=capture, **QUIET).fit(batches())
    return torch.cat([p.detach().flatten() for p in module.parameters()]), result


def as_eagerly(make: Callable[[], nn.Module]) -> Any:
    (want, _), (got, result) = trained(make, "eager"), trained(make, "compile")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert result.capture.rung == "compile"
    return result


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_a_number_of_a_captured_step(name: str) -> None:
    """Its own value in every step, in the loss and at a branch."""
    as_eagerly(lambda: Net(name))


@pytest.mark.parametrize("names", [BRANCHES, VALUES], ids=["branches", "values"])
def test_a_number_of_a_step_in_pieces(names: dict[str, Any]) -> None:
    """The same, all in one step."""
    assert not as_eagerly(lambda: Pieces(*names)).capture.whole


class Written(Pieces):
    """Between two stretches, by the step itself."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.mse_loss(self.b(torch.tanh(self.a(batch[0]))), batch[1])
        number = float(f"{loss.item():.1f}")
        return loss * (1 + number)


def test_what_is_written_of_a_number_between_stretches() -> None:
    """Is rounded in every step."""
    as_eagerly(Written)


class Counts(Net):
    """A buffer that the step counts up, and a number that it keeps and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        late = self.calls.item() > 5
        self.calls += 1
        self.rate *= 0.77
        print(f"rate {self.rate:.2f}")
        return loss * 2 if late else loss


def test_a_counting_buffer(capsys: pytest.CaptureFixture[str]) -> None:
    """Is asked what it holds in every step; what is written of a Python float is written as it says."""
    as_eagerly(Counts)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("rate")]
    assert lines == [f"rate {0.77 ** (n + 1):.2f}" for n in range(len(INTS))] * 2
