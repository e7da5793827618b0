"""Laws of the loggers: every call is on disk when it returns, in a form that any reader takes."""

from __future__ import annotations

import argparse
import csv
import json
import math
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrain.errors import OptionError
from fasttrain.loggers import CsvLogger, JsonlLogger, TensorBoardLogger, make_loggers

KILLED = """
import os, signal, sys
from fasttrain.loggers import make_loggers
loggers = make_loggers(True, sys.argv[1])
for step in range(1000):
    for logger in loggers:
        logger.log_metrics({"loss": 1.0 / (step + 1)}, step=step)
os.kill(os.getpid(), signal.SIGKILL)
"""


def lines(path: str) -> list[dict[str, Any]]:
    """The lines, read by a parser that takes no NaN and no Infinity."""

    def refuse(name: str) -> float:
        raise AssertionError(name)

    return [json.loads(line, parse_constant=refuse) for line in Path(path).read_text().splitlines()]


def rows(path: str) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_line_holds_step_time_and_metrics(tmp_path: Path) -> None:
    """In the order of the calls; a tensor is a number; non-finite values are strings."""
    logger = JsonlLogger(tmp_path)
    before = time.time()
    logger.log_metrics({"loss": torch.tensor(0.5), "acc": 1}, step=3)  # type: ignore[dict-item]
    logger.log_metrics({"a": math.nan, "b": math.inf, "c": -math.inf, "step": 7.0}, step=4)
    first, second = lines(logger.path)
    assert (first["step"], first["metrics"]) == (3, {"loss": 0.5, "acc": 1.0})
    assert before <= first["time"] <= time.time()
    assert second["metrics"] == {"a": "nan", "b": "inf", "c": "-inf", "step": 7.0}


def test_columns_grow_and_earlier_rows_stay(tmp_path: Path) -> None:
    """A metric that comes later gets a column; who did not log it has nothing in it."""
    logger = CsvLogger(tmp_path)
    logger.log_metrics({"loss": 0.5}, step=1)
    logger.log_metrics({"val, loss": 0.25, "b": math.nan}, step=2)
    logger.log_metrics({"loss": 0.125}, step=3)
    assert rows(logger.path) == [
        {"step": "1", "loss": "0.5", "val, loss": "", "b": ""},
        {"step": "2", "loss": "", "val, loss": "0.25", "b": "nan"},
        {"step": "3", "loss": "0.125", "val, loss": "", "b": ""},
    ]


@pytest.mark.parametrize("kind", [JsonlLogger, CsvLogger])
def test_a_closed_or_reopened_logger_appends(kind: Any, tmp_path: Path) -> None:
    """After finalize, and in a second process that was given the same version."""
    logger = kind(tmp_path, version=0)
    logger.log_metrics({"a": 1.0}, step=1)
    logger.save()
    logger.finalize("success")
    logger.log_metrics({"a": 2.0}, step=2)
    logger.finalize("failed")
    kind(tmp_path, version=0).log_metrics({"a": 3.0, "b": 4.0}, step=3)
    found = rows(logger.path) if kind is CsvLogger else lines(logger.path)
    assert [int(row["step"]) for row in found] == [1, 2, 3]


def test_a_killed_run_keeps_every_line(tmp_path: Path) -> None:
    """SIGKILL right after the last call loses nothing."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    directory = tmp_path / "fasttrain_logs" / "version_0"
    assert [line["step"] for line in lines(str(directory / "metrics.jsonl"))] == list(range(1000))
    assert len(rows(str(directory / "metrics.csv"))) == 1000


def test_each_run_gets_its_own_version(tmp_path: Path) -> None:
    """The next free number, one for both default loggers; nothing is created before something is logged."""
    for expected in (0, 1, 2):
        loggers = make_loggers(True, tmp_path)
        assert len({logger.log_dir for logger in loggers}) == 1
        assert {logger.version for logger in loggers} == {expected}
        assert not Path(loggers[0].log_dir).exists()
        loggers[0].log_metrics({"a": 1.0}, step=0)
    assert JsonlLogger(tmp_path, version="named").log_dir == str(tmp_path / "fasttrain_logs" / "named")
    assert JsonlLogger(tmp_path, "x").version == 0
    assert CsvLogger(tmp_path).version == 3


def test_hyperparameters_are_written_in_any_form(tmp_path: Path) -> None:
    """A dict, a namespace, values that JSON does not know; nothing for None."""
    logger = JsonlLogger(tmp_path)
    logger.log_hyperparams(None)
    assert not Path(logger.log_dir).exists()
    logger.log_hyperparams({"lr": 0.1, "path": Path("x"), 3: "three"})
    assert json.loads(Path(logger.log_dir, "hparams.json").read_text()) == {"lr": 0.1, "path": "x", "3": "three"}
    logger.log_hyperparams(argparse.Namespace(lr=0.2))
    assert json.loads(Path(logger.log_dir, "hparams.json").read_text()) == {"lr": 0.2}


def test_the_option_is_a_switch_or_the_users_own(tmp_path: Path) -> None:
    """True and None give the defaults, False none, an object or a list itself; anything else is refused."""

    class Mine:
        def log_metrics(self, metrics: dict[str, float], step: int) -> None: ...

    mine = Mine()
    assert [type(logger) for logger in make_loggers(None, tmp_path)] == [JsonlLogger, CsvLogger]
    assert make_loggers(False, tmp_path) == make_loggers([], tmp_path) == []
    assert make_loggers(mine, tmp_path) == make_loggers([mine], tmp_path) == [mine]
    for wrong in ("csv", 1.5, [mine, None], Mine):
        with pytest.raises(OptionError, match="log_metrics"):
            make_loggers(wrong, tmp_path)


def test_tensorboard_is_written_or_explained(tmp_path: Path) -> None:
    """Without the package, a sentence says how to get it."""
    if find_spec("tensorboard") is None:
        with pytest.raises(OptionError, match=r"fasttrain\[tensorboard\]"):
            TensorBoardLogger(tmp_path)
    else:
        logger = TensorBoardLogger(tmp_path)
        logger.log_metrics({"a": 1.0}, step=0)
        logger.finalize("success")
        assert list(Path(logger.log_dir).glob("events*"))
