"""Every side of every workload, rounds interleaved, as one table and one JSON: ``python -m bench.compare [workload ...]``."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from bench.worker import SIDES, worker
from bench.workloads import WORKLOADS


def compare(name: str, sides: tuple[str, ...], rounds: int, warm: int = 2) -> dict[str, dict[str, float]]:
    """Median microseconds a batch of each side, rounds interleaved; refuses when two sides train to different losses."""
    batches = WORKLOADS[name].batches * WORKLOADS[name].passes
    with contextlib.ExitStack() as stack:
        live = {s: stack.enter_context(worker(name, s)) for s in sides}
        first = {s: [run() for _ in range(warm)] for s, run in live.items()}
        seen: dict[str, list[dict[str, float]]] = {s: [] for s in sides}
        for _ in range(rounds):
            for s, run in live.items():
                seen[s].append(run())
    losses = {s: [r["loss"] for r in first[s] + seen[s]] for s in sides}
    _check_losses(name, losses)
    return {
        s: {
            "us": statistics.median(r["seconds"] for r in seen[s]) / batches * 1e6,
            "best_us": min(r["seconds"] for r in seen[s]) / batches * 1e6,
            "first_round_s": first[s][0]["seconds"], "peak_mb": max(r["peak_mb"] for r in seen[s]), "loss": losses[s][-1],
        }
        for s in sides
    }  # fmt: skip


def _check_losses(name: str, losses: dict[str, list[float]]) -> None:
    """A speed is printed only when the first epochs' mean losses agree: same data, same order, same weights."""
    mixed = WORKLOADS[name].precision != "32-true"
    reference = losses["plain"][0]
    for side, values in losses.items():
        if abs(values[0] - reference) > (2e-2 if mixed else 2e-3) * abs(reference):
            where = f"{name}: {side} trains to {values[0]:.6f} in its first round, plain to {reference:.6f}"
            raise SystemExit(f"{where}: not the same training, no speed.")


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """One Markdown table: microseconds a batch, and how many times quicker fasttrain is than each side."""
    sides = list(next(iter(results.values())))
    lines = ["| workload | " + " | ".join(sides) + " |", "|---|" + "---|" * len(sides)]
    rows = []
    for name, row in results.items():
        ours = row["fasttrain"]["us"]
        cells = [f"**{row[s]['us']:.0f}**" if s == "fasttrain" else f"{row[s]['us']:.0f} ({row[s]['us'] / ours:.2f}x)" for s in sides]
        worst = min(row[s]["us"] / ours for s in sides if s != "fasttrain")
        rows.append((worst, "| " + " | ".join([name, *cells]) + " |"))
    return "\n".join(lines + [r for _, r in sorted(rows)])  # the losing cases on top


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", default=list(WORKLOADS))
    parser.add_argument("--sides", nargs="*", default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    for name in args.workloads or list(WORKLOADS):
        results[name] = compare(name, tuple(args.sides), args.rounds)
        print(table({name: results[name]}), flush=True)
    print("\n" + table(results))
    if args.write:
        stamp = datetime.date.today().isoformat()
        machine = {"torch": torch.__version__, "python": platform.python_version(), "cpu": _cpu(), "threads": torch.get_num_threads()}
        path = Path(__file__).parent / "results" / f"{stamp}-cpu"
        command = " ".join(["python -m bench.compare", *sys.argv[1:]])
        kept = {"machine": machine, "command": command, "results": results}
        path.with_suffix(".json").write_text(json.dumps(kept, indent=1))
        heading = f"# CPU, {stamp}\n\n{machine}\n\nMedian µs a batch, loader and logging included; (ratio to fasttrain)."
        path.with_suffix(".md").write_text(f"{heading}\n\n{table(results)}\n")


def _cpu() -> str:
    try:
        return next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
