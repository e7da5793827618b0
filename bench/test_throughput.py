"""``pytest bench --benchmark-only``: a group a workload, a row a side; what lies behind a row is in its ``extra_info``.

The sides of a workload are measured together, rounds interleaved, each in a process that times itself. pytest-benchmark gets
those seconds through a clock that they alone move.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from bench.conftest import NOT_MEASURED
from bench.machine import device
from bench.measure import Record, measure
from bench.processes import Processes
from bench.sides.table import SIDES
from bench.workloads import WORKLOADS

pytest.importorskip("pytest_benchmark")

_now = [0.0]


def measured_clock() -> float:
    """Seconds of rounds so far, as the sides' own processes measured them."""
    return _now[0]


@pytest.fixture(scope="session")
def processes(request: pytest.FixtureRequest) -> Iterator[Processes]:
    with Processes(device(), request.config.getoption("--quick")) as started:
        yield started


@pytest.fixture(scope="module", params=list(WORKLOADS))
def workload(request: pytest.FixtureRequest, processes: Processes) -> tuple[str, dict[str, Record]]:
    """A workload's name, and the record of every side that was selected."""
    wanted = [
        item.callspec.params["side"] for item in request.session.items
        if "workload" in getattr(item, "fixturenames", ()) and item.callspec.params.get("workload") == request.param
    ]  # fmt: skip
    rounds, warm = (1, 1) if processes.quick else (request.config.getoption("--rounds"), 2)
    found = measure(processes, request.param, wanted, rounds, warm)
    NOT_MEASURED.extend((request.param, side, record) for side, record in found.items() if "us" not in record)
    return request.param, found


@pytest.mark.benchmark(timer=measured_clock)
@pytest.mark.parametrize("side", SIDES)
def test_throughput(workload: tuple[str, dict[str, Record]], side: str, benchmark: Any) -> None:
    """Seconds of a round, loader and logging included; no row when the losses are not the plain loop's."""
    name, found = workload
    record = found[side]
    if "skipped" in record:
        benchmark.skipped = True
        pytest.skip(record["skipped"])
    if "refused" in record:
        benchmark.skipped = True
        pytest.fail(record["refused"], pytrace=False)
    benchmark.group = name
    benchmark.extra_info.update(workload=name, side=side, record=record)
    left = iter(record["seconds"])

    def one_round() -> None:
        _now[0] += next(left)

    benchmark.pedantic(one_round, rounds=len(record["seconds"]), iterations=1, warmup_rounds=0)
