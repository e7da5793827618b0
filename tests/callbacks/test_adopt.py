"""Laws of adoption: Lightning's own callbacks become ours with every setting, and theirs stays readable."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from fasttrain import JsonlLogger, compile_fit
from fasttrain.callbacks import (
    Callback,
    CallbackList,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    Timer,
    adopt,
)
from fasttrain.errors import FasttrainWarning, OptionError
from tests.parity import modules as m

CHECKPOINTS: list[dict[str, Any]] = [
    {},
    {
        "dirpath": "somewhere",
        "filename": "{epoch}",
        "monitor": "x",
        "mode": "max",
        "save_top_k": 4,
        "save_last": "link",
    },
    {"every_n_train_steps": 7, "save_top_k": -1, "save_weights_only": True, "verbose": True, "save_on_exception": True},
    {"train_time_interval": timedelta(minutes=3), "auto_insert_metric_name": False, "save_last": True},
    {"every_n_epochs": 0, "save_on_train_epoch_end": False, "enable_version_counter": False},
]


@pytest.mark.parametrize("settings", CHECKPOINTS)
def test_a_model_checkpoint_keeps_its_settings(settings: dict[str, Any]) -> None:
    """Every argument of its constructor, and its key in a checkpoint."""
    theirs = pl.callbacks.ModelCheckpoint(**settings)
    ours = adopt(theirs)
    assert isinstance(ours, ModelCheckpoint)
    assert ours.state_key == theirs.state_key
    for name in inspect.signature(pl.callbacks.ModelCheckpoint).parameters:
        wanted = getattr(theirs, name) if hasattr(theirs, name) else getattr(theirs, f"_{name}")
        assert getattr(ours, name) == wanted, name


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"min_delta": 0.5, "patience": 7, "verbose": True, "mode": "max", "strict": False, "check_finite": False},
        {"stopping_threshold": 1.0, "divergence_threshold": 2.0, "min_delta": 0.5, "check_on_train_epoch_end": True},
        {"log_rank_zero_only": True},
    ],
)
def test_early_stopping_keeps_its_settings(settings: dict[str, Any]) -> None:
    """Every argument of its constructor, and its key in a checkpoint."""
    theirs = pl.callbacks.EarlyStopping("x", **settings)
    ours = adopt(theirs)
    assert isinstance(ours, EarlyStopping)
    assert ours.state_key == theirs.state_key
    for name in inspect.signature(pl.callbacks.EarlyStopping).parameters:
        wanted = getattr(theirs, name) if hasattr(theirs, name) else getattr(theirs, f"_{name}")
        assert getattr(ours, name) == wanted, name


def test_what_ours_finds_out_is_written_to_theirs(tmp_path: Path, make_run: Callable[..., Any]) -> None:
    """The user reads best_model_path and stopped_epoch from the objects they made."""
    save, stop = pl.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss"), pl.callbacks.EarlyStopping("val_loss")
    run = make_run(adopt(save), adopt(stop))
    run.fit([0.5, 0.4, 0.6, 0.7, 0.8, 0.9], epochs=6)
    assert save.best_model_path == str(tmp_path / "epoch=1-step=8")
    assert round(save.best_model_score.item(), 2) == 0.4
    assert (stop.stopped_epoch, stop.wait_count, stop.stopping_reason.name) == (4, 3, "PATIENCE_EXHAUSTED")


def test_timer_and_lr_monitor_keep_their_settings() -> None:
    """And share what they measure with the object the user made."""
    theirs = pl.callbacks.Timer("00:01:00:00", interval="epoch", verbose=False)
    ours = adopt(theirs)
    assert isinstance(ours, Timer)
    assert (ours._duration, ours._interval, ours._verbose) == (3600.0, "epoch", False)
    ours.on_train_start(None, None)  # type: ignore[arg-type]
    assert theirs.start_time("train") == ours.start_time("train") is not None
    monitor = pl.callbacks.LearningRateMonitor("epoch", log_momentum=True)
    mine = adopt(monitor)
    assert isinstance(mine, LearningRateMonitor)
    assert (mine.logging_interval, mine.log_momentum, mine.log_weight_decay) == ("epoch", True, False)
    assert mine.lrs is monitor.lrs


def test_bars_and_summaries_are_dropped() -> None:
    """Ours replace them; a user's own bar is dropped with a word about it."""

    class MyBar(pl.callbacks.TQDMProgressBar):
        pass

    for theirs in (pl.callbacks.TQDMProgressBar(), pl.callbacks.RichProgressBar(), pl.callbacks.ModelSummary()):
        assert adopt(theirs) is None
    with pytest.warns(FasttrainWarning, match="MyBar"):
        assert adopt(MyBar()) is None


