"""A byte-level GPT as a plain ``nn.Module``: nanoGPT's decoder, its optimizer groups, its warm-up and cosine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 256  # a token is a byte


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Shape and schedule of one model."""

    layers: int = 4
    heads: int = 4
    width: int = 144
    block: int = 64  # bytes of context
    lr: float = 4e-3
    warmup_steps: int = 100
    steps: int = 1000  # where the cosine ends
    weight_decay: float = 0.1


class Attention(nn.Module):
    """Causal self-attention; queries, keys and values in one product."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C] -> [B, T, C]
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # each [B, H, T, C/H]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed: Tensor = self.out(y.transpose(1, 2).reshape(B, T, C))
        return mixed


class Block(nn.Module):
    """Attention, then a perceptron four times as wide, each on a normed residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, bias=False)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, bias=False)
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C] -> [B, T, C]
        x = x + self.attention(self.norm1(x))
        y: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return y


class ByteGPT(nn.Module):
    """Next-byte prediction; batches are ``(rows,)`` with uint8 rows ``[B, block + 1]``."""

    log: Callable[..., None]  # fasttrain puts it there
    progress_unit = ("it", 1)  # what the progress line counts, and how many of them are in a batch

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config, self.steps = config, config.steps
        self.bytes = nn.Embedding(VOCABULARY, config.width)
        self.places = nn.Parameter(torch.empty(config.block, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=False)
        self.head = nn.Linear(config.width, VOCABULARY, bias=False)
        self.head.weight = self.bytes.weight  # one matrix reads and writes bytes
        self._initialize()

    def _initialize(self) -> None:
        """Normal with 0.8/sqrt(width), what writes into the residual stream smaller by the number of writes (GPT-2).

        A third of a bit a byte better after 700 steps than GPT-2's 0.02, which is meant for a width of 768.
        """
        std = 0.8 / math.sqrt(self.config.width)
        for name, p in self.named_parameters():
            if p.dim() < 2:
                continue
            is_residual = name.endswith(("out.weight", "down.weight"))
            nn.init.normal_(p, std=std / math.sqrt(2 * self.config.layers) if is_residual else std)

    def forward(self, tokens: Tensor) -> Tensor:  # int64 [B, T] -> logits [B, T, 256]
        x = self.bytes(tokens) + self.places[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def loss(self, rows: Tensor) -> Tensor:
        """Mean nats a byte ``[]`` of rows ``[B, T + 1]``."""
        rows = rows.long()
        logits = self(rows[:, :-1])
        return F.cross_entropy(logits.reshape(-1, VOCABULARY), rows[:, 1:].reshape(-1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch[0])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch[0]), prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW, matrices decayed and the rest not; warm-up and cosine by step."""
        parameters = list(self.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": self.config.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.config.lr, betas=(0.9, 0.98))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_factor(self, step: int) -> float:
        """Of the peak: up in a line, down on a cosine to a tenth."""
        warmup, steps = self.config.warmup_steps, self.steps
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        return 0.1 + 0.45 * (1.0 + math.cos(math.pi * done))

    @torch.inference_mode()
    def generate(self, prompt: bytes, count: int, *, temperature: float = 0.8, seed: int = 0, max_seconds: float = math.inf) -> bytes:
        """``prompt`` and ``count`` more bytes, drawn with a generator of its own; fewer when the time is up before."""
        device, was_training = self.places.device, self.training
        generator = torch.Generator(device).manual_seed(seed)
        tokens = torch.tensor([list(prompt)], device=device)
        self.eval()
        deadline = time.perf_counter() + max_seconds
        for _ in range(count):
            logits = self(tokens[:, -self.config.block :])[0, -1].float()
            drawn = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)
            tokens = torch.cat([tokens, drawn[None]], dim=1)
            if time.perf_counter() > deadline:
                break
        self.train(was_training)
        return bytes(tokens[0].tolist())
