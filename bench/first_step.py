"""Time to the first step: a new process, an epoch of one batch; with compile caches that are empty, then with those it left."""

from __future__ import annotations

from typing import Any

from bench.processes import Processes
from bench.sides.table import why_not
from bench.workloads import WORKLOADS

WORKLOADS_STARTED = ("autoencoder", "char_gpt")
SIDES_STARTED = ("fasttrain", "plain", "plain-compiled", "lightning")


def first_step(processes: Processes, workload: str, side: str) -> dict[str, Any]:
    """``cold_s`` and ``warm_s``, from a process that has torch to a step that is done; ``imports_s`` of it, in the warm start."""
    reason = why_not(WORKLOADS[workload], side, processes.device)
    if reason:
        return {"skipped": reason}
    cache = f"start-{workload}-{side}"
    cold, warm = (_start(processes, workload, side, cache) for _ in range(2))
    return {"workload": workload, "start_of": side, "cold_s": cold["begun_s"], "warm_s": warm["begun_s"], "imports_s": warm["imports_s"]}


def _start(processes: Processes, workload: str, side: str, cache: str) -> dict[str, Any]:
    line = processes.start(workload, side, first=True, cache=cache)
    try:
        return line.ask("go")
    finally:
        line.close()
