"""A table and a chart of a suite's JSON, the losing cases on top: ``python -m bench.report FILE.json [--write]``.

Reads what ``pytest bench --benchmark-only --benchmark-json=FILE.json`` and ``python -m bench.compare --json FILE.json`` keep.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS = "fasttrain"
PLAIN = ("plain", "plain-1thread", "plain-fused", "plain-compiled", "plain-compiled-threads", "captured-by-hand")
PEERS = {
    "lightning": "Lightning", "lightning-compile": "Lightning + compile", "fabric": "Fabric", "accelerate": "Accelerate",
    "keras-torch": "Keras", "ignite": "Ignite",
}  # fmt: skip
RESULTS = Path(__file__).parent / "results"
EVEN = 1.0  # a side that takes less time than ours has won


@dataclass(frozen=True, kw_only=True)
class Row:
    """One side on one workload; ``ratio`` is its time over ours, None without either."""

    workload: str
    side: str
    record: Mapping[str, Any]
    ratio: float | None

    @property
    def lost(self) -> bool:
        """We are slower than somebody else's side."""
        return self.ratio is not None and self.ratio < EVEN and not self.side.startswith(OURS)


def records_of(kept: Mapping[str, Any]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """The records by workload and side, from either kind of file."""
    if "records" in kept:
        return {w: dict(group) for w, group in kept["records"].items()}
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for bench in kept["benchmarks"]:
        extra = bench["extra_info"]
        if "side" in extra:
            found.setdefault(extra["workload"], {})[extra["side"]] = extra["record"]
    for workload, side, record in kept.get("not_measured", []):
        found.setdefault(workload, {})[side] = record
    return found


def rows_of(kept: Mapping[str, Any]) -> list[Row]:
    """Workloads in the order of their worst case for us, and within one the quickest side first."""
    groups = []
    for workload, group in records_of(kept).items():
        ours = group.get(OURS, {}).get("us")
        rows = [Row(workload=workload, side=s, record=r, ratio=r["us"] / ours if ours and "us" in r else None) for s, r in group.items()]
        others = [r.ratio for r in rows if r.ratio is not None and not r.side.startswith(OURS)]
        rows.sort(key=lambda r: (r.record.get("us", float("inf")), r.side))
        groups.append((min(others, default=float("-inf")), workload, rows))
    return [row for *_, rows in sorted(groups, key=lambda g: g[:2]) for row in rows]


def table(rows: Sequence[Row]) -> str:
    """Markdown: what refused or failed, then what lost, then the rest; then each row's other measures, then what was not measured."""
    speeds = [r for r in rows if "us" in r.record]
    out = [f"- **refused**: {r.record['refused']}" for r in rows if "refused" in r.record]
    lost = [r for r in speeds if r.lost]
    if lost:
        out += ["", "Slower than another side:", ""]
        out += [f"- {r.workload}: {r.side} takes {r.ratio:.2f} of our time" for r in sorted(lost, key=lambda r: r.ratio or 0.0)]
    if speeds:
        out += ["", *_summary(speeds), "", *_measures(speeds)]
    skipped: dict[str, list[str]] = {}
    for r in rows:
        if "skipped" in r.record:
            skipped.setdefault(r.record["skipped"], []).append(f"{r.workload} / {r.side}")
    if skipped:
        out += ["", "Not measured:", ""]
        out += [f"- {why}: {', '.join(names)}" for why, names in skipped.items()]
    return "\n".join(out).strip()


def _summary(rows: Sequence[Row]) -> list[str]:
    """One line a workload: ours, and how many times longer the others take; the worst of the hand-written loops by name."""
    columns = ("workload", "fasttrain, µs a batch", "best plain loop", *PEERS.values())
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for workload in dict.fromkeys(r.workload for r in rows):
        mine = {r.side: r for r in rows if r.workload == workload}
        best = min((mine[s] for s in PLAIN if s in mine), key=lambda r: r.record["us"], default=None)
        plain = f"{_ratio(best)} ({best.side})" if best else "-"
        cells = [_ratio(mine.get(s)) for s in PEERS]
        ours = f"**{mine[OURS].record['us']:.0f}**" if OURS in mine else "-"
        lines.append(f"| {workload} | {ours} | {plain} | {' | '.join(cells)} |")
    return lines


def _ratio(row: Row | None) -> str:
    return "-" if row is None else f"{row.ratio:.2f}x" if row.ratio is not None else f"{row.record['us']:.0f} µs"


def _measures(rows: Sequence[Row]) -> list[str]:
    names = ("µs a batch", "to fasttrain", "best", "first round s", "peak MB", "own calls", "host reads", "GPU busy", "note")
    lines = ["| workload | side | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for r in rows:
        seen = r.record
        memory = f"{seen['peak_mb']:.0f}" + (f" + {seen['device_peak_mb']:.0f} device" if "device_peak_mb" in seen else "")
        own = f"{seen['calls_a_step']:.1f}" if r.side.startswith(OURS) and "calls_a_step" in seen else ""
        reads = f"{seen['reads_a_step']:.2f}" if "reads_a_step" in seen else ""
        busy = f"{seen['busy']:.0%}" if "busy" in seen else ""
        cells = (f"{seen['us']:.0f}", _ratio(r) if r.ratio is not None else "", f"{seen['best_us']:.0f}", f"{seen['first_round_s']:.1f}",
                 memory, own, reads, busy, seen.get("note", ""))  # fmt: skip
        lines.append(f"| {r.workload} | {r.side} | " + " | ".join(cells) + " |")
    return lines


def starts(kept: Mapping[str, Any]) -> str:
    """Time to the first step, cold and warm: a table, or nothing where it was not measured."""
    seen = [b["extra_info"] for b in kept.get("benchmarks", []) if "cold_s" in b["extra_info"]] + list(kept.get("starts", []))
    if not seen:
        return ""
    lines = ["| workload | side | first step, s: cold caches | warm caches | of it imports |", "|---|---|---|---|---|"]
    for s in sorted(seen, key=lambda s: (s["workload"], s["warm_s"])):
        lines.append(f"| {s['workload']} | {s['start_of']} | {s['cold_s']:.2f} | {s['warm_s']:.2f} | {s['imports_s']:.2f} |")
    return "\n".join(lines)


def page(kept: Mapping[str, Any], chart: str = "") -> str:
    """The whole Markdown of one dated file."""
    about = kept.get("machine") or kept.get("machine_info", {}).get("fasttrain_bench", {})
    quick = "\n\n**Quick sizes, one round: this shows that the rows run, not how fast.**" if kept.get("quick") else ""
    title = f"# Training steps beside other frameworks, {about.get('device', '')}, {about.get('date', '')}"
    head = f"{title}\n\n{about}\n\n`{kept.get('command', '')}`"
    how = (
        "Median µs a batch of interleaved rounds, each side in a process of its own, loader and logging included; a ratio is the "
        "other side's time over fasttrain's. Every row's first and last losses agree with the plain loop's. Own calls: Python functions "
        "of fasttrain that ran, over the batches of a whole epoch. Host reads: of a CPU tensor too, as of an optimizer's own count."
    )
    parts = [head + quick, how, f"![ratios]({chart})" if chart else "", table(rows_of(kept)), starts(kept)]
    return "\n\n".join(p for p in parts if p) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--write", nargs="?", type=Path, const=RESULTS, metavar="FOLDER", help="keep it all in bench/results")
    args = parser.parse_args()
    kept = json.loads(args.file.read_text())
    if not args.write:
        print(page(kept))
        return 0
    print(write(kept, args.write))
    return 0


def write(kept: Mapping[str, Any], folder: Path) -> Path:
    """Dated Markdown, SVG and JSON in ``folder``; gives the Markdown's path."""
    from bench.chart import svg

    about = kept.get("machine") or kept["machine_info"]["fasttrain_bench"]
    base = folder / f"{about['date']}-suite-{about['device']}"
    folder.mkdir(parents=True, exist_ok=True)
    slim = {"machine": about, "command": kept.get("command", ""), "quick": kept.get("quick", False), "records": records_of(kept)}
    slim["starts"] = [b["extra_info"] for b in kept.get("benchmarks", []) if "cold_s" in b["extra_info"]] + list(kept.get("starts", []))
    base.with_suffix(".json").write_text(json.dumps(slim, indent=1) + "\n")
    base.with_suffix(".svg").write_text(svg(rows_of(kept)))
    base.with_suffix(".md").write_text(page(kept, f"{base.name}.svg"))
    return base.with_suffix(".md")


if __name__ == "__main__":
    sys.exit(main())
