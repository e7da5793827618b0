"""The CUDA graph rung against the eager one, and the traps that bite in silence. Needs a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fasttrain
from tests.kernels.lions import Lion

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")]
QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "gpu"}


class Net(nn.Module):
    """Two layers, optional dropout."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Dropout(p), nn.Linear(64, 4))
        self.seen: list[torch.Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7), "interval": "step"}]


def batches(n: int = 12, size: int = 32) -> list[list[torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [[torch.randn(size, 16, generator=g), torch.randint(4, (size,), generator=g)] for _ in range(n)]


def train(capture: str, data: Any = None, p: float = 0.0, **options: Any) -> tuple[Any, Net]:
    torch.manual_seed(1)
    module = Net(p)
    torch.manual_seed(2)
    data = batches() if data is None else data
    return fasttrain.compile_fit(module, capture=capture, **QUIET, **{"max_epochs": 3, **options}).fit(data, data[:3]), module


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda ps: torch.optim.Adam(ps, lr=1e-2, amsgrad=True),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2),
    "lion": lambda ps: Lion(ps, lr=1e-3, weight_decay=0.1),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-3),  # torch's own update behind the graph
}
ROUNDING = {"32-true": 1e-3, "bf16-mixed": 2e-2, "16-mixed": 5e-3, "bf16-true": 5e-2}  # of the forward's dtype, over 12 steps


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [*((o, p) for o in OPTIMIZERS for p in ("32-true", "16-mixed")), ("adamw", "bf16-mixed"), ("adamw", "bf16-true"), ("sgd", "bf16-true")],
)
def test_every_update_is_the_eager_one(optimizer: str, precision: str, accumulate: int) -> None:
    """Optimizers x precisions x windows: loss, weights and loss scale land where the eager rung's do."""

    class Chosen(Net):
        def configure_optimizers(self) -> Any:
            return OPTIMIZERS[optimizer](self.parameters())

    runs = []
    for capture in ("eager", "graph"):
        torch.manual_seed(1)
        module = Chosen()
        given: dict[str, Any] = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 1.0, "precision": precision, "max_epochs": 1}
        trainer = fasttrain.compile_fit(module, capture=capture, **QUIET, **given)
        runs.append((trainer.fit(batches()), module))
    (eager, a), (graph, b) = runs
    assert graph.capture.rung == "graph"
    assert ("fused Triton" in graph.capture.tail) == (optimizer != "rmsprop")
    assert graph.metrics["loss_epoch"] == pytest.approx(eager.metrics["loss_epoch"], rel=ROUNDING[precision])
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        # sign-like updates turn round on noise: the norms of the weights are compared, not their elements
        assert float((x - y).detach().float().norm()) <= 10 * ROUNDING[precision] * float(x.detach().float().norm())


@pytest.mark.parametrize("accumulate", [1, 3, 5])
def test_graph_is_eager(accumulate: int) -> None:
    """Same weights, metrics and counts as the eager rung, with validation between and a learning rate that moves."""
    eager, a = train("eager", accumulate_grad_batches=accumulate, gradient_clip_val=0.5)
    graph, b = train("graph", accumulate_grad_batches=accumulate, gradient_clip_val=0.5)
    assert graph.capture.rung == "graph"
    assert graph.capture.direct
    assert (eager.steps, eager.epochs) == (graph.steps, graph.epochs)
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.allclose(x, y, rtol=1e-3, atol=1e-3)
    assert eager.metrics == pytest.approx(graph.metrics, rel=1e-3)


def test_the_users_batches_stay_theirs() -> None:
    """No batch becomes a static input: after the run every batch holds what it held."""
    data = [[t.cuda() for t in b] for b in batches()]
    before = [[t.clone() for t in b] for b in data]
    train("graph", data)
    for x, y in zip(data, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))


def test_losses_are_of_their_own_steps() -> None:
    """Losses kept over steps are the values of those steps, not the last one's memory."""
    kept: list[torch.Tensor] = []

    class Keeps(fasttrain.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            kept.append(trainer.callback_metrics["loss"])

    train("graph", callbacks=[Keeps()])
    assert len({float(x) for x in kept}) > len(kept) // 2


def test_dropout_masks_differ_and_reproduce() -> None:
    """Replays draw new masks, and the same seed draws the same ones."""
    same = [list(batches(1)[0]) for _ in range(10)]
    first, a = train("graph", same, p=0.5, max_epochs=1)
    _, b = train("graph", same, p=0.5, max_epochs=1)
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)
    assert first.capture.direct
