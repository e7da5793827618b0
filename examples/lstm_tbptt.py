"""A character LSTM on Python's own source, batches split along time: ``truncated_bptt_steps`` and ``hiddens``.

Run it: ``python examples/lstm_tbptt.py --epochs 4`` trains torch's nn.LSTM; with ``--cell own`` a cell written by hand.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fasttrain

BATCH, TIME = 32, 128  # streams read side by side, characters of each in a batch
State = tuple[Tensor, Tensor]  # hidden and cell state, each [B, width]


class OwnLSTM(nn.Module):
    """What nn.LSTM computes (Hochreiter and Schmidhuber 1997), in operations a tracer can follow."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.x, self.h = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width, bias=False)

    def forward(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:  # [B, T, width] -> [B, T, width]
        gates, outputs = self.x(x), []
        h, c = state or (torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0]))
        for t in range(x.shape[1]):
            i, f, g, o = (gates[:, t] + self.h(h)).chunk(4, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs, 1), (h, c)


class CharLSTM(nn.Module):
    """The next character from all before it; a gradient goes back ``split`` characters."""

    def __init__(self, cell: str, characters: int, split: int, width: int = 96) -> None:
        super().__init__()
        self.truncated_bptt_steps = split
        self.embed, self.out = nn.Embedding(characters, width), nn.Linear(width, characters)
        self.cell = OwnLSTM(width) if cell == "own" else nn.LSTM(width, width, batch_first=True)

    def training_step(self, batch: list[Tensor], batch_idx: int, hiddens: Any) -> dict[str, Any]:
        """``hiddens``: what the split before this one returned, detached; None for the first of a batch."""
        x, y = batch  # int64 [B, split]
        h, hiddens = self.cell(self.embed(x), hiddens)
        loss = F.cross_entropy(self.out(h).flatten(0, 1), y.flatten())
        self.log("bits", loss / math.log(2), on_step=False, on_epoch=True, prog_bar=True)
        return {"loss": loss, "hiddens": hiddens}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=4e-3)


def read_text() -> Tensor:
    """The source of argparse as character numbers ``[n]``."""
    text = Path(argparse.__file__).read_text()
    number = {c: i for i, c in enumerate(sorted(set(text)))}
    return torch.tensor([number[c] for c in text])


def streams(text: Tensor) -> TensorDataset:
    """``BATCH`` streams cut in pieces of ``TIME``: rows of a batch stand side by side, the next row goes on in its stream."""
    pieces = (len(text) - 1) // (BATCH * TIME)
    n = pieces * BATCH * TIME
    cut = [t[:n].view(BATCH, pieces, TIME).transpose(0, 1).reshape(-1, TIME) for t in (text, text[1:])]
    return TensorDataset(*cut)


def order0_entropy(text: Tensor) -> float:
    """Bits a character that the best code without any context needs (Shannon 1948)."""
    shares = text.bincount().double() / len(text)
    return float(-(shares * shares.log2()).nansum())


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, print what was learnt, and give it back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--max-time", type=float, default=120.0, help="seconds of training at most")
    parser.add_argument("--capture", default="auto", choices=["auto", "eager", "compile"])
    parser.add_argument("--cell", default="torch", choices=["torch", "own"])
    parser.add_argument("--split", type=int, default=16, help="characters that a gradient goes back")
    parser.add_argument("--batches", type=int, help="in an epoch; all when left out")
    args = parser.parse_args(argv)
    fasttrain.seed_everything(0)
    text = read_text()
    module = CharLSTM(args.cell, int(text.max()) + 1, args.split)
    trainer = fasttrain.compile_fit(
        module,
        max_epochs=args.epochs,
        max_time=timedelta(seconds=args.max_time),
        limit_train_batches=args.batches or 1.0,
        capture=args.capture,
        logger=False,
        enable_checkpointing=False,
    )
    result = trainer.fit(DataLoader(streams(text), batch_size=BATCH))
    entropy = order0_entropy(text)
    print(f"bits a character: {result.metrics['bits']:.2f}; without context the best code needs {entropy:.2f}")
    print(f"{result.steps} updates, {TIME // args.split} in a batch")
    print(trainer.explain().splitlines()[0])
    return {"bits": result.metrics["bits"], "entropy": entropy, "steps": result.steps}


if __name__ == "__main__":
    main()
