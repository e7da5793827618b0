"""Lightning's own demo modules, of both import names."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.coverage_modules.case import Case, Subject


def words(vocabulary: int, n: int, shape: tuple[int, ...]) -> list[Tensor]:
    """``n`` integer tensors of ``shape`` below ``vocabulary``, out of Python's own source text."""
    text = (Path(os.__file__).parent / "argparse.py").read_bytes() * 4
    size = int(torch.tensor(shape).prod())
    return [torch.tensor([(a * 31 + b) % vocabulary for a, b in zip(text[i:], text[i + 1 : i + size + 1], strict=False)]).view(shape)
            for i in range(0, n * size, size)]  # fmt: skip


def _boring(family: str, name: str) -> Subject:
    module: Any = getattr(import_module(f"{family}.demos.boring_classes"), name)()
    return Subject(module=module, batches=[torch.randn(8, 32) for _ in range(8)])


def _text(family: str, file: str, name: str) -> Subject:
    module: Any = getattr(import_module(f"{family}.demos.{file}"), name)(vocab_size=500)
    module.prepare_data = lambda: None  # its own downloads WikiText2
    batches = [(w[:, :-1], w[:, 1:].contiguous()) for w in words(500, 8, (8, 36))]
    return Subject(module=module, batches=batches, options={"gradient_clip_val": 0.25})


CASES = (
    Case(name="boring-pl", needs=("pytorch_lightning",), make=lambda: _boring("pytorch_lightning", "BoringModel")),
    Case(name="boring-manual", needs=("lightning",), make=lambda: _boring("lightning.pytorch", "ManualOptimBoringModel")),
    Case(name="demo-transformer", needs=("lightning",), make=lambda: _text("lightning.pytorch", "transformer", "LightningTransformer")),
    # lr 20: eager against eager with weights 1e-7 apart, the losses are 3e-4 apart after 20 steps
    Case(name="demo-lstm", needs=("pytorch_lightning",), make=lambda: _text("pytorch_lightning", "lstm", "LightningLSTM"), early=10),
)
