"""What a feature may cost where it is on, and that it costs nothing where it is not: own Python calls in a steady batch."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest


def _load() -> Any:
    """bench/overhead.py, which counts."""
    path = Path(__file__).parent.parent.parent / "bench" / "overhead.py"
    spec = importlib.util.spec_from_file_location("fasttrain_bench_overhead", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


overhead = _load()
FREE = [name for name, case in overhead.CASES.items() if case.most == 15]


@pytest.mark.parametrize("name", overhead.CASES)
def test_calls_of_a_steady_batch(name: str) -> None:
    """A captured batch makes at most as many calls of our own functions as its case allows; 15 where nothing is asked for."""
    case = overhead.CASES[name]
    measured = overhead.measure(case)
    assert "rung: compile" in measured.explained
    assert measured.calls <= case.most, f"{measured.calls:.1f} calls a batch: {measured.by_name}"
    if name in FREE:
        assert measured.guards <= 0.1, "guards were evaluated though nobody's code had run"


def test_most_features_are_free() -> None:
    """The bound of the plain case is that of logging, clipping, windows, schedules, validation and Result objects too."""
    assert {"plain", "plain, every option at its default", "logging, two values", "clipping by norm", "accumulation of 4"} <= set(FREE)
    assert {"scheduler by step", "validation every 1000 steps", "Result objects", "barebones", "16-mixed"} <= set(FREE)
