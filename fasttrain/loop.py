"""The trunk: epochs, batches, windows, and what is due after each. Read it from ``fit_loop`` down."""

from __future__ import annotations

import math
import time
from typing import Any

from fasttrain.cadence import validation_interval, window_length
from fasttrain.data import END, Lookahead
from fasttrain.errors import DataError, NonFiniteError, reject
from fasttrain.evaluate import epoch_end, evaluate, sanity_check
from fasttrain.graphs.capture import capture_step, dry_look
from fasttrain.graphs.contract import batch_size_of
from fasttrain.graphs.explain import one_line
from fasttrain.graphs.step import Step
from fasttrain.loaders import renew
from fasttrain.run import Run
from fasttrain.schedules import moved_schedulers, step_schedulers
from fasttrain.state import rng_state, set_rng_state
from fasttrain.step_result import for_epoch_end, rebuilt
from fasttrain.stopping import deadline, finished, granted, save_interrupted, stops


def fit_loop(run: Run) -> None:
    """Train until something says stop. Progress, metrics and the module carry the result."""
    facade, progress = run.facade, run.facade.progress
    run.trainable.module.zero_grad()
    if run.options.num_sanity_val_steps and run.val and (not progress.epoch_open or progress.phase == "epoch_end"):
        sanity_check(run)
    facade.state.stage = "train"
    if finished(run):  # nothing to train
        return
    run.fire("on_train_start")
    run.started = time.perf_counter()
    while not finished(run):
        _epoch(run)
    run.fire("on_train_end")


def _epoch(run: Run) -> None:
    facade, progress = run.facade, run.facade.progress
    assert run.train is not None
    facade.epoch_ended = False
    if not progress.epoch_open:
        _put_back(run)
        progress.batches_done = progress.window_open = 0
        progress.batch_idx = -1
        renew(run, "train")
    run.train.set_epoch(progress.epoch)
    if not progress.epoch_open:
        run.fire("on_epoch_start")
        run.fire("on_train_epoch_start")
        progress.epoch_open = True
    if progress.phase != "epoch_end":
        ahead = _open_pass(run)
        facade.log_on_step = True
        run.epoch_complete = _batches(run, ahead)
        facade.log_on_step = False
    else:
        _put_back(run)
        run.epoch_complete = True
    _end_epoch(run)


def _open_pass(run: Run) -> Lookahead:
    """This epoch's batches, from where a resumed run stood; the random streams are as they were at that batch."""
    train, progress, resume = run.train, run.facade.progress, run.resume
    assert train is not None
    if resume is not None and resume["epoch_rng"] is not None:
        set_rng_state(resume["epoch_rng"])
        train.set_streams(resume["epoch_rng"])
    run.epoch_rng = rng_state() | train.streams()
    batches = train.one_pass(progress.batches_done, None if resume is None else resume["rng"])
    ahead = Lookahead(batches, train.batches, train.total, progress.batches_done)
    _put_back(run)
    return ahead


def _put_back(run: Run) -> None:
    """After a resume: the random streams as they were when the checkpoint was written."""
    if run.resume is not None:
        assert run.train is not None
        set_rng_state(run.resume["rng"])
        run.train.set_streams(run.resume["rng"])
        run.resume = None


