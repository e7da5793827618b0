"""Frameworks that leave the loop to their user and take the pieces: Fabric, Accelerate, Ignite."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor

from bench.rounds import Stopped
from bench.sides.job import Job, Tally
from bench.sides.loop import Step, make_step, take_splits, take_turns, train


def fabric(job: Job) -> None:
    """Lightning Fabric, as its guide writes a loop."""
    from lightning.fabric import Fabric

    own = Fabric(accelerator="cpu" if job.device == "cpu" else "cuda", devices=1, precision=job.w.precision)
    loader = own.setup_dataloaders(job.loader)
    train(job, {"one": _fabric_one, "turns": _fabric_turns, "splits": _fabric_splits}[job.w.form](own, job), lambda: loader)


def _fabric_one(own: Any, job: Job) -> Step:
    w = job.w
    model, optimizer = own.setup(job.model, job.model.optimizer())

    def step(batch: Any, i: int) -> dict[str, Tensor]:
        ends = (i + 1) % w.window == 0
        with own.no_backward_sync(model, enabled=not ends) if w.window > 1 else contextlib.nullcontext():
            out = model(batch[0])
            loss = job.model.score(out, batch)
            own.backward(loss / w.window if w.window > 1 else loss)
        if ends:
            if w.clip is not None:
                own.clip_gradients(model, optimizer, max_norm=w.clip)
            optimizer.step()
            optimizer.zero_grad()
        return {"loss": loss.detach(), **job.observed(out)}

    return step


def _fabric_turns(own: Any, job: Job) -> Step:
    model = job.model
    d, g = model.optimizers_of()
    model.discriminator, d = own.setup(model.discriminator, d)
    model.generator, g = own.setup(model.generator, g)
    return lambda batch, i: take_turns(model, [d, g], batch, own.backward)


def _fabric_splits(own: Any, job: Job) -> Step:
    model, optimizer = own.setup(job.model, job.model.optimizer())
    model.mark_forward_method("part")
    return lambda batch, i: take_splits(job.model, model.part, optimizer, batch, own.backward)


def accelerate(job: Job) -> None:
    """Hugging Face Accelerate, as its guide writes a loop."""
    from accelerate import Accelerator

    mixed = {"bf16-mixed": "bf16", "16-mixed": "fp16"}.get(job.w.precision, "no")
    own = Accelerator(mixed_precision=mixed, cpu=job.device == "cpu", gradient_accumulation_steps=job.w.window)
    loader = own.prepare(job.loader)
    train(job, {"one": _accelerate_one, "turns": _accelerate_turns, "splits": _accelerate_splits}[job.w.form](own, job), lambda: loader)


def _accelerate_one(own: Any, job: Job) -> Step:
    model, optimizer = own.prepare(job.model, job.model.optimizer())

    def step(batch: Any, i: int) -> dict[str, Tensor]:
        with own.accumulate(model):
            out = model(batch[0])
            loss = job.model.score(out, batch)
            own.backward(loss)
            if own.sync_gradients and job.w.clip is not None:
                own.clip_grad_norm_(model.parameters(), job.w.clip)
            optimizer.step()
            optimizer.zero_grad()
        return {"loss": loss.detach(), **job.observed(out)}

    return step


def _accelerate_turns(own: Any, job: Job) -> Step:
    model = job.model
    d, g = model.optimizers_of()
    model.discriminator, model.generator, d, g = own.prepare(model.discriminator, model.generator, d, g)
    return lambda batch, i: take_turns(model, [d, g], batch, own.backward)


def _accelerate_splits(own: Any, job: Job) -> Step:
    model, optimizer = own.prepare(job.model, job.model.optimizer())
    return lambda batch, i: take_splits(job.model, model.part, optimizer, batch, own.backward)


def ignite(job: Job) -> None:
    """PyTorch Ignite: an Engine around a process function; epochs begin and end in its events."""
    from ignite.engine import Engine, Events

    job.model.to(job.device)
    step, tally, size, rounds = make_step(job, fused=False, compiled=False), Tally(job), job.size, job.rounds
    window = job.w.window
    engine = Engine(lambda engine, batch: step(batch, (engine.state.iteration - 1) % size.batches))

    @engine.on(Events.EPOCH_STARTED)
    def started(engine: Any) -> None:
        if (engine.state.epoch - 1) % size.passes == 0 and not rounds.start():
            raise Stopped

    @engine.on(Events.ITERATION_COMPLETED)
    def completed(engine: Any) -> None:
        tally.add(engine.state.output, stepped=engine.state.iteration % window == 0)

    @engine.on(Events.EPOCH_COMPLETED)
    def ended(engine: Any) -> None:
        tally.end()
        if engine.state.epoch % size.passes == 0:
            rounds.finish()

    with contextlib.suppress(Stopped):
        engine.run(job.loader, max_epochs=10**6)
