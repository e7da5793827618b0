"""The suite without pytest: ``python -m bench.compare [workload ...] [--sides ...] [--quick] [--json FILE]``; report.py reads the file."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from bench.machine import device, machine
from bench.measure import measure
from bench.processes import Processes
from bench.report import rows_of, table
from bench.sides.table import SIDES
from bench.workloads import WORKLOADS


def main() -> int:
    """0 when every side that was measured trained alike."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", default=list(WORKLOADS), metavar="workload", help=", ".join(WORKLOADS))
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=SIDES, metavar="side", help=", ".join(SIDES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: does every row run?")
    parser.add_argument("--seconds", type=float, help="start no further workload after this time")
    parser.add_argument("--json", type=Path, help="keep the records in this file")
    args = parser.parse_args()
    where, began = device(), time.monotonic()
    unknown = [name for name in args.workloads if name not in WORKLOADS]
    if unknown:
        parser.error(f"no workload {unknown[0]!r}; there are {', '.join(WORKLOADS)}")
    kept: dict[str, Any] = {
        "machine": machine(where), "command": " ".join(["python -m bench.compare", *sys.argv[1:]]), "quick": args.quick, "records": {}
    }  # fmt: skip
    left_out = []
    with Processes(where, args.quick) as processes:
        for name in args.workloads:
            if args.seconds is not None and time.monotonic() - began > args.seconds:
                left_out.append(name)
                continue
            rounds, warm = (1, 1) if args.quick else (args.rounds, 2)
            kept["records"][name] = measure(processes, name, args.sides, rounds, warm)
            print(table(rows_of({"records": {name: kept["records"][name]}})) + "\n", flush=True)
            if args.json:  # as it goes, so that nothing is lost
                args.json.write_text(json.dumps(kept, indent=1))
    if left_out:
        kept["left_out"] = left_out
        print(f"not measured for want of time: {', '.join(left_out)}")
    if args.json:
        args.json.write_text(json.dumps(kept, indent=1))
    refused = [record["refused"] for group in kept["records"].values() for record in group.values() if "refused" in record]
    for sentence in refused:
        print(f"refused: {sentence}")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
