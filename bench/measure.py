"""All sides of a workload, alive at once, each in its own process; rounds interleaved, losses compared, then speeds."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench.busy import Busy
from bench.losses import disagreement, trail
from bench.processes import Line, Processes, SideEnded
from bench.sides.table import SIDES, why_not
from bench.workloads import WORKLOADS, Size, Workload

REFERENCE = "plain"  # whose losses are the right ones: torch as its documentation writes it
LEADERS = ("fasttrain", "plain-compiled")  # a quick run starts them first: others find what these compiled in the cache
Record = dict[str, Any]  # of one side: "us" and the rest, or "skipped" or "refused" with the sentence


def measure(processes: Processes, workload: str, sides: Sequence[str], rounds: int = 5, warm: int = 2) -> dict[str, Record]:
    """A record a side. The reference is measured too, asked for or not: without it no losses can be compared."""
    w, device = WORKLOADS[workload], processes.device
    found: dict[str, Record] = {}
    for side in dict.fromkeys((REFERENCE, *sides)):
        reason = why_not(w, side, device)
        found[side] = {"skipped": reason} if reason else {}
    live: dict[str, Line] = {}
    seen: dict[str, list[Record]] = {s: [] for s in found}
    with Busy(device) as busy, contextlib.ExitStack() as stack:

        def begin(side: str) -> None:
            """The start and the warm rounds, which nobody times but for the first."""
            with _noted(found, workload, side, live):
                began = time.perf_counter()
                live[side] = processes.start(workload, side)
                stack.callback(live[side].close)
                seen[side].append(live[side].ask("go"))
                found[side]["first_round_s"] = time.perf_counter() - began
                seen[side] += [live[side].ask("go") for _ in range(warm - 1)]

        # One after the other, for a side may choose its rung and its threads by measuring; quick sizes measure nothing.
        with ThreadPoolExecutor(os.cpu_count() if processes.quick else 1) as pool:
            order = [s for s, r in found.items() if not r]
            list(pool.map(begin, sorted(order, key=lambda s: s not in LEADERS) if processes.quick else order))
        live = {s: live[s] for s in found if s in live}
        for _ in range(rounds):
            for side in list(live):
                with _noted(found, workload, side, live):
                    seen[side].append(live[side].ask("go") | busy.share())
        for side in list(live):
            with _noted(found, workload, side, live):
                found[side] |= _counted(live[side].ask("count"), w.size(device, processes.quick))
    for side in live:
        found[side] |= _summary(w, processes, seen[side], warm)
    return _judged(w, found)


@contextlib.contextmanager
def _noted(found: dict[str, Record], workload: str, side: str, live: dict[str, Line]) -> Iterator[None]:
    """A side that ends is written down and asked no more."""
    try:
        yield
    except SideEnded as ended:
        found[side] = {"refused": f"{workload}: {side} failed: {ended}"}
        live.pop(side, None)


def _counted(record: Record, size: Size) -> Record:
    return {"calls_a_step": record["calls"] / size.batches, "reads_a_step": record["reads"] / size.batches}


def _summary(w: Workload, processes: Processes, seen: list[Record], warm: int) -> Record:
    size = w.size(processes.device, processes.quick)
    batches, timed = size.batches * size.passes, seen[warm:]
    seconds = [r["seconds"] for r in timed]
    record = {
        "us": statistics.median(seconds) / batches * 1e6, "best_us": min(seconds) / batches * 1e6, "seconds": seconds,
        "first_in_process_s": seen[0]["seconds"], "peak_mb": max(r["peak_mb"] for r in seen), "trail": trail(seen),
        "note": seen[-1].get("note", ""),
    }  # fmt: skip
    for name in ("device_peak_mb", "busy"):
        values = [r[name] for r in timed if r.get(name) is not None]
        if values:
            record[name] = max(values) if name == "device_peak_mb" else statistics.mean(values)
    return record


def _judged(w: Workload, found: dict[str, Record]) -> dict[str, Record]:
    """Speeds only of sides whose losses are the reference's."""
    reference = found[REFERENCE]
    for side, record in found.items():
        if "us" not in record or side == REFERENCE:
            continue
        if "us" not in reference:
            wrong = f"{side} has nothing to be compared with: {reference.get('refused') or reference.get('skipped')}"
        else:
            wrong = disagreement(REFERENCE, reference["trail"], side, record["trail"], SIDES[side].agree or w.agree)
        if wrong:
            found[side] = {"refused": f"{w.name}: {wrong}", "trail": record["trail"]}
    return found
