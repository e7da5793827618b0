"""Small modules of every kind people bring, and the loaders that feed them; each trains under Lightning as it stands."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from pytorch_lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

WIDTH, CLASSES = 8, 3


# -- data -------------------------------------------------------------------------------------------------------------
def rows(n: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, WIDTH, generator=g)
    return x, (x.sum(1) + 0.3 * torch.randn(n, generator=g) > 0).long() + (x[:, 0] > 1).long()


def labelled(n: int = 44, batch_size: int = 8, *, shuffle: bool = True, seed: int = 5, **more: Any) -> DataLoader:
    """Batches (x float[B, 8], y int64[B]); 44 rows leave a last batch of four."""
    return DataLoader(TensorDataset(*rows(n, seed)), batch_size=batch_size, shuffle=shuffle, **more)


def images(n: int = 40) -> DataLoader:
    g = torch.Generator().manual_seed(6)
    return DataLoader(
        TensorDataset(torch.randn(n, 1, 8, 8, generator=g), torch.randint(CLASSES, (n,), generator=g)), batch_size=8, shuffle=True
    )


def sequences(n: int = 40) -> DataLoader:
    g = torch.Generator().manual_seed(7)
    return DataLoader(
        TensorDataset(torch.randn(n, 6, WIDTH, generator=g), torch.randint(CLASSES, (n,), generator=g)), batch_size=8, shuffle=True
    )


def tokens(n: int = 40) -> DataLoader:
    g = torch.Generator().manual_seed(8)
    ids = torch.randint(20, (n, 6), generator=g)
    return DataLoader(TensorDataset(ids, ids[:, 0] % CLASSES), batch_size=8, shuffle=True)


@dataclass
class Pair:
    """A batch as a dataclass."""

    x: Tensor
    y: Tensor


class Mapped(Dataset):
    """Rows as dicts, which the default collate turns into dicts of batches."""

    def __init__(self, n: int = 40) -> None:
        self.x, self.y = rows(n)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": self.x[i], "y": self.y[i]}


def dicts() -> DataLoader:
    return DataLoader(Mapped(), batch_size=8, shuffle=True)


def to_pair(items: list[tuple[Tensor, Tensor]]) -> Pair:
    return Pair(torch.stack([x for x, _ in items]), torch.stack([y for _, y in items]))


def pairs() -> DataLoader:
    return DataLoader(TensorDataset(*rows(40)), batch_size=8, shuffle=True, collate_fn=to_pair)


def nested(items: list[tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    p = to_pair(items)
    return (p.x, p.x.abs()), p.y


def tuples() -> DataLoader:
    return DataLoader(TensorDataset(*rows(40)), batch_size=8, shuffle=True, collate_fn=nested)


class Data(LightningDataModule):
    """A datamodule that makes its data in setup, as people do."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def prepare_data(self) -> None:
        self.calls.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.calls.append(f"setup {stage}")
        self.rows = TensorDataset(*rows(40))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=8, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=16)

    def teardown(self, stage: str) -> None:
        self.calls.append(f"teardown {stage}")


# -- modules ----------------------------------------------------------------------------------------------------------
def assert_finite(x: Tensor) -> None:
    """An ``assert`` as users write it: pytest rewrites those of a test's own file."""
    assert torch.isfinite(x).all(), "x is not finite"


class Base(LightningModule):
    """A classifier over (x, y) that remembers when it was validated."""

    def __init__(self, **kw: Any) -> None:
        super().__init__()
        self.kw = kw
        self.validated: list[int] = []
        self.build()

    def build(self) -> None:
        self.net = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def on_validation_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.validated.append(self.global_step)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Classifier(Base):
    """An MLP under Adam."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class LinearRegression(Base):
    """One linear layer and a squared error."""

    def build(self) -> None:
        self.net = nn.Linear(WIDTH, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.mse_loss(self(x).squeeze(-1), y.to(x.dtype))
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.mse_loss(self(x).squeeze(-1), y.to(x.dtype)))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.02)


class Normed(Base):
    """BatchNorm: buffers that move in training and stand still in validation."""

    def build(self) -> None:
        self.net = nn.Sequential(nn.Linear(WIDTH, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, CLASSES))


class Dropped(Base):
    """Dropout with the probability it is given."""

    def build(self) -> None:
        self.net = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Dropout(self.kw.get("p", 0.5)), nn.Linear(16, CLASSES))


class Tied(Base):
    """One weight used by two layers."""

    def build(self) -> None:
        self.first, self.second, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Frozen(Base):
    """The first layer does not train, though the optimizer holds it."""

    def build(self) -> None:
        super().build()
        self.net[0].requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


class Unused(Base):
    """A layer that no loss depends on; weight decay must not touch it."""

    def build(self) -> None:
        super().build()
        self.spare = nn.Linear(4, 4)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.5)


class Grouped(Base):
    """Two parameter groups with their own lr and weight decay."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(
            [
                {"params": self.net[0].parameters(), "lr": 1e-3, "weight_decay": 0.0},
                {"params": self.net[2].parameters(), "lr": 3e-2, "weight_decay": 0.3},
            ]
        )


