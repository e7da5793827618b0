"""Metric objects in the step: whole, asked behind the graph, with Lightning's values step by step and epoch by epoch."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fasttrain

pl = pytest.importorskip("pytorch_lightning")
torchmetrics = pytest.importorskip("torchmetrics")
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "max_epochs": 2,
    "accelerator": "cpu",
}


class Net(pl.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(4, 3)
        self.acc = torchmetrics.Accuracy("multiclass", num_classes=3)
        self.f1 = torchmetrics.F1Score("multiclass", num_classes=3, average="macro")
        self.mean = torchmetrics.MeanMetric()
        self.auc = torchmetrics.AUROC("multiclass", num_classes=3)
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out = self.a(batch[0])
        loss = F.cross_entropy(out, batch[1])
        told = self.tell(out, batch[1], loss)
        return loss if told is None else told

    def tell(self, out: Tensor, y: Tensor, loss: Tensor) -> Any:
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Called(Net):
    """Logged as they are, a step's and an epoch's; one for the epoch alone."""

    def tell(self, out: Tensor, y: Tensor, loss: Tensor) -> None:
        self.acc(out, y)
        self.f1(out.softmax(-1), y)
        self.log("acc", self.acc, on_step=True, on_epoch=True)
        self.log("f1", self.f1, on_step=False, on_epoch=True)


class Updated(Net):
    """Updated, asked by the module itself at the epoch's end; one that checks its values, and one that keeps them all."""

    def tell(self, out: Tensor, y: Tensor, loss: Tensor) -> None:
        self.acc.update(out, y)
        self.mean(loss)
        self.auc.update(out.softmax(-1), y)
        self.log("mean", self.mean, on_step=True, on_epoch=True)

    def on_train_epoch_end(self) -> None:
        self.seen += [float(self.acc.compute()), float(self.auc.compute())]
        self.acc.reset()
        self.auc.reset()


class Valued(Net):
    """What a call gives is logged, and what is so far."""

    def tell(self, out: Tensor, y: Tensor, loss: Tensor) -> None:
        self.log("acc", self.acc(out, y), on_epoch=True)
        self.mean.update(loss)
        self.log("so_far", self.mean.compute())


class InTheLoss(Net):
    """Its value is a factor of the loss: it stays in the graph, or the step in pieces."""

    def tell(self, out: Tensor, y: Tensor, loss: Tensor) -> Tensor:
        return loss * (1 + self.acc(out, y))


class AndAList(InTheLoss):
    """Beside it a list that grows, which no graph wants."""

    def tell(self, out: Tensor, y: Tensor, loss: Tensor) -> Tensor:
        self.seen.append(loss.item())
        return super().tell(out, y, loss)


class Asked(Net):
    """What kind of metric it is is asked by the step, which keeps a list too."""

    def tell(self, out: Tensor, y: Tensor, loss: Tensor) -> None:
        if not isinstance(self.acc, torchmetrics.MeanMetric):
            self.seen.append(loss.detach())


class Seen:
    """A callback of either kind."""

    def __init__(self) -> None:
        self.told: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.told.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        self.on_train_batch_end(trainer)


def made(make: type[Net]) -> tuple[Net, Any]:
    g = torch.Generator().manual_seed(3)
    data = [(torch.randn(8, 4, generator=g), torch.randint(3, (8,), generator=g)) for _ in range(4)]
    torch.manual_seed(0)
    return make(), torch.utils.data.DataLoader(data, batch_size=None)  # type: ignore[arg-type]


def by_lightning(make: type[Net]) -> tuple[Net, list[dict[str, float]]]:
    (module, data), seen = made(make), type("Both", (Seen, pl.Callback), {})()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pl.Trainer(callbacks=[seen], enable_model_summary=False, **QUIET).fit(module, data)
    return module, seen.told


@pytest.mark.parametrize("make", [Called, Updated, Valued, InTheLoss, AndAList, Asked])
def test_metric_objects(make: type[Net]) -> None:
    """Eager and captured: what a callback sees after every batch and epoch is what Lightning shows; whole unless the loss wants it."""
    there, told = by_lightning(make)
    for capture in ("eager", "compile"):
        (module, data), seen = made(make), type("Both", (Seen, fasttrain.Callback), {})()
        result = fasttrain.compile_fit(module, capture=capture, callbacks=[seen], **QUIET).fit(data)
        assert len(seen.told) == len(told) == 10
        for here, one in zip(seen.told, told, strict=True):
            assert here == pytest.approx(one, rel=1e-5), capture
        assert list(map(float, module.seen)) == pytest.approx(list(map(float, there.seen)))
        torch.testing.assert_close(list(module.a.parameters()), list(there.a.parameters()))
    if make is AndAList:  # no graph for each of its lengths
        assert result.capture.whole, result.capture
    if not issubclass(make, InTheLoss):
        assert (result.capture.whole, result.capture.direct, result.capture.traces) == (True, True, 1), result.capture
