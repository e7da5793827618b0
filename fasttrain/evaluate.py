"""Validation, test and predict: one pass over each loader without gradients, modes put back one by one."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fasttrain.data import END, Lookahead, Source
from fasttrain.entries import check_place
from fasttrain.graphs.auto import built_as
from fasttrain.graphs.contract import batch_size_of
from fasttrain.graphs.evalstep import EvalStep
from fasttrain.results import MetricView
from fasttrain.run import Run
from fasttrain.state import rng_state, set_rng_state
from fasttrain.step_result import epoch_values, gathered, rebuilt

HOOK = {"validate": "validation", "test": "test", "predict": "predict"}


def sanity_check(run: Run) -> None:
    """A few validation batches before training, thrown away: finds a broken validation_step now, not in an hour."""
    facade, steps = run.facade, run.options.num_sanity_val_steps
    streams = rng_state()
    facade.sanity_checking = True
    with facade.metrics_put_back():
        run.fire("on_sanity_check_start")
        evaluate(run, run.val, "validate", at_most=None if steps == -1 else steps)
        run.fire("on_sanity_check_end")
    facade.sanity_checking = False
    set_rng_state(streams)


def evaluate(run: Run, sources: Sequence[Source], stage: str, *, at_most: int | None = None) -> MetricView:
    """Run ``stage`` over every loader; returns the epoch's metrics, which the facade keeps too."""
    facade, hook, started = run.facade, HOOK[stage], time.perf_counter()
    before, was_ended, was_step = facade.state.stage, facade.epoch_ended, facade.log_on_step
    facade.state.stage, facade.epoch_ended, facade.log_on_step = stage, False, False
    facade.eval_store.reset()
    if facade.state.fn == "fit" and not facade.sanity_checking and not facade.progress.window_open:
        run.trainable.call("on_validation_model_zero_grad")
    with _eval_mode(run, stage), _without_gradients(run):
        run.fire(f"on_{hook}_start")
        run.fire(f"on_{hook}_epoch_start")
        kept = [list(_pass(run, s, stage, i, len(sources), at_most)) for i, s in enumerate(sources)]
        epoch_end(run, f"{hook}_epoch_end", kept)
        del kept
        facade.epoch_ended = True
        run.fire(f"on_{hook}_epoch_end")
        view = facade.eval_store.at_epoch_end()
        facade.eval_store.reset()
        facade.keep(view)
        if not facade.sanity_checking:
            facade.send(view.logged, facade.progress.stepping_batches)
        run.fire(f"on_{hook}_end")
    facade.state.stage, facade.epoch_ended, facade.log_on_step = before, was_ended, was_step
    run.ledger.validate_s += time.perf_counter() - started
    return view


def epoch_end(run: Run, hook: str, kept: list[list[Any]]) -> None:
    """``training_epoch_end`` and its like: called with what the epoch's steps returned (a list an evaluation loader);
    what it returns is logged."""
    if hook in run.trainable.hooks:
        splits = hook == "training_epoch_end" and run.trainable.split_length > 0
        outputs = [gathered(of_one, hook, splits=splits) for of_one in kept]
        returned = run.trainable.call(hook, outputs[0] if len(outputs) == 1 else outputs)
        run.trainable.sink.hook = hook
        for name, value, how in epoch_values(returned, hook):
            run.trainable.sink.log(name, value, **how)


def predict(run: Run, sources: Sequence[Source]) -> list[Any]:
    """Every batch's prediction, in order; a list per loader when there are several."""
    facade = run.facade
    facade.state.stage = "predict"
    with _eval_mode(run, "predict"), _without_gradients(run):
        run.fire("on_predict_start")
        run.fire("on_predict_epoch_start")
        outputs = [list(_pass(run, s, "predict", i, len(sources), None)) for i, s in enumerate(sources)]
        run.fire("on_predict_epoch_end")
        run.fire("on_predict_end")
    return outputs[0] if len(outputs) == 1 else outputs


