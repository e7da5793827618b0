"""Laws of agreement: with several ranks one that stops stops all, and rank zero's word is everybody's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from fasttrain.callbacks.agree import all_ranks, any_rank, from_rank_zero
from fasttrain.callbacks.early_stopping import EarlyStopping


def rank(index: int, root: str) -> None:
    """One of two processes."""
    dist.init_process_group("gloo", init_method=f"file://{root}/meet", rank=index, world_size=2)
    stop = EarlyStopping("x", patience=9)
    run = SimpleNamespace(
        callback_metrics={"x": torch.tensor(float("nan") if index else 0.5)},
        world_size=2,
        should_stop=False,
        current_epoch=4,
        is_global_zero=index == 0,
        val_check_interval=1.0,
        check_val_every_n_epoch=1,
        fast_dev_run=False,
        sanity_checking=False,
        state=SimpleNamespace(fn="fit"),
    )
    stop.on_train_epoch_end(run, None)  # type: ignore[arg-type]
    votes = [any_rank(bool(index), 2), all_ranks(bool(index), 2), all_ranks(True, 2), from_rank_zero(f"r{index}", 2)]
    Path(root, f"{index}.json").write_text(json.dumps([*votes, run.should_stop, stop.stopped_epoch]))
    dist.destroy_process_group()


def test_two_ranks_agree(tmp_path: Path) -> None:
    """Both have the same answers, also the one whose own metric is fine."""
    ranks = [subprocess.Popen([sys.executable, __file__, str(index), str(tmp_path)]) for index in (0, 1)]
    assert [process.wait(timeout=90) for process in ranks] == [0, 0]
    wanted = [True, False, True, "r0", True, 4]
    assert [json.loads((tmp_path / f"{index}.json").read_text()) for index in (0, 1)] == [wanted, wanted]


def test_one_rank_decides_alone() -> None:
    """Without a process group."""
    assert any_rank(True, 1)
    assert not all_ranks(False, 1)
    assert from_rank_zero("mine", 1) == "mine"


if __name__ == "__main__":
    rank(int(sys.argv[1]), sys.argv[2])
