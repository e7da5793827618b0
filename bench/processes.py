"""The sides' processes as their parent sees them: ask for a round, get its record, hear of an end."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from bench.sides.table import SIDES

ROOT = Path(__file__).parent.parent


class SideEnded(Exception):
    """A side's process failed, died, or was silent past its time."""


class Line:
    """One side's process; ``ask`` sends a word and waits for the record that answers it."""

    def __init__(self, connection: socket.socket, log: Path, limit_s: float) -> None:
        connection.settimeout(limit_s)
        self._connection, self._log, self._limit_s = connection, log, limit_s
        self._said = connection.makefile("rw")

    def ask(self, word: str) -> dict[str, Any]:
        try:
            self._said.write(f"{word}\n")
            self._said.flush()
            text = self._said.readline()
        except TimeoutError:
            raise SideEnded(f"no answer within {self._limit_s:.0f} s") from None
        except OSError:
            text = ""
        if not text:
            raise SideEnded(f"its process died: {_tail(self._log)}")
        record = dict(json.loads(text))
        if "error" in record:
            raise SideEnded(record["error"])
        return record

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._said.close()
        self._connection.close()


def _tail(log: Path) -> str:
    """The end of what a process printed, without where this tree lies."""
    return log.read_text(errors="replace")[-600:].replace(f"{ROOT}/", "")


class Processes:
    """Starts sides; owns the folder with their logs, sockets and compile caches, and the processes that fork them."""

    def __init__(self, device: str, quick: bool, limit_s: float = 400.0, *, fork: bool | None = None) -> None:
        self.device, self.quick, self.limit_s = device, quick, limit_s
        self._fork = device == "cpu" if fork is None else fork
        self._held = tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True)
        self.folder = Path(self._held.name)
        self._nurseries: dict[str, subprocess.Popen[str]] = {}
        self._alone: list[subprocess.Popen[Any]] = []
        self._count = itertools.count()
        self._one_at_a_time = threading.Lock()

    def start(self, workload: str, side: str, *, first: bool = False, cache: str = "cache") -> Line:
        """A process that waits for its first word. ``first``: for the time to the first step, nothing imported beforehand."""
        number = next(self._count)
        path, log = self.folder / f"{number}.sock", self.folder / f"{number}.log"
        log.touch()
        imports = SIDES[side].imports
        order = {
            "workload": workload, "side": side, "device": self.device, "quick": self.quick, "first": first, "socket": str(path),
            "log": str(log), "imports": imports,
        }  # fmt: skip
        server = socket.socket(socket.AF_UNIX)
        with contextlib.closing(server):
            server.bind(str(path))
            server.listen(1)
            server.settimeout(2.0)
            process = self._send(order, imports, cache) if self._fork and not first else self._one(order, cache)
            deadline = time.monotonic() + 120
            while True:
                try:
                    connection, _ = server.accept()
                    break
                except TimeoutError:
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise SideEnded(f"{workload} / {side} did not start: {_tail(log)}") from None
        return Line(connection, log, self.limit_s)

    def _environment(self, cache: str) -> dict[str, str]:
        folder = self.folder / cache
        own = {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": str(folder / "triton"), "KERAS_BACKEND": "torch"}
        return os.environ | own | ({"OMP_NUM_THREADS": "1"} if self.quick else {})  # two threads on a busy core wait for each other

    def _one(self, order: dict[str, Any], cache: str) -> subprocess.Popen[Any]:
        command = [sys.executable, "-m", "bench.worker", "--one", json.dumps(order)]
        with Path(order["log"]).open("a") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=self._environment(cache), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._alone.append(process)
        return process

    def _send(self, order: dict[str, Any], imports: tuple[str, ...], cache: str) -> subprocess.Popen[str]:
        family = ",".join(imports)
        with self._one_at_a_time:
            if family not in self._nurseries:
                command = [sys.executable, "-m", "bench.worker", family]
                with (self.folder / f"nursery-{len(self._nurseries)}.log").open("a") as log:
                    self._nurseries[family] = subprocess.Popen(
                        command, cwd=ROOT, env=self._environment(cache), stdin=subprocess.PIPE, stdout=log, stderr=log, text=True
                    )
            nursery = self._nurseries[family]
            assert nursery.stdin is not None
            nursery.stdin.write(json.dumps(order) + "\n")
            nursery.stdin.flush()
            return nursery

    def close(self) -> None:
        for nursery in self._nurseries.values():
            assert nursery.stdin is not None
            nursery.stdin.close()
        for process in (*self._nurseries.values(), *self._alone):  # their lines are closed: nobody wants a round of them
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._held.cleanup()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *ended: object) -> None:
        self.close()
