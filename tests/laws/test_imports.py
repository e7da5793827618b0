"""The house: imports acyclic and downward, files short, public names a list, nothing touched on import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fasttrain

ROOT = Path(fasttrain.__file__).parent
FLOORS = {
    "errors": 0, "retired": 0, "options": 0, "state": 0,
    "entries": 1, "hook_names": 1, "results": 1, "step_result": 1, "cadence": 1, "reach": 1, "code_state": 1, "kernels": 1,
    "forms": 2, "module": 2, "combined": 2, "data": 2, "graphs": 2,
    "callbacks": 3, "loggers": 3, "progress": 3, "checkpoint": 3, "facade": 3, "display": 3,
    "run": 4, "loaders": 4, "schedules": 4, "stopping": 4, "evaluate": 4, "loop": 4, "resume": 4, "setup": 4, "own_loop": 4, "fit": 4,
    "__init__": 5, "__main__": 5, "cli": 5, "demo": 5, "env": 5, "explain_command": 5,
}  # fmt: skip
FILES = sorted(ROOT.rglob("*.py"))


def _room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    """The fasttrain modules a file imports at run time, wherever in the file it does."""
    tree = ast.parse(path.read_text())
    guarded = [t for t in ast.walk(tree) if isinstance(t, ast.If) and "TYPE_CHECKING" in ast.unparse(t.test)]
    typing_only = {id(n) for t in guarded for n in ast.walk(t)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fasttrain":
            for name in node.names:
                inner = ROOT.joinpath(*node.module.split(".")[1:], name.name)
                is_module = inner.with_suffix(".py").is_file() or inner.is_dir()
                found.add(f"{node.module}.{name.name}" if is_module else node.module)
        elif isinstance(node, ast.Import):
            found.update(a.name for a in node.names if a.name.split(".")[0] == "fasttrain")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    """A file imports from its own floor or below, never from above."""
    room = _room(path)
    assert room in FLOORS, f"{path.name} is in no room: give it a floor"
    for module in _imports(path):
        other = module.split(".")[1] if "." in module else "__init__"
        if other in FLOORS:
            up = f"{path.relative_to(ROOT)} (floor {FLOORS[room]}) imports {module} (floor {FLOORS[other]})"
            assert FLOORS[other] <= FLOORS[room], up


def test_imports_have_no_cycle() -> None:
    """The modules form a directed graph without a cycle."""
    names = {".".join(("fasttrain", *p.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): p for p in FILES}
    graph = {n: {m for m in _imports(p) if m in names and m != n} for n, p in names.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short(path: Path) -> None:
    """No file is longer than 400 lines."""
    assert len(path.read_text().splitlines()) <= 400


def test_public_names_are_a_list() -> None:
    """What ``fasttrain`` exports is exactly this; a new name is a decision."""
    assert sorted(fasttrain.__all__) == [
        "Callback", "CaptureError", "CaptureReport", "CheckpointError", "CombinedLoader", "CompiledFit", "CsvLogger",
        "DataError", "EarlyStopping", "EvalResult", "FasttrainError", "FasttrainWarning", "FitResult", "JsonlLogger",
        "KernelError", "LearningRateMonitor", "Ledger", "ModelCheckpoint", "ModuleError", "NonFiniteError", "Obstacle",
        "OptionError", "TensorBoardLogger", "Timer", "TrainResult", "compile_fit", "seed_everything",
    ]  # fmt: skip
    for name in fasttrain.__all__:
        assert getattr(fasttrain, name) is not None


def test_import_touches_nothing() -> None:
    """Importing the package loads no torch, starts no device, changes no global setting and imports no Lightning."""
    code = """
import sys, fasttrain
assert "torch" not in sys.modules, "import fasttrain loaded torch"
import torch
def globals_of_torch():
    return (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_rng_state().sum().item())
before = globals_of_torch()
import torch._dynamo.config as dynamo
flag = dynamo.trace_autograd_ops
import fasttrain.fit
after = globals_of_torch()
assert before == after and dynamo.trace_autograd_ops == flag
assert not torch.cuda.is_initialized()
assert not [m for m in sys.modules if m.split(".")[0] in ("lightning", "pytorch_lightning")]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
