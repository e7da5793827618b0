"""Native operations on lists of CPU tensors that are no optimizer's: their norm, and their sum into another list."""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Sequence

from torch import Tensor

from fasttrain.errors import KernelError, reject
from fasttrain.kernels import library
from fasttrain.kernels.layout import in_order_of, is_dense, overlapping, unfit
from fasttrain.kernels.library import DTYPES, INF, L2, SGD


class _Lists:
    """A chunk table for tensors of these sizes, and the memory of one call on them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.rows = (library.Row * len(tensors))()
        for row, tensor in zip(self.rows, tensors, strict=True):
            row.numel, row.dtype = tensor.numel(), DTYPES[tensor.dtype]
            row.grad_dtype = row.dtype
        self.addresses = array("Q", [0] * len(tensors))
        self.call = library.Call(
            grads=self.addresses.buffer_info()[0],
            rows=ctypes.addressof(self.rows),
            grad_scale=1.0,
            max_norm=math.inf,
            clip_value=math.inf,
        )
        self.plan = library.Plan([tensor.numel() for tensor in tensors], SGD)


def norm(tensors: Sequence[Tensor], norm_type: float) -> float:
    """The L2 (2.0) or largest-magnitude (inf) norm of CPU tensors that `unfit` accepts but for gaps; a host number."""
    dense = [tensor if is_dense(tensor) else tensor.contiguous() for tensor in tensors]
    lists = _Lists(dense)
    lists.call.norm_kind = INF if norm_type == math.inf else L2
    lists.addresses[:] = array("Q", [tensor.data_ptr() for tensor in dense])
    result: float = lists.plan.library.fasttrain_norm(lists.plan.address, ctypes.byref(lists.call))
    return result


class NativeSum:
    """Adds lists of tensors into one list of CPU tensors, every tensor in one native call: gradient accumulation.

    total = NativeSum(buffers)
    total.add_(grads)                # buffers[i] += grads[i]; None adds nothing
    total.add_(grads, scale=0.25)
    """

    def __init__(self, totals: Sequence[Tensor]) -> None:
        if (reason := library.obstacle()) is not None:
            raise KernelError(reject("NativeSum", "no native library", "one", f"{reason}."))
        for i, total in enumerate(totals):
            if (reason := unfit(total)) is not None:
                raise KernelError(reject("totals", f"tensor {i}, which {reason}", "dense CPU tensors", "Copy it."))
        if (shared := overlapping(totals)) is not None:
            raise KernelError(reject("totals", f"tensors {shared} in one memory", "apart", "Clone one."))
        self._totals = tuple(totals)
        self._lists = _Lists(self._totals)
        for row, total in zip(self._lists.rows, self._totals, strict=True):
            row.param = total.data_ptr()

    def add_(self, terms: Sequence[Tensor | None], scale: float = 1.0) -> None:
        """totals[i] += scale * terms[i], in place. Shapes and dtypes must be those of the totals."""
        if len(terms) != len(self._totals):
            raise KernelError(reject("terms", f"{len(terms)}", f"{len(self._totals)} of them", "Give one a total."))
        pairs = enumerate(zip(terms, self._totals, strict=True))
        held = [None if term is None else _fitting(i, term, total) for i, (term, total) in pairs]
        self._lists.addresses[:] = array("Q", [0 if term is None else term.data_ptr() for term in held])
        self._lists.call.grad_scale = scale
        self._lists.plan.library.fasttrain_add(self._lists.plan.address, ctypes.byref(self._lists.call))


def _fitting(index: int, term: Tensor, total: Tensor) -> Tensor:
    if term.shape != total.shape or term.dtype != total.dtype or not term.is_cpu:
        got = f"{term.dtype} {tuple(term.shape)} on {term.device}"
        raise KernelError(reject(f"term {index}", got, f"{total.dtype} {tuple(total.shape)}", "Nothing was written."))
    return in_order_of(term, total)
