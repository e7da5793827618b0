"""The documents say what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from fasttrain.options import OptionsDict

ROOT = Path(__file__).parent.parent


def test_every_option_is_documented() -> None:
    """docs/options.md names exactly the options there are."""
    rows = re.findall(r"^\| (`.+?) \|", (ROOT / "docs/options.md").read_text(), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == set(OptionsDict.__annotations__)


def test_readme_has_the_two_commands() -> None:
    """The README's two commands are the ones CI runs."""
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci/run").read_text()
    for command in ("pip install . && fasttrain demo", "pip install '.[test]' && pytest"):
        assert command in readme
        assert command.replace("install ", "install -q ") in ci
