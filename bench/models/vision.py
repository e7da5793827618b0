"""Images, without torchvision: ResNet-18 for 32x32, a small ViT, a U-Net and a DCGAN."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.dense import Classifier
from bench.models.text import Block


class Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2015)."""

    def __init__(self, come: int, go: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(come, go, 3, stride, 1, bias=False), nn.BatchNorm2d(go)
        self.conv2, self.norm2 = nn.Conv2d(go, go, 3, 1, 1, bias=False), nn.BatchNorm2d(go)
        same = come == go and stride == 1
        self.short = nn.Identity() if same else nn.Sequential(nn.Conv2d(come, go, 1, stride, bias=False), nn.BatchNorm2d(go))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.short(x))


class ResNet18(Classifier):
    """Two blocks of each of four widths, a 3x3 stem for 32x32 images; ``width`` 64 is the published one."""

    def __init__(self, width: int = 64, blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        stages = [
            Residual(widths[s] if b == 0 else widths[s + 1], widths[s + 1], 2 if s > 0 and b == 0 else 1)
            for s in range(4)
            for b in range(blocks)
        ]
        self.body, self.head = nn.Sequential(*stages), nn.Linear(8 * width, 10)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, 32, 32] -> [B, 10]
        return self.head(self.body(self.stem(x)).mean((2, 3)))

    def optimizer(self, **extra: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4, **extra)

    def rows(self, n: int) -> tuple[Tensor, ...]:
        return torch.randn(n, 3, 32, 32), torch.randint(10, (n,))


class ViT(Classifier):
    """Patches of 4x4, a class token, blocks without dropout (Dosovitskiy et al. 2020)."""

    def __init__(self, width: int = 64, layers: int = 4, heads: int = 4, patch: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.first, self.place = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.randn(1, (32 // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, 32, 32] -> [B, 10]
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.first.expand(len(h), -1, -1), h], 1) + self.place
        return self.head(self.norm(self.blocks(h))[:, 0])

    def optimizer(self, **extra: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-4, **extra)

    def rows(self, n: int) -> tuple[Tensor, ...]:
        return torch.randn(n, 3, 32, 32), torch.randint(10, (n,))


def _double(come: int, go: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(come, go, 3, padding=1, bias=False), nn.BatchNorm2d(go), nn.ReLU(),
        nn.Conv2d(go, go, 3, padding=1, bias=False), nn.BatchNorm2d(go), nn.ReLU(),
    )  # fmt: skip


class UNet(Classifier):
    """Down, across and up with skip connections, a mask out (Ronneberger et al. 2015)."""

    def __init__(self, width: int = 16, levels: int = 3) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(levels + 1)]
        self.down = nn.ModuleList(_double(3 if i == 0 else widths[i - 1], w) for i, w in enumerate(widths))
        self.rise = nn.ModuleList(nn.ConvTranspose2d(widths[i + 1], widths[i], 2, 2) for i in reversed(range(levels)))
        self.up = nn.ModuleList(_double(2 * widths[i], widths[i]) for i in reversed(range(levels)))
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, 32, 32] -> [B, 1, 32, 32]
        kept = []
        for i, level in enumerate(self.down):
            x = level(F.max_pool2d(x, 2) if i else x)
            kept.append(x)
        kept.pop()
        for rise, up in zip(self.rise, self.up, strict=True):
            x = up(torch.cat([kept.pop(), rise(x)], 1))
        return self.head(x)

    def score(self, out: Tensor, batch: Any) -> Tensor:
        return F.binary_cross_entropy_with_logits(out, batch[1])

    def optimizer(self, **extra: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-4, **extra)

    def rows(self, n: int) -> tuple[Tensor, ...]:
        x = torch.randn(n, 3, 32, 32)
        return x, (F.avg_pool2d(x.mean(1, keepdim=True), 5, 1, 2) > 0).float()


class DCGAN(nn.Module):
    """Two convolutional networks that play against each other (Radford et al. 2015); the noise comes with the batch's seed."""

    def __init__(self, width: int = 16, latent: int = 16) -> None:
        super().__init__()
        self.latent = latent
        self.generator = nn.Sequential(
            nn.ConvTranspose2d(latent, 2 * width, 4, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU(),  # 4x4
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),  # 8x8
            nn.ConvTranspose2d(width, 1, 4, 2, 1), nn.Tanh(),  # 16x16
        )  # fmt: skip
        self.discriminator = nn.Sequential(
            nn.Conv2d(1, width, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 4), nn.Flatten(0),
        )  # fmt: skip

    def losses(self, batch: Any) -> Iterator[Tensor]:
        """The discriminator's loss, then the generator's, by the discriminator that has just learnt."""
        real = batch[0]
        fake = self.generator(torch.randn(len(real), self.latent, 1, 1, device=real.device))
        yield (judged(self.discriminator(real), 1.0) + judged(self.discriminator(fake.detach()), 0.0)) / 2
        yield judged(self.discriminator(fake), 1.0)

    def optimizers_of(self, **extra: Any) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999), **extra) for net in (self.discriminator, self.generator)]

    def rows(self, n: int) -> tuple[Tensor, ...]:
        return (F.avg_pool2d(torch.rand(n, 1, 20, 20) * 2 - 1, 5, 1),)


def judged(logits: Tensor, as_what: float) -> Tensor:
    """The loss of a judgement ``[B]`` that should have been ``as_what``."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, as_what))
