"""The graph rung: the traced step recorded once in a CUDA graph and replayed. The only file that knows streams and pools.

Not yet run on a GPU: written from the documented behaviour of ``torch.cuda.graph``; its tests are marked ``gpu``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

WARM_CALLS = 3  # real steps on the capture stream before recording: kernels are loaded, workspaces allocated


class GraphMemory:
    """One pool and one capture stream for every graph of a run."""

    def __init__(self, device: torch.device) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Replay:
    """A compiled step, called with its own arguments: run as it is at first, then recorded, then replayed.

    ``slots`` are the arguments that change from call to call; they are copied into tensors of the graph's own, so a
    user's batch is never the static input. Results in ``copied`` are copied out, because the next replay overwrites
    what a graph returned; the others (gradients that the update reads at once) are the graph's static tensors.
    """

    def __init__(self, run: Callable[..., Any], slots: Sequence[int], copied: Sequence[int], memory: GraphMemory) -> None:
        self._run, self._slots, self._copied, self._memory = run, tuple(slots), tuple(copied), memory
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._static: list[Tensor] = []
        self._outs: Sequence[Any] = ()

    def __call__(self, *args: Tensor) -> list[Any]:
        if self._graph is None:
            self._calls += 1
            if self._calls <= WARM_CALLS:
                return self._warm(args)
            self._record(args)
        assert self._graph is not None
        for i in self._slots:
            self._static[i].copy_(args[i], non_blocking=True)
        self._graph.replay()
        outs = list(self._outs)
        for i in self._copied:
            outs[i] = outs[i].clone()
        return outs

    def _warm(self, args: Sequence[Tensor]) -> list[Any]:
        """A real step on the capture stream, ordered after and before the caller's stream."""
        stream, here = self._memory.stream, torch.cuda.current_stream()
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            outs = list(self._run(*args))
        here.wait_stream(stream)
        for out in outs:
            if isinstance(out, Tensor):
                out.record_stream(here)
        return outs

    def _record(self, args: Sequence[Tensor]) -> None:
        """Capture executes nothing: the caller replays for this very batch. Other threads may go on using the device."""
        self._static = list(args)
        for i in self._slots:
            self._static[i] = torch.empty_strided(args[i].shape, args[i].stride(), dtype=args[i].dtype, device=args[i].device)
            self._static[i].copy_(args[i])
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=self._memory.pool, stream=self._memory.stream, capture_error_mode="thread_local"):
            self._outs = self._run(*self._static)
        self._graph = graph
