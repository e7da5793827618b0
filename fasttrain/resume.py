"""Exact state: what goes into a checkpoint of a run, and how it is put back so that the run was never stopped."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fasttrain import checkpoint as disk
from fasttrain.errors import CheckpointError
from fasttrain.graphs.capture import as_decided
from fasttrain.run import Run
from fasttrain.state import rng_state


def save(run: Run, path: Path, weights_only: bool) -> Path:
    """Write the run as it stands at ``path``; returns the path."""
    started, progress = time.perf_counter(), run.facade.progress
    run.settle()
    state: dict[str, Any] = {
        "epoch": progress.epoch,
        "global_step": progress.global_step,
        "state_dict": run.trainable.module.state_dict(),
        "hyper_parameters": _hparams(run),
    }
    if not weights_only:
        state |= _training_state(run)
    tell_callbacks(run, "on_save_checkpoint", state)
    run.trainable.call("on_save_checkpoint", state)
    written = disk.write(Path(path), state)
    run.ledger.checkpoint_s += time.perf_counter() - started
    return written


def _training_state(run: Run) -> dict[str, Any]:
    facade, progress, maker = run.facade, run.facade.progress, run.maker
    assert maker is not None
    saved = progress.state_dict()
    if saved["phase"] == "epoch_end" and not run.epoch_complete:
        saved["phase"] = ""  # a stop in mid-epoch: whoever resumes goes on with the epoch
    return {
        "progress": saved,
        "optimizer_states": [o.state_dict() for o in maker.optimizers],
        "lr_schedulers": [c.scheduler.state_dict() for c in run.facade.lr_scheduler_configs],
        "scaler": maker.scaler.state_dict() if maker.scaler else None,
        "callbacks": run.callbacks.state_dict(),
        "rng": rng_state() | (run.train.streams() if run.train is not None else {}),
        "epoch_rng": run.epoch_rng,
        "open_gradients": _open_gradients(run),
        "train_metrics": facade.train_store.state(),
        "known_metrics": dict(facade.callback_metrics),
        "datamodule": _datamodule_state(facade.datamodule),
        "loaders": run.asked,
        "decided": _decided(run),
    }


def _open_gradients(run: Run) -> dict[str, Tensor] | None:
    """Of an open window; under manual optimization whatever the module has gathered."""
    manual = run.trainable.form == "manual"
    return (run.step.gradients() or None) if run.step is not None and (manual or run.facade.progress.window_open) else None


def _datamodule_state(datamodule: Any) -> Any:
    return datamodule.state_dict() or None if callable(getattr(datamodule, "state_dict", None)) else None


def _decided(run: Run) -> dict[str, Any] | None:
    """What ``auto`` chose: a resumed run must compute the same bits, not measure anew."""
    if run.step is None:
        return None
    build = vars(run.report.build) if run.report.build is not None else None
    ahead = run.maker.ahead if run.maker is not None else None
    decided = {"rung": run.report.rung, "threads": run.report.threads, "build": build, "calls": [c.state() for c in run.step.calls]}
    return decided | ({} if ahead is None else {"from": ahead.at})


def _hparams(run: Run) -> dict[str, Any] | None:
    """Hyperparameters that have a plain form; the rest is the constructor's business."""
    params = getattr(run.trainable.module, "hparams", None)
    plain = (bool, int, float, str, type(None), list, tuple, dict)
    return {str(k): v for k, v in dict(params).items() if isinstance(v, plain)} if params else None


def find(run: Run, ckpt_path: str | os.PathLike[str]) -> dict[str, Any]:
    """The checkpoint that "last", "best" or a path means, read and verified. Raises CheckpointError."""
    folders = [Path(run.options.default_root_dir)]
    folders += [Path(d) for c in run.facade.checkpoint_callbacks if (d := getattr(c, "dirpath", None))]
    if ckpt_path == "last":
        path = disk.newest(folders)
        if path is None:
            raise CheckpointError(
                f"ckpt_path='last': no checkpoint below {', '.join(map(str, folders))}. Leave ckpt_path out to start anew."
            )
    elif ckpt_path == "best":
        best = next((c.best_model_path for c in run.facade.checkpoint_callbacks if c.best_model_path), "")
        if not best:
            raise CheckpointError("ckpt_path='best': no ModelCheckpoint of this trainer has saved one yet. Give 'last' or a path.")
        path = Path(best)
    else:
        path = Path(ckpt_path)
    run.display.line(f"from checkpoint {path}")
    return disk.read(path)


def load_weights(run: Run, ckpt_path: str | os.PathLike[str] | None) -> None:
    """For validate, test and predict: only the weights."""
    if ckpt_path is not None:
        load_module(run, find(run, ckpt_path))