class TakesDict(Base):
    """Batches are dicts."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch["x"]), batch["y"])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch["x"]), batch["y"]))


class TakesTuple(Base):
    """Batches are tuples in tuples."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x, size), y = batch
        loss = F.cross_entropy(self(x) * size.mean(), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        (x, _), y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))


class TakesDataclass(Base):
    """Batches are dataclasses."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch.x), batch.y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch.x), batch.y))


class SometimesNone(Base):
    """training_step returns None for every third batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx % 3 == 1 else loss


class StepScheduled(Base):
    """A scheduler that moves every step."""

    def configure_optimizers(self) -> Any:
        opt = torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.ExponentialLR(opt, 0.9), "interval": "step"}}


class EpochScheduled(Base):
    """Two schedulers that move every epoch, one of them every second."""

    def configure_optimizers(self) -> Any:
        opt = torch.optim.SGD(self.parameters(), lr=0.2)
        every_second = {"scheduler": torch.optim.lr_scheduler.ExponentialLR(opt, 0.7), "frequency": 2}
        return [opt], [torch.optim.lr_scheduler.StepLR(opt, 1, 0.5), every_second]


class Plateau(Base):
    """ReduceLROnPlateau on the validation loss, with a threshold it can never pass."""

    def configure_optimizers(self) -> Any:
        opt = torch.optim.SGD(self.parameters(), lr=0.2)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=0, threshold=0.9)
        return {"optimizer": opt, "lr_scheduler": plateau, "monitor": "val_loss"}


class OneCycle(Base):
    """OneCycleLR over the steps the trainer expects."""

    def configure_optimizers(self) -> Any:
        opt = torch.optim.AdamW(self.parameters(), lr=1e-3)
        steps = int(self.trainer.estimated_stepping_batches)
        return [opt], [{"scheduler": torch.optim.lr_scheduler.OneCycleLR(opt, 0.05, total_steps=steps), "interval": "step"}]


class Cosine(Base):
    """CosineAnnealingLR by epoch."""

    def configure_optimizers(self) -> Any:
        opt = torch.optim.Adam(self.parameters(), lr=2e-2)
        return [opt], [torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=self.trainer.max_epochs)]


OPTIMIZERS: dict[str, Any] = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
}


class Optimized(Base):
    """The optimizer it is told to use."""

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.kw["optimizer"]](self.parameters())


class Conv(Base):
    """Convolution and pooling."""

    def build(self) -> None:
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, CLASSES),
        )


class Recurrent(Base):
    """An LSTM that is given its first state."""

    def build(self) -> None:
        self.lstm, self.head = nn.LSTM(WIDTH, 8, batch_first=True), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.zeros(1, len(x), 8)
        return self.head(self.lstm(x, (first, first))[0][:, -1])


class ReadsItsLoss(Base):
    """A branch on a value, in a step too small to be worth cutting."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * 0.5 if loss > 1.2 else loss


class Transformer(Base):
    """One encoder layer with attention."""

    def build(self) -> None:
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


class Embedded(Base):
    """An embedding with a padding row."""

    def build(self) -> None:
        self.table, self.head = nn.Embedding(20, WIDTH, padding_idx=0), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x).mean(1))


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2.5 * x**2 * grad  # not the true derivative: shows that this backward is the one used


class CustomFunction(Base):
    """An autograd.Function with a backward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](torch.tanh(_Cube.apply(self.net[0](x) * 0.5)))


