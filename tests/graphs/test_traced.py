"""Which batches run captured: the same ones in a run that was stopped and resumed as in the run that never was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttrain.graphs import traced
from fasttrain.graphs.traced import TracedCall
from tests.forms.pairs import Saves, assert_resumes, same_weights, slow, trained

WIDTH = 12


class Net(nn.Module):
    """Takes sequences of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.b(torch.tanh(self.a(batch))) - batch.flip(-1)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Drawing(Net):
    """Its distribution's arguments are looked at every so many steps."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        mean, spread = self.a(batch).chunk(2, -1)
        drawn = torch.distributions.Normal(mean, torch.nn.functional.softplus(spread)).rsample()
        return (drawn - batch.mean(-1, keepdim=True)).square().mean()


def of_lengths(*lengths: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(5)
    return [torch.randn(4, n, WIDTH, generator=g) for n in lengths]


RAGGED = {
    "a short last batch": [7] * 4 + [3],
    "a short first batch": [3] + [7] * 4,
    "one odd batch in twelve": [7] * 6 + [3] + [7] * 5,
    "every length": [7, 5, 9, 7, 3, 11, 5, 8, 6, 2],
}


@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize("at", [4, pytest.param(10, marks=slow), pytest.param(21, marks=slow)])
def test_a_captured_run_over_batches_of_many_sizes_resumes(lengths: list[int], at: int, tmp_path: Path) -> None:
    """Bit for bit, wherever it was saved."""
    assert_resumes(Net, [at], tmp_path, "compile", data=lambda: of_lengths(*lengths), max_epochs=5)


def test_looks_at_the_arguments_come_at_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fifth step runs op by op, counted over the resume."""
    monkeypatch.setattr(traced, "VALIDATE_EVERY", 5)
    looked: list[list[int]] = []
    real = TracedCall.untraced

    def untraced(self: TracedCall, batch: Any, batch_idx: int) -> Any:
        looked[-1].append(self.count)
        return real(self, batch, batch_idx)

    monkeypatch.setattr(TracedCall, "untraced", untraced)
    for at, resumes in ((7, False), (7, True)):
        looked.append([])
        path = tmp_path / "saved"
        trained(Drawing, of_lengths(*[7] * 9), "compile", ckpt_path=path if resumes else None,
                callbacks=[Saves(None if resumes else path, at)])  # fmt: skip
    assert [sorted(set(steps)) for steps in looked] == [[5, 10, 15], [10, 15]]  # 10 was tried too, before the run went on


def test_batches_of_another_size_after_a_resume_get_the_graph(tmp_path: Path) -> None:
    """Somebody goes on with other batches: after a few they are what is captured."""
    trained(Net, of_lengths(*[7] * 200), "compile", max_epochs=1, callbacks=[Saves(tmp_path / "saved", 200)])
    ours = trained(Net, of_lengths(*[9] * 40), "compile", max_epochs=2, ckpt_path=tmp_path / "saved")
    assert ours.result.capture.direct


def test_a_rare_size_gets_no_graph_however_the_others_were_called() -> None:
    """One in twenty stays op by op, where somebody's code runs between the steps and where it does not."""
    lengths = [7] * 19 + [3]
    quick, hooked = (trained(Net, of_lengths(*lengths), "compile", max_epochs=10, callbacks=c) for c in ([], [Saves(None, 0)]))
    assert quick.result.capture.traces == hooked.result.capture.traces == 1
    same_weights(quick, hooked)


def test_a_checkpoint_without_the_count_still_loads(tmp_path: Path) -> None:
    """It was not kept once."""
    path, data = tmp_path / "saved", of_lengths(*[7] * 6)
    whole = trained(Net, data, "compile", callbacks=[Saves(path, 4)])
    text = (path / "state.json").read_text()
    assert '"calls"' in text
    (path / "state.json").write_text(text.replace('"calls"', '"unknown"'))
    manifest = json.loads((path / "manifest.json").read_text())
    written = (path / "state.json").read_bytes()
    manifest["files"]["state.json"] = {"bytes": len(written), "sha256": hashlib.sha256(written).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    same_weights(trained(Net, data, "compile", ckpt_path=path, seed=11), whole)
