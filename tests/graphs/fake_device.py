"""A device that stands in for CUDA: it executes at replay, and what it gives back is overwritten by the next replay, as a graph's is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from fasttrain.errors import CaptureError
from fasttrain.graphs.device_tail import DeviceTail, Moved
from fasttrain.graphs.tail import StockTail


class FakeGraph:
    def __init__(self, device: FakeDevice, number: int, work: Callable[[], Any]) -> None:
        self._device, self.number, self._work = device, number, work
        self.outs: Any = None
        self.dead = False

    def replay(self) -> None:
        assert not self.dead, "a graph that is dead was replayed"
        self._device.log.append(("replay", self.number))
        outs = self._work()
        if self.outs is None:
            self.outs = outs
            return
        with torch.no_grad():
            for old, new in zip(tree_flatten(self.outs)[0], tree_flatten(outs)[0], strict=True):
                if isinstance(old, Tensor) and old is not new:
                    old.copy_(new)

    def reset(self) -> None:
        self.dead, self.outs = True, None


class FakeEvent:
    """Ordered by the log: who recorded it where, and who waited."""

    def __init__(self, device: FakeDevice, number: int) -> None:
        self._device, self.number = device, number

    def record(self) -> None:
        self._device.log.append(("record", self.number, self._device.stream))

    def wait(self) -> None:
        self._device.log.append(("wait", self.number, self._device.stream))

    def synchronize(self) -> None:
        self._device.log.append(("host waits", self.number))


class FakeDevice:
    """Records nothing but what it was asked to do, in order. ``refuse``: what a capture fails with."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.graphs: list[FakeGraph] = []
        self.refuse = ""
        self.stream = "main"
        self.watching = self.closed = False
        self.landed: list[Tensor] = []
        self._events = 0

    def record(self, work: Callable[[], Any]) -> FakeGraph:
        if self.refuse:
            raise CaptureError(f"the capture failed: {self.refuse}")
        graph = FakeGraph(self, len(self.graphs), work)
        self.graphs.append(graph)
        self.log.append(("capture", graph.number))
        return graph

    @contextlib.contextmanager
    def _on(self, stream: str) -> Iterator[None]:
        before, self.stream = self.stream, stream
        yield
        self.stream = before

    def aside(self) -> Any:
        self.log.append(("real",))
        return self._on("capture")

    def copying(self) -> Any:
        return self._on("copy")

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        self.watching = True
        try:
            yield
        finally:
            self.watching = False

    def event(self) -> FakeEvent:
        self._events += 1
        return FakeEvent(self, self._events)

    def landing(self, like: Tensor) -> Tensor:
        made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        self.landed.append(made)  # kept, so that no other has its address
        return made

    def pinned(self, like: Tensor) -> Tensor:
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)

    def holds(self, t: Tensor) -> bool:
        return any(t is made for made in self.landed)

    def copy(self, to: Tensor, source: Tensor) -> None:
        self.log.append(("copy", to.data_ptr(), self.stream))
        to.copy_(source)

    def close(self) -> None:
        self.closed = True
        for graph in self.graphs:
            graph.reset()

    def count(self, what: str) -> int:
        return sum(entry[0] == what for entry in self.log)


class FakeTail(DeviceTail):
    """torch's own update in the place of the kernels."""

    captures = True  # type: ignore[assignment]

    def __init__(self, optimizer: Any, params: Any, options: Any, scaler: Any, norms: Any = None, pending: Any = None) -> None:
        self._stock, self._rescale, self.ready = StockTail(optimizer, params, options, scaler), 1.0, False

    def launch(self, grads: Sequence[Tensor | None], loss: Tensor | None) -> Moved:
        self._stock.step([None if g is None else g.clone() for g in grads], self._rescale, loss)
        return Moved([i for i, g in enumerate(grads) if g is not None], None)

    def prepare(self, n: int) -> None:
        pass

    def before_replay(self, rescale: float) -> None:
        self._rescale = rescale

    def step(self, grads: Sequence[Tensor | None], rescale: float, loss: Tensor | None) -> bool:
        self._rescale = rescale
        self.launch(grads, loss)
        return True

    def after(self, moved: Moved) -> bool:
        return True

    def refresh(self) -> None:
        pass


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    """Runs on the CPU may be asked for capture="graph" and get it from here; compiled code is AOTAutograd's, run op by op."""
    from torch._dynamo.backends.debugging import aot_eager

    made = FakeDevice()
    monkeypatch.setattr("fasttrain.setup.make_device", lambda run: made)
    monkeypatch.setattr("fasttrain.graphs.cuda.make_tail", FakeTail)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, examples, config_patches: aot_eager(graph, examples))
    return made
