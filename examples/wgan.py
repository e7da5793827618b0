"""A Wasserstein GAN on eight gaussians in a ring: ``optimizer_idx`` and ``frequency``, five batches for the critic, one for the generator.

Run it: ``python examples/wgan.py --epochs 30 --capture compile``
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fasttrain

N_CRITIC, CLIP, LATENT = 5, 0.1, 4


class WGAN(nn.Module):
    """Arjovsky et al. 2017: the critic's weights are kept in a box, which keeps it Lipschitz."""

    def __init__(self) -> None:
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
        self.generator = nn.Sequential(nn.Linear(LATENT, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, z: Tensor) -> Tensor:  # [B, LATENT] -> [B, 2]
        points: Tensor = self.generator(z)
        return points

    def training_step(self, batch: list[Tensor], batch_idx: int, optimizer_idx: int) -> Tensor:
        """Once for the optimizer whose turn this batch is."""
        self.clip_critic()  # before anybody looks at it: the same as after its update
        fake = self(torch.randn(len(batch[0]), LATENT))
        if optimizer_idx == 0:
            distance = self.critic(batch[0]).mean() - self.critic(fake).mean()
            self.log("distance", distance, on_epoch=True, prog_bar=True)
            return -distance
        return -self.critic(fake).mean()

    @torch.no_grad()
    def clip_critic(self) -> None:
        for p in self.critic.parameters():
            p.clamp_(-CLIP, CLIP)

    def configure_optimizers(self) -> list[dict[str, Any]]:
        return [
            {"optimizer": torch.optim.Adam(self.critic.parameters(), lr=2e-3, betas=(0.0, 0.99)), "frequency": N_CRITIC},
            {"optimizer": torch.optim.Adam(self.generator.parameters(), lr=2e-3, betas=(0.0, 0.99)), "frequency": 1},
        ]


def ring(count: int, seed: int) -> Tensor:
    """Points ``[count, 2]`` around eight places on a circle of radius 2."""
    g = torch.Generator().manual_seed(seed)
    angle = torch.randint(8, (count,), generator=g) * (math.pi / 4)
    return 2 * torch.stack([angle.cos(), angle.sin()], 1) + 0.1 * torch.randn(count, 2, generator=g)


@torch.no_grad()
def distance(module: WGAN, real: Tensor) -> float:
    """Energy distance between drawn and generated points: 0 when they are alike (Szekely and Rizzo 2013)."""
    a, b = real, module(torch.randn(len(real), LATENT, generator=torch.Generator().manual_seed(2)))
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, print what was learnt, and give it back."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--max-time", type=float, default=120.0, help="seconds of training at most")
    parser.add_argument("--capture", default="auto", choices=["auto", "eager", "compile"])
    args = parser.parse_args(argv)
    fasttrain.seed_everything(0)
    module, points = WGAN(), ring(6144, seed=1)
    before = distance(module, ring(512, seed=3))
    trainer = fasttrain.compile_fit(
        module,
        max_epochs=args.epochs,
        max_time=timedelta(seconds=args.max_time),
        capture=args.capture,
        logger=False,
        enable_checkpointing=False,
    )
    result = trainer.fit(DataLoader(TensorDataset(points), batch_size=64, shuffle=True))
    after = distance(module, ring(512, seed=3))
    print(f"energy distance to the ring: {before:.3f} before, {after:.3f} after {result.steps} batches")
    print(trainer.explain().splitlines()[0])
    return {"before": before, "after": after, "batches": result.steps}


if __name__ == "__main__":
    main()
