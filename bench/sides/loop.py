"""The loop a careful person writes: eager, with a fused optimizer, compiled, under another thread count."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.sides.job import Job, Tally

Step = Callable[[Any, int], dict[str, Tensor]]  # a batch and its number; gives what is logged, detached


def plain(job: Job, *, fused: bool = False, compiled: bool = False, threads: int = 0) -> None:
    """Rounds of a plain loop. ``threads``: 0 leaves torch's own choice."""
    if threads:
        torch.set_num_threads(threads)
    job.model.to(job.device)
    train(job, make_step(job, fused=fused, compiled=compiled))


def other_threads(job: Job) -> None:
    """Compiled and fused under the best of the thread counts that are not torch's own choice: each is compiled and timed."""
    own = torch.get_num_threads()
    counts = [n for n in (1, own // 2, os.cpu_count() or own) if 0 < n != own]
    best = min(dict.fromkeys(counts), key=lambda n: _trial(job, n)) if len(set(counts)) > 1 else counts[0] if counts else own
    job.rounds.notes["note"] = f"{best} thread{'s' if best != 1 else ''}"
    torch._dynamo.reset()
    plain(job, fused=True, compiled=True, threads=best)


def _trial(job: Job, threads: int, batches: int = 10) -> float:
    """Seconds that a few compiled steps take under ``threads``, on a copy of the model."""
    torch.set_num_threads(threads)
    torch._dynamo.reset()
    random = torch.get_rng_state()
    trial = Job(job.w, job.size, job.device, job.rounds, copy.deepcopy(job.model), None)
    step = make_step(trial, fused=True, compiled=True)
    batch = next(iter(torch.utils.data.DataLoader(job.loader.dataset, batch_size=job.size.batch)))
    for i in range(3):
        step(batch, i)
    began = time.perf_counter()
    for i in range(batches):
        step(batch, i)
    torch.set_rng_state(random)
    return time.perf_counter() - began


def train(job: Job, step: Step, batches: Callable[[], Any] | None = None) -> None:
    """Epochs of ``step`` over the loader (or what ``batches`` gives), as long as rounds are wanted."""
    tally, window = Tally(job), job.w.window
    while job.rounds.start():
        for _ in range(job.size.passes):
            for i, batch in enumerate(job.loader if batches is None else batches()):
                tally.add(step(batch, i), stepped=(i + 1) % window == 0)
            tally.end()
        job.rounds.finish()


def make_step(job: Job, *, fused: bool, compiled: bool) -> Step:
    extra = {"fused": True} if fused else {}
    return {"one": one, "turns": turns, "splits": splits}[job.w.form](job, extra, compiled)


def one(job: Job, extra: dict[str, Any], compiled: bool) -> Step:
    """One loss, one optimizer: windows, clipping, autocast and a scaler where the workload has them."""
    model, w = job.model, job.w
    optimizer, scaler = model.optimizer(**extra), job.scaler()
    parameters = list(model.parameters())

    def forward(batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        out = model(batch[0])
        loss = model.score(out, batch)
        return loss, job.observed(out)

    call = torch.compile(forward) if compiled else forward

    def step(batch: Any, i: int) -> dict[str, Tensor]:
        with job.autocast():
            loss, seen = call(job.to_device(batch))
        scaler.scale(loss / w.window if w.window > 1 else loss).backward()
        if (i + 1) % w.window == 0:
            if w.clip is not None:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(parameters, w.clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return {"loss": loss.detach(), **seen}

    return step


def turns(job: Job, extra: dict[str, Any], compiled: bool) -> Step:
    """Each optimizer steps on its own loss, the fake batch made once; compiled: both networks."""
    model = job.model
    optimizers = model.optimizers_of(**extra)
    if compiled:
        model.generator.compile()
        model.discriminator.compile()

    def step(batch: Any, i: int) -> dict[str, Tensor]:
        return take_turns(model, optimizers, job.to_device(batch), lambda loss: loss.backward())

    return step


def take_turns(model: Any, optimizers: list[Any], batch: Any, backward: Callable[[Tensor], Any]) -> dict[str, Tensor]:
    seen = []
    for loss, optimizer in zip(model.losses(batch), optimizers, strict=True):
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
        seen.append(loss.detach())
    return {"loss": seen[0], "other": seen[1]}


def splits(job: Job, extra: dict[str, Any], compiled: bool) -> Step:
    """A batch in pieces along time, an update for each, the state handed on without its graph."""
    model = job.model
    optimizer = model.optimizer(**extra)
    part = torch.compile(model.part) if compiled else model.part

    def step(batch: Any, i: int) -> dict[str, Tensor]:
        return take_splits(model, part, optimizer, job.to_device(batch), lambda loss: loss.backward())

    return step


def take_splits(model: Any, part: Callable[..., Any], optimizer: Any, batch: Any, backward: Callable[[Tensor], Any]) -> dict[str, Tensor]:
    state, total = None, torch.zeros((), device=batch[0].device)
    pieces = model.splits(batch)
    for x, y in pieces:
        loss, state = part(x, y, state)
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
        total = total + loss.detach()
    return {"loss": total / len(pieces), "last": loss.detach()}
