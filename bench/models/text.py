"""Sequences: a GPT of any size, and an LSTM whose batches are split along time."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.dense import Classifier

State = tuple[Tensor, Tensor]  # hidden and cell state, each [1, B, width]


class Block(nn.Module):
    """Attention and a two-layer MLP, normed before; ``causal`` for a GPT, not for a ViT."""

    def __init__(self, width: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C] -> [B, T, C]
        b, t, c = x.shape
        q, k, v = (z.view(b, t, self.heads, c // self.heads).transpose(1, 2) for z in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).reshape(b, t, c)
        x = x + self.out(attended)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(Classifier):
    """nanoGPT's CPU recipe by default: 4 layers, 4 heads, width 128, context 64, AdamW; GPT-2 124M by its own sizes."""

    def __init__(self, vocabulary: int = 65, width: int = 128, layers: int = 4, heads: int = 4, context: int = 64) -> None:
        super().__init__()
        self.vocabulary, self.context = vocabulary, context
        self.token, self.place = nn.Embedding(vocabulary, width), nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.token.weight
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers))

    def forward(self, x: Tensor) -> Tensor:  # int64 [B, T] -> [B, T, vocabulary]
        h = self.token(x) + self.place
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))

    def score(self, out: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(out.flatten(0, 1), batch[1].flatten())

    def rows(self, n: int) -> tuple[Tensor, ...]:
        tokens = torch.randint(self.vocabulary, (n, self.context + 1))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class CharLSTM(nn.Module):
    """The next character from all before it; a gradient goes back ``split`` characters."""

    def __init__(self, characters: int = 65, width: int = 96, time: int = 64, split: int = 16) -> None:
        super().__init__()
        self.characters, self.time, self.split = characters, time, split
        self.embed, self.out = nn.Embedding(characters, width), nn.Linear(width, characters)
        self.lstm = nn.LSTM(width, width, batch_first=True)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:  # int64 [B, T] -> [B, T, characters]
        h, state = self.lstm(self.embed(x), state)
        return self.out(h), state

    def part(self, x: Tensor, y: Tensor, state: State | None) -> tuple[Tensor, State]:
        """The loss of one split, and the state for the next, without its graph."""
        out, (h, c) = self(x, state)
        return F.cross_entropy(out.flatten(0, 1), y.flatten()), (h.detach(), c.detach())

    def splits(self, batch: Any) -> list[tuple[Tensor, Tensor]]:
        x, y = batch
        return list(zip(x.split(self.split, 1), y.split(self.split, 1), strict=True))

    def optimizer(self, **extra: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3, **extra)

    def rows(self, n: int) -> tuple[Tensor, ...]:
        tokens = torch.randint(self.characters, (n, self.time + 1))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
