"""When things happen: the events of a fit, batch for batch, beside Lightning's."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, IterableDataset

import fasttrain
from fasttrain import EarlyStopping, OptionError
from tests.parity import modules as m
from tests.parity.harness import Case, Outcome, assert_same_weights, fast_fit, lightning_fit


class Traced(m.Base):
    """Notes every training batch, validation batch and epoch end with the counts as the module sees them."""

    def build(self) -> None:
        super().build()
        self.events: list[tuple[Any, ...]] = []

    def note(self, what: str, *more: Any) -> None:
        sanity = "sanity " if self.trainer.sanity_checking else ""
        self.events.append((sanity + what, *more, self.current_epoch, self.global_step))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.note("train", batch_idx, float(batch[0].sum()))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # type: ignore[override]
        self.note("val", dataloader_idx, batch_idx)
        super().validation_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        self.note("epoch end")

    def configure_optimizers(self) -> Any:
        opt = torch.optim.SGD(self.parameters(), lr=0.1)
        return [opt], [
            {"scheduler": torch.optim.lr_scheduler.ExponentialLR(opt, 0.99), "interval": "step"},
            torch.optim.lr_scheduler.ExponentialLR(opt, 0.9),
        ]


class StopsAt(Traced):
    """Asks to stop in the batch end of its n-th batch (counted over all epochs)."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if sum(e[0] == "train" for e in self.events) == self.kw["n"]:
            self.trainer.should_stop = True


class Stream(IterableDataset):
    """Rows one by one, without a length."""

    def __init__(self, n: int) -> None:
        self.x, self.y = m.rows(n)

    def __iter__(self) -> Any:
        return iter(list(zip(self.x, self.y, strict=True)))


def ten() -> DataLoader:
    return m.labelled(80)


def two() -> DataLoader:
    return m.labelled(10, 5, shuffle=False)


def both(make: Callable[[], Any] = Traced, train: Callable[[], Any] = ten, val: Any = two, **options: Any) -> tuple[Outcome, Outcome]:
    case = Case(make, train, val, {"max_epochs": 2} | options)
    return fast_fit(case), lightning_fit(case)


def assert_same_run(ours: Outcome, theirs: Outcome) -> None:
    """The dry look calls training_step once more, before everything: that call is taken off."""
    mine, other = list(ours.module.events), list(theirs.module.events)
    assert mine == other
    assert (ours.steps, ours.epochs) == (theirs.steps, theirs.epochs)
    assert_same_weights(ours.weights, theirs.weights)


OPTIONS: dict[str, dict[str, Any]] = {
    "once an epoch": {},
    "every 3 batches": {"val_check_interval": 3},
    "every batch": {"val_check_interval": 1},
    "as often as the epoch is long": {"val_check_interval": 10},
    "share .25": {"val_check_interval": 0.25},
    "share .4": {"val_check_interval": 0.4},
    "share .05, less than a batch": {"val_check_interval": 0.05},
    "across epochs": {"val_check_interval": 7, "check_val_every_n_epoch": None, "max_epochs": 3},
    "across epochs, longer than one": {"val_check_interval": 14, "check_val_every_n_epoch": None, "max_epochs": 3},
    "every second epoch": {"check_val_every_n_epoch": 2, "max_epochs": 5},
    "every second epoch, by 3": {"check_val_every_n_epoch": 2, "val_check_interval": 3, "max_epochs": 5},
    "4 batches, windows of 5": {"val_check_interval": 4, "accumulate_grad_batches": 5},
    "limit ints": {"limit_train_batches": 4, "limit_val_batches": 1},
    "limit floats": {"limit_train_batches": 0.35, "limit_val_batches": 0.5},
    "limit beyond": {"limit_train_batches": 99, "limit_val_batches": 99},
    "limit one": {"limit_train_batches": 1, "limit_val_batches": 1},
    "limit 1.0": {"limit_train_batches": 1.0, "limit_val_batches": 1.0},
    "no validation": {"limit_val_batches": 0},
    "no training": {"limit_train_batches": 0},
    "share of a limited epoch": {"limit_train_batches": 6, "val_check_interval": 0.5},
    "no sanity": {"num_sanity_val_steps": 0},
    "sanity all": {"num_sanity_val_steps": -1},
    "sanity one": {"num_sanity_val_steps": 1},
    "fast dev run": {"fast_dev_run": True},
    "fast dev run of 3": {"fast_dev_run": 3},
    "fast dev run, windows of 2": {"fast_dev_run": 3, "accumulate_grad_batches": 3},
    "overfit int": {"overfit_batches": 2},
    "overfit float": {"overfit_batches": 0.5},
    "max steps in mid-epoch": {"max_steps": 14},
    "max steps at an epoch's end": {"max_steps": 20, "max_epochs": -1},
    "max steps, no epochs": {"max_steps": 23, "max_epochs": None},
    "max steps on a validation batch": {"max_steps": 6, "val_check_interval": 3},
    "max steps off a validation batch": {"max_steps": 7, "val_check_interval": 3},
    "max steps with windows": {"max_steps": 3, "accumulate_grad_batches": 5},
    "no epochs": {"max_epochs": 0},
    "no steps": {"max_steps": 0},
    "windows beyond the epoch": {"accumulate_grad_batches": 10},
    "window schedule": {"accumulate_grad_batches": {0: 1, 1: 5}, "max_epochs": 3},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_events_are_lightnings(name: str) -> None:
    """Every batch, validation batch and epoch end, in order, with the counts the module sees, and the weights after."""
    options = dict(OPTIONS[name])
    theirs = dict(options)
    if isinstance(k := options.get("accumulate_grad_batches"), dict):
        del theirs["accumulate_grad_batches"]
        theirs["callbacks"] = [pl.callbacks.GradientAccumulationScheduler(k)]
    ours = fast_fit(Case(Traced, ten, two, {"max_epochs": 2} | options))
    assert_same_run(ours, lightning_fit(Case(Traced, ten, two, {"max_epochs": 2} | theirs)))


@pytest.mark.parametrize("n", [3, 10, 13])
@pytest.mark.parametrize(
    "least", [{}, {"min_steps": 12}, {"min_epochs": 2}, {"min_epochs": 1, "min_steps": 15}, {"min_steps": 5, "val_check_interval": 4}]
)
def test_a_stop_request_waits_for_the_least_and_validates_once_more(n: int, least: dict[str, Any]) -> None:
    """min_epochs and min_steps hold it back; the batch that grants it is followed by one validation."""
    ours, theirs = both(lambda: StopsAt(n=n), max_epochs=4, **least)
    assert_same_run(ours, theirs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"limit_train_batches": 4},
        {"val_check_interval": 3},
        {"val_check_interval": 3, "limit_train_batches": 7},
        {"max_steps": 8},
        {"limit_val_batches": 1},
    ],
)
def test_a_stream_without_length_is_run_as_lightning_runs_it(options: dict[str, Any]) -> None:
    """Ints limit it, its end ends the epoch, validation comes at the end or every n batches."""
    ours, theirs = both(train=lambda: DataLoader(Stream(80), 8), val=lambda: DataLoader(Stream(10), 5), **options)
    assert_same_run(ours, theirs)


