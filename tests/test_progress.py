"""Laws of progress: what is drawn fits, what is printed stays, and neither can break or slow the training."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TextIO

import pytest
from rich.cells import cell_len

from fasttrain.progress import PlainProgress, RichProgress, Silent, Snapshot, fitted, make_progress

TRAIN = Snapshot(
    stage="train",
    epoch=1,
    max_epochs=3,
    batch=5,
    total_batches=10,
    global_step=15,
    loss=0.12345,
    metrics={"val_loss": 0.5},
    batches_per_s=12.5,
    seconds_left=3725,
    rung="graph",
)
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


@contextmanager
def terminal(columns: int, encoding: str = "utf-8") -> Iterator[tuple[TextIO, Callable[[], str]]]:
    """A real terminal of that width: a stream to write to, and what has arrived at its other end so far."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    arrived = bytearray()

    def drain() -> None:
        try:
            while chunk := os.read(ours, 65536):
                arrived.extend(chunk)
        except OSError:
            return

    reader = threading.Thread(target=drain, daemon=True)
    reader.start()

    def text() -> str:
        time.sleep(0.05)
        return arrived.decode(encoding, "replace")

    with os.fdopen(theirs, "w", encoding=encoding, buffering=1) as stream:
        yield stream, text
    reader.join(1)
    os.close(ours)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which the test moves."""
    now = [100.0]
    monkeypatch.setattr("fasttrain.progress.time.monotonic", lambda: now[0])
    return now


def test_the_line_says_everything_when_there_is_room() -> None:
    """Epoch, bar, loss, speed, time left, metrics, step, rung, note."""
    line = fitted(replace(TRAIN, note="verified"), 200)
    bar = "━" * 15 + "─" * 15
    rest = "loss 0.1235  12.5 it/s  1:02:05 left  val_loss 0.5  step 15  graph  verified"
    assert line == f"epoch 2/3 5/10  {bar}  {rest}"


@pytest.mark.parametrize("fancy", [True, False])
@pytest.mark.parametrize("stage", ["train", "sanity", "validate", "test", "predict", "compile"])
def test_the_line_fits_every_width(stage: str, fancy: bool) -> None:
    """Also with wide and control characters in the names of metrics, and in ASCII when that is all there is."""
    odd = replace(TRAIN, stage=stage, metrics={"精度": 0.9, "a\nb\x1b[2J": float("nan")}, note="…" * 9)
    for width in range(160):
        line = fitted(odd, width, fancy=fancy)
        assert cell_len(line) <= width
        assert line.isprintable()
        assert fancy or line.isascii()


def test_what_is_not_known_is_left_out() -> None:
    """An endless loader has no total and no bar; nothing shows None."""
    line = fitted(Snapshot(stage="train", batch=7, seconds_left=float("inf")), 100)
    assert line == "epoch 1 7  ? left  step 0"
    assert fitted(Snapshot(stage="compile", note="tracing"), 100) == "compile  tracing"


@pytest.mark.parametrize("columns", [20, 40, 80])
def test_a_terminal_sees_one_line_that_never_wraps(columns: int) -> None:
    """Nothing between two carriage returns is as wide as the terminal, and lines said meanwhile stay above."""
    with terminal(columns) as (stream, seen):
        progress = make_progress(True, stream)
        assert isinstance(progress, RichProgress)
        progress.start(TRAIN)
        for batch in range(5, 11):
            time.sleep(progress.interval)
            progress.update(replace(TRAIN, batch=batch))
        progress.line("saved")
        progress.stop(replace(TRAIN, batch=10))
        text = seen()
    drawn = re.split(r"[\r\n]+", ESCAPES.sub("", text))
    assert max(cell_len(line) for line in drawn) < columns
    assert [line.strip() for line in drawn if "saved" in line] == ["saved"]
    assert "10/10" in drawn[-2]
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is back


def test_a_terminal_without_utf8_gets_ascii() -> None:
    """No character that its encoding lacks is written."""
    with terminal(120, "ascii") as (stream, seen):
        progress = make_progress(True, stream)
        progress.start(replace(TRAIN, metrics={"précision": 1.0}))
        progress.stop()
        text = seen()
    assert "###" in text
    assert "pr?cision" in text


def test_it_redraws_at_most_ten_times_a_second(clock: list[float]) -> None:
    """However often it is told, and the last word is drawn."""

    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Screen()
    progress = RichProgress(screen)
    progress.start(TRAIN)
    for batch in range(1000):
        clock[0] += 0.001
        progress.update(replace(TRAIN, batch=batch, total_batches=1001))
    drawn = len(re.findall(r"\d+/1001", screen.getvalue()))
    assert 8 <= drawn <= 10
    progress.stop(replace(TRAIN, batch=1001, total_batches=1001))
    assert "1001/1001" in screen.getvalue()
    progress.stop()


def test_without_a_terminal_there_is_a_line_every_few_seconds_and_at_each_end(clock: list[float]) -> None:
    """No escape codes; epochs and passes end with a line, nothing is said twice."""
    stream = io.StringIO()
    progress = make_progress(True, stream)
    assert isinstance(progress, PlainProgress)
    progress.start(replace(TRAIN, epoch=0, batch=0))
    for batch in range(1, 11):
        clock[0] += 1.0
        progress.update(replace(TRAIN, epoch=0, batch=batch))
    progress.update(replace(TRAIN, stage="validate", batch=1, total_batches=4))
    progress.update(replace(TRAIN, epoch=1, batch=1))
    progress.line("saved")
    progress.stop()
    progress.stop()
    starts = [" ".join(line.split()[:3]) for line in stream.getvalue().splitlines()]
    ends = ["validate 1/4 loss", "saved", "epoch 2/3 1/10"]
    assert starts == ["epoch 1/3 5/10", "epoch 1/3 10/10", *ends]
    assert "\x1b" not in stream.getvalue()


def test_plain_lines_survive_any_stream() -> None:
    """A character that the encoding lacks is replaced, and a closed stream is no error."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    progress = PlainProgress(stream)
    progress.line("précision ✓")
    assert raw.getvalue() == b"pr?cision ?\n"
    stream.close()
    progress.line("more")
    progress.start(TRAIN)
    progress.stop(replace(TRAIN, batch=9))


def test_it_may_be_off(capsys: pytest.CaptureFixture[str]) -> None:
    """Then nothing is shown at all."""
    progress = make_progress(False)
    assert isinstance(progress, Silent)
    progress.start(TRAIN)
    progress.update(TRAIN)
    progress.line("x")
    progress.stop(TRAIN)
    assert capsys.readouterr() == ("", "")


def test_importing_it_does_not_import_rich() -> None:
    """Import time matters to those who show nothing."""
    code = "import sys, fasttrain.progress; sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
