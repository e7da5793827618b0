"""The launches of one step, as data: which kernel, over how many programs, with what."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttrain.kernels.device_scale import DeviceScale
from fasttrain.kernels.triton_plan import BLOCK, CHUNK, JUDGE_BLOCK, JUDGE_ROWS, JUDGE_WARPS, NORMS_BLOCK, WARPS, Binding

_OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}  # fusion pinned: triton 3.10 turns its default round


@dataclass(frozen=True, kw_only=True)
class Cells:
    """What a tail's kernels share over its whole life, but for `table`, which follows the number of groups."""

    record: Tensor  # float32 [parameters, 16]
    verdict: Tensor  # float32 [4]
    norm: Tensor
    skipped: Tensor
    skips: Tensor
    scale: DeviceScale | None


@dataclass(frozen=True, kw_only=True)
class Call:
    """What one step asks for. Tensors are 0-d, on the device."""

    rule: int
    inf: bool
    measure: bool
    check: bool
    zero: bool
    rescale: Tensor | None
    loss: Tensor | None
    norms: Tensor | None
    sticky: bool = False


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One kernel; `constants` are what it is compiled for."""

    name: str
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    def key(self) -> tuple[Any, ...]:
        """Equal for launches that share one compiled kernel."""
        dtypes = tuple(a.dtype for a in self.arguments if isinstance(a, Tensor))
        return (self.name, dtypes, tuple(map(str, self.constants.values())))

    def run(self) -> None:
        getattr(kernels(), self.name)[(self.programs,)](*self.arguments, **self.constants)


@functools.cache
def kernels() -> Any:
    """The kernels, imported with triton at the first step that needs them."""
    from fasttrain.kernels import triton_kernels

    return triton_kernels


def launches(binding: Binding, table: Tensor, cells: Cells, call: Call) -> Iterator[Launch]:
    """Norm, verdict, update, in this order."""
    types, scale = kernels().TYPES, cells.scale
    none = cells.norm  # stands where a kernel's constants say that nothing is read
    scale_cells = (none, none) if scale is None else (scale.value, scale.clean_steps)
    rescale = none if call.rescale is None else call.rescale
    flags = {"INF": call.inf, "SCALED": scale is not None, "RESCALED": call.rescale is not None}
    sizes = {"CHUNK": CHUNK, "BLOCK": BLOCK}
    if call.measure:
        for run in binding.norm_launches:
            constants = {"G": types[run.kind.grad], "INF": call.inf, "ALIGN": run.kind.align, **sizes, **_OPTIONS}
            yield Launch(
                name="norm_chunks", programs=run.count, constants=constants,
                arguments=(binding.rows, binding.chunks, binding.partial, run.first),
            )  # fmt: skip
    if call.norms is not None:  # before the verdict, which moves the loss scale on
        yield Launch(
            name="row_norms", programs=len(binding.rows), constants={**flags, "BLOCK": NORMS_BLOCK, **_OPTIONS},
            arguments=(binding.partial, binding.spans, table, scale_cells[0], rescale, call.norms),
        )  # fmt: skip
    switches = {"MEASURE": call.measure, "CHECK": call.check, "LOSS": call.loss is not None, "RULE": call.rule, "STICKY": call.sticky}
    chunks = sum(run.count for run in binding.norm_launches)
    yield Launch(
        name="judge", programs=1,
        constants={**flags, **switches, "BLOCK": JUDGE_BLOCK, "ROWS": JUDGE_ROWS, **_OPTIONS, "num_warps": JUDGE_WARPS},
        arguments=(
            binding.partial, chunks, table, binding.rows, len(binding.rows), cells.record, cells.verdict, cells.norm, cells.skipped,
            cells.skips, *scale_cells, none if call.loss is None else call.loss, rescale,
        ),
    )  # fmt: skip
    for run in reversed(binding.update_launches):
        kind = run.kind
        kinds = {"P": types[kind.param], "G": types[kind.grad], "S": types[kind.state], "MODE": kind.mode, "MASTERED": kind.mastered}
        yield Launch(
            name="update_chunks", programs=run.count, constants={**kinds, "ZERO": call.zero, "ALIGN": kind.align, **sizes, **_OPTIONS},
            arguments=(binding.rows, binding.chunks, cells.record, cells.verdict, run.first + run.count - 1),
        )  # fmt: skip


def on(device: torch.device) -> Any:
    """The context in which kernels of this device are launched."""
    return torch.cuda.device(device if device.type == "cuda" else -1)  # -1: leaves everything as it is
