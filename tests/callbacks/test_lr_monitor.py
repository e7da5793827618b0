"""Laws of the lr monitor: the names and values that Lightning's logs."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from fasttrain.callbacks import LearningRateMonitor
from fasttrain.errors import OptionError


class Notes:
    """A logger that remembers."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.seen.append((step, dict(metrics)))


def build(case: str) -> tuple[list[torch.optim.Optimizer], list[dict[str, Any]]]:
    """Optimizers and their scheduler configurations."""
    a, b = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    groups: list[dict[str, Any]] = [{"params": a.parameters()}, {"params": b.parameters(), "lr": 0.3}]
    if case == "groups":
        return [torch.optim.AdamW(groups, lr=0.1)], []
    if case == "named":
        groups[0]["name"], groups[1]["name"] = "body", "head"
        sgd = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01)
        return [sgd], [{"scheduler": StepLR(sgd, 1), "interval": "epoch", "name": "mine"}]
    adam = torch.optim.Adam(a.parameters(), lr=0.1)
    return [adam], [{"scheduler": StepLR(adam, 1), "interval": "step", "name": None}]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("interval", [None, "step", "epoch"])
@pytest.mark.parametrize("case", ["plain", "groups", "named"])
def test_names_and_values_are_lightnings(case: str, interval: Any, make_run: Callable[..., Any], tmp_path: Any) -> None:
    """Every group, scheduler and interval: the same calls with the same steps."""
    settings = {"logging_interval": interval, "log_momentum": True, "log_weight_decay": True}
    seen = Notes()

    class Theirs(pl.loggers.CSVLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if any(name.startswith(("lr-", "mine")) for name in metrics):
                seen.log_metrics(metrics, step or 0)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.layer(batch).sum()

        def configure_optimizers(self) -> Any:
            optimizers, schedulers = build(case)
            named = [{k: v for k, v in config.items() if v is not None} for config in schedulers]
            return optimizers, named

    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=Theirs(tmp_path),
        callbacks=[pl.callbacks.LearningRateMonitor(**settings)],
        log_every_n_steps=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Module(), DataLoader(torch.ones(4, 1)))

    optimizers, schedulers = build(case)

    class Move(LearningRateMonitor):
        """Also moves the schedulers when Lightning does."""

        def on_train_batch_end(self, run: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            for config in schedulers:
                if config["interval"] == "step" or batch_idx == 3:
                    config["scheduler"].step()

    run = make_run(
        Move(**settings),
        val_enabled=False,
        loggers=[notes := Notes()],
        optimizers=optimizers,
        lr_scheduler_configs=[SimpleNamespace(**config) for config in schedulers],
        log_every_n_steps=2,
    )
    for optimizer in optimizers:
        optimizer.step()
    run.fit([], epochs=3)
    assert notes.seen == seen.seen


def test_without_a_logger_it_is_refused(make_run: Callable[..., Any]) -> None:
    """There is nobody to tell."""
    with pytest.raises(OptionError, match="logger"):
        make_run(LearningRateMonitor()).fit([], epochs=1)
    with pytest.raises(OptionError, match="logging_interval"):
        LearningRateMonitor("batch")  # type: ignore[arg-type]


def test_a_learning_rate_on_the_device_is_read(make_run: Callable[..., Any]) -> None:
    """An lr that is a tensor is logged as a number."""
    optimizer = torch.optim.Adam(torch.nn.Linear(1, 1).parameters(), lr=torch.tensor(0.5))
    run = make_run(LearningRateMonitor(), loggers=[notes := Notes()], optimizers=[optimizer], val_enabled=False)
    run.fit([], epochs=1)
    assert notes.seen == [(0, {"lr-Adam": 0.5})]
