"""What a run keeps in memory between steps."""

from __future__ import annotations

import contextlib
import gc
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fasttrain


class Wide(nn.Module):
    """2 x 2 MB of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 8192), nn.ReLU(), nn.Linear(8192, 64))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = F.mse_loss(self.net(batch), batch)
        self.log("loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def live_bytes() -> int:
    """Bytes in the storages of every tensor that is alive."""
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter) and thing.layout == torch.strided:
            with contextlib.suppress(RuntimeError):  # a tracer's wrapper that has no storage
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Look:
    """Weighs memory after some steady batches, from the loader, between two steps."""

    def __init__(self, batches: list[torch.Tensor]) -> None:
        self.batches, self.bytes = batches, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        for i, batch in enumerate(self.batches):
            if i == len(self.batches) - 2:
                self.bytes = live_bytes()
            yield batch


def test_steady_memory_is_the_plain_loops() -> None:
    """Between captured steps no more is alive than between a plain loop's, plus one copy of the gradients."""
    data = Look([torch.randn(8, 64) for _ in range(30)])
    torch.manual_seed(0)
    plain = Wide()
    plain.log = lambda *args, **kwargs: None  # type: ignore[assignment]
    optimizer = plain.configure_optimizers()
    for i, batch in enumerate(data):
        optimizer.zero_grad()
        plain.training_step(batch, i).backward()
        optimizer.step()
    base, gradients = data.bytes, sum(p.numel() * p.element_size() for p in plain.parameters())
    del plain, optimizer
    torch.manual_seed(0)
    module = Wide()
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    result = fasttrain.compile_fit(module, max_epochs=1, capture="compile", **options).fit(data)
    assert result.capture.direct
    assert data.bytes <= base + gradients
