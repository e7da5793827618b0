"""Public modules that nobody here wrote, each beside Lightning or its own loop: ``python -m bench.coverage [--only NAME] [--write]``."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import selectors
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.coverage_modules.case import Case
from bench.coverage_modules.cases import CASES
from bench.coverage_modules.side import SIDES
from bench.coverage_modules.table import judged, table

HERE = Path(__file__).parent


class SideEnded(Exception):
    """A side's process said that it failed, died, or ran past its time; the record says which."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        super().__init__(str(record["error"]))
        self.record = dict(record)


class Side:
    """One process: ``ask`` sends a word and waits for its answer."""

    def __init__(self, case: str, side: str, steps: int, limit_s: float, folder: Path) -> None:
        self.limit_s, self.log = limit_s, (folder / f"{case}-{side}.log").open("w+")
        command = [sys.executable, "-m", "bench.coverage_modules.side", case, side, "--steps", str(steps)]
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / f"cache-{side}")}  # a cold one for the run: compile times are a first start's
        self.process = subprocess.Popen(
            command,
            cwd=HERE.parent,
            env=os.environ | offline | cache,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            bufsize=0,
        )
        self._left = b""

    def ask(self, word: str = "") -> dict[str, Any]:
        """The next record, after ``word``. Raises SideEnded for an error, a death, or silence past the limit."""
        assert self.process.stdin is not None
        if word:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(f"{word}\n".encode())
        line = self._line(time.monotonic() + self.limit_s)
        if line is None:
            raise SideEnded({"error": f"no answer within {self.limit_s:.0f} s"})
        if not line:
            raise SideEnded({"error": f"the process died with {self.process.wait(10)}: {self._tail()}"})
        record = dict(json.loads(line))
        if "error" in record:
            raise SideEnded(record)
        return record

    def _line(self, deadline: float) -> bytes | None:
        """One line; empty when the process has closed its end, None when the time is over."""
        pipe = self.process.stdout
        assert pipe is not None
        with selectors.DefaultSelector() as ready:
            ready.register(pipe, selectors.EVENT_READ)
            while b"\n" not in self._left:
                if not ready.select(max(0.0, deadline - time.monotonic())):
                    return None
                piece = os.read(pipe.fileno(), 1 << 16)
                if not piece:
                    return b""
                self._left += piece
        line, _, self._left = self._left.partition(b"\n")
        return line

    def _tail(self) -> str:
        self.log.flush()
        return Path(self.log.name).read_text(errors="replace")[-600:]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


@contextlib.contextmanager
def _live(case: Case, sides: Sequence[str], steps: int, limit_s: float, folder: Path) -> Iterator[dict[str, Side]]:
    live: dict[str, Side] = {}
    try:
        yield live
    finally:
        for side in live.values():
            side.close()


def cover(case: Case, sides: Sequence[str], steps: int, rounds: int, limit_s: float, folder: Path) -> dict[str, Any]:
    """Each side's losses, capture and median µs a batch; rounds interleaved. A side that ends early keeps its error."""
    seen: dict[str, dict[str, Any]] = {s: {"us_each": []} for s in sides}
    with _live(case, sides, steps, limit_s, folder) as live:
        for s in sides:
            side = live[s] = Side(case.name, s, steps, limit_s, folder)
            with _noted(seen, s, live):
                seen[s] |= side.ask()
                started = time.perf_counter()
                first = side.ask("go")
                seen[s] |= first | {"first_round_s": time.perf_counter() - started}
        for _ in range(rounds):
            for s in list(live):
                with _noted(seen, s, live):
                    seen[s]["us_each"].append(live[s].ask("go")["us"])
        for s in list(live):
            with _noted(seen, s, live):
                seen[s] |= live[s].ask("stop")
    for record in seen.values():
        record["us"] = statistics.median(record["us_each"]) if record["us_each"] else None
    return judged({"name": case.name, "packages": {n: _version(n) for n in case.needs}, "steps": steps, "early": case.early, "sides": seen})


@contextlib.contextmanager
def _noted(seen: dict[str, dict[str, Any]], name: str, live: dict[str, Side]) -> Iterator[None]:
    """A side that ends is written down and asked no more."""
    try:
        yield
    except SideEnded as ended:
        seen[name] |= ended.record
        live.pop(name).close()


def _version(package: str) -> str:
    names = importlib.metadata.packages_distributions().get(package, [package])
    try:
        return f"{names[0]} {importlib.metadata.version(names[0])}"
    except importlib.metadata.PackageNotFoundError:
        return names[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    known = {c.name: c for c in CASES}
    parser.add_argument("--only", nargs="*", default=list(known), choices=known, metavar="NAME", help="these modules, in this order")
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=SIDES)
    parser.add_argument("--steps", type=int, default=30, help="batches a round")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, sides interleaved")
    parser.add_argument("--limit", type=float, default=300, help="seconds that one answer of one side may take")
    parser.add_argument("--write", nargs="?", type=Path, const=HERE / "results", help="keep the result in bench/results (or in a folder)")
    args = parser.parse_args()
    wanted = [known[name] for name in args.only]
    skipped = {c.name: c.missing() for c in wanted if c.missing()}
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for case in (c for c in wanted if c.name not in skipped):
            results.append(cover(case, args.sides, args.steps, args.rounds, args.limit, Path(folder)))
            print(table(results[-1:]), flush=True)
            if args.write:  # as it goes, so that nothing is lost
                _write(args.write, results, skipped)
    print("\n" + table(results))
    for name, why in skipped.items():
        print(f"skipped {name}: {why}")


def _write(folder: Path, results: Sequence[Mapping[str, Any]], skipped: Mapping[str, str]) -> None:
    stamp = datetime.date.today().isoformat()
    machine = {"torch": torch.__version__, "python": platform.python_version(), "cores": os.cpu_count()}
    path = folder / f"{stamp}-coverage"
    command = " ".join(["python -m bench.coverage", *sys.argv[1:]])
    path.with_suffix(".json").write_text(
        json.dumps({"machine": machine, "command": command, "skipped": skipped, "results": results}, indent=1)
    )
    heading = f"# Public modules, CPU, {stamp}\n\n{machine}\n\n`{command}`"
    path.with_suffix(".md").write_text(f"{heading}\n\n{table(results)}\n")


if __name__ == "__main__":
    main()
