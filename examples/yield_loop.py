"""The extension point ``turns=``: a few lines of your own replace how the optimizers take their turns; the module stays as it is.

The module's own training_step is asked for each optimizer's loss and encodes the batch for each of them. With ``turns``
the batch is encoded once (the YieldLoop of Lightning's documents). Run it: ``python examples/yield_loop.py --epochs 20 --capture compile``
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fasttrain


class CodeAndLabel(nn.Module):
    """An autoencoder of points, and a classifier that reads its code."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2))
        self.decoder = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 8))
        self.classifier = nn.Linear(2, 4)

    def reconstruction(self, code: Tensor, x: Tensor) -> Tensor:
        return F.mse_loss(self.decoder(code), x)

    def classification(self, code: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.classifier(code), y)

    def training_step(self, batch: list[Tensor], batch_idx: int, optimizer_idx: int) -> Tensor:
        """Not called when ``turns`` is given."""
        x, y = batch
        code = self.encoder(x)
        return self.reconstruction(code, x) if optimizer_idx == 0 else self.classification(code.detach(), y)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        coder = torch.optim.Adam([*self.encoder.parameters(), *self.decoder.parameters()], lr=5e-3)
        return [coder, torch.optim.SGD(self.classifier.parameters(), lr=0.2)]


def turns(module: CodeAndLabel, batch: list[Tensor], batch_idx: int) -> Iterator[Tensor]:
    """One loss a yield, in the order of configure_optimizers; what stands behind a yield sees that optimizer's update."""
    x, y = batch
    code = module.encoder(x)
    yield module.reconstruction(code, x)  # the first optimizer: encoder and decoder
    yield module.classification(code.detach(), y)  # the second: the classifier


def points(count: int) -> tuple[Tensor, Tensor]:
    """Four clouds in eight dimensions, ``[count, 8]``, and which one each point is of, ``[count]``."""
    g = torch.Generator().manual_seed(1)
    places, y = 2 * torch.randn(4, 8, generator=g), torch.randint(4, (count,), generator=g)
    return places[y] + 0.5 * torch.randn(count, 8, generator=g), y


@torch.no_grad()
def accuracy(module: CodeAndLabel, x: Tensor, y: Tensor) -> float:
    """Share of points whose cloud the classifier names."""
    return float((module.classifier(module.encoder(x)).argmax(1) == y).float().mean())


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, print what was learnt, and give it back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--max-time", type=float, default=60.0, help="seconds of training at most")
    parser.add_argument("--capture", default="auto", choices=["auto", "eager", "compile"])
    args = parser.parse_args(argv)
    fasttrain.seed_everything(0)
    module, (x, y) = CodeAndLabel(), points(1024)
    before = accuracy(module, x, y)
    trainer = fasttrain.compile_fit(
        module,
        turns=turns,
        max_epochs=args.epochs,
        max_time=timedelta(seconds=args.max_time),
        capture=args.capture,
        logger=False,
        enable_checkpointing=False,
    )
    result = trainer.fit(DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True))
    after = accuracy(module, x, y)
    print(f"accuracy: {before:.2f} before, {after:.2f} after {result.steps} batches")
    print(trainer.explain().splitlines()[0])
    return {"before": before, "after": after, "batches": result.steps}


if __name__ == "__main__":
    main()
