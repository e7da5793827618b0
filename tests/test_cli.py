"""Laws of the command line: it answers before torch is there, one sentence for an error, the right exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fasttrain import __version__, cli
from fasttrain.errors import OptionError

FACTORY = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

class Branches(Plain):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * 2 if round(loss.item(), 6) > 1 else loss

def loader():
    return DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=4)

def plain():
    return Plain(), loader()

def eager():
    return Plain(), loader(), {"capture": "eager", "gradient_clip_val": 1.0}

def branches():
    return Branches(), loader()

def wrong():
    return Plain()
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"factories_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


def test_the_command_line_is_there_before_torch() -> None:
    """Importing it imports neither torch nor rich, so that the first line comes at once."""
    code = "import sys, fasttrain.cli; print(sorted({'torch', 'rich', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_env_as_a_command() -> None:
    """``python -m fasttrain.cli env`` prints a line for each fact and nothing to stderr."""
    done = subprocess.run([sys.executable, "-m", "fasttrain.cli", "env"], capture_output=True, text=True, check=True)
    names = [line.split(":")[0] for line in done.stdout.splitlines()]
    assert names[0] == "fasttrain"
    assert {"torch", "python", "cpu", "native library", "C++ compiler", "rungs", "CUDA devices"} <= set(names)
    assert done.stderr == ""


def test_env_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """``env --json`` is one JSON object with the same facts."""
    assert cli.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fasttrain"] == __version__
    assert found["rungs"]["eager"] == "yes"
    assert found["cores"]["usable"] >= 1


def test_explain_says_how_the_step_runs(factories: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The factory's options are used, and the report of the one step is printed."""
    assert cli.main(["explain", f"{factories}:eager"]) == 0
    assert "rung: eager (asked for)" in capsys.readouterr().out


def test_explain_names_what_stands_in_the_way(factories: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A step that cannot be captured whole is told by file and line, with exit code 1."""
    assert cli.main(["explain", f"{factories}:branches"]) == 1
    assert f"{factories}.py:" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["nowhere:plain", "nothing", "{}:absent", "{}:wrong"])
def test_a_wrong_factory_is_one_sentence(name: str, factories: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What came and what was wanted, on stderr, with exit code 2 and no traceback."""
    assert cli.main(["explain", name.format(factories)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fasttrain: ")
    assert "wanted" in error
    assert "Traceback" not in error


def test_an_error_of_ours_is_exit_code_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A FasttrainError becomes its sentence."""

    def fail(arguments: object) -> int:
        raise OptionError("this: got that; wanted more.")

    monkeypatch.setattr(cli, "_env", fail)
    assert cli.main(["env"]) == 2
    assert capsys.readouterr().err == "fasttrain: this: got that; wanted more.\n"


def test_ctrl_c_is_exit_code_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A KeyboardInterrupt ends a command without a traceback."""

    def interrupted(arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_env", interrupted)
    assert cli.main(["env"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["demo", "--max-time", "0"], ["demo", "--size", "huge"], ["train"]])
def test_wrong_arguments_are_exit_code_2(argv: list[str]) -> None:
    """argparse says what is wrong before anything is imported."""
    with pytest.raises(SystemExit) as error:
        cli.main(argv)
    assert error.value.code == 2
