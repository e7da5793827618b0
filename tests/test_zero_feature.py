"""barebones leaves everything out, and options that contradict one another are refused before the first batch."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, IterableDataset

import fasttrain
from fasttrain import EarlyStopping, FasttrainError, ModelCheckpoint, OptionError, compile_fit
from fasttrain.options import BARE, make_options
from tests.parity import modules as m


class Told(m.Base):
    """Logs in every way there is, and counts the batches it was given."""

    def build(self) -> None:
        super().build()
        self.batches = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.batches += 1
        loss = super().training_step(batch, batch_idx)
        self.log_dict({"a": loss, "b": 2.0}, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("epoch", 1.0)


# -- barebones --------------------------------------------------------------------------------------------------------
def test_barebones_trains_as_lightnings_does() -> None:
    """The same weights and validations; the sanity check is left out, nothing is logged."""
    ends = []
    for ours in (True, False):
        torch.manual_seed(0)
        module = Told()
        torch.manual_seed(7)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if ours:
                compile_fit(module, barebones=True, capture="eager", max_epochs=2).fit(m.labelled(), m.labelled(16, shuffle=False))
            else:
                trainer = pl.Trainer(barebones=True, accelerator="cpu", max_epochs=2)
                trainer.fit(module, m.labelled(), m.labelled(16, shuffle=False))
        assert not module.trainer.callback_metrics
        ends.append((module.validated, [p.detach().clone() for p in module.parameters()], torch.get_rng_state()))
    assert ends[0][0] == ends[1][0] == [6, 12]
    assert all(torch.equal(a, b) for a, b in zip(ends[0][1], ends[1][1], strict=True))
    assert torch.equal(ends[0][2], ends[1][2])


def test_barebones_writes_and_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No file, no line, no metric, no callback of ours; the module's own log calls end at once."""
    module = Told()
    trainer = compile_fit(module, barebones=True, capture="eager", max_epochs=2, default_root_dir=tmp_path)
    result = trainer.fit(m.labelled(), m.labelled(16, shuffle=False))
    assert (result.metrics, result.steps, result.best_checkpoint) == ({}, 12, None)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    assert (module.trainer.callbacks, module.trainer.loggers) == ([], [])
    assert (module.trainer.train_store.state(), module.trainer.log_every_n_steps) == (make_empty(), 0)


def make_empty() -> Any:
    """What a store says that nobody wrote to."""
    return fasttrain.facade.MetricStore().state()


def test_barebones_is_captured_with_nothing_to_log() -> None:
    """The captured step gives no metric back."""
    module = m.Base()
    result = compile_fit(module, barebones=True, capture="compile", max_epochs=1).fit(m.labelled(40))
    assert (result.capture.rung, result.metrics, result.steps) == ("compile", {}, 5)


def test_a_module_logs_again_without_barebones() -> None:
    """The switch belongs to the run, not to the module."""
    module = m.Base()
    bare = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "capture": "eager", "max_epochs": 1}
    assert compile_fit(module, barebones=True, capture="eager", max_epochs=1).fit(m.labelled()).metrics == {}
    assert "train_loss" in compile_fit(module, **bare).fit(m.labelled()).metrics


@pytest.mark.parametrize(
    "option",
    [
        {"logger": True},
        {"logger": [object()]},
        {"enable_checkpointing": True},
        {"enable_progress_bar": True},
        {"enable_model_summary": True},
        {"log_every_n_steps": 10},
        {"num_sanity_val_steps": 2},
        {"fast_dev_run": True},
        {"fast_dev_run": 3},
        {"detect_anomaly": True},
    ],
    ids=lambda option: "-".join(f"{k}={v if isinstance(v, (bool, int)) else type(v).__name__}" for k, v in option.items()),
)
def test_barebones_refuses_what_it_leaves_out(option: dict[str, Any]) -> None:
    """As Lightning does; the sentence names the option and barebones."""
    with pytest.raises(OptionError, match=f"{next(iter(option))}: got .*because barebones=True.*Leave one of the two out"):
        make_options({"barebones": True} | option)
    with pytest.raises(ValueError, match="barebones=True"):
        pl.Trainer(barebones=True, **option)


def test_barebones_refuses_our_own_too() -> None:
    """Norms that nobody would hear of, and a callback that saves."""
    with pytest.raises(OptionError, match=r"track_grad_norm: got 2.*barebones=True"):
        make_options({"barebones": True, "track_grad_norm": 2})
    with pytest.raises(OptionError, match=r"callbacks: got ModelCheckpoint.*barebones=True"):
        compile_fit(m.Base(), barebones=True, callbacks=[ModelCheckpoint()]).fit(m.labelled())
    with pytest.raises(OptionError, match="barebones: got 1"):
        make_options({"barebones": 1})


@pytest.mark.parametrize("name", BARE)
def test_what_is_off_already_does_not_contradict_barebones(name: str) -> None:
    """Saying it twice is saying it once; so is leaving it to its default."""
    for value in (BARE[name], None):
        made = make_options({"barebones": True, name: False if name == "fast_dev_run" else value})
        assert {k: getattr(made, k) for k in BARE} == BARE


# -- norms ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("value", "norm"), [(None, None), (-1, None), (-1.0, None), (2, 2.0), (1.5, 1.5), ("inf", math.inf), (math.inf, math.inf)]
)
def test_track_grad_norm_is_a_norm_or_off(value: Any, norm: float | None) -> None:
    """The values it has always taken."""
    assert make_options({"track_grad_norm": value}).track_grad_norm == norm


