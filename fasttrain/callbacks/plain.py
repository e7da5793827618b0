"""Metrics as plain values: numbers that any JSON reader takes, and the names that exist, for a message."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor


def as_plain(value: Tensor | float | None) -> float | str | None:
    """A float, or "nan", "inf", "-inf", which JSON has no number for; `float()` takes either back."""
    if value is None:
        return None
    number = float(value)  # host read when it is a tensor
    return number if math.isfinite(number) else str(number)


def named(metrics: Iterable[str]) -> str:
    """The names, sorted, for the end of a sentence."""
    return ", ".join(sorted(metrics)) or "none has been logged yet"