class LogsDict(Base):
    """log_dict in both steps, metrics in a hook, one kept from the loggers."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        out = self(x)
        loss = F.cross_entropy(out, y)
        self.log_dict({"train/loss": loss, "train/acc": (out.argmax(1) == y).float().mean()}, on_step=True, on_epoch=True)
        self.log("quiet", loss * 2, logger=False, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        out = self(x)
        self.log_dict({"val/loss": F.cross_entropy(out, y), "val/acc": (out.argmax(1) == y).float().mean()}, prog_bar=True)

    def on_train_epoch_end(self) -> None:
        self.log("epochs_squared", float(self.current_epoch**2))


class Reduces(Base):
    """Every reduction over the epoch, weighted and not."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        for fx in ("mean", "sum", "min", "max"):
            self.log(fx, loss, on_step=False, on_epoch=True, reduce_fx=fx)
        self.log("both", loss, on_step=True, on_epoch=True)
        self.log("unweighted", loss, on_step=False, on_epoch=True, batch_size=1)
        self.log("number", 3.0)
        return loss


class ReturnsMore(Base):
    """training_step returns a dict with more than the loss, and reads it in on_train_batch_end."""

    def build(self) -> None:
        super().build()
        self.seen: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        out = self(x)
        return {"loss": F.cross_entropy(out, y), "top": out.max(), "label": "a string"}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert outputs["label"] == "a string"
        self.seen.append(float(outputs["top"]))


class AfterBackward(Base):
    """on_after_backward halves the gradients of the head."""

    def on_after_backward(self) -> None:
        for p in self.net[2].parameters():
            p.grad.mul_(0.5)


class OwnClipping(Base):
    """configure_gradient_clipping that clips by a value of its own."""

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="value")


class WarmsUp(Base):
    """optimizer_step that warms the learning rate up by hand."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * min(1.0, (self.global_step + 1) / 6)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


class OwnSchedulerStep(StepScheduled):
    """lr_scheduler_step that moves the scheduler only every second time."""

    def build(self) -> None:
        super().build()
        self.asked = 0

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        self.asked += 1
        if self.asked % 2 == 0:
            scheduler.step()


class Buffered(Base):
    """A buffer the module updates by hand in its step, and reads."""

    def build(self) -> None:
        super().build()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
                self.count += 1
        return self.net(x - self.mean)


class NoIndex(Base):
    """training_step and validation_step that take the batch alone."""

    def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
        return super().training_step(batch, 0)

    def validation_step(self, batch: Any) -> None:  # type: ignore[override]
        super().validation_step(batch, 0)


class SeveralVal(Base):
    """validation_step with a dataloader_idx."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # type: ignore[override]
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y) + dataloader_idx)
        self.log(f"plain_{dataloader_idx}", float(dataloader_idx), add_dataloader_idx=False)


class ReadsIndex(Base):
    """A loss that depends on batch_idx, global_step and current_epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        factor = 1.0 + 0.1 * batch_idx + 0.01 * self.global_step + 0.5 * self.current_epoch
        return F.cross_entropy(self(x), y) * factor


class Noisy(Base):
    """Random numbers drawn in the step and made with the default dtype."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x + 0.1 * torch.randn(x.shape)), y)


class Schedules(Base):
    """A lambda schedule by step, whose factor is read off the trainer in the step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def configure_optimizers(self) -> Any:
        opt = torch.optim.SGD(self.parameters(), lr=0.3)
        rule = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: 1 / math.sqrt(1 + s))
        return [opt], [{"scheduler": rule, "interval": "step"}]


class BranchesOnIndex(Base):
    """Another loss for every third batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        return loss * 3 if batch_idx % 3 == 2 else loss


class BranchesOnStep(Base):
    """Another loss at every fourth step, counted by the trainer."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        return loss * 3 if self.global_step % 4 == 2 else loss


class BranchesOnTrainer(Base):
    """Another loss in later epochs and at the last batch, asked of the trainer."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        if self.trainer.current_epoch >= 1:
            loss = loss * 2
        return loss * 3 if self.trainer.is_last_batch else loss


class CountsItself(Base):
    """A Python counter of its own, read and raised in the step."""

    def build(self) -> None:
        super().build()
        self.seen = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.seen += 1
        return F.cross_entropy(self(x), y) * (1.0 if self.seen < 7 else 0.5)


class Unfreezes(Base):
    """The first layer trains from the second epoch on."""

    def build(self) -> None:
        super().build()
        self.net[0].requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.net[0].requires_grad_(True)


class Switches(Base):
    """BatchNorm and dropout put into eval mode from the second epoch on."""

    def build(self) -> None:
        self.net = nn.Sequential(nn.Linear(WIDTH, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, CLASSES))

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.net[1].eval()


class SwapsLoss(Base):
    """A plain attribute that a hook changes between batches."""

    def build(self) -> None:
        super().build()
        self.factor = 1.0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.factor = 0.5 if batch_idx >= 3 else 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y) * self.factor
