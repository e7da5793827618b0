"""What qualify.sh's parts left behind, as one dated JSON and one Markdown: ``python -m bench.gpu.record PARTS FOLDER``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench.machine import device, machine
from bench.report import records_of, rows_of, table

OVER = (124, 137)  # what `timeout` exits with when it ended a part
ROOT = Path(__file__).parent.parent.parent
KEPT = 4000  # characters of a part's output: its end, where the summary and the errors stand


def parts_of(folder: Path) -> list[dict[str, Any]]:
    """The parts in the order in which they ran."""
    found = []
    for line in (folder / "parts.tsv").read_text().splitlines():
        name, status, seconds, command = line.split("\t")
        log = _without_paths((folder / f"{name}.log").read_text(errors="replace"), folder)
        part = {"name": name, "status": int(status), "seconds": int(seconds), "command": _without_paths(command, folder)}
        found.append(part | {"output": log[-KEPT:]})
    return found


def _without_paths(text: str, parts: Path) -> str:
    """Where a machine keeps its things is nobody's business who reads a result."""
    for path, name in ((str(parts), "PARTS"), (sys.executable, "python"), (f"{ROOT}/", ""), (str(Path.home()), "~")):
        text = text.replace(path, name)
    return text


def record(folder: Path) -> dict[str, Any]:
    """Everything, as data."""
    training, kernels = folder / "training.json", folder / "kernels.md"
    return {
        "machine": machine(device()), "parts": parts_of(folder),
        "training": json.loads(training.read_text()) if training.exists() else {"records": {}},
        "kernels": _without_paths(kernels.read_text(), folder) if kernels.exists() else "",
    }  # fmt: skip


def page(kept: dict[str, Any]) -> str:
    """The Markdown: what failed on top, then the training bench with its losing cases on top, then the kernels."""
    about = kept["machine"]
    parts = ["| part | ended | seconds | last line |", "|---|---|---|---|"]
    for p in kept["parts"]:
        last = next((line for line in reversed(p["output"].splitlines()) if line.strip()), "").strip().replace("|", "/")
        parts.append(f"| {p['name']} | {_ended(p['status'])} | {p['seconds']} | {last[:160]} |")
    failed = [f"**{p['name']}: {_ended(p['status'])}.**" for p in kept["parts"] if p["status"]]
    tiny = ["**A rehearsal at tiny sizes: no figure here says how fast anything is.**"] if kept["training"].get("quick") else []
    sections = [
        f"# On {about.get('gpu', 'a CPU')}, {about['date']}", *tiny, *failed, str(about), "\n".join(parts), "## Training",
        table(rows_of(kept["training"])) if records_of(kept["training"]) else "No workload was finished.", "## Kernels",
        kept["kernels"] or "No table was finished.",
    ]  # fmt: skip
    return "\n\n".join(sections) + "\n"


def _ended(status: int) -> str:
    return "well" if status == 0 else "its time was over" if status in OVER else f"with {status}"


def main() -> int:
    """0 when every part ended well."""
    kept = record(Path(sys.argv[1]))
    folder = Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / f"{kept['machine']['date']}-{'gpu' if kept['machine']['device'] == 'cuda' else 'rehearsal'}"
    base.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")
    base.with_suffix(".md").write_text(page(kept))
    print(f"written: {base.with_suffix('.md')} and {base.with_suffix('.json')}")
    return int(any(p["status"] for p in kept["parts"]))


if __name__ == "__main__":
    sys.exit(main())