def _batches(run: Run, ahead: Lookahead) -> bool:
    """The batches of one epoch; returns when they are over or something says stop: True unless it was stopped in its middle."""
    facade, options, progress, display = run.facade, run.options, run.facade.progress, run.display
    train = run.train
    assert train is not None
    store, remember, clock = facade.train_store, display.recent.append, time.perf_counter
    window, total, batch_idx, divisor = options.window(progress.epoch), train.batches, progress.batches_done - 1, progress.divisor
    interval = _interval(run)
    transfer = run.transfer(staging=run.maker.staging if run.maker is not None else None)
    loggers, log_every = facade.loggers, options.log_every_n_steps
    starts, ends = run.live("on_train_batch_start", "on_batch_start"), run.live("on_train_batch_end", "on_batch_end", "training_epoch_end")
    foreign = run.brings_itself() or run.foreign(
        "on_train_batch_start", "on_train_batch_end", "on_batch_start", "on_batch_end", "lr_scheduler_step"
    ) or run.reached_between_steps(train)  # fmt: skip
    by_step = [s for s in run.schedulers if s.interval == "step" and not s.reduce_on_plateau]
    by_epoch = [s for s in run.schedulers if s.interval == "epoch" and not s.reduce_on_plateau]
    plateaus = [s for s in run.schedulers if s.interval == "step" and s.reduce_on_plateau]
    ended = False
    until, due = deadline(run), _captured_from(run)
    if progress.phase:
        _finish_resumed_batch(run, interval, ahead.last)
    step = run.step
    if step is not None:
        step.refresh()
        step.epoch = progress.epoch
    if run.step is not None:
        _recorded_alone(run, seen=foreign or starts or ends, moves=bool(by_step or plateaus))
    while not (facade.should_stop and granted(run)):
        batch = ahead()
        if batch is END:
            if batch_idx < 0:
                got = f"no batch in epoch {progress.epoch}"
                raise DataError(reject(train.name, got, "at least one batch in every epoch", "Give something that can be iterated anew."))
            break
        batch_idx += 1
        progress.batch_idx = batch_idx
        if batch is None:
            progress.batches_done += 1
            if ahead.last and progress.window_open and step is not None:
                _update(run, step, divisor, batch_idx, by_step)
                progress.stepping_batches += 1
            if ahead.last and by_epoch:
                step_schedulers(run, by_epoch, progress.epoch + 1)
            if interval is not None and _validation_is_due(run, interval, ahead.last, clock()):
                _validate(run)
            continue
        if transfer is not None:
            batch = transfer(batch)
        if starts and _batch_start(run, batch, batch_idx) == -1:
            ended = True
            break
        if step is None or (progress.batches_seen >= due and not progress.window_open):
            step = _capture(run, batch)
            until, due = deadline(run), _captured_from(run)
            _recorded_alone(run, seen=foreign or starts or ends, moves=bool(by_step or plateaus))
        if progress.window_open == 0:
            progress.divisor = divisor = window_length(batch_idx, window, total) if window > 1 else 1
        progress.window_open += 1
        last_batch = ahead.last
        last = progress.window_open >= divisor or last_batch
        if foreign:
            step.refresh()
            if run.optimizers_swapped():
                step = _with_other_optimizers(run, step)
        out = step.micro_step(batch, batch_idx, first=progress.window_open == 1, last=last, divisor=divisor, opened=progress.window_open)
        for o in out.earlier:
            store.append(o.keys, o.values, o.batch_size or batch_size_of(batch))
        if out.keys:
            store.append(out.keys, out.values, out.batch_size or batch_size_of(batch))
        remember(out.loss)
        stepped = last and _update(run, step, divisor, batch_idx, by_step)
        if last_batch and by_epoch:
            step_schedulers(run, by_epoch, progress.epoch + 1)
        progress.batches_done += 1
        progress.batches_seen += 1
        if ends:
            _batch_end(run, out.returned, batch, batch_idx)
        if last and loggers and log_every and (progress.stepping_batches + 1) % log_every == 0:
            run.flush()
            facade.send(store.at_step().logged, progress.stepping_batches)
            step.refresh()  # a logger may be anybody's code
        if facade.should_stop and progress.window_open and granted(run):
            _update(run, step, divisor, batch_idx, by_step)  # before the validation that a stop adds: it sees these weights
        now = clock()
        if now >= display.due:
            run.flush()
            display.train(facade, now, until)
        if interval is not None and _validation_is_due(run, interval, last_batch, now):
            _validate(run)
        if stepped and plateaus:
            step_schedulers(run, plateaus, progress.global_step)
        if last:
            progress.stepping_batches += 1
        progress.restarting = False
        if (facade.should_stop or run.interrupted or now > until or 0 <= options.max_steps <= progress.global_step) and stops(
            run, now > until
        ):
            break
    if progress.window_open and step is not None:
        _update(run, step, divisor, batch_idx, by_step)  # a stop or an early end closes the window, it drops nothing
    if ended and by_epoch:
        step_schedulers(run, by_epoch, progress.epoch + 1)
    return ended or ahead.last


