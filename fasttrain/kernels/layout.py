"""What memory a tensor covers: whether native code may walk it from its first address to its last."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from fasttrain.kernels.library import DTYPES


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory, each once, in whatever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def same_order(tensor: Tensor, model: Tensor) -> bool:
    """Whether both are dense and element k in memory is the same element of each (shapes being equal)."""
    if tensor.is_contiguous() and model.is_contiguous():
        return True
    sizes = tensor.shape
    strides = zip(tensor.stride(), model.stride(), sizes, strict=True)
    return all(a == b or n == 1 for a, b, n in strides) and is_dense(tensor)


def in_order_of(tensor: Tensor, model: Tensor) -> Tensor:
    """`tensor` itself when it lies in memory as `model` does, else a copy that does."""
    return tensor if same_order(tensor, model) else torch.empty_like(model, dtype=tensor.dtype).copy_(tensor)


def unfit(tensor: Tensor) -> str | None:
    """Why native code cannot take this parameter, as the end of a sentence; None when it can."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"is a {type(tensor).__name__}"
    if tensor.layout != torch.strided:
        return f"has layout {tensor.layout}"
    if tensor.device.type != "cpu":
        return f"is on {tensor.device}"
    if tensor.dtype not in DTYPES:
        return f"has dtype {tensor.dtype}"
    if not is_dense(tensor):
        return f"is a view with gaps (shape {tuple(tensor.shape)}, strides {tensor.stride()})"
    return None


def overlapping(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """Two of these dense tensors that share memory, by index; None when there are none."""
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), i) for i, t in enumerate(tensors))
    spans = [span for span in spans if span[0] != span[1]]
    for (_, end, i), (start, _, j) in pairwise(spans):
        if start < end:
            return i, j
    return None
