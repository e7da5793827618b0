"""Laws of checkpointing: what Lightning's saves, ours saves; what differs on purpose; what is never removed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from fasttrain.callbacks import ModelCheckpoint
from fasttrain.errors import CheckpointError, FasttrainWarning, OptionError

VALUES = [0.5, 0.4, 0.6, 0.3, 0.3, 0.7, 0.2, 0.9] * 4

CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"save_top_k": -1}, {}),
    ({"save_top_k": 0, "save_last": True}, {}),
    ({"monitor": "val_loss"}, {}),
    ({"monitor": "val_loss", "mode": "max", "save_top_k": 3}, {}),
    ({"monitor": "val_loss", "save_top_k": -1, "filename": "{epoch:02d}-{val_loss:.2f}"}, {}),
    ({"monitor": "val_loss", "save_top_k": 2, "save_last": True}, {}),
    ({"monitor": "val_loss", "save_top_k": 2, "save_last": "link"}, {}),
    ({"monitor": "val_loss", "save_top_k": 3, "filename": "same"}, {}),
    ({"save_top_k": -1, "filename": "same"}, {}),
    ({"filename": "same", "enable_version_counter": False}, {}),
    ({"every_n_epochs": 2, "save_top_k": -1}, {}),
    ({"every_n_epochs": 3, "save_last": True}, {}),
    ({"every_n_train_steps": 3, "save_top_k": -1}, {}),
    ({"every_n_train_steps": 3, "save_last": True}, {}),
    ({"every_n_train_steps": 5, "save_top_k": -1, "save_last": "link"}, {}),
    ({"every_n_train_steps": 3, "monitor": "train_loss", "save_top_k": 2}, {}),
    ({"train_time_interval": timedelta(0), "save_top_k": -1}, {}),
    ({"monitor": "val_loss", "save_top_k": 2}, {"val_check_interval": 2}),
    ({"monitor": "val_loss", "save_top_k": 2}, {"val_check_interval": 0.25}),
    ({"monitor": "val_loss", "save_top_k": -1, "save_on_train_epoch_end": True}, {"val_check_interval": 2}),
    ({"monitor": "val_loss", "save_top_k": -1, "save_on_train_epoch_end": False}, {}),
    ({"monitor": "val_loss", "save_top_k": 2}, {"check_val_every_n_epoch": 2}),
    ({"filename": "e{epoch}-l{val_loss:.3f}-{missing}", "auto_insert_metric_name": False, "save_top_k": -1}, {}),
    ({"filename": "a/{epoch}", "save_top_k": -1}, {}),
]


def names(directory: str | Path) -> set[str]:
    """Every checkpoint below, without Lightning's suffix."""
    root = Path(directory)
    found = {p for p in root.rglob("*") if p.suffix == ".ckpt" or p.is_symlink() or (p / "state.json").exists()}
    return {str(p.relative_to(root)).removesuffix(".ckpt") for p in found}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", range(len(CASES)))
def test_it_keeps_what_lightning_keeps(
    case: int, tmp_path: Path, make_run: Callable[..., Any], lightning_fit: Callable[..., Any]
) -> None:
    """Same values, same arguments: the same names on disk, best, last, k-th and scores at the end."""
    arguments, cadence = CASES[case]
    theirs = pl.callbacks.ModelCheckpoint(tmp_path / "a", **arguments)
    lightning_fit([theirs], VALUES, epochs=5, **cadence)
    ours = ModelCheckpoint(tmp_path / "b", **arguments)
    make_run(ours, **cadence).fit(VALUES, epochs=5)
    assert names(tmp_path / "b") == names(tmp_path / "a")
    for name in ("best_model_path", "last_model_path", "kth_best_model_path"):
        wanted = getattr(theirs, name)
        relative = os.path.relpath(wanted, tmp_path / "a").removesuffix(".ckpt") if wanted else ""
        assert getattr(ours, name) == (str(tmp_path / "b" / relative) if wanted else ""), name
    assert [score.item() for score in ours.best_k_models.values()] == [s.item() for s in theirs.best_k_models.values()]
    assert (ours.best_model_score is None) == (theirs.best_model_score is None)
    assert ours.best_model_score is None or ours.best_model_score.item() == theirs.best_model_score.item()