@pytest.mark.parametrize("option", [{"limit_train_batches": 0.5}, {"val_check_interval": 0.5}, {"limit_val_batches": 0.5}])
def test_a_share_of_a_stream_is_refused(option: dict[str, Any]) -> None:
    """A stream has no length to take a share of; the message says which option to give as an integer."""
    with pytest.raises(OptionError, match=rf"{next(iter(option))}.*no length"):
        fast_fit(Case(Traced, lambda: DataLoader(Stream(80), 8), lambda: DataLoader(Stream(10), 5), option))


@pytest.mark.parametrize("options", [{}, {"limit_val_batches": 1}, {"num_sanity_val_steps": 1}, {"limit_val_batches": 0.5}])
def test_several_validation_loaders_run_one_after_the_other(options: dict[str, Any]) -> None:
    """In order, each with its own limit and index."""
    ours, theirs = both(val=lambda: [m.labelled(10, 5, shuffle=False), m.labelled(16, 4, shuffle=False)], **options)
    assert_same_run(ours, theirs)
    assert ours.metrics.keys() == theirs.metrics.keys()


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("at", [0, 1, 4, 9])
def test_minus_one_from_on_train_batch_start_ends_the_epoch(at: int) -> None:
    """No step for that batch, no validation in that epoch; the next epoch starts anew."""

    class Ends(Traced):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == at and self.current_epoch == 0 else None

        def configure_optimizers(self) -> Any:
            opt = torch.optim.SGD(self.parameters(), lr=0.1)  # by epoch only: Lightning moves one by step for no step here
            return [opt], [torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)]

    ours, theirs = both(Ends)
    assert_same_run(ours, theirs)


def test_the_window_that_minus_one_leaves_open_is_stepped() -> None:
    """[ours] Its gradients are not dropped: batches 4 and 5 of a window of four make a second step."""

    class Ends(Traced):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 6 else None

    assert fast_fit(Case(Ends, ten, None, {"max_epochs": 1, "accumulate_grad_batches": 4})).steps == 2


def test_a_stop_closes_the_open_window_with_a_step() -> None:
    """[ours] A stop in the third batch of a window of five still makes a step, of three batches."""
    ours = fast_fit(Case(lambda: StopsAt(n=3), ten, None, {"accumulate_grad_batches": 5}))
    assert ours.steps == 1