@pytest.mark.parametrize("value", [0, -2, "2", True, math.nan, [2]])
def test_a_wrong_norm(value: Any) -> None:
    """Said with what it may be."""
    with pytest.raises(OptionError, match=r"track_grad_norm: got .*a number > 0, 'inf', or None"):
        make_options({"track_grad_norm": value})


# -- cadences ---------------------------------------------------------------------------------------------------------
class Stream(IterableDataset):
    """Rows one by one, without a length."""

    def __iter__(self) -> Any:
        return iter(list(zip(*m.rows(24), strict=True)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"val_check_interval": 7}, "val_check_interval: got 7; wanted at most the epoch's 6 batches.*check_val_every_n_epoch=None"),
        ({"val_check_interval": 4, "limit_train_batches": 3}, "val_check_interval: got 4; wanted at most the epoch's 3 batches"),
        ({"val_check_interval": 4, "limit_train_batches": 0.5}, "val_check_interval: got 4; wanted at most the epoch's 3 batches"),
        ({"val_check_interval": 3, "overfit_batches": 2}, "val_check_interval: got 3; wanted at most the epoch's 2 batches"),
        ({"val_check_interval": 0.5, "check_val_every_n_epoch": None}, "check_val_every_n_epoch: got None"),
        ({"check_val_every_n_epoch": None}, "check_val_every_n_epoch: got None; wanted an integer val_check_interval"),
        ({"val_check_interval": 3, "val_every_n_steps": 3}, "val_every_n_steps and val_check_interval"),
        ({"val_check_interval": "00:00:01:00", "val_every_n_steps": 3}, "val_every_n_steps and val_check_interval"),
        ({"val_every_n_steps": 0}, "val_every_n_steps: got 0; wanted an integer >= 1"),
        ({"val_check_interval": -1}, "val_check_interval: got -1"),
        ({"val_check_interval": True}, "val_check_interval: got True"),
        ({"val_check_interval": math.nan}, "val_check_interval: got nan"),
        ({"val_check_interval": "1:00"}, "val_check_interval: got '1:00'"),
        ({"check_val_every_n_epoch": 1.5}, "check_val_every_n_epoch: got 1.5"),
        ({"min_steps": 4, "max_steps": 3}, "min_steps: got 4; wanted at most max_steps=3"),
        ({"min_epochs": 3, "max_epochs": 2}, "min_epochs: got 3; wanted at most max_epochs=2"),
        ({"min_epochs": -1}, "min_epochs: got -1; wanted an integer >= 0"),
        ({"max_time": {"minutes": -5}}, "max_time: got .*-5"),
        ({"max_time": 60}, "max_time: got 60"),
        ({"limit_train_batches": math.nan}, "limit_train_batches: got nan"),
        ({"limit_val_batches": 0.01}, "limit_val_batches: got 0.01.*no batch"),
        ({"overfit_batches": 0.01}, "overfit_batches: got 0.01.*no batch"),
        ({"gradient_clip_val": math.nan}, "gradient_clip_val: got nan"),
    ],
    ids=str,
)
def test_a_contradiction_is_said_before_the_first_batch(options: dict[str, Any], words: str) -> None:
    """In one sentence; no batch was trained."""
    refuses(words, m.labelled(shuffle=False), options)


@pytest.mark.parametrize(
    "options", [{"val_check_interval": 0.5}, {"limit_train_batches": 0.5}, {"limit_val_batches": 0.5}, {"overfit_batches": 0.5}], ids=str
)
def test_a_share_of_a_stream_is_said_before_the_first_batch(options: dict[str, Any]) -> None:
    """Nobody knows its length; which option to give as an integer is in the sentence."""
    stream = DataLoader(Stream(), 4)
    refuses(f"{next(iter(options))}: got 0.5; wanted an integer or 1.0", stream, options, val=stream)


def refuses(words: str, train: Any, options: dict[str, Any], val: Any = None) -> None:
    bare = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1, "capture": "eager"}
    module = Told()
    with pytest.raises(FasttrainError, match=words):
        compile_fit(module, **bare | options).fit(train, m.labelled(16, shuffle=False) if val is None else val)
    assert module.batches == 0


@pytest.mark.parametrize(
    "options",
    [
        {"fast_dev_run": True, "min_steps": 5},
        {"fast_dev_run": 2, "min_epochs": 3},
        {"min_steps": 5, "max_epochs": 0},
        {"min_epochs": 3, "max_epochs": -1},
        {"min_epochs": 2, "max_epochs": 2},
        {"min_steps": 4, "max_steps": -1},
        {"val_check_interval": 20, "limit_val_batches": 0},
        {"val_check_interval": 20, "check_val_every_n_epoch": None},
        {"val_every_n_steps": 20, "check_val_every_n_epoch": None},
        {"val_check_interval": "00:00:01:00", "check_val_every_n_epoch": None},
    ],
    ids=str,
)
def test_what_only_looks_like_a_contradiction_runs(options: dict[str, Any]) -> None:
    """An option that the other leaves without effect is no error, as in Lightning."""
    bare = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1, "capture": "eager"}
    stop = EarlyStopping("val_loss", patience=0, check_on_train_epoch_end=False)
    module = Told()
    ends = {"callbacks": [stop]} if options.get("max_epochs") == -1 else {}
    settings = bare | options | ends | ({"max_time": {"seconds": 1}} if ends else {})
    compile_fit(module, **settings).fit(m.labelled(), m.labelled(8, shuffle=False))
    assert module.batches or settings["max_epochs"] == 0