def load_module(run: Run, saved: dict[str, Any]) -> None:
    """Weights and buffers, with one table of what does not fit. Raises CheckpointError before anything is changed."""
    module = run.trainable.module
    run.trainable.call("on_load_checkpoint", saved)
    table = _mismatch(module.state_dict(), saved["state_dict"])
    if table:
        raise CheckpointError(
            f"the checkpoint does not fit {type(module).__name__}:\n{table}\nBuild the module as it was built when this was saved."
        )
    module.load_state_dict(saved["state_dict"])


def _mismatch(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    rows = [f"  missing in the checkpoint: {k}" for k in mine if k not in theirs]
    rows += [f"  not in the module: {k}" for k in theirs if k not in mine]
    for k, v in mine.items():
        other = theirs.get(k)
        if isinstance(v, Tensor) and isinstance(other, Tensor) and v.shape != other.shape:
            rows.append(f"  {k}: {list(other.shape)} in the checkpoint, {list(v.shape)} in the module")
    return "\n".join(rows[:20] + ([f"  ... and {len(rows) - 20} more"] if len(rows) > 20 else []))


def tell_callbacks(run: Run, hook: str, saved: dict[str, Any]) -> None:
    """``on_save_checkpoint`` or ``on_load_checkpoint`` of callbacks, which may add to a checkpoint, or take from it."""
    sink = run.trainable.sink
    before, sink.hook = sink.hook, hook
    for call in run.callbacks.calls(hook):
        call(run.facade, run.trainable.module, saved)
    sink.hook = before


def load_before_optimizers(run: Run, saved: dict[str, Any]) -> None:
    """To go on training: weights, then the state of the datamodule, which its loaders may need, then that of callbacks."""
    if "progress" not in saved:
        raise CheckpointError(
            "this checkpoint holds weights only: training cannot go on from it. Load it with validate/test/predict, or start anew."
        )
    load_module(run, saved)
    if saved["datamodule"] is not None and callable(getattr(run.facade.datamodule, "load_state_dict", None)):
        run.facade.datamodule.load_state_dict(saved["datamodule"])
    tell_callbacks(run, "on_load_checkpoint", saved)
    run.callbacks.load_state_dict(saved["callbacks"])


def load_training(run: Run, saved: dict[str, Any]) -> None:
    """The rest: optimizer, schedulers, scaler, counters; streams and position wait for the epoch."""
    facade, maker = run.facade, run.maker
    assert maker is not None
    if len(saved["lr_schedulers"]) != len(run.facade.lr_scheduler_configs):
        raise CheckpointError(
            f"the checkpoint has {len(saved['lr_schedulers'])} schedulers and configure_optimizers returned "
            f"{len(run.facade.lr_scheduler_configs)}. "
            "Return the same ones."
        )
    if len(saved["optimizer_states"]) != len(maker.optimizers):
        raise CheckpointError(
            f"the checkpoint has {len(saved['optimizer_states'])} optimizers and configure_optimizers returned {len(maker.optimizers)}. "
            "Return the same ones."
        )
    try:
        for optimizer, state in zip(maker.optimizers, saved["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)
    except ValueError as error:
        raise CheckpointError(
            f"the checkpoint's optimizer does not fit this one: {error}. Return the same optimizer and groups."
        ) from error
    for config, state in zip(run.facade.lr_scheduler_configs, saved["lr_schedulers"], strict=True):
        config.scheduler.load_state_dict(state)
    if maker.scaler is not None and saved["scaler"] is not None:
        maker.scaler.load_state_dict(saved["scaler"])
    facade.progress.load_state_dict(saved["progress"])
    facade.train_store.load(saved["train_metrics"])
    facade.restore_known(saved["known_metrics"])
    as_decided(maker, saved["decided"])
    run.open_gradients = saved["open_gradients"]
    run.resume = {"rng": saved["rng"], "epoch_rng": saved["epoch_rng"] if facade.progress.epoch_open else None}


def complete_report(run: Run) -> None:
    """What only the running step knows: traces, direct calls, obstacles met on the way."""
    step, report = run.step, run.report
    if step is None or not step.calls:
        return
    report.traces, report.compile_s = sum(c.traces for c in step.calls), sum(c.compile_s for c in step.calls)
    report.direct = all(c.direct for c in step.calls)
    report.why_guarded = next((c.why_guarded for c in step.calls if not c.direct), "")
    report.whole = report.whole and not any(c.failed for c in step.calls)
    batches = run.facade.progress.batches_seen
    if report.direct and batches >= 16 and all(2 * c.guarded_calls > batches for c in step.calls):
        why = "somebody's code runs between the steps: a hook, a callback, a loader that knows the module"
        report.direct, report.why_guarded = False, why
    report.guards_us = max((c.guards_us for c in step.calls), default=0.0)
    known = {(o.where, o.reason) for o in step.obstacles}  # again, with what they have come to cost
    report.obstacles = [o for o in report.obstacles if (o.where, o.reason) not in known] + list(step.obstacles)
