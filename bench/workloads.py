"""The models people measure trainers with: one module each, unchanged for every framework."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class LogisticRegression(nn.Module):
    """Lightning issue 8857: one linear layer, plain SGD."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(784, 10)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.layer(x), y)

    def optimizer(self, **extra: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3, **extra)


class Autoencoder(nn.Module):
    """Lightning issue 6196: 784-128-64-12-3 and back, Adam."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [784, 128, 64, 12, 3]
        self.encoder = _mlp(sizes)
        self.decoder = _mlp(sizes[::-1])

    def loss(self, batch: Any) -> Tensor:
        x = batch[0]
        return F.mse_loss(self.decoder(self.encoder(x)), x)

    def optimizer(self, **extra: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3, **extra)


class SmallTensors(nn.Module):
    """75 linear layers of 64: 150 small tensors, AdamW. Bound by overhead, not by arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(74):
            layers += [nn.Linear(64, 64), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(64, 10))

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def optimizer(self, **extra: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, **extra)


class CharGPT(nn.Module):
    """4 layers, 4 heads, width 128, context 64: nanoGPT's CPU recipe, AdamW. Bound by matrix products."""

    def __init__(self, vocabulary: int = 65, width: int = 128, layers: int = 4, heads: int = 4, context: int = 64) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(vocabulary, width), nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.token.weight
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers))

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        h = self.token(x) + self.place
        for block in self.blocks:
            h = block(h)
        return F.cross_entropy(self.head(self.norm(h)).flatten(0, 1), y.flatten())

    def optimizer(self, **extra: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, **extra)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (z.view(b, t, self.heads, c // self.heads).transpose(1, 2) for z in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, c)
        x = x + self.out(attended)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def _mlp(sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(sizes)):
        layers += [nn.Linear(a, b)] + ([nn.ReLU()] if i < len(sizes) - 2 else [])
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class Workload:
    """A module, its data, and how much of it makes one measured round."""

    name: str
    make: Callable[[], Any]
    rows: Callable[[int], tuple[Tensor, ...]]
    batch: int
    batches: int
    passes: int = 1  # epochs in a measured round: long enough that waking up is not what is measured
    precision: str = "32-true"

    def loader(self) -> DataLoader[Any]:
        torch.manual_seed(7)
        return DataLoader(TensorDataset(*self.rows(self.batch * self.batches)), batch_size=self.batch, shuffle=True)


def _images(n: int) -> tuple[Tensor, ...]:
    return torch.rand(n, 784), torch.randint(10, (n,))


def _vectors(n: int) -> tuple[Tensor, ...]:
    return torch.randn(n, 64), torch.randint(10, (n,))


def _text(n: int) -> tuple[Tensor, ...]:
    tokens = torch.randint(65, (n, 65))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


WORKLOADS = {
    w.name: w
    for w in (
        Workload("logistic_regression", LogisticRegression, _images, 32, 400, passes=8),
        Workload("autoencoder", Autoencoder, _images, 32, 200, passes=2),
        Workload("small_tensors", SmallTensors, _vectors, 32, 60),
        Workload("char_gpt", CharGPT, _text, 12, 20),
        Workload("char_gpt_bf16", CharGPT, _text, 12, 20, precision="bf16-mixed"),
    )
}
