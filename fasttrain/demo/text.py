"""The text every machine has: the source files of Python's standard library, split by file, as rows of bytes."""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fasttrain.errors import DataError

SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "__pycache__"})
VALIDATION_SHARE = 20  # one file in so many is kept for validation
LEAST_BYTES = 100_000


@dataclass(frozen=True, kw_only=True)
class Text:
    """Training and validation text as uint8 ``[bytes]``, from how many files each."""

    train: Tensor
    validation: Tensor
    train_files: int
    validation_files: int


def read_standard_library(folder: Path | None = None) -> Text:
    """Every ``.py`` file of the standard library (or of ``folder``), its tests apart, in the order of its names.

    Raises:
        DataError: there is hardly any text, as in a Python that ships its library as bytecode.
    """
    root = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    files = sorted(f.relative_to(root) for f in root.rglob("*.py"))
    files = [f for f in files if not SKIPPED.intersection(f.parts)]
    held_out = [f for f in files if _is_held_out(f)]
    kept = [f for f in files if not _is_held_out(f)]
    text = Text(train=_read(root, kept), validation=_read(root, held_out), train_files=len(kept), validation_files=len(held_out))
    if min(text.train.numel(), VALIDATION_SHARE * text.validation.numel()) < LEAST_BYTES:
        raise DataError(f"the demo's text: found {text.train.numel():,} bytes in {len(files)} Python files below {root}; wanted at least "
                        f"{LEAST_BYTES:,}. This Python seems to ship its library without the source; use another one.")  # fmt: skip
    return text


def _is_held_out(file: Path) -> bool:
    """By name alone, so that a file is on the same side on every machine."""
    return zlib.crc32(file.as_posix().encode()) % VALIDATION_SHARE == 0


def _read(root: Path, files: Sequence[Path]) -> Tensor:
    return torch.frombuffer(bytearray(b"\n".join((root / f).read_bytes() for f in files) or b"\n"), dtype=torch.uint8)


def rows_of(text: Tensor, length: int) -> Tensor:
    """The text as non-overlapping rows, uint8 ``[n, length]``; a rest shorter than a row is left out."""
    return text[: text.numel() // length * length].view(-1, length)


def spread(rows: Tensor, count: int) -> Tensor:
    """At most ``count`` of the rows, evenly spaced."""
    return rows if len(rows) <= count else rows[torch.linspace(0, len(rows) - 1, count).long()]


def order0_entropy(text: Tensor) -> float:
    """Bits a byte that the best code without any context needs for ``text`` (uint8, any shape); Shannon 1948."""
    counts = torch.bincount(text.reshape(-1).long(), minlength=256).double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log2()).sum())
