"""Why and when a fit ends: limits reached, a request granted, ctrl-C."""

from __future__ import annotations

import math
from pathlib import Path

from fasttrain.cadence import epoch_done, steps_done
from fasttrain.run import Run


def finished(run: Run) -> bool:
    """Between epochs: is there nothing left to train? Notes why."""
    options, progress = run.options, run.facade.progress
    if run.stopped_by:
        return True
    if epoch_done(progress.epoch, options.max_epochs):
        run.stopped_by = "max_epochs"
    elif steps_done(progress.global_step, options.max_steps):
        run.stopped_by = "max_steps"
    elif granted(run):
        run.stopped_by = _who_stopped(run)
    assert run.train is not None
    return bool(run.stopped_by) or run.train.batches == 0


def granted(run: Run) -> bool:
    """Did somebody ask to stop, and are the least epochs (whole ones) and steps done?"""
    return run.facade.should_stop and _may_stop(run)


def stops(run: Run, timed_out: bool) -> bool:
    """Something asked to stop at this batch: is it granted now? Notes why."""
    if run.interrupted:
        run.stopped_by = "interrupt"
    elif steps_done(run.facade.progress.global_step, run.options.max_steps):
        run.stopped_by = "max_steps"
    elif timed_out and _may_stop(run):
        run.stopped_by = "max_time"
    elif granted(run):
        run.stopped_by = _who_stopped(run)
    return bool(run.stopped_by)


def deadline(run: Run) -> float:
    """When ``max_time`` is over, on the clock of ``time.perf_counter``."""
    return math.inf if run.options.max_seconds is None else run.started + run.options.max_seconds


def save_interrupted(run: Run) -> None:
    """After ctrl-C: a checkpoint to go on from."""
    facade = run.facade
    if run.options.enable_checkpointing:
        path = facade.save_checkpoint(Path(facade.log_dir) / "checkpoints" / f"interrupted-step={facade.global_step}")
        run.display.line(f"interrupted: saved {path}; fit(..., ckpt_path='last') goes on from there")


def _may_stop(run: Run) -> bool:
    progress, options = run.facade.progress, run.options
    return progress.epoch >= options.min_epochs and progress.global_step >= options.min_steps


def _who_stopped(run: Run) -> str:
    early = run.facade.early_stopping_callback
    return "early_stopping" if getattr(early, "stopped_epoch", 0) else "callback"
