"""``trainer.step(batch)``: the captured micro-step for people who keep their own loop."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fasttrain.errors import ModuleError, NonFiniteError, reject
from fasttrain.graphs.capture import capture_step, dry_look
from fasttrain.graphs.step import Step
from fasttrain.module import attached
from fasttrain.run import Run
from fasttrain.schedules import moved_schedulers, step_schedulers
from fasttrain.setup import make_maker, place_module


class OwnLoop:
    """One optimizer step every ``accumulate_grad_batches`` calls; schedulers with interval "step" move with it."""

    def __init__(self, run: Run) -> None:
        self._run = run
        place_module(run)
        run.maker = make_maker(run)
        run.facade.state.stage = "train"
        self._step: Step | None = None

    def __call__(self, batch: Any) -> Tensor:
        run, progress = self._run, self._run.facade.progress
        with attached(run.trainable, run.facade):
            transfer = run.transfer()
            batch = batch if transfer is None else transfer(batch)
            if self._step is None:
                assert run.maker is not None
                dry_look(run.maker, batch)
                self._step, run.report = capture_step(run.maker, batch, math.inf)
                run.step = self._step
            window = run.options.window(0)
            opened = progress.window_open + 1
            last = opened >= window
            self._step.refresh()  # the caller's code ran since the last step
            out = self._step.micro_step(batch, progress.batch_idx + 1, first=opened == 1, last=last, divisor=window, opened=opened)
            progress.batch_idx += 1
            progress.window_open += 1
            if last:
                self._update(self._step)
        progress.batches_seen += 1
        if out.loss is None:
            raise ModuleError(
                reject("what training_step returned to trainer.step", None, "a loss", "Leave such batches out of your own loop.")
            )
        return out.loss.clone()

    def _update(self, step: Step) -> None:
        run, progress = self._run, self._run.facade.progress
        stepped = step.update_step(1.0)
        progress.window_open = 0
        if stepped > 0:
            progress.global_step += stepped
            by_step = [s for s in run.schedulers if s.interval == "step" and not s.reduce_on_plateau]
            if len(step.moved) == 1:
                step_schedulers(run, by_step, progress.global_step)
            else:
                moved_schedulers(run, by_step, step.moved)
        elif run.options.nonfinite == "raise" and run.maker is not None and run.maker.scaler is None:
            raise NonFiniteError(f"step {progress.global_step}: the loss or a gradient is not finite; the weights are as before it.")
