"""``pytest bench --benchmark-only``: seconds to the first step of a warm start; the cold one stands in ``extra_info``."""

from __future__ import annotations

from typing import Any

import pytest

from bench.first_step import SIDES_STARTED, WORKLOADS_STARTED, first_step
from bench.machine import device
from bench.processes import Processes

pytest.importorskip("pytest_benchmark")

_now = [0.0]


def measured_clock() -> float:
    """Seconds of starts so far, as the started processes measured them."""
    return _now[0]


@pytest.mark.benchmark(timer=measured_clock)
@pytest.mark.parametrize("side", SIDES_STARTED)
@pytest.mark.parametrize("name", WORKLOADS_STARTED)
def test_first_step(name: str, side: str, benchmark: Any, request: pytest.FixtureRequest) -> None:
    """Two starts, one after the other, the second with the first one's compile caches."""
    with Processes(device(), request.config.getoption("--quick")) as processes:
        found = first_step(processes, name, side)
    if "skipped" in found:
        benchmark.skipped = True
        pytest.skip(found["skipped"])
    benchmark.group = f"first step: {name}"
    benchmark.extra_info.update(found)

    def start() -> None:
        _now[0] += found["warm_s"]

    benchmark.pedantic(start, rounds=1, iterations=1, warmup_rounds=0)
