"""Progress: what a person sees while a run goes on; a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TextIO

_REDRAW_S = 0.1
_PLAIN_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One moment of a run. `batch` counts those done in this epoch or pass; None is for what is not known."""

    stage: str  # "train", "sanity", "validate", "test", "predict" or "compile"
    epoch: int = 0
    max_epochs: int | None = None
    batch: int = 0
    total_batches: int | None = None
    global_step: int = 0
    loss: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    batches_per_s: float | None = None
    unit: str = "it"  # what the rate counts, and how many of them a batch has
    units_per_batch: int = 1
    seconds_left: float | None = None
    rung: str = ""
    note: str = ""


class Progress(Protocol):
    """What the loop tells; `interval` is how many seconds it may wait between two updates."""

    interval: float

    def start(self, snapshot: Snapshot) -> None: ...
    def update(self, snapshot: Snapshot) -> None: ...
    def line(self, text: str) -> None: ...
    def stop(self, snapshot: Snapshot | None = None) -> None: ...


def make_progress(enabled: bool, stream: TextIO | None = None) -> Progress:
    """A live line when `stream` (stderr) is a terminal that can move its cursor, plain lines when not, or nothing."""
    if not enabled:
        return Silent()
    stream = sys.stderr if stream is None else stream
    is_live = stream.isatty() and os.environ.get("TERM") != "dumb"
    return RichProgress(stream) if is_live else PlainProgress(stream)


class Silent:
    """Shows nothing."""

    interval = 3600.0

    def start(self, snapshot: Snapshot) -> None:
        """Shows nothing."""

    def update(self, snapshot: Snapshot) -> None:
        """Shows nothing."""

    def line(self, text: str) -> None:
        """Shows nothing."""

    def stop(self, snapshot: Snapshot | None = None) -> None:
        """Shows nothing."""


