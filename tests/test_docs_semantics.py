"""The table of rules names tests that are there, and says of each rule what is true of it."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECTIONS = [
    "Order of one fit",
    "Randomness and order",
    "Counting",
    "Validation",
    "Optimizers and schedulers",
    "Logging",
    "Stopping and saving",
]
TEXT = (ROOT / "docs/semantics.md").read_text()
ROWS: list[tuple[str, str]] = [r for r in re.findall(r"^\| (.+?) \| (.+) \|$", TEXT, re.MULTILINE) if r != ("rule", "proof")]
NAMED = sorted({name for _, proof in ROWS for name in re.findall(r"`(\S+)`", proof)})


def _fails(decorator: str) -> bool:
    """Is it a mark of an expected failure? ``bug`` is the one of tests/forms."""
    return "xfail" in decorator or decorator == "bug"


@cache
def functions_of(file: str) -> dict[str, bool]:
    """The test functions of a file, and whether each is expected to fail."""
    tree = ast.parse((ROOT / file).read_text())
    functions = [f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name.startswith("test_")]
    return {f.name: any(_fails(ast.unparse(d).partition("(")[0]) for d in f.decorator_list) for f in functions}


def test_every_named_test_is_there() -> None:
    """A file of this repository and a function in it."""
    split = [name.partition("::") for name in NAMED]
    assert [n for n, (file, _, function) in zip(NAMED, split, strict=True) if function not in functions_of(file)] == []


def test_every_rule_has_a_proof_or_is_pending() -> None:
    """Nothing else stands in a cell, no rule stands twice, and every section has rows."""
    assert re.findall(r"^## (.+)$", TEXT, re.MULTILINE) == SECTIONS
    for rule, proof in ROWS:
        assert proof == "pending" or re.fullmatch(r"`tests/\S+\.py::test_\w+`( `tests/\S+\.py::test_\w+`)*", proof), rule
    assert len({rule for rule, _ in ROWS}) == len(ROWS)
    assert all(re.findall(r"^\| .+ \|$", part, re.MULTILINE)[2:] for part in TEXT.split("\n## ")[1:])


def test_an_open_rule_is_one_whose_tests_are_expected_to_fail() -> None:
    """And a rule that is not open has no such test."""
    for rule, proof in ROWS:
        for name in re.findall(r"`(\S+)`", proof):
            file, _, function = name.partition("::")
            assert functions_of(file)[function] == ("*open*" in rule), f"{rule}: {name}"


def test_no_expected_failure_is_left_out() -> None:
    """Whatever the parity and rule tests expect to fail stands in the table."""
    files = [*sorted((ROOT / "tests/parity").glob("test_*.py")), ROOT / "tests/test_semantics_rules.py"]
    failing = {
        f"{p.relative_to(ROOT).as_posix()}::{n}"
        for p in files
        for n, fails in functions_of(p.relative_to(ROOT).as_posix()).items()
        if fails
    }
    assert failing <= set(NAMED)


def test_the_table_reaches_enough_cases() -> None:
    """A rule each for most, a test each for more: parameters not even counted."""
    assert len(ROWS) >= 100
    assert len(NAMED) >= 120