def _pass(run: Run, source: Source, stage: str, index: int, count: int, at_most: int | None) -> Iterator[Any]:
    """One loader's batches; yields what the step returned where somebody wants it."""
    facade, trainable, display = run.facade, run.trainable, run.display
    hook, suffix = HOOK[stage], f"/dataloader_idx_{index}" if count > 1 else ""
    limit = source.batches if at_most is None else min(at_most, source.batches)
    transfer, eval_step = run.transfer(index), _step_of(run, source, stage, index, suffix)
    start, end = (run.batch_hook(f"on_{hook}_batch_{which}", several=count > 1) for which in ("start", "end"))
    keep = stage == "predict" or f"{hook}_epoch_end" in trainable.hooks
    source.set_epoch(facade.progress.epoch)
    ahead = Lookahead(source.one_pass(), limit, source.total)
    foreign = (
        run.brings_itself()
        or run.foreign(f"on_{hook}_batch_start", f"on_{hook}_batch_end")
        or (eval_step.traced and run.reached_between_steps(source))
    )
    shown = "sanity" if facade.sanity_checking else stage
    told = (facade.sanity_checking or facade.state.fn != "fit") and display.due != math.inf  # then its end is told too
    batch_idx, progress = -1, facade.progress
    while (batch := ahead()) is not END:
        batch_idx += 1
        progress.eval_dataloader_idx, progress.eval_batch_idx = index, batch_idx
        if batch is None:
            continue
        if transfer is not None:
            batch = transfer(batch)
        if start or end:
            facade.last_batch_size, facade.dataloader_suffix = batch_size_of(batch), suffix
        if start is not None:
            start(batch, batch_idx, index)
        if foreign:
            eval_step.refresh()
        output, keys, values, size = eval_step(batch, batch_idx, index)
        if keys:
            if stage == "predict":
                check_place(keys[0].name, "predict_step", on_step=False, on_epoch=True)
            facade.eval_store.append(keys, values, size)
        if end is not None:
            end(rebuilt(output), batch, batch_idx, index)
        if keep:
            yield output
        now = time.perf_counter()
        if now >= display.due or (told and ahead.last):
            told = True
            display.evaluate(facade, shown, batch_idx + 1, limit, now)
    facade.last_batch_size, facade.dataloader_suffix = 1, ""


def _step_of(run: Run, source: Source, stage: str, index: int, suffix: str) -> EvalStep:
    """The stage's step for this loader, kept over the passes of a fit; traced when the training step is and it pays."""
    hook, hooks = HOOK[stage], run.trainable.hooks
    keep = stage == "predict" or f"{hook}_epoch_end" in hooks or run.live(f"on_{hook}_batch_end")
    step = run.eval_steps.get((stage, index))
    if step is None:
        step = run.eval_steps[stage, index] = EvalStep(run.trainable, run.spec, stage, keep=keep, suffix=suffix)
    build = run.report.build
    if run.step is None and run.maker is not None and run.maker.decided is not None and run.options.capture != "eager":
        build = built_as(run.maker.decided)  # a resumed run that still owes a validation: as the run did that was saved
    within = run.facade.state.fn == "fit" and not run.facade.sanity_checking
    left = math.inf if run.options.capture == "compile" else _passes_left(run) * source.batches
    recorded = run.step is not None and run.step.rung == "graph" and run.maker is not None
    step.begin(left, build=build if within else None, device=run.maker.device if recorded and run.maker is not None else None)
    return step


def _passes_left(run: Run) -> float:
    """How often this fit will still validate, as far as its options tell."""
    options, facade = run.options, run.facade
    if run.train is None or options.max_epochs == -1 or math.isinf(run.train.batches):
        return math.inf
    epochs = options.max_epochs - facade.current_epoch
    if options.val_every_n_steps is not None:
        return epochs * run.train.batches / options.window(facade.current_epoch) / options.val_every_n_steps
    if isinstance(options.val_check_interval, int):
        return epochs * run.train.batches / options.val_check_interval
    return epochs / options.val_check_interval / (options.check_val_every_n_epoch or 1)


@contextmanager
def _eval_mode(run: Run, stage: str) -> Iterator[None]:
    module, hooks = run.trainable.module, run.trainable.hooks
    sink = run.trainable.sink
    modes = [(m, m.training) for m in module.modules()]
    sink.on_step_default, sink.on_epoch_default = False, True
    if (to_eval := f"on_{HOOK[stage]}_model_eval") in hooks:
        run.trainable.call(to_eval)
    else:
        module.eval()
    try:
        yield
    finally:
        sink.on_step_default, sink.on_epoch_default = True, False
        if (to_train := f"on_{HOOK[stage]}_model_train") in hooks:
            run.trainable.call(to_train)
        else:
            for m, training in modes:
                m.training = training


@contextmanager
def _without_gradients(run: Run) -> Iterator[None]:
    alone = run.facade.state.fn != "fit" and run.options.inference_mode
    with torch.inference_mode() if alone else torch.no_grad():
        yield