def test_everything_else_is_returned_as_it_is() -> None:
    """The user's own code, also where it extends one of theirs."""

    class MyCheckpoint(pl.callbacks.ModelCheckpoint):
        pass

    for callback in (Callback(), MyCheckpoint(), pl.callbacks.LambdaCallback(), ModelCheckpoint(), object()):
        assert adopt(callback) is callback


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "StochasticWeightAveraging": (lambda: pl.callbacks.StochasticWeightAveraging(1e-2), "WeightAveraging"),
    "GradientAccumulationScheduler": (
        lambda: pl.callbacks.GradientAccumulationScheduler({2: 4}),
        r"accumulate_grad_batches=\{2: 4, 0: 1\}",
    ),
    "LearningRateFinder": (pl.callbacks.LearningRateFinder, "Tuner"),
    "BatchSizeFinder": (pl.callbacks.BatchSizeFinder, "Tuner"),
    "ThroughputMonitor": (lambda: pl.callbacks.ThroughputMonitor(len), "ledger"),
    "DeviceStatsMonitor": (pl.callbacks.DeviceStatsMonitor, "memory_stats"),
    "OnExceptionCheckpoint": (lambda: pl.callbacks.OnExceptionCheckpoint("x"), "save_on_exception=True"),
    "Writes": (lambda: type("Writes", (pl.callbacks.BasePredictionWriter,), {})("batch"), "on_predict_batch_end"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_works_on_lightnings_trainer_alone_is_refused(name: str) -> None:
    """Before anything runs, with what to write instead; also what is derived from it."""
    make, instead = REFUSED[name]
    with pytest.raises(OptionError, match=f"callbacks: got a {name}.*{instead}"):
        adopt(make())


THROUGH_HOOKS: dict[str, Callable[[], Any]] = {
    "BackboneFinetuning": lambda: pl.callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=1),
    "LambdaCallback": lambda: pl.callbacks.LambdaCallback(on_validation_batch_end=lambda trainer, module, outputs, batch, batch_idx: None),
    "LearningRateMonitor": pl.callbacks.LearningRateMonitor,
    "ModelPruning": lambda: pl.callbacks.ModelPruning("l1_unstructured", amount=0.3),
    "ModelSummary": pl.callbacks.ModelSummary,
    "RichModelSummary": pl.callbacks.RichModelSummary,
    "RichProgressBar": pl.callbacks.RichProgressBar,
    "TQDMProgressBar": pl.callbacks.TQDMProgressBar,
    "Timer": lambda: pl.callbacks.Timer("00:01:00:00"),
    "WeightAveraging": pl.callbacks.WeightAveraging,
}


@pytest.mark.parametrize("name", THROUGH_HOOKS)
def test_what_works_through_hooks_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A fit with validation, then a validation and a prediction."""

    class Backed(m.Base):
        def build(self) -> None:
            super().build()
            self.backbone = self.net[0]

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    options: dict[str, Any] = {"logger": JsonlLogger(tmp_path), "default_root_dir": tmp_path, "enable_checkpointing": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trainer = compile_fit(Backed(), max_epochs=2, capture="eager", accelerator="cpu", callbacks=[THROUGH_HOOKS[name]()], **options)
        assert trainer.fit(m.labelled(), m.labelled()).epochs == 2
        trainer.validate(m.labelled())
        trainer.predict(m.labelled())


def test_a_hook_with_nothing_to_do_is_not_called() -> None:
    """A checkpoint by epochs has nothing to do after a batch, adopted or not; one by steps has."""
    for made in (ModelCheckpoint(), adopt(pl.callbacks.ModelCheckpoint())):
        assert CallbackList([made]).calls("on_train_batch_end") == ()
    assert len(CallbackList([ModelCheckpoint(every_n_train_steps=1)]).calls("on_train_batch_end")) == 1


def test_adopted_callbacks_are_live_like_ours() -> None:
    """The same hooks are called."""
    theirs = pl.callbacks.ModelCheckpoint(every_n_train_steps=2)
    ours, adopted = CallbackList([ModelCheckpoint(every_n_train_steps=2)]), CallbackList([adopt(theirs)])
    for hook in ("on_train_batch_end", "on_validation_end", "on_train_epoch_end", "on_train_end", "state_dict"):
        assert len(ours.calls(hook)) == len(adopted.calls(hook)) == 1