def _capture(run: Run, batch: Any) -> Step:
    """Before the first batch is trained: a dry look at it, then the rung."""
    started = time.perf_counter()
    assert run.maker is not None
    run.maker.optimizers = list(run.facade.optimizers)  # a hook may have put others there
    if run.step is None:
        dry_look(run.maker, batch)
    step, run.report = capture_step(
        run.maker, batch, _remaining_batches(run), may_wait=True, mid_window=run.facade.progress.window_open > 0
    )
    run.step, step.epoch = step, run.facade.progress.epoch
    run.facade.capture = run.report
    spent = time.perf_counter() - started
    run.ledger.compile_s += spent
    run.started += spent  # max_time is for training
    if run.open_gradients is not None:
        step.load_gradients(run.open_gradients)
        run.open_gradients = None
    run.display.rung = run.report.rung
    run.display.restart_clock(run.facade)
    run.display.line(one_line(run.report))
    return step


def _captured_from(run: Run) -> float:
    """The batch of the fit at which a step that is compiled beside the others takes over."""
    return run.maker.ahead.at if run.maker is not None and run.maker.ahead is not None else math.inf


def _with_other_optimizers(run: Run, step: Step) -> Step:
    """Somebody has put another optimizer into ``trainer.optimizers``: it is the one that moves from here on, on the eager rung."""
    maker, gathered = run.maker, step.gradients() if run.facade.progress.window_open > 1 else {}
    assert maker is not None
    run.settle()
    maker.optimizers = list(run.facade.optimizers)
    run.verbs.bind(maker.optimizers, maker.schedulers)
    other = run.step = maker.eager()
    other.epoch = step.epoch
    if gathered:
        other.load_gradients(gathered)
    run.report.rung, run.report.whole, run.report.why = other.rung, False, "trainer.optimizers was given another optimizer"
    return other


def _recorded_alone(run: Run, *, seen: bool, moves: bool) -> None:
    """On the graph rung: batches that nobody sees lie in slots, and steps between which nothing moves may wait for one launch."""
    maker = run.maker
    assert maker is not None
    alone = run.step is not None and run.step.rung == "graph" and not seen
    if maker.staging is not None:
        maker.staging.fixed = alone
    if maker.launches is not None:
        maker.launches.open = alone and not moves and not run.options.verify
        if not maker.launches.open and run.facade.progress.epoch == 0:
            why = "a hook or a callback runs between the steps" if seen else "a schedule moves between the steps"
            why = "the step is not recorded" if run.step is None or run.step.rung != "graph" else why
            run.display.line(f"steps_per_launch={maker.launches.n} has no effect: {why}")


def _remaining_batches(run: Run) -> float:
    options, progress = run.options, run.facade.progress
    assert run.train is not None
    batches = math.inf if options.max_epochs == -1 else (options.max_epochs - progress.epoch) * run.train.batches
    if options.max_steps != -1:
        batches = min(batches, (options.max_steps - progress.global_step) * options.window(progress.epoch))
    return batches


def _update(run: Run, step: Step, divisor: int, batch_idx: int, by_step: list[Any]) -> bool:
    """The end of a window: one optimizer step (True), or a step refused because something is not finite."""
    progress = run.facade.progress
    stepped = step.update_step(1.0 if progress.window_open == divisor else divisor / progress.window_open)
    progress.window_open = 0
    several = len(step.moved) > 1
    if several and any(step.moved):  # a refused update holds nobody else's schedule back
        moved_schedulers(run, by_step, step.moved)
    if stepped >= 0:
        progress.global_step += stepped
        if by_step and stepped and not several:
            for done in range(progress.global_step - stepped + 1, progress.global_step + 1):
                step_schedulers(run, by_step, done)
    elif run.options.nonfinite == "raise" and run.maker is not None and run.maker.scaler is None:
        loss = run.display.recent[-1]
        others = "The weights of the refused optimizer are as they were before this step; turns before it have been taken. "
        kept = "The weights are as they were before this step. " if not several else others
        raise NonFiniteError(
            f"step {progress.global_step} (epoch {progress.epoch}, batch {batch_idx}): the loss or a gradient is not finite "
            f"(loss {float('nan') if loss is None else float(loss)}). {kept}"
            "Look at this batch and at the learning rate, clip with gradient_clip_val=1.0, or set nonfinite='skip'."
        )
    else:
        run.ledger.skipped_steps += 1
    return stepped > 0


