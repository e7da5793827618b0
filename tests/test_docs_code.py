"""The Python blocks of the documents run, one after the other on each page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.filterwarnings("ignore::fasttrain.FasttrainWarning")  # older hooks are named
@pytest.mark.parametrize("page", ["optimizers.md", "loops.md", "capture.md"])
def test_every_block_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, and nothing of them fails."""
    monkeypatch.chdir(tmp_path)
    text = (DOCS / page).read_text()
    found = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(found) >= (1 if page == "capture.md" else 5)
    shared: dict[str, Any] = {"__name__": page}
    for block in found:
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block.group(1), str(DOCS / page), "exec"), shared)


@pytest.mark.parametrize("page", ["optimizers.md", "loops.md", "capture.md"])
def test_every_link_leads_somewhere(page: str) -> None:
    """To a file of this repository."""
    for target in re.findall(r"\]\((?!http)([^)#]+)", (DOCS / page).read_text()):
        assert (DOCS / target).exists(), target
