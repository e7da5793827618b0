"""``pytest bench --benchmark-only``: one row a side; before every timed round the plain loop runs one, so the ratio is of one moment."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import pytest

from bench.worker import SIDES, worker
from bench.workloads import WORKLOADS

pytest.importorskip("pytest_benchmark")


@pytest.fixture(scope="module", params=list(WORKLOADS))
def plain(request: pytest.FixtureRequest) -> Iterator[tuple[str, Any]]:
    """The plain loop of one workload, alive while its other sides are measured."""
    with worker(request.param, "plain") as run:
        run()
        yield request.param, run


@pytest.mark.parametrize("side", SIDES)
def test_epoch(plain: tuple[str, Any], side: str, benchmark: Any) -> None:
    """Seconds of one epoch, loader and logging included."""
    name, run_plain = plain
    if side == "lightning":
        pytest.importorskip("pytorch_lightning")
    benchmark.group = name
    references: list[float] = []
    with worker(name, side) as run:
        for _ in range(2):
            run()
        benchmark.pedantic(run, setup=lambda: references.append(run_plain()["seconds"]), rounds=7, warmup_rounds=0)
    batches = WORKLOADS[name].batches * WORKLOADS[name].passes
    benchmark.extra_info["us_a_batch"] = benchmark.stats.stats.median / batches * 1e6
    benchmark.extra_info["times_plain"] = statistics.median(references) / benchmark.stats.stats.median
