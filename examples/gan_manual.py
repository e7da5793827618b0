"""The GAN of dcgan.py by manual optimization: the step toggles the optimizers, goes backward and steps them itself.

Run it: ``python examples/gan_manual.py --epochs 10 --capture compile``
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fasttrain

SIZE, LATENT = 16, 16


class ManualGAN(nn.Module):
    """Two convolutional networks and two optimizers: the discriminator's is the first."""

    generated: Tensor  # forwards of the generator in training: a buffer, so that captured steps count too

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.ConvTranspose2d(LATENT, 32, 4), nn.BatchNorm2d(32), nn.ReLU(),  # 4x4
            nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),  # 8x8
            nn.ConvTranspose2d(16, 1, 4, 2, 1), nn.Tanh(),  # 16x16
        )  # fmt: skip
        self.discriminator = nn.Sequential(
            nn.Conv2d(1, 16, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(16, 32, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(32, 1, 4), nn.Flatten(0),
        )  # fmt: skip
        self.register_buffer("generated", torch.zeros(()))

    def forward(self, z: Tensor) -> Tensor:  # [B, LATENT] -> [B, 1, 16, 16]
        if self.training:
            self.generated += 1
        images: Tensor = self.generator(z[:, :, None, None])
        return images

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        real = batch[0]
        d, g = self.optimizers()
        fake = self(torch.randn(len(real), LATENT))
        self.toggle_optimizer(d)  # from here on nothing but the discriminator wants a gradient
        self.manual_backward((judged(self.discriminator(real), 1.0) + judged(self.discriminator(fake.detach()), 0.0)) / 2)
        d.step()
        d.zero_grad()
        self.untoggle_optimizer(d)
        self.toggle_optimizer(g)
        self.manual_backward(judged(self.discriminator(fake), 1.0))  # by the discriminator that has just learnt
        g.step()
        g.zero_grad()
        self.untoggle_optimizer(g)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.5, 0.999)) for net in (self.discriminator, self.generator)]


def judged(logits: Tensor, as_what: float) -> Tensor:
    """The loss of a judgement ``[B]`` that should have been ``as_what``."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, as_what))


def discs(count: int) -> Tensor:
    """Bright discs of any place and size on a dark ground, ``[count, 1, 16, 16]`` in -1..1."""
    g = torch.Generator().manual_seed(1)
    x, y = (torch.rand(count, 1, 1, generator=g) * 6 + 5 for _ in range(2))
    radius = torch.rand(count, 1, 1, generator=g) * 2 + 2
    grid = torch.arange(SIZE)
    distance = ((grid[None, None] - x) ** 2 + (grid[None, :, None] - y) ** 2).sqrt()
    return (radius - distance).clamp(-1, 1)[:, None]


@torch.no_grad()
def distance(module: ManualGAN, real: Tensor) -> float:
    """Energy distance between drawn and generated images: 0 when they are alike (Szekely and Rizzo 2013)."""
    module.eval()
    a, b = real.flatten(1), module(torch.randn(len(real), LATENT, generator=torch.Generator().manual_seed(2))).flatten(1)
    module.train()
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, print what was learnt, and give it back."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--max-time", type=float, default=120.0, help="seconds of training at most")
    parser.add_argument("--capture", default="auto", choices=["auto", "eager", "compile"])
    args = parser.parse_args(argv)
    fasttrain.seed_everything(0)
    module, images = ManualGAN(), discs(1024)
    before = distance(module, images[:256])
    trainer = fasttrain.compile_fit(
        module,
        max_epochs=args.epochs,
        max_time=timedelta(seconds=args.max_time),
        capture=args.capture,
        logger=False,
        enable_checkpointing=False,
    )
    result = trainer.fit(DataLoader(TensorDataset(images), batch_size=32, shuffle=True, drop_last=True))
    after = distance(module, images[:256])
    print(f"energy distance to the drawn images: {before:.3f} before, {after:.3f} after {result.steps} batches")
    print(f"generator forwards: {int(module.generated)}, one a batch")
    print(trainer.explain().splitlines()[0])
    return {"before": before, "after": after, "batches": result.steps, "generated": float(module.generated)}


if __name__ == "__main__":
    main()