class PlainProgress:
    """A line every few seconds and one at the end of each epoch or pass; never an escape code, always flushed."""

    def __init__(self, stream: TextIO | None = None, interval: float = _PLAIN_S) -> None:
        self.interval = interval
        self._stream = sys.stderr if stream is None else stream
        self._latest: Snapshot | None = None
        self._is_shown = True
        self._shown_at = 0.0

    def start(self, snapshot: Snapshot) -> None:
        self._latest, self._is_shown, self._shown_at = snapshot, True, time.monotonic()

    def update(self, snapshot: Snapshot) -> None:
        before = self._latest
        if before is not None and (before.stage, before.epoch) != (snapshot.stage, snapshot.epoch):
            self._show_latest()  # the epoch or pass that ended
        self._latest, self._is_shown = snapshot, snapshot == before and self._is_shown
        if snapshot.batch == snapshot.total_batches or time.monotonic() - self._shown_at >= self.interval:
            self._show_latest()

    def line(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        try:
            self._stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            pass  # a pipe that was closed at the other end must not end the training

    def stop(self, snapshot: Snapshot | None = None) -> None:
        if snapshot is not None and snapshot != self._latest:
            self._latest, self._is_shown = snapshot, False
        self._show_latest()
        self._latest = None

    def _show_latest(self) -> None:
        if self._latest is not None and not self._is_shown:
            self.line("  ".join(_parts(self._latest)))
            self._is_shown, self._shown_at = True, time.monotonic()


class RichProgress:
    """One line, redrawn at most ten times a second (60 µs each on a 2-core CPU) and never wider than the terminal."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.interval = _REDRAW_S
        self._stream = sys.stderr if stream is None else stream
        self._live: Any = None
        self._latest: Snapshot | None = None
        self._drawn_at = 0.0

    def start(self, snapshot: Snapshot) -> None:
        if self._live is None:
            from rich.console import Console  # slow to import, and only wanted on a terminal
            from rich.live import Live

            console = Console(file=self._stream, force_terminal=True, highlight=False, soft_wrap=True)
            # what is printed goes above the line, but what goes to a file keeps going there
            self._live = Live(
                console=console,
                auto_refresh=False,
                redirect_stdout=sys.stdout.isatty(),
                redirect_stderr=sys.stderr.isatty(),
            )
            self._live.start()
        self._draw(snapshot)

    def update(self, snapshot: Snapshot) -> None:
        self._latest = snapshot
        if time.monotonic() - self._drawn_at >= _REDRAW_S:
            self._draw(snapshot)

    def line(self, text: str) -> None:
        if self._live is None:
            PlainProgress(self._stream).line(text)
        else:
            self._live.console.print(text, markup=False, emoji=False)

    def stop(self, snapshot: Snapshot | None = None) -> None:
        if self._live is None:
            return
        last = snapshot or self._latest
        if last is not None:
            self._draw(last)
        self._live.stop()
        self._live = self._latest = None

    def _draw(self, snapshot: Snapshot) -> None:
        from rich.text import Text

        self._latest, self._drawn_at = snapshot, time.monotonic()
        if self._live is not None:
            fancy = (getattr(self._stream, "encoding", None) or "").lower().startswith("utf")
            text = fitted(snapshot, self._width(), fancy=fancy)
            self._live.update(Text(text, no_wrap=True, overflow="crop"), refresh=True)

    def _width(self) -> int:
        """Columns to draw in: one fewer than there are, since some terminals wrap when the last is written."""
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns
        except (OSError, ValueError, AttributeError):
            columns = 0
        if columns:
            self._live.console.width = columns  # rich asks the standard streams, which may be elsewhere
        return int(self._live.console.width) - 1


def fitted(snapshot: Snapshot, width: int, *, fancy: bool = True) -> str:
    """The live line in at most `width` columns: what matters less goes first, and the bar takes what is left."""
    from rich.cells import cell_len, set_cell_size

    parts = [_plain(part, fancy) for part in _parts(snapshot)]
    while len(parts) > 1 and cell_len("  ".join(parts)) > width:
        parts.pop()
    text = "  ".join(parts)
    if cell_len(text) > width:
        return set_cell_size(text, max(width, 0)).rstrip()
    room = min(width - cell_len(text) - 2, 30)
    if snapshot.total_batches and room >= 4:
        bar = _bar(snapshot.batch / snapshot.total_batches, room, fancy)
        return "  ".join([parts[0], bar, *parts[1:]])
    return text


def _parts(snapshot: Snapshot) -> list[str]:
    """The pieces of a line, the most important first."""
    s = snapshot
    where = s.stage if s.stage != "train" else f"epoch {s.epoch + 1}" + (f"/{s.max_epochs}" if s.max_epochs else "")
    total = "" if s.total_batches is None else f"/{s.total_batches}"
    parts = [where] if s.stage == "compile" else [f"{where} {s.batch}{total}"]
    if s.loss is not None:
        parts.append(f"loss {s.loss:.4g}")
    if s.batches_per_s is not None:
        rate = s.batches_per_s * s.units_per_batch
        parts.append(f"{rate:.4g} {s.unit}/s" if rate < 1000 else f"{rate:,.0f} {s.unit}/s")
    if s.seconds_left is not None:
        parts.append(f"{_clock(s.seconds_left)} left")
    parts += [f"{name} {value:.4g}" for name, value in s.metrics.items()]
    if s.stage == "train":
        parts.append(f"step {s.global_step}")
    return parts + [part for part in (s.rung, s.note) if part]


def _plain(text: str, fancy: bool) -> str:
    """One line without control characters, and in ASCII when the terminal has no more."""
    text = "".join(char if char.isprintable() else " " for char in text)
    return text if fancy else text.encode("ascii", "replace").decode("ascii")


def _bar(done: float, width: int, fancy: bool) -> str:
    filled = round(min(max(done, 0.0), 1.0) * width)
    full, empty = ("━", "─") if fancy else ("#", "-")
    return full * filled + empty * (width - filled)


def _clock(seconds: float) -> str:
    if not 0 <= seconds < 1e9:
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
