"""One side in a process of its own: ``python -m bench.worker FAMILY SOCKETS`` forks one for each line it reads, or is one (``--one``).

A process that has imported a framework once forks the sides that need it, so that a suite of 150 rows does not import torch
150 times. Where there is a CUDA device nothing is forked: a device that a parent has looked at is lost to its children.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any


def serve(order: Mapping[str, Any]) -> None:
    """Connect to who asked, train rounds as long as they are wanted, say what went wrong if something did."""
    began = time.perf_counter()
    line = socket.socket(socket.AF_UNIX)
    line.connect(order["socket"])
    said = line.makefile("rw")
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)

    def answer(record: Mapping[str, Any]) -> None:
        said.write(json.dumps(record) + "\n")
        said.flush()

    try:
        warnings.simplefilter("ignore")
        _train(order, lambda: said.readline().strip(), answer, began)
    except BaseException as error:
        traceback.print_exc()
        with contextlib.suppress(OSError):
            answer({"error": f"{type(error).__name__}: {error}"})


def _train(order: Mapping[str, Any], ask: Any, answer: Any, began: float) -> None:
    for name in order["imports"]:
        importlib.import_module(name)
    from bench.rounds import Rounds
    from bench.sides.job import Job
    from bench.sides.table import SIDES
    from bench.workloads import WORKLOADS

    w, side, device = WORKLOADS[order["workload"]], SIDES[order["side"]], order["device"]
    size = w.size(device, order["quick"])
    if order["first"]:  # one epoch of one batch: the time to the first step
        size = replace(size, batches=1, passes=1)
        w = replace(w, window=1)
    function = getattr(importlib.import_module(f"bench.sides.{side.file}"), side.function)
    rounds = Rounds(ask, answer, device, began)
    rounds.notes["imports_s"] = time.perf_counter() - began
    function(Job.make(w, size, device, rounds), **side.given)


def nursery() -> None:
    """Import what the family needs, then fork one child an order, until stdin ends."""
    for name in sys.argv[1].split(","):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for name in ("bench.rounds", "bench.sides.job", "bench.sides.table"):
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    gc.freeze()
    for text in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(0)
            os.open(os.devnull, os.O_RDONLY)
            serve(json.loads(text))
            os._exit(0)  # no teardown of a framework that is still in its loop


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        serve(json.loads(sys.argv[2]))
        os._exit(0)
    nursery()
