"""A run without a model: the attributes that callbacks read, and a loop that calls them in the order of a real fit."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fasttrain.callbacks import CallbackList


@dataclass
class Run:
    """What the loop's facade offers to callbacks, and the loop itself in `fit`."""

    default_root_dir: str
    callbacks: CallbackList = field(default_factory=CallbackList)
    current_epoch: int = 0
    global_step: int = 0
    batch_idx: int = 0
    max_epochs: int | None = None
    max_steps: int = -1
    callback_metrics: dict[str, torch.Tensor] = field(default_factory=dict)
    should_stop: bool = False
    is_global_zero: bool = True
    world_size: int = 1
    sanity_checking: bool = False
    fast_dev_run: bool | int = False
    loggers: list[Any] = field(default_factory=list)
    optimizers: list[Any] = field(default_factory=list)
    lr_scheduler_configs: list[Any] = field(default_factory=list)
    log_every_n_steps: int = 50
    state: Any = field(default_factory=lambda: SimpleNamespace(fn="fit"))
    val_check_interval: Any = 1.0
    check_val_every_n_epoch: int | None = 1
    num_training_batches: int | float = 4
    num_val_batches: list[int] = field(default_factory=lambda: [1])
    val_enabled: bool = True
    accumulate: int = 1
    saves: list[tuple[str, int]] = field(default_factory=list)
    fail_saving: bool = False
    _updated: dict[str, int] = field(default_factory=dict)

    def log(self, name: str, value: float) -> None:
        self.callback_metrics[name] = torch.tensor(value)
        self._updated[name] = self.global_step

    def metric_step(self, name: str) -> int | None:
        return self._updated.get(name)

    def save_checkpoint(self, path: str | Path, weights_only: bool = False) -> Path:
        if self.fail_saving:
            raise OSError("disk full")
        directory = Path(path)
        directory.mkdir(parents=True, exist_ok=True)
        state = {"step": self.global_step, "weights_only": weights_only, "callbacks": self.callbacks.state_dict()}
        (directory / "state.json").write_text(json.dumps(state, allow_nan=False))
        self.saves.append((directory.name, self.global_step))
        return directory

    def call(self, hook: str, *arguments: Any) -> None:
        for call in self.callbacks.calls(hook):
            call(self, None, *arguments)

    def fit(self, val_losses: Sequence[float], epochs: int) -> None:
        """Trains `epochs` epochs; the i-th validation of the run logs `val_losses[i]`."""
        values = iter(val_losses)
        self.call("setup", "fit")
        self.call("on_fit_start")
        self.call("on_train_start")
        while self.current_epoch < epochs and not self.should_stop:
            self._epoch(values)
            self.current_epoch += not self.should_stop
        self.call("on_train_end")

    def _epoch(self, values: Any) -> None:
        self.call("on_train_epoch_start")
        for index in range(int(self.num_training_batches)):
            self.batch_idx = index
            self.call("on_train_batch_start", None, self.batch_idx)
            done = self.batch_idx + 1
            self.global_step += done % self.accumulate == 0 or done == self.num_training_batches
            self.log("train_loss", 1.0 / (1 + self.global_step))
            self.call("on_train_batch_end", None, None, self.batch_idx)
            if self._validation_is_due(done):
                self.call("on_validation_start")
                self.log("val_loss", next(values))
                self.call("on_validation_end")
            if self.should_stop:
                break
        for part in self.callbacks.split("on_train_epoch_end"):
            for call in part:
                call(self, None)

    def _validation_is_due(self, done: int) -> bool:
        if not self.val_enabled or (self.current_epoch + 1) % (self.check_val_every_n_epoch or 1):
            return False
        if isinstance(self.val_check_interval, float):
            return done % max(1, int(self.num_training_batches * self.val_check_interval)) == 0
        return done % self.val_check_interval == 0


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    """Builds a run whose root is a fresh directory."""

    def make(*callbacks: Any, **settings: Any) -> Run:
        return Run(default_root_dir=str(tmp_path / "run"), callbacks=CallbackList(callbacks), **settings)

    return make


@pytest.fixture
def lightning_fit(tmp_path: Path) -> Callable[..., Any]:
    """Fits the same metric sequence with the real thing; gives back its trainer."""
    import pytorch_lightning as pl
    from torch.utils.data import DataLoader

    class Scripted(pl.LightningModule):
        def __init__(self, val_losses: Sequence[float]) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.values = iter(val_losses)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            self.log("train_loss", 1.0 / (2 + self.global_step))
            return self.layer(batch).sum()

        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            self.log("val_loss", next(self.values))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    def fit(callbacks: list[Any], val_losses: Sequence[float], epochs: int, batches: int = 4, **options: Any) -> Any:
        trainer = pl.Trainer(
            callbacks=callbacks,
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            enable_checkpointing=any(isinstance(callback, pl.callbacks.Checkpoint) for callback in callbacks),
            default_root_dir=str(tmp_path / "theirs"),
            **options,
        )
        trainer.fit(Scripted(val_losses), DataLoader(torch.ones(batches, 1)), DataLoader(torch.ones(1, 1)))
        return trainer

    return fit