@pytest.mark.parametrize(
    "options", [{}, {"val_check_interval": 4}, {"check_val_every_n_epoch": 2}, {"check_val_every_n_epoch": 2, "min_epochs": 4}]
)
def test_early_stopping_stops_where_lightnings_does(options: dict[str, Any]) -> None:
    """The same check, the same batch, whether validation is once an epoch or in its middle."""

    class Worsens(Traced):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.note("val", dataloader_idx, batch_idx)
            self.log("val_loss", torch.tensor(1.0 + max(0, len(self.validated) - 1)))

    base = {"max_epochs": 9} | options
    ours = fast_fit(Case(Worsens, ten, two, base | {"callbacks": [EarlyStopping("val_loss", patience=2)]}))
    theirs = lightning_fit(Case(Worsens, ten, two, base | {"callbacks": [pl.callbacks.EarlyStopping("val_loss", patience=2)]}))
    assert_same_run(ours, theirs)
    assert ours.result.stopped_by == "early_stopping"


def test_early_stopping_checks_after_every_validation_by_steps() -> None:
    """[ours] With val_every_n_steps a check follows each validation, not each epoch."""

    class Worsens(Traced):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val_loss", torch.tensor(1.0 + len(self.validated)))

    stop = EarlyStopping("val_loss", patience=2)
    ours = fast_fit(Case(Worsens, ten, two, {"val_every_n_steps": 2, "callbacks": [stop]}))
    assert (ours.validated, ours.steps) == ([2, 4, 6], 6)


@pytest.mark.parametrize("window", [1, 3])
def test_val_every_n_steps_counts_optimizer_steps(window: int) -> None:
    """[ours] Never in the middle of a window, across epochs."""
    ours = fast_fit(Case(Traced, ten, two, {"val_every_n_steps": 3, "accumulate_grad_batches": window, "max_epochs": 3}))
    assert ours.validated == list(range(3, ours.steps + 1, 3))


def test_max_time_ends_the_run_after_the_batch_in_hand() -> None:
    """A run out of time stops, says so, and its epoch end still runs."""

    class Slow(Traced):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            time.sleep(0.05)
            return super().training_step(batch, batch_idx)

    started = time.perf_counter()
    ours = fast_fit(Case(Slow, ten, None, {"max_time": {"seconds": 0.6}, "max_epochs": -1}))
    assert 0.5 < time.perf_counter() - started < 3.0
    assert ours.result.stopped_by == "max_time"
    assert ours.module.events[-1][0] == "epoch end"


def test_validation_by_wall_time_follows_the_clock() -> None:
    """val_check_interval as a time: no validation before it has passed, then again and again."""

    class Slow(Traced):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            time.sleep(0.02)
            return super().training_step(batch, batch_idx)

    none = fast_fit(Case(Slow, ten, two, {"val_check_interval": "00:01:00:00"}))
    assert none.validated == []
    assert fast_fit(Case(Slow, ten, two, {"val_check_interval": {"milliseconds": 90}})).validated


@pytest.mark.parametrize("frequency", [1, 3])
def test_scheduler_frequency_counts_optimizer_steps(frequency: int) -> None:
    """[ours] Every third optimizer step, also with windows of two and across epochs."""

    class Module(m.Base):
        def configure_optimizers(self) -> Any:
            opt = torch.optim.SGD(self.parameters(), lr=0.1)
            self.rule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
            return [opt], [{"scheduler": self.rule, "interval": "step", "frequency": frequency}]

    ours = fast_fit(Case(Module, ten, None, {"accumulate_grad_batches": 2, "max_epochs": 2}))
    assert ours.steps == 10
    assert ours.module.rule.last_epoch == 10 // frequency


@pytest.mark.parametrize(("monitor", "frequency"), [("val_loss", 5), ("train_loss", 1)])
def test_a_plateau_by_step_moves_after_the_batch(monitor: str, frequency: int) -> None:
    """interval="step" with ReduceLROnPlateau: at every step that is due, after the validation if there is one."""

    class Module(Traced):
        def configure_optimizers(self) -> Any:
            opt = torch.optim.SGD(self.parameters(), lr=0.1)
            self.rule = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0, threshold=0.9)
            return {
                "optimizer": opt,
                "lr_scheduler": {"scheduler": self.rule, "interval": "step", "monitor": monitor, "frequency": frequency},
            }

    ours, theirs = both(Module, val_check_interval=5)
    assert_same_run(ours, theirs)
    assert ours.module.rule.last_epoch == theirs.module.rule.last_epoch


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_alone_gives_what_lightning_gives(stage: str) -> None:
    """validate, test and predict: the same metrics, the same predictions in the same order, limits obeyed."""

    class Module(Traced):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", self(batch[0]).sum(), prog_bar=True)

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            assert torch.is_inference_mode_enabled()
            return self(batch[0])

    for limit in (1.0, 1, 0.5):
        module = Module()
        options = {f"limit_{'val' if stage == 'validate' else stage}_batches": limit}
        bare = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "accelerator": "cpu",
        }
        ours = getattr(fasttrain.compile_fit(module, **bare, **options), stage)(m.labelled(20, 5, shuffle=False))
        with pytest.warns():
            theirs = getattr(pl.Trainer(**bare, **options), stage)(module, m.labelled(20, 5, shuffle=False))
        if stage == "predict":
            assert len(ours) == len(theirs)
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        else:
            assert ours == pytest.approx(theirs[0], rel=1e-6)
