"""Compiling beside training: a process of its own fills torch's compile cache while eager steps are made.

It makes nothing but files, so that the run's numbers depend on one thing alone: the batch, fixed in advance, from which
the captured step is taken.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from fasttrain.options import Options

LONGEST_S = 600.0  # to be waited for: what takes longer is compiled here and now
IDLE_S = 10.0  # without computing: it waits for a lock that a thread of the parent's had
SHARE = 8  # of the machine's memory, the part that weights may take: the process may write all of its copies
_SETPARENTDEATH = 1  # prctl's PR_SET_PDEATHSIG


def can_compile_ahead(module: nn.Module, options: Options, device: torch.device) -> bool:
    """May there be such a process: a fork, of one in which nothing lives that does not survive it?"""
    if not sys.platform.startswith("linux") or len(os.sched_getaffinity(0)) < 2:
        return False
    if device.type != "cpu" or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    if options.deterministic or options.verify or (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return sum(p.nbytes for p in module.parameters()) * SHARE <= memory


class Ahead:
    """``work`` in a forked process; ``at``: the batch of the fit that waits for it; ``threads``: what torch is to have again then.

    ``work`` None: there is no process, and the batch is the same.
    """

    def __init__(self, at: int, threads: int, work: Callable[[], object] | None) -> None:
        self.at, self.threads, self._pid = at, threads, 0
        if work is None:
            return
        with warnings.catch_warnings():  # Python 3.12: of the threads that a fork leaves behind
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                self._pid = os.fork()
            except OSError:  # no memory or no process to be had: at that batch it is compiled here
                return
        if self._pid == 0:
            _be_the_child(work)

    def wait(self, say: Callable[[str], None], stopped: Callable[[], bool]) -> bool:
        """Until it has ended, however it did; False when somebody stops the run meanwhile."""
        began = seen = time.monotonic()
        told, did = False, _work_of(self._pid)
        try:
            while self._pid and not stopped() and (now := time.monotonic()) - seen < IDLE_S and now - began < LONGEST_S:
                if (does := _work_of(self._pid)) != did:
                    seen, did = now, does
                if self._has_ended():
                    self._pid = 0
                elif not told and now - began > 0.5:
                    told = True
                    say(f"batch {self.at}: waiting for the step that is compiled beside the run ...")
                time.sleep(0.02 if self._pid else 0.0)
        finally:
            self.close()
        return not stopped()

    def _has_ended(self) -> bool:
        try:
            return bool(os.waitpid(self._pid, os.WNOHANG)[0])
        except ChildProcessError:  # somebody has said that nobody waits for children
            return not _lives(self._pid)

    def close(self) -> None:
        """It is not wanted any more. A compiler that it has called is left to end by itself, so that no half library stays in the cache."""
        pid, self._pid = self._pid, 0
        if pid:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _work_of(pid: int) -> str:
    """The time that a process has computed, and its children's, as far as they have ended; another text while one runs."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        running = [p for t in Path(f"/proc/{pid}/task").iterdir() for p in (t / "children").read_text().split()]
    except OSError:
        return ""
    return " ".join(fields[11:15]) + (f" {time.monotonic()}" if running else "")


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _be_the_child(work: Callable[[], object]) -> None:
    try:
        os.setpgid(0, 0)  # ctrl-C is for the run to hear
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE}:  # the run's own are not to be called here
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        ctypes.CDLL(None).prctl(_SETPARENTDEATH, signal.SIGKILL)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(nowhere, stream)
        import torch._inductor.config as settings

        settings.compile_threads = 1  # a pool of the parent's has no threads here
        # Nor has OpenMP's; a thread that has not met OpenMP gets a pool of its own.
        thread = threading.Thread(target=contextvars.copy_context().run, args=(work,))  # where torch keeps its settings
        thread.start()
        thread.join()
    finally:
        os._exit(0)