@pytest.mark.parametrize(
    ("template", "insert"),
    [(None, True), ("{epoch:03d}-{step}", True), ("x-{val_loss:.2f}", True), ("{val_loss:.1e}", False), ("{no}", True),
     ("{a/b:.2f}", False), ("{a.b}", True), ("plain", True), ("{epoch}-{epoch_x}", True)],
)  # fmt: skip
def test_names_are_lightnings(template: str | None, insert: bool) -> None:
    """A template gives the name Lightning gives, less the suffix."""
    metrics = {"val_loss": 0.12345, "a/b": 1.5, "a.b": 2.5, "epoch_x": 7.0}
    values = {name: torch.tensor(value) for name, value in metrics.items()}
    values |= {"epoch": torch.tensor(4), "step": torch.tensor(12)}
    theirs = pl.callbacks.ModelCheckpoint(filename=template, auto_insert_metric_name=insert)
    ours = ModelCheckpoint(filename=template, auto_insert_metric_name=insert)
    wanted = theirs.format_checkpoint_name(dict(values), ver=2)
    assert ours.format_checkpoint_name(dict(values), ver=2) == wanted.removesuffix(".ckpt")


def test_a_step_save_uses_the_newest_value_and_says_of_which_step(make_run: Callable[..., Any]) -> None:
    """Nothing is lost in the first epoch, and a save on a validation step is scored by that validation."""
    save = ModelCheckpoint(monitor="val_loss", every_n_train_steps=2, save_top_k=-1)
    run = make_run(save, num_training_batches=8)
    run.fit([0.5, 0.4], epochs=2)
    assert run.saves == [(f"epoch={e}-step={s}", s) for e, s in ((0, 8), (1, 10), (1, 12), (1, 14), (1, 16))]
    assert list(save.metric_steps.values()) == [8, 8, 8, 8, 16]
    assert [round(score.item(), 2) for score in save.best_k_models.values()] == [0.5, 0.5, 0.5, 0.5, 0.4]


def test_a_step_save_waits_for_the_validation_of_that_step(make_run: Callable[..., Any]) -> None:
    """With validation after every batch each save is scored by its own step, not by the one before."""
    save = ModelCheckpoint(monitor="val_loss", every_n_train_steps=3, save_top_k=-1)
    make_run(save, val_check_interval=1).fit([0.01 * step for step in range(1, 9)], epochs=2)
    assert [round(score.item(), 2) for score in save.best_k_models.values()] == [0.03, 0.06]
    assert list(save.metric_steps.values()) == [3, 6]


def test_a_waiting_save_is_made_even_when_validation_does_not_come(make_run: Callable[..., Any]) -> None:
    """At the end of the epoch when the metric is there, else a warning names the metrics that exist."""
    save = ModelCheckpoint(monitor="val_loss", every_n_train_steps=2, save_top_k=-1, save_last=True)
    run = make_run(save, val_enabled=False)
    with pytest.warns(FasttrainWarning, match=r"val_loss.*train_loss"):
        run.fit([], epochs=1)
    assert names(save.dirpath or "") == {"last"}


def test_best_is_the_old_one_until_the_new_one_is_complete(make_run: Callable[..., Any]) -> None:
    """A write that fails changes nothing, on disk or in memory."""
    run = make_run(save := ModelCheckpoint(monitor="val_loss", save_top_k=1))
    run.fit([0.5], epochs=1)
    best, state = save.best_model_path, save.state_dict()
    run.fail_saving = True
    with pytest.raises(OSError, match="disk full"):
        run.fit([0.4], epochs=2)
    assert save.best_model_path == best
    assert save.state_dict() == state
    assert Path(best).is_dir()