def _batch_start(run: Run, batch: Any, batch_idx: int) -> Any:
    run.facade.last_batch_size = batch_size_of(batch)
    run.fire("on_batch_start", batch, batch_idx)
    return run.fire("on_train_batch_start", batch, batch_idx)


def _batch_end(run: Run, returned: Any, batch: Any, batch_idx: int) -> None:
    progress = run.facade.progress
    run.facade.last_batch_size = batch_size_of(batch)
    progress.phase = "batch_end"
    run.fire("on_train_batch_end", rebuilt(returned), batch, batch_idx)
    run.fire("on_batch_end")
    progress.phase = ""
    if "training_epoch_end" in run.trainable.hooks and returned is not None:
        run.outputs.append(for_epoch_end(returned))


def _interval(run: Run) -> float | None:
    """Batches between validations in this epoch; None when there is nothing to validate in it."""
    options, train = run.options, run.train
    assert train is not None
    every = options.check_val_every_n_epoch
    if not run.val or (every is not None and (run.facade.progress.epoch + 1) % every):
        return None
    return validation_interval(train.batches, options.val_check_interval, across_epochs=every is None)


def _validation_is_due(run: Run, interval: float, last_batch: bool, now: float) -> bool:
    """By optimizer steps, by wall time, or by batches; a granted stop request adds one."""
    options, progress = run.options, run.facade.progress
    if granted(run):
        return True
    if options.val_every_n_steps is not None:
        every = options.val_every_n_steps
        return progress.window_open == 0 and progress.global_step // every > progress.validated_step // every
    if options.val_check_seconds is not None:
        return now - run.validated_at >= options.val_check_seconds
    if interval == math.inf:
        return last_batch
    count = progress.batches_seen if options.check_val_every_n_epoch is None else progress.batches_done
    return count % int(interval) == 0


def _validate(run: Run) -> None:
    progress = run.facade.progress
    run.settle()
    progress.validated_step = progress.global_step
    renew(run, "val")
    progress.phase = "validation"
    evaluate(run, run.val, "validate")
    progress.phase = ""
    _after_validation(run)


def _after_validation(run: Run) -> None:
    run.validated_at = time.perf_counter()
    run.display.back_to_training(run.facade, deadline(run))
    if run.step is not None:
        run.step.refresh()


def _finish_resumed_batch(run: Run, interval: float | None, last_batch: bool) -> None:
    """What was still owed to the batch in whose hooks the checkpoint was written."""
    progress = run.facade.progress
    phase, progress.phase = progress.phase, ""
    if phase == "validation":
        _after_validation(run)
    elif interval is not None and _validation_is_due(run, interval, last_batch, time.perf_counter()):
        _validate(run)
    if progress.window_open == 0:
        plateaus = [s for s in run.schedulers if s.interval == "step" and s.reduce_on_plateau]
        step_schedulers(run, plateaus, progress.global_step)
        progress.stepping_batches += 1


def _end_epoch(run: Run) -> None:
    """Epoch hooks and metrics, in Lightning's order: callbacks, the module, early stopping, checkpoints, then plateaus."""
    facade, progress = run.facade, run.facade.progress
    run.settle()
    facade.epoch_ended = True
    if progress.phase != "epoch_end":
        progress.phase = "epoch_end"
        epoch_end(run, "training_epoch_end", [run.outputs])
        run.outputs = []
        run.trainable.sink.hook = "on_train_epoch_end"
        before, after = run.callbacks.split("on_train_epoch_end")
        for call in before:
            call(facade, run.trainable.module)
        run.trainable.call("on_train_epoch_end")
        for call in after:
            call(facade, run.trainable.module)
        run.fire("on_epoch_end")
    if run.interrupted:
        save_interrupted(run)  # here, where the epoch is still open: whoever resumes goes on within it
    view = facade.train_store.at_step()
    facade.keep(view)
    ended = facade.train_store.at_epoch_end()
    facade.keep(ended)
    facade.train_store.reset()
    plateaus = [s for s in run.schedulers if s.interval == "epoch" and s.reduce_on_plateau]
    if run.epoch_complete and plateaus:
        step_schedulers(run, plateaus, progress.epoch + 1)
    facade.send(ended.logged, max(0, progress.stepping_batches - 1))
    run.display.epoch_end(facade, deadline(run))
    progress.phase, progress.epoch_open, facade.epoch_ended = "", False, False
    progress.epoch += 1
