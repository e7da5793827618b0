"""Linear layers: the workloads that are all overhead."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Classifier(nn.Module):
    """What every workload with one loss and one optimizer has: ``forward``, ``score`` and ``loss`` made of the two."""

    def score(self, out: Tensor, batch: Any) -> Tensor:
        """The loss of what ``forward`` gave for ``batch[0]``."""
        return F.cross_entropy(out, batch[1])

    def loss(self, batch: Any) -> Tensor:
        return self.score(self(batch[0]), batch)

    def observed(self, out: Tensor) -> dict[str, Tensor]:
        """What the logging variants log beside the loss."""
        out = out.detach().float()
        return {"mean": out.mean(), "largest": out.max(), "spread": out.std()}

    def optimizer(self, **extra: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, **extra)


class LogisticRegression(Classifier):
    """Lightning issue 8857: one linear layer, plain SGD."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(784, 10)

    def forward(self, x: Tensor) -> Tensor:  # [B, 784] -> [B, 10]
        return self.layer(x)

    def optimizer(self, **extra: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3, **extra)

    def rows(self, n: int) -> tuple[Tensor, ...]:
        return torch.rand(n, 784), torch.randint(10, (n,))


class Autoencoder(Classifier):
    """Lightning issue 6196: 784-128-64-12-3 and back, Adam."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [784, 128, 64, 12, 3]
        self.encoder, self.decoder = mlp(sizes), mlp(sizes[::-1])

    def forward(self, x: Tensor) -> Tensor:  # [B, 784] -> [B, 784]
        return self.decoder(self.encoder(x))

    def score(self, out: Tensor, batch: Any) -> Tensor:
        return F.mse_loss(out, batch[0])

    def optimizer(self, **extra: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3, **extra)

    def rows(self, n: int) -> tuple[Tensor, ...]:
        return torch.rand(n, 784), torch.randint(10, (n,))


class SmallTensors(Classifier):
    """75 linear layers of 64: 150 small tensors, AdamW."""

    def __init__(self, layers: int = 75) -> None:
        super().__init__()
        body: list[nn.Module] = []
        for _ in range(layers - 1):
            body += [nn.Linear(64, 64), nn.ReLU()]
        self.net = nn.Sequential(*body, nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:  # [B, 64] -> [B, 10]
        return self.net(x)

    def rows(self, n: int) -> tuple[Tensor, ...]:
        return torch.randn(n, 64), torch.randint(10, (n,))


def mlp(sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(sizes)):
        layers += [nn.Linear(a, b)] + ([nn.ReLU()] if i < len(sizes) - 2 else [])
    return nn.Sequential(*layers)