@pytest.mark.parametrize("top_k", [1, 2, -1])
@pytest.mark.parametrize("last", [None, True, "link"])
def test_a_resumed_run_continues_the_ranking(
    top_k: int, last: Any, tmp_path: Path, make_run: Callable[..., Any]
) -> None:
    """Resumed from the state inside any checkpoint it wrote, the run ends with the files of the run never stopped."""

    def build(where: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / where, monitor="val_loss", save_top_k=top_k, save_last=last)

    make_run(whole := build("whole")).fit(VALUES, epochs=6)
    for cut in range(1, 6):
        where = f"cut{cut}"
        run = make_run(save := build(where))
        run.fit(VALUES, epochs=cut)
        newest = tmp_path / where / run.saves[-1][0]
        state = json.loads((newest / "state.json").read_text())["callbacks"][save.state_key]
        then = make_run(again := build(where), current_epoch=cut, global_step=run.global_step)
        then.callbacks.load_state_dict({save.state_key: state})
        then.fit(VALUES[cut:], epochs=6)
        assert names(tmp_path / where) == names(tmp_path / "whole")
        relative = {os.path.relpath(path, tmp_path / where) for path in again.best_k_models}
        assert relative == {os.path.relpath(path, tmp_path / "whole") for path in whole.best_k_models}


def test_in_another_directory_only_the_best_path_is_taken_over(tmp_path: Path, make_run: Callable[..., Any]) -> None:
    """With a warning, and nothing in the old directory is removed."""
    run = make_run(old := ModelCheckpoint(tmp_path / "a", monitor="val_loss"))
    run.fit([0.9], epochs=1)
    then = make_run(new := ModelCheckpoint(tmp_path / "b", monitor="val_loss"), current_epoch=1, global_step=4)
    with pytest.warns(FasttrainWarning, match="ranking starts anew"):
        then.callbacks.load_state_dict(run.callbacks.state_dict())
    assert new.best_model_path == old.best_model_path
    then.fit([0.5], epochs=2)
    assert names(tmp_path / "a") == {"epoch=0-step=4"}


