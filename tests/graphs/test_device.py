"""What is asked of torch.cuda around a capture, on a torch.cuda that only writes it down."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fasttrain.errors import CaptureError
from fasttrain.graphs.device import CudaDevice


class Stream:
    def __init__(self, *args: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        LOG.append(("waits", names(self), names(other)))


LOG: list[tuple[Any, ...]] = []
HERE = Stream()


def names(stream: Any) -> str:
    return "here" if stream is HERE else "own"


class Capture:
    """torch.cuda.graph: as in torch, a capture that cannot end leaves its stream current."""

    def __init__(self, graph: Any, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> None:
        LOG.append(("capture", pool, names(stream), capture_error_mode))

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, *args: Any) -> None:
        if kind is not None:
            raise RuntimeError("operation failed due to a previous error during capture")


class Graph:
    def __init__(self) -> None:
        self.generators: list[Any] = []

    def register_generator_state(self, generator: Any) -> None:
        LOG.append(("generator", generator))

    def replay(self) -> None:
        LOG.append(("replay",))

    def reset(self) -> None:
        LOG.append(("reset",))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> CudaDevice:
    LOG.clear()
    pools = iter(range(10))
    zeros = torch.zeros
    for name, stub in {
        "graph_pool_handle": lambda: next(pools), "Stream": Stream, "CUDAGraph": Graph, "graph": Capture, "synchronize": lambda *a: None,
        "current_stream": lambda *a: HERE, "set_stream": lambda s: LOG.append(("current", names(s))),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(torch, "zeros", lambda *a, device=None, **k: zeros(*a, **k))
    generator = type("Generator", (), {"device": torch.device("cuda", 0)})()
    return CudaDevice(torch.device("cuda", 0), lambda: [generator])


def test_one_pool_and_one_stream(cuda: CudaDevice) -> None:
    """Every capture has the run's pool and stream, other threads may go on, and the module's generators are known to it."""
    graphs = [cuda.record(lambda: "outs") for _ in range(2)]
    captures = [entry for entry in LOG if entry[0] == "capture"]
    assert captures == [("capture", 0, "own", "thread_local")] * 2
    assert sum(entry[0] == "generator" for entry in LOG) == 2
    graphs[0].replay()
    assert graphs[0].outs == "outs"
    cuda.close()
    assert graphs[0].outs is None
    assert LOG[-2:] == [("reset",)] * 2


def test_graphs_that_are_let_go_are_let_go(cuda: CudaDevice) -> None:
    """A run keeps no graph alive."""
    cuda.record(lambda: None)
    cuda.close()
    assert ("reset",) not in LOG


def test_a_capture_that_fails(cuda: CudaDevice) -> None:
    """The first cause is told, the caller's stream is current again, the pool is another, and a capture that ends has ended it."""

    def work() -> None:
        raise RuntimeError("the step called .item()")

    with pytest.raises(CaptureError, match=r"the step called \.item"):
        cuda.record(work)
    after = LOG[[entry[0] for entry in LOG].index("capture") + 1 :]
    assert after == [("current", "here"), ("capture", None, "own", "thread_local")]
    cuda.record(lambda: None)
    assert LOG[-1] == ("capture", 1, "own", "thread_local")
