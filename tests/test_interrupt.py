"""A run that is stopped from outside: ctrl-C with loader workers, a kill between two renames, a loader's own generator."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fasttrain
from fasttrain import checkpoint
from fasttrain.callbacks import ModelCheckpoint

SCRIPT = """
import sys, time, torch, fasttrain
from torch.utils.data import DataLoader, Dataset
torch.set_num_threads(1)
class Rows(Dataset):
    def __len__(self): return 400
    def __getitem__(self, i): time.sleep(0.002); return torch.randn(4), torch.randn(1)
class M(torch.nn.Module):
    def __init__(self):
        super().__init__(); self.net = torch.nn.Linear(4, 1)
    def training_step(self, batch, i):
        print("batch", i, flush=True)
        return (self.net(batch[0]) - batch[1]).square().mean()
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), lr=0.01)
if __name__ == "__main__":
    quiet = dict(logger=False, enable_progress_bar=False, default_root_dir=sys.argv[1])
    trainer = fasttrain.compile_fit(M(), capture="eager", max_epochs=50, **quiet)
    trainer.fit(DataLoader(Rows(), batch_size=20, num_workers=2))
"""


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="no signal masks here")
def test_ctrl_c_reaches_the_run_and_not_its_workers(tmp_path: Path) -> None:
    """A terminal sends SIGINT to the whole group; the workers' last batches are still wanted."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("batch 3"):
                break
        os.killpg(process.pid, signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert "KeyboardInterrupt" in errors, errors
    assert "DataError" not in errors, errors
    saved = checkpoint.newest([tmp_path / "out"])
    assert saved is not None
    assert saved.name.startswith("interrupted")


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def state(step: int) -> dict[str, Any]:
        return {"state_dict": {"w": torch.full((2,), float(step))}, "epoch": 0, "global_step": step}

    path = checkpoint.write(tmp_path / "last", state(1))
    real, renames = os.replace, []

    def dying(a: Any, b: Any) -> None:
        renames.append(a)
        if len(renames) == 2:
            raise SystemExit
        real(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        patch.setattr(checkpoint.shutil, "rmtree", lambda *a, **k: None)  # a killed process cleans nothing up
        with pytest.raises(SystemExit):
            checkpoint.write(path, state(2))
    assert not path.exists()
    left = checkpoint.newest([tmp_path])
    assert left is not None
    assert checkpoint.read(left)["global_step"] == 2
    checkpoint.write(path, state(3))
    assert os.listdir(tmp_path) == ["last"]
    assert checkpoint.newest([tmp_path]) == path


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("at", [3, 5, 7])
def test_a_loader_with_its_own_generator_resumes_in_its_order(tmp_path: Path, at: int, workers: int) -> None:
    g = torch.Generator().manual_seed(9)
    rows = TensorDataset(torch.randn(40, 4, generator=g), torch.randn(40, 1, generator=g))

    def run(folder: str, steps: int, ckpt_path: str | None = None) -> list[Tensor]:
        torch.manual_seed(0)
        module, root = Net(), tmp_path / folder
        keeps = ModelCheckpoint(dirpath=root, every_n_train_steps=1, save_top_k=-1)
        options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "max_epochs": 4, "default_root_dir": root}
        trainer = fasttrain.compile_fit(module, capture="eager", max_steps=steps, callbacks=[keeps], **options)
        loader = DataLoader(rows, 8, shuffle=True, generator=torch.Generator().manual_seed(3), num_workers=workers)
        trainer.fit(loader, ckpt_path=ckpt_path)
        return list(module.parameters())

    whole = run("whole", 15)
    run("parts", at)
    resumed = run("parts", 15, "last")
    assert all(torch.equal(p, q) for p, q in zip(whole, resumed, strict=True))
