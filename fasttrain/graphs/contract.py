"""Shapes and dtypes a capture was made for, and the sentence when a batch differs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

Leaf = tuple[tuple[int, ...], tuple[int, ...], Any, bool]  # shape, stride, dtype, requires_grad
Key = tuple[Any, ...]


def tensors_of(batch: Any) -> list[Tensor] | None:
    """The batch's tensors in a fixed order; None when it holds anything but tensors, None and plain containers."""
    found: list[Tensor] = []
    return found if _walk(batch, found) else None


def _walk(node: Any, found: list[Tensor]) -> bool:
    if isinstance(node, Tensor):
        found.append(node)
        return True
    if node is None:
        return True
    if isinstance(node, Mapping):
        return all(_walk(v, found) for v in node.values())
    if isinstance(node, (list, tuple)):
        return all(_walk(v, found) for v in node)
    if is_dataclass(node):
        return all(_walk(getattr(node, f.name), found) for f in fields(node))
    return False


def copied(batch: Any) -> Any:
    """A batch of its own to look at: containers anew and tensors cloned, the same object twice again the same object."""
    return _copied(batch, {})


def _copied(node: Any, made: dict[int, Any]) -> Any:
    if id(node) in made:
        return made[id(node)]
    if isinstance(node, Tensor):
        new: Any = _cloned(node)
    elif isinstance(node, tuple):
        parts = [_copied(v, made) for v in node]
        new = type(node)(*parts) if hasattr(node, "_fields") else tuple(parts) if type(node) is tuple else node
    elif isinstance(node, (Mapping, list)) or (hasattr(node, "__dict__") and not isinstance(node, nn.Module)):
        try:
            new = copy.copy(node)
            if new is not node and isinstance(node, (list, MutableMapping)):
                for k in node if isinstance(node, Mapping) else range(len(node)):
                    new[k] = _copied(node[k], made)
            elif new is not node:
                for name, value in vars(node).items():
                    object.__setattr__(new, name, _copied(value, made))
        except Exception:  # a container that cannot be copied is looked at as it is
            new = node
    else:
        new = node
    made[id(node)] = new
    return new


def _cloned(t: Tensor) -> Tensor:
    """With the same strides; as it is where it cannot be written to, or where a clone would lose what it is."""
    if type(t) is not Tensor or t.layout is not torch.strided or 0 in t.stride() or t.is_neg() or t.is_conj():
        return t
    new = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
    new.copy_(t.detach()).requires_grad_(t.requires_grad)
    new.__dict__.update(t.__dict__)
    return new


def reader_for(batch: Any) -> Callable[[Any], Any] | None:
    """The cheapest function that gives ``tensors_of`` for batches built like this one; None: the batch itself is that."""
    if isinstance(batch, Tensor):
        return lambda b: (b,)
    if type(batch) in (list, tuple) and all(isinstance(t, Tensor) for t in batch):
        return None
    if type(batch) is dict and all(isinstance(t, Tensor) for t in batch.values()):
        return dict.values
    return _written_reader(batch) or tensors_of


def _written_reader(batch: Any) -> Callable[[Any], Any] | None:
    """A function written for one nesting of containers: the tensors of a batch built so, None for any other batch."""
    names: dict[str, Any] = {"Tensor": Tensor}
    checks: list[str] = []
    leaves: list[str] = []

    def walk(node: Any, at: str) -> bool:
        if isinstance(node, Tensor):
            leaves.append(at)  # what is no tensor there is found when its shape is compared
            return True
        if node is None:
            checks.append(f"{at} is not None")
            return True
        kind = f"k{len(names)}"
        names[kind] = type(node)
        if isinstance(node, dict):
            keys = f"d{len(names)}"
            names[keys] = list(node)
            checks.append(f"type({at}) is not {kind} or list({at}) != {keys}")
            return all(isinstance(k, (str, int)) and walk(v, f"{at}[{k!r}]") for k, v in node.items())
        if isinstance(node, (list, tuple)):
            checks.append(f"type({at}) is not {kind} or len({at}) != {len(node)}")
            return all(walk(v, f"{at}[{i}]") for i, v in enumerate(node))
        return False

    if not walk(batch, "b") or len(leaves) > 64:
        return None
    tests = "".join(f"    if {c}: return None\n" for c in checks)
    exec(f"def read(b):\n{tests}    return ({''.join(leaf + ', ' for leaf in leaves)})", names)
    read: Callable[[Any], Any] = names["read"]
    return read


def structure(batch: Any) -> Key:
    """The containers, keys and non-tensor leaves of a batch, hashable."""
    if isinstance(batch, Tensor):
        return ("T",)
    if isinstance(batch, Mapping):
        return (type(batch), *((k, structure(v)) for k, v in batch.items()))
    if isinstance(batch, (list, tuple)):
        return (type(batch), *(structure(v) for v in batch))
    if is_dataclass(batch):
        return (type(batch), *(structure(getattr(batch, f.name)) for f in fields(batch)))
    return (type(batch),)


def leaf(t: Tensor) -> Leaf:
    return (tuple(t.shape), t.stride(), t.dtype, t.requires_grad)


def key_of(batch: Any) -> Key:
    """What must stay the same for a capture to be replayed on this batch."""
    tensors: list[Tensor] = []
    _walk(batch, tensors)
    return (structure(batch), *(leaf(t) for t in tensors))


def batch_size_of(batch: Any) -> int:
    """Dim 0 of the first tensor with one, as Lightning weighs a batch; 1 when there is none."""
    tensors: list[Tensor] = []
    _walk(batch, tensors)
    return next((t.shape[0] for t in tensors if t.dim() > 0), 1)


def describe(batch: Any, indent: str = "  ") -> str:
    """Shapes and types of a batch, a line a leaf, for error messages."""
    lines: list[str] = []
    _describe(batch, "batch", lines)
    return "\n".join(indent + line for line in lines[:40])


def _describe(node: Any, path: str, lines: list[str]) -> None:
    if isinstance(node, Tensor):
        lines.append(f"{path}: {str(node.dtype).removeprefix('torch.')}{list(node.shape)}")
    elif isinstance(node, Mapping):
        for k, v in node.items():
            _describe(v, f"{path}[{k!r}]", lines)
    elif isinstance(node, (list, tuple)):
        for i, v in enumerate(node):
            _describe(v, f"{path}[{i}]", lines)
    elif is_dataclass(node):
        for f in fields(node):
            _describe(getattr(node, f.name), f"{path}.{f.name}", lines)
    else:
        lines.append(f"{path}: {type(node).__name__}")
