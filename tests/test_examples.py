"""The examples run as they stand, learn what they say, and learn the same on the compile rung as on the eager one."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SHORT = {  # arguments of a run that takes about a second, and the ratio of after to before that it must reach
    "dcgan": (["--epochs", "2"], 0.5),
    "gan_manual": (["--epochs", "2"], 0.5),
    "wgan": (["--epochs", "2"], 0.5),
    "warmup_by_hand": (["--epochs", "6"], 0.5),
}


@cache
def example(name: str) -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(f"examples.{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a tracer looks for it there
    spec.loader.exec_module(module)
    return module


@cache
def ran(name: str, *argv: str) -> dict[str, float]:
    """What its ``main`` gives back."""
    found: dict[str, float] = example(name).main(list(argv))
    return found


def test_every_example_is_tested() -> None:
    """No script without a run here."""
    assert {p.stem for p in EXAMPLES.glob("*.py")} == {*SHORT, "yield_loop", "lstm_tbptt"}


@pytest.mark.parametrize("name", SHORT)
def test_it_learns(name: str) -> None:
    """The number it prints falls."""
    argv, ratio = SHORT[name]
    found = ran(name, *argv, "--capture", "eager")
    assert found["after"] < ratio * found["before"]


def test_the_classifier_behind_turns_learns() -> None:
    """Accuracy rises from chance to nearly all."""
    found = ran("yield_loop", "--epochs", "2", "--capture", "eager")
    assert found["before"] < 0.5
    assert found["after"] > 0.9


@pytest.mark.parametrize("cell", ["torch", "own"])
def test_the_lstm_falls_below_order_0(cell: str) -> None:
    """Bits a character of a short run are already below what a code without context needs; an update for every split."""
    found = ran("lstm_tbptt", "--epochs", "1", "--split", "16", "--cell", cell, "--capture", "eager")
    assert found["bits"] < 0.8 * found["entropy"]
    assert found["steps"] % 8 == 0


def test_manual_optimization_is_the_generator_form() -> None:
    """The same GAN in two forms: the same numbers on the eager rung, and one forward of the generator a batch in both."""
    a, b = (ran(name, *SHORT[name][0], "--capture", "eager") for name in ("dcgan", "gan_manual"))
    assert a == b
    assert a["generated"] == a["batches"]


def test_optimizers_move_when_the_warm_up_says() -> None:
    """Every second and every fourth batch."""
    found = ran("warmup_by_hand", *SHORT["warmup_by_hand"][0], "--capture", "eager")
    assert (found["body"], found["head"]) == (found["batches"] / 2, found["batches"] / 4)


CAPTURED = {
    "dcgan": ["--epochs", "1"],
    "gan_manual": ["--epochs", "1"],
    "wgan": ["--epochs", "1"],
    "yield_loop": ["--epochs", "1"],
    "warmup_by_hand": ["--epochs", "1"],
    "lstm_tbptt": ["--epochs", "1", "--batches", "4"],
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n == "lstm_tbptt" else []) for n in CAPTURED])
def test_the_captured_run_is_the_eager_one(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every number that it prints, to rounding, and the rung that was asked for."""
    eager = ran(name, *CAPTURED[name], "--capture", "eager")
    captured = ran(name, *CAPTURED[name], "--capture", "compile")
    assert captured == pytest.approx(eager, rel=0.02)
    assert "rung: compile" in capsys.readouterr().out
