"""What measuring decided on this machine, kept beside torch's own compile cache so that the next run decides the same."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import platform
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fasttrain.graphs.contract import key_of
from fasttrain.options import Options


def key_for(
    module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], batch: Any, options: Options, beside: Sequence[Any] = ()
) -> str:
    """A digest of the module's source and shapes, the batch's contract, the step's options, the machine and the versions.

    ``beside``: functions that the step calls and the module does not hold (``loss=``).
    """
    theirs = ("torch", "pytorch_lightning", "lightning", "builtins")
    own = [k for k in type(module).__mro__ if k.__module__.split(".")[0] not in theirs]
    shapes = [(n, tuple(p.shape), str(p.dtype), p.requires_grad) for n, p in module.named_parameters()]
    parts = (
        [_source(x) for x in (*own, *beside)],
        str(module),
        shapes,
        [type(o).__qualname__ for o in optimizers],
        key_of(batch),
        options.precision,
        options.gradient_clip_val,
        dict(options.accumulate_grad_batches),
        torch.__version__,
        _own_code(),
        platform.processor(),
        os.cpu_count(),
        torch.get_num_threads(),
        *sorted({_device_name(p.device) for p in module.parameters()} - {"cpu"}),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@cache
def _own_code() -> str:
    """What was measured is this package's code too, released or not."""
    files = sorted(Path(__file__).parents[1].glob("[gk]*/*.py"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def _source(thing: Any) -> str:
    """What it is written as, or its name where nobody can say."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    try:
        return inspect.getsource(named)
    except (OSError, TypeError):
        return f"{named.__module__}.{named.__qualname__}"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def recall(key: str) -> dict[str, Any] | None:
    """What was decided for this key, or None."""
    try:
        found = json.loads((_folder() / f"{key}.json").read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def remember(key: str, decision: dict[str, Any]) -> None:
    """Keep a decision; a cache that cannot be written is only a slower next start."""
    try:
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{key}.{os.getpid()}.part"
        part.write_text(json.dumps(decision))
        part.replace(folder / f"{key}.json")
    except OSError:
        return


def _folder() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "fasttrain"