def test_what_it_did_not_write_stays(tmp_path: Path, make_run: Callable[..., Any]) -> None:
    """Foreign directories with the wanted names are neither overwritten nor removed."""
    for name in ("epoch=0-step=4", "last"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("x")
    make_run(ModelCheckpoint(tmp_path, save_last="link")).fit(VALUES, epochs=3)
    assert (tmp_path / "epoch=0-step=4" / "mine").exists()
    assert (tmp_path / "last" / "mine").exists()
    assert (tmp_path / "last-v1").resolve() == (tmp_path / "epoch=2-step=12").resolve()
    strict = ModelCheckpoint(tmp_path, save_last="link", enable_version_counter=False, filename="other")
    with pytest.raises(CheckpointError, match="no link"):
        make_run(strict).fit(VALUES, epochs=1)
    assert (tmp_path / "last" / "mine").exists()


def test_the_checkpoint_a_run_resumed_from_stays(tmp_path: Path, make_run: Callable[..., Any]) -> None:
    """Even when a better one pushes it out."""
    run = make_run(save := ModelCheckpoint(tmp_path, monitor="val_loss"))
    run.fit([0.9], epochs=1)
    run.ckpt_path = save.best_model_path
    run.fit([0.5], epochs=2)
    assert names(tmp_path) == {"epoch=0-step=4", "epoch=1-step=8"}


def test_last_is_of_the_very_end(tmp_path: Path, make_run: Callable[..., Any]) -> None:
    """Also when the rhythm of saving does not hit the last step."""
    run = make_run(ModelCheckpoint(tmp_path, every_n_train_steps=3, save_last=True))
    run.fit(VALUES, epochs=1)
    assert run.saves == [("epoch=0-step=3", 3), ("last", 3), ("last", 4)]


def test_accumulation_saves_each_step_once(make_run: Callable[..., Any]) -> None:
    """7 batches, windows of 3, every 2 steps, 2 epochs: steps 2, 4 and 6."""
    run = make_run(ModelCheckpoint(every_n_train_steps=2, save_top_k=-1), num_training_batches=7, accumulate=3)
    run.fit(VALUES, epochs=2)
    assert [step for _, step in run.saves] == [2, 4, 6]


def test_a_nan_is_the_worst_value(make_run: Callable[..., Any]) -> None:
    """It is kept while there is room and the first to go."""
    run = make_run(save := ModelCheckpoint(monitor="val_loss", save_top_k=2))
    run.fit([math.nan, 0.5, 0.7], epochs=3)
    assert {Path(path).name for path in save.best_k_models} == {"epoch=1-step=8", "epoch=2-step=12"}


def test_a_missing_metric_is_an_error_that_lists_those_that_exist(make_run: Callable[..., Any]) -> None:
    """Once validation has run and it is still not there."""
    with pytest.raises(OptionError, match=r"val_acc.*train_loss, val_loss"):
        make_run(ModelCheckpoint(monitor="val_acc")).fit(VALUES, epochs=1)
    with pytest.raises(OptionError, match=r"val_acc.*train_loss, val_loss"):
        make_run(ModelCheckpoint(monitor="val_acc", every_n_train_steps=1)).fit(VALUES, epochs=1)


@pytest.mark.parametrize("idle", [{"fast_dev_run": 1}, {"sanity_checking": True}])
def test_it_rests_in_fast_dev_runs_and_sanity_checks(idle: dict[str, Any], make_run: Callable[..., Any]) -> None:
    """Nothing is written there."""
    run = make_run(ModelCheckpoint(save_last=True), ModelCheckpoint(every_n_train_steps=1), **idle)
    run.fit(VALUES, epochs=1)
    assert run.saves == []


def test_an_exception_is_saved_when_asked_for(make_run: Callable[..., Any]) -> None:
    """And not twice at the same step."""
    run = make_run(ModelCheckpoint(save_on_exception=True, save_weights_only=True))
    run.call("setup", "fit")
    run.global_step = 5
    run.call("on_exception", RuntimeError("x"))
    run.call("on_exception", RuntimeError("x"))
    assert run.saves == [("epoch=0-step=5", 5)]


def test_the_place_is_beside_the_first_logger(tmp_path: Path, make_run: Callable[..., Any]) -> None:
    """Else in the root; always absolute."""
    from fasttrain.loggers import JsonlLogger

    run = make_run(save := ModelCheckpoint(), loggers=[JsonlLogger(tmp_path, "mine", 3)])
    run.fit(VALUES, epochs=1)
    assert save.dirpath == str(tmp_path / "mine" / "version_3" / "checkpoints")
    run = make_run(save := ModelCheckpoint())
    run.fit(VALUES, epochs=1)
    assert save.dirpath == str(tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "auto"},
        {"save_top_k": -2},
        {"save_top_k": 2},
        {"save_last": "copy"},
        {"every_n_train_steps": -1},
        {"every_n_epochs": -1},
        {"every_n_train_steps": 1, "every_n_epochs": 1},
        {"every_n_train_steps": 1, "train_time_interval": timedelta(seconds=1)},
        {"every_n_epochs": 1, "train_time_interval": timedelta(seconds=1)},
    ],
)
def test_wrong_arguments_are_refused_when_it_is_made(wrong: dict[str, Any]) -> None:
    """Before anything trains."""
    with pytest.raises(OptionError):
        ModelCheckpoint(**wrong)


def test_a_format_that_a_metric_cannot_take_is_explained(make_run: Callable[..., Any]) -> None:
    """The message shows the field and the value."""
    with pytest.raises(OptionError, match=r"val_loss:03d"):
        make_run(ModelCheckpoint(filename="{val_loss:03d}")).fit(VALUES, epochs=1)
