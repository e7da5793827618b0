"""The only file that knows CUDA's streams, events, pools and graphs; its small face is what a test without a GPU stands in for.

Not yet run on a GPU: written from torch's documentation and source.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from fasttrain.errors import CaptureError


class Graph(Protocol):
    """Recorded work. ``outs``: what the work gave back, tensors of the graph's own that every replay writes anew."""

    @property
    def outs(self) -> Any: ...

    def replay(self) -> None: ...

    def reset(self) -> None: ...


class Event(Protocol):
    """A place in a stream: ``record`` puts it into the current stream, ``wait`` has the current stream wait for it."""

    def record(self) -> None: ...

    def wait(self) -> None: ...

    def synchronize(self) -> None:
        """Host wait."""


class Device(Protocol):
    """What capturing and staging need of an accelerator."""

    def record(self, work: Callable[[], Any]) -> Graph:
        """``work`` as a graph; nothing of it is executed. Raises CaptureError, and the device is as good as before."""

    def aside(self) -> AbstractContextManager[Any]:
        """Within: work on the stream that captures, after all that was given to the caller's and before all that will be."""

    def copying(self) -> AbstractContextManager[Any]:
        """Within: work on the stream that brings batches. It waits for nobody but for events."""

    def watched(self) -> AbstractContextManager[Any]:
        """Within: a host that waits for the device is an error."""

    def event(self) -> Event: ...

    def holds(self, t: Tensor) -> bool:
        """Is it there already?"""

    def copy(self, to: Tensor, source: Tensor) -> None:
        """In the current stream; the host does not wait."""

    def landing(self, like: Tensor) -> Tensor:
        """Memory of the device of this shape, strides and dtype."""

    def pinned(self, like: Tensor) -> Tensor:
        """Host memory of this shape, strides and dtype that the device copies from by itself."""

    def close(self) -> None:
        """Every graph dies: before a process group does, and before the interpreter ends."""


class CudaDevice:
    """One pool, one capture stream and one copy stream for every graph and every batch of a run.

    ``generators()``: random generators of the module's own; torch's default one is always known to a capture.
    """

    def __init__(self, device: torch.device, generators: Callable[[], Sequence[torch.Generator]]) -> None:
        self._device, self._generators = device, generators
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._graphs: WeakSet[_CudaGraph] = WeakSet()

    def record(self, work: Callable[[], Any]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators():
            if generator.device.type == "cuda":
                graph.register_generator_state(generator)
        here, first, collects = torch.cuda.current_stream(self._device), None, gc.isenabled()
        gc.disable()  # a graph that dies within a capture of another
        try:
            # thread_local: a loader's pinning thread may go on using the device.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                try:
                    outs = work()
                except Exception as error:
                    first = error  # what ends the capture says less
                    raise
        except Exception as error:
            self._recover(here)
            raise CaptureError(f"the capture failed: {first or error}") from (first or error)
        finally:
            if collects:
                gc.enable()
        recorded = _CudaGraph(graph, outs)
        self._graphs.add(recorded)
        return recorded

    def _recover(self, here: Any) -> None:
        """A capture that ended badly leaves its stream current, its pool taken and torch's generator believing that it goes on."""
        torch.cuda.set_stream(here)
        self._pool = torch.cuda.graph_pool_handle()
        cell = torch.zeros((), device=self._device)
        torch.cuda.synchronize(self._device)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self._stream, capture_error_mode="thread_local"):
            cell.add_(1)

    @contextmanager
    def aside(self) -> Iterator[None]:
        # What is allocated within needs no record_stream: the stream's next work waits for all that was given to ``here`` by then.
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            here.wait_stream(self._stream)

    def copying(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._copies)

    @contextmanager
    def watched(self) -> Iterator[None]:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def event(self) -> Event:
        event: Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        return event

    def holds(self, t: Tensor) -> bool:
        return t.device == self._device

    def copy(self, to: Tensor, source: Tensor) -> None:
        to.copy_(source, non_blocking=True)

    def landing(self, like: Tensor) -> Tensor:
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=self._device)

    def pinned(self, like: Tensor) -> Tensor:
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, pin_memory=True)

    def close(self) -> None:
        with suppress(RuntimeError):  # a device that has failed says so to whoever asks next
            torch.cuda.synchronize(self._device)
        for graph in list(self._graphs):
            graph.reset()


class _CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, outs: Any) -> None:
        self._graph, self.outs = graph, outs
        self.replay = graph.replay

    def reset(self) -> None:
        self.outs = None
        self._graph.reset()
