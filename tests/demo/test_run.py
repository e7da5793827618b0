"""Laws of the demo as a whole: it learns, writes what it names, and goes on where it was ended."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrain.demo.model import ByteGPT, GPTConfig
from fasttrain.demo.pace import Pace
from fasttrain.demo.run import PLAN, Size, demo
from fasttrain.demo.text import Text
from fasttrain.errors import OptionError

SIZES = {"small": Size(config=GPTConfig(layers=1, heads=2, width=16, block=16, lr=1e-2, warmup_steps=5), batch=8, sample_bytes=20)}
TEXT = torch.frombuffer(bytearray(b"for i in range(10):\n    print(i)\n" * 1000), dtype=torch.uint8)
STAGE = Text(train=TEXT, validation=TEXT[:2000], train_files=2, validation_files=1)


def run(out: Path, **changes: Any) -> bool:
    return demo(**({"out": out, "max_time": 1.0, "capture": "eager", "precision": "32-true", "text": STAGE, "sizes": SIZES} | changes))


def rows_of(printed: str) -> dict[str, str]:
    """The summary's rows."""
    return {name.strip(): value for name, value in re.findall(r"^  (\S.{13}) (.+)$", printed, re.MULTILINE)}


def test_it_learns_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The summary's bits are below the entropy beside them, its checkpoint and metrics are there, and it samples."""
    assert run(tmp_path)
    printed = capsys.readouterr().out
    rows = rows_of(printed)
    bits, entropy = map(float, re.findall(r"\d+\.\d+", rows["bits per byte"]))
    assert bits < entropy
    assert {"parameters", "steps", "tokens seen", "tokens/s", "rung", "val loss"} <= set(rows)
    assert (Path(rows["checkpoint"]) / "model.safetensors").is_file()
    lines = [json.loads(line) for line in Path(rows["metrics"].split(" and ")[0]).read_text().splitlines()]
    logged = {name for line in lines for name in line["metrics"]}
    assert {"train_loss", "val_loss", "tokens_per_s"} <= logged
    assert "what it writes" in printed


def test_ctrl_c_writes_everything_and_resume_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An interrupted run ends with a summary and a checkpoint; resumed, it does the rest of its plan and no more."""
    calls = 0
    forward = ByteGPT.training_step

    def interrupting(self: ByteGPT, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, batch, batch_idx)

    monkeypatch.setattr(ByteGPT, "training_step", interrupting)
    assert not run(tmp_path)
    rows = rows_of(capsys.readouterr().out)
    assert "ended by ctrl-C" in rows["steps"]
    assert Path(rows["checkpoint"]).is_dir()
    monkeypatch.setattr(ByteGPT, "training_step", forward)
    assert run(tmp_path, resume=True, max_time=30.0)
    planned = json.loads((tmp_path / "version_0" / PLAN).read_text())["steps"]
    assert rows_of(capsys.readouterr().out)["steps"] == f"{planned:,} (as planned)"
    assert not (tmp_path / "version_1").exists()


def test_resume_refuses_what_does_not_fit(tmp_path: Path) -> None:
    """Nothing to resume from, or another seed than the run's, is a sentence."""
    with pytest.raises(OptionError, match="no checkpoint below"):
        run(tmp_path, resume=True)
    run(tmp_path)
    with pytest.raises(OptionError, match=r"--seed: got 5; wanted 0"):
        run(tmp_path, resume=True, seed=5)


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    """--out below a file is refused before anything is trained."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="--out"):
        run(tmp_path / "file" / "below")


def test_a_slow_machine_ends_the_cosine_early() -> None:
    """With half the steps done in all of the time, the rate's end moves to where the run will stop, never beyond the plan."""

    class Trainer:
        global_step, capture = 0, None

    model, trainer = ByteGPT(SIZES["small"].config), Trainer()
    model.log = lambda *arguments: None
    for max_time, expected in ((1e-9, 50), (1e9, 100)):
        pace = Pace(max_time, 100, 128)
        trainer.global_step = 0
        pace.on_train_start(trainer, model)
        trainer.global_step = 50
        pace.on_validation_start(trainer, model)
        pace.on_validation_epoch_end(trainer, model)
        assert model.steps == expected
