"""Batches, equal for every side: plain shuffling, whose order is drawn from torch's seed when an epoch begins.

(With a generator of the loader's own the order would depend on whether a framework asks for one batch more than there are.)
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

DATA_SEED = 7
SLOW_S = 0.002  # what a batch of the slow loader waits for, as for a disk or a network


class Prepared(Dataset[Any]):
    """Rows that cost host work one by one: a flip and a normalisation, what an image pipeline does to a row."""

    def __init__(self, *rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows[0])

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        x, *rest = (t[i] for t in self.rows)
        x = x.flip(-1) if i % 2 else x
        return ((x - x.mean()) / (x.std() + 1e-5), *rest)


class Slow(TensorDataset):
    """Rows that are waited for; a whole batch at a time."""

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, ...]]:
        time.sleep(SLOW_S)
        return [self[i] for i in indices]


DATASETS = {"memory": TensorDataset, "worker": Prepared, "slow": Slow}


def make_loader(model: Any, kind: str, batch: int, batches: int, device: str) -> DataLoader[Any]:
    """A shuffled loader over ``batch * batches`` rows drawn from one seed; the global random stream is as it was before."""
    before = torch.get_rng_state()
    torch.manual_seed(DATA_SEED)
    rows = model.rows(batch * batches)
    torch.set_rng_state(before)
    workers: dict[str, Any] = {"num_workers": 1, "persistent_workers": True} if kind == "worker" else {}
    return DataLoader(DATASETS[kind](*rows), batch_size=batch, shuffle=True, pin_memory=device == "cuda", **workers)
