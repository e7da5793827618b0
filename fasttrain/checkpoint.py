"""A checkpoint on disk: a directory of safetensors and JSON with a manifest, whole or not there at all. No pickle."""

from __future__ import annotations

import base64
import collections
import glob
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrain.errors import CheckpointError

FORMAT = 1
MODEL, STATE, TREE, MANIFEST = "model.safetensors", "state.safetensors", "state.json", "manifest.json"


def write(path: Path, checkpoint: Mapping[str, Any]) -> Path:
    """Write ``checkpoint`` (its ``state_dict`` apart) as the directory ``path``: temp beside it, fsync, rename, fsync.

    Raises CheckpointError for a value that has no safe form on disk, naming it; nothing is left behind then.
    """
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.part"
    part.mkdir()
    try:
        weights, aliases, extra = _weights(checkpoint["state_dict"])
        loose: dict[str, Tensor] = {}
        rest = {k: v for k, v in checkpoint.items() if k != "state_dict"}
        tree = {"rest": encode(rest, loose, "checkpoint"), "aliases": aliases, "extra": encode(extra, loose, "state_dict")}
        save_file(weights, part / MODEL)
        save_file(loose, part / STATE)
        (part / TREE).write_text(json.dumps(tree, allow_nan=False))
        files = {name: {"bytes": (part / name).stat().st_size, "sha256": _digest(part / name)} for name in (MODEL, STATE, TREE)}
        manifest = {
            "format": FORMAT,
            "torch": torch.__version__,
            "epoch": checkpoint.get("epoch"),
            "global_step": checkpoint.get("global_step"),
            "files": files,
        }
        (part / MANIFEST).write_text(json.dumps(manifest, indent=2))
        for name in (*files, MANIFEST):
            _fsync(part / name)
        _fsync(part)
        _swap(part, path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return path


def read(path: Path) -> dict[str, Any]:
    """The checkpoint at ``path``, verified against its manifest. Raises CheckpointError naming the damaged file."""
    from safetensors.torch import load_file

    path = Path(path)
    verify(path)
    tree = json.loads((path / TREE).read_text())
    loose = load_file(path / STATE)
    weights: dict[str, Any] = dict(load_file(path / MODEL))
    for name, other in tree["aliases"].items():
        weights[name] = weights[other]
    checkpoint: dict[str, Any] = decode(tree["rest"], loose)
    checkpoint["state_dict"] = weights | decode(tree["extra"], loose)
    return checkpoint


def verify(path: Path) -> None:
    """Raise CheckpointError when ``path`` is no checkpoint of ours or any of its files is not what was written."""
    if path.is_file():
        raise CheckpointError(
            f"ckpt_path {path}: a file; wanted a fasttrain checkpoint directory. Pickled .ckpt files are not loaded: "
            "they can run code. Load its weights yourself with torch.load(..., weights_only=True)."
        )
    if not (path / MANIFEST).is_file():
        what = "has no manifest.json: it is not a checkpoint, or not a whole one" if path.is_dir() else "does not exist"
        raise CheckpointError(f"ckpt_path {path}: {what}. Give 'last', 'best' or a checkpoint directory.")
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        for name in (MODEL, STATE, TREE):
            said = files[name]
            if (path / name).stat().st_size != said["bytes"] or _digest(path / name) != said["sha256"]:
                raise CheckpointError(
                    f"checkpoint {path}: {name} is damaged (its checksum is not the manifest's). Use an older checkpoint."
                )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path}: it cannot be read ({error}). Use an older checkpoint.") from error


def newest(roots: list[Path]) -> Path | None:
    """The checkpoint written last below any of ``roots``; damaged ones are passed over."""
    found = {m.parent for root in roots if root.is_dir() for m in root.rglob(MANIFEST)}
    found = {p for p in found if not p.name.startswith(".") or _orphaned(p)}
    for path in sorted(found, key=lambda p: (p / MANIFEST).stat().st_mtime_ns, reverse=True):
        try:
            verify(path)
            return path
        except CheckpointError:
            continue
    return None


def _orphaned(path: Path) -> bool:
    """A whole checkpoint under its working name, and nothing under its own: the process ended between two renames."""
    name, _, kind = path.name[1:].rpartition(".")
    return kind in ("old", "part") and not (path.parent / name.rpartition(".")[0]).exists()


def encode(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """``value`` as JSON; tensors go into ``tensors`` and leave their name."""
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().to("cpu").contiguous().clone()
        return {"$tensor": name}
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, collections.Counter):
        return {"$counter": [[encode(k, tensors, where), v] for k, v in value.items()]}
    if isinstance(value, Mapping):
        if all(isinstance(k, str) and not k.startswith("$") for k in value):
            return {k: encode(v, tensors, f"{where}[{k!r}]") for k, v in value.items()}
        return {"$dict": [[encode(k, tensors, where), encode(v, tensors, f"{where}[{k!r}]")] for k, v in value.items()]}
    if isinstance(value, (list, collections.deque)):
        return [encode(v, tensors, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": [encode(v, tensors, f"{where}[{i}]") for i, v in enumerate(value)]}
    return _encode_rare(value, where)


def _encode_rare(value: Any, where: str) -> Any:
    if isinstance(value, (set, frozenset)):
        return {"$set": sorted(value)}
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, timedelta):
        return {"$timedelta": value.total_seconds()}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, (torch.device, Path)):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if callable(getattr(value, "item", None)) and getattr(value, "shape", None) == ():
        return value.item()
    raise CheckpointError(
        f"{where}: got a {type(value).__name__}; wanted tensors, numbers, strings, None and lists, tuples, sets or dicts of them. "
        "Checkpoints hold no pickled objects: save what rebuilds it, in on_save_checkpoint or a state_dict()."
    )


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What ``encode`` was given."""
    if isinstance(value, list):
        return [decode(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        (tag, inner), *_ = value.items()
        if tag in _DECODERS:
            return _DECODERS[tag](inner, tensors)
    return {k: decode(v, tensors) for k, v in value.items()}


_DECODERS: dict[str, Any] = {
    "$tensor": lambda v, t: t[v],
    "$float": lambda v, t: float(v),
    "$counter": lambda v, t: collections.Counter({decode(k, t): n for k, n in v}),
    "$dict": lambda v, t: {decode(k, t): decode(x, t) for k, x in v},
    "$tuple": lambda v, t: tuple(decode(x, t) for x in v),
    "$set": lambda v, t: set(v),
    "$bytes": lambda v, t: base64.b64decode(v),
    "$timedelta": lambda v, t: timedelta(seconds=v),
    "$dtype": lambda v, t: getattr(torch, v),
}


def _weights(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """A state dict as tensors to write once, names that share them, and entries that are no tensors."""
    weights: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    extra: dict[str, Any] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, value in state_dict.items():
        if not isinstance(value, Tensor):
            extra[name] = value
            continue
        key = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        if value.numel() and key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            weights[name] = value.detach().to("cpu").contiguous().clone()
    return weights, aliases, extra


def _swap(part: Path, path: Path) -> None:
    """Put the finished directory in place; an older one of that name is moved aside first and removed after."""
    if path.exists():
        os.replace(path, path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.old")
    os.replace(part, path)
    _fsync(path.parent)
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????.*"):  # ours, and of processes that were killed
        if left.suffix in (".old", ".part"):
            shutil.rmtree(left, ignore_errors=True)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
