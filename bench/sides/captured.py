"""The strongest loop we can write by hand: compiled arithmetic, fused capturable optimizer, the whole step in CUDA graphs.

Not yet run on a GPU. Rows of a dataset in memory are gathered on the device, in the order in which the loader would give them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.sides.job import Job
from bench.sides.loop import take_splits, take_turns, train

WARM = 3  # steps on a side stream before a capture, put back afterwards: cuDNN and cuBLAS choose, the compiler compiles
Piece = Callable[[], Any]


def captured(job: Job) -> None:
    """Rounds of replays."""
    job.model.to(job.device)
    train(job, Captured(job, cuda_graph), Gathered(job) if job.w.loader == "memory" else None)


def cuda_graph(piece: Piece) -> Piece:
    """What replays ``piece``, recorded once."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outs = piece()

    def replay() -> Any:
        graph.replay()
        return outs

    return replay


class Captured:
    """A step that copies its batch into static tensors and replays what ``record`` recorded of the arithmetic."""

    def __init__(self, job: Job, record: Callable[[Piece], Piece]) -> None:
        self.job = job
        random = torch.get_rng_state(), torch.cuda.get_rng_state() if job.device == "cuda" else None
        first = next(iter(torch.utils.data.DataLoader(job.loader.dataset, batch_size=job.size.batch)))
        self.slots = [t.to(job.device) for t in first]
        self.optimizers: list[torch.optim.Optimizer] = []
        before = [t.detach().clone() for t in self._tensors()]
        pieces = {"one": self._one, "turns": self._turns, "splits": self._splits}[job.w.form]()
        self._warm(pieces)
        self.runs = [record(piece) for piece in pieces]
        self._put_back(before)
        torch.set_rng_state(random[0])
        if random[1] is not None:
            torch.cuda.set_rng_state(random[1])

    def __call__(self, batch: Any, i: int) -> dict[str, Tensor]:
        for slot, t in zip(self.slots, batch, strict=True):
            slot.copy_(t, non_blocking=True)
        seen = self.runs[0]()
        if len(self.runs) > 1 and (i + 1) % self.job.w.window == 0:
            self.runs[1]()
        return {name: value.clone() for name, value in seen.items()}  # a replay writes over what the last one gave

    def _one(self) -> list[Piece]:
        """The micro-step, with the update in it where every batch is a step, else beside it."""
        job, model, w = self.job, self.job.model, self.job.w
        optimizer = model.optimizer(**self._extra())
        self.optimizers, parameters, forward = [optimizer], list(model.parameters()), torch.compile(model)

        def update() -> None:
            if w.clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, w.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

        def micro() -> dict[str, Tensor]:
            with torch.autocast(job.device, dtype=job.dtype, enabled=job.dtype is not None, cache_enabled=False):
                out = forward(self.slots[0])
                loss = model.score(out, self.slots)
            (loss / w.window).backward()
            if w.window == 1:
                update()
            return {"loss": loss.detach(), **job.observed(out)}

        for p in parameters:
            p.grad = torch.zeros_like(p)
        return [micro] if w.window == 1 else [micro, update]

    def _turns(self) -> list[Piece]:
        model = self.job.model
        self.optimizers = model.optimizers_of(**self._extra())
        model.generator.compile()
        model.discriminator.compile()
        return [lambda: take_turns(model, self.optimizers, self.slots, lambda loss: loss.backward())]

    def _splits(self) -> list[Piece]:
        model = self.job.model
        self.optimizers = [model.optimizer(**self._extra())]
        return [lambda: take_splits(model, model.part, self.optimizers[0], self.slots, lambda loss: loss.backward())]

    def _extra(self) -> dict[str, Any]:
        """Fused; Adam's count of steps on the device, where a graph needs it."""
        sgd = isinstance(next(iter(_made(self.job))), torch.optim.SGD)
        return {"fused": True} if sgd or self.job.device == "cpu" else {"fused": True, "capturable": True}

    def _tensors(self) -> list[Tensor]:
        return [*self.job.model.parameters(), *self.job.model.buffers()]

    def _warm(self, pieces: list[Piece]) -> None:
        side = torch.cuda.Stream() if self.job.device == "cuda" else None
        if side is not None:
            side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for piece in pieces * WARM:
                piece()
        if side is not None:
            torch.cuda.current_stream().wait_stream(side)

    @torch.no_grad()
    def _put_back(self, before: list[Tensor]) -> None:
        """Weights, buffers, optimizer state and gradients: the warm steps never were."""
        for t, was in zip(self._tensors(), before, strict=True):
            t.copy_(was)
            if t.grad is not None:
                t.grad.zero_()
        for state in (s for optimizer in self.optimizers for s in optimizer.state.values()):
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()


def _made(job: Job) -> list[torch.optim.Optimizer]:
    return job.model.optimizers_of() if job.w.form == "turns" else [job.model.optimizer()]


class Gathered:
    """The loader's batches, in its order, from rows that lie on the device."""

    def __init__(self, job: Job) -> None:
        self.size, self.device = job.size.batch, job.device
        self.rows = [t.to(job.device) for t in job.loader.dataset.tensors]

    def __call__(self) -> Iterator[list[Tensor]]:
        _, seed = (int(torch.empty((), dtype=torch.int64).random_()) for _ in range(2))  # what a loader's iterator and its sampler draw
        order = torch.randperm(len(self.rows[0]), generator=torch.Generator().manual_seed(seed))
        for indices in order.to(self.device).split(self.size):
            yield [t[indices] for t in self.rows]
