"""``optimizer_step`` by hand: a warm-up, and optimizers that move every second and every fourth batch.

Run it: ``python examples/warmup_by_hand.py --epochs 20 --capture compile``
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fasttrain

WARMUP, EVERY = 50, (2, 4)  # updates until the whole learning rate; batches between updates of each optimizer


class Slow(nn.Module):
    """A body and a head with an optimizer each; the head moves half as often."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh()), nn.Linear(32, 1)
        self.moved = [0, 0]
        self.lrs: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int, optimizer_idx: int) -> Tensor:
        x, y = batch
        return F.mse_loss(self.head(self.body(x)), y)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer, optimizer_idx: int, optimizer_closure: Callable[[], Any]
    ) -> None:
        """``optimizer_closure`` runs training_step and backward; ``step`` calls it, and who does not step calls it himself."""
        if (batch_idx + 1) % EVERY[optimizer_idx]:
            optimizer_closure()
            return
        self.moved[optimizer_idx] += 1
        for group in optimizer.param_groups:
            group["lr"] = min(1.0, self.moved[optimizer_idx] / WARMUP) * group["initial_lr"]
        self.lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step(closure=optimizer_closure)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam([{"params": list(part.parameters()), "initial_lr": lr}]) for part, lr in ((self.body, 5e-3), (self.head, 1e-2))
        ]


def surface(count: int) -> tuple[Tensor, Tensor]:
    """Points ``[count, 4]`` and a smooth function of them ``[count, 1]``."""
    x = torch.rand(count, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return x, (3 * x[:, :1]).sin() + x[:, 1:2] * x[:, 2:3]


@torch.no_grad()
def error(module: Slow, x: Tensor, y: Tensor) -> float:
    """Share of the variance that is not explained."""
    return float(F.mse_loss(module.head(module.body(x)), y) / y.var())


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, print what was learnt, and give it back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--max-time", type=float, default=60.0, help="seconds of training at most")
    parser.add_argument("--capture", default="auto", choices=["auto", "eager", "compile"])
    args = parser.parse_args(argv)
    fasttrain.seed_everything(0)
    module, (x, y) = Slow(), surface(1024)
    before = error(module, x, y)
    trainer = fasttrain.compile_fit(
        module,
        max_epochs=args.epochs,
        max_time=timedelta(seconds=args.max_time),
        capture=args.capture,
        logger=False,
        enable_checkpointing=False,
    )
    result = trainer.fit(DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True))
    after = error(module, x, y)
    print(f"unexplained variance: {before:.3f} before, {after:.3f} after {result.steps} batches")
    print(f"updates: body {module.moved[0]}, head {module.moved[1]}; learning rate from {module.lrs[0]:.1e} to {module.lrs[-1]:.1e}")
    print(trainer.explain().splitlines()[0])
    return {"before": before, "after": after, "batches": result.steps, "body": module.moved[0], "head": module.moved[1]}


if __name__ == "__main__":
    main()
