"""Where the Triton tail finds its tensors: one row of addresses a parameter, one row a chunk, one launch a kind of tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter

import torch
from torch import Tensor

CHUNK, BLOCK = 8192, 1024  # elements of a program, and of one turn of its loop: 8 an thread with 4 warps
WARPS = 4
NORMS_BLOCK = 128
JUDGE_BLOCK, JUDGE_ROWS, JUDGE_WARPS = 2048, 512, 8  # the one program between: 256 rows spilled a register on sm_90
VECTOR = 16  # bytes of the widest load
SGD, SGD_MOMENTUM, NESTEROV, ADAM, AMSGRAD, LION = range(6)  # as in triton_kernels
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, order=True, kw_only=True)
class Kind:
    """What one launch is compiled for. dtypes as their place in FLOATS; `align` in bytes, of every address in the row."""

    grad: int
    align: int
    param: int = 0
    state: int = 0
    mode: int = SGD
    mastered: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """One parameter that has a gradient: everything about it but the gradient's address."""

    index: int
    numel: int
    kind: Kind
    cells: tuple[int, ...]  # param, grad, slots, master, step, group: the row of the table


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run of chunks of one kind."""

    kind: Kind
    first: int
    count: int


def alignment(addresses: Iterable[int]) -> int:
    """VECTOR when it divides all addresses (0, nothing there, it does), else 1: single elements are loaded."""
    return VECTOR if all(address % VECTOR == 0 for address in addresses) else 1


@dataclass(kw_only=True)
class Binding:
    """The device tables for one list of gradients, and the launches over them. Uploaded outside any capture."""

    rows: Tensor  # int64 [parameters, 8]
    chunks: Tensor  # int64 [chunks, 3]: row, offset, count
    spans: Tensor  # int64 [parameters, 2]: the row's chunks
    partial: Tensor  # float64 [chunks]
    norm_launches: tuple[Run, ...]
    update_launches: tuple[Run, ...]
    layout: tuple[object, ...]
    grads: dict[int, tuple[int, int]]  # row -> address and dtype of its gradient
    held: list[Tensor] = field(default_factory=list)  # of a capture: what its graph reads stays alive
    pending: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (device, host) still to be copied

    def upload(self) -> None:
        """Copies what is pending, in stream order; the host memory is fresh each time, so nothing waits."""
        for device, host in self.pending:
            device.copy_(host, non_blocking=True)
        self.pending.clear()


@dataclass(frozen=True, kw_only=True)
class Tables:
    """Device memory of one binding. Never made inside a capture: its pool's memory is written again by every replay."""

    rows: Tensor
    chunks: Tensor
    spans: Tensor
    partial: Tensor


def make_tables(numels: Sequence[int], device: torch.device, chunk: int = CHUNK) -> Tables:
    """Room for a binding in which every one of these parameters has a gradient."""
    most = max(sum(-(-numel // chunk) for numel in numels), 1)
    return Tables(
        rows=torch.zeros(len(numels), 8, dtype=torch.int64, device=device),
        chunks=torch.zeros(most, 3, dtype=torch.int64, device=device),
        spans=torch.zeros(len(numels), 2, dtype=torch.int64, device=device),
        partial=torch.zeros(most, dtype=torch.float64, device=device),
    )


def make_binding(rows: Sequence[Row], tables: Tables, chunk: int = CHUNK) -> Binding:
    """Tables filled with these rows. Rows of one kind lie together; a parameter without a row has no chunk and no group."""
    parameters = len(tables.rows)
    ordered = sorted(rows, key=attrgetter("kind", "index"))
    index = torch.tensor([row.index for row in ordered], dtype=torch.int64)
    numel = torch.tensor([row.numel for row in ordered], dtype=torch.int64)
    pieces = (numel + chunk - 1) // chunk
    stops = pieces.cumsum(0)
    total = int(stops[-1]) if ordered else 0
    within = torch.arange(total) - (stops - pieces).repeat_interleave(pieces)
    host = torch.empty(total, 3, dtype=torch.int64)
    host[:, 0] = index.repeat_interleave(pieces)
    host[:, 1] = within * chunk
    host[:, 2] = (numel.repeat_interleave(pieces) - host[:, 1]).clamp(max=chunk)
    spans = torch.zeros(parameters, 2, dtype=torch.int64)
    spans[index, 0], spans[index, 1] = stops - pieces, stops
    counted = list(zip((row.kind for row in ordered), pieces.tolist(), strict=True))
    return Binding(
        rows=tables.rows,
        chunks=tables.chunks,
        spans=tables.spans,
        partial=tables.partial,
        norm_launches=_runs([(Kind(grad=kind.grad, align=kind.align), n) for kind, n in counted]),
        update_launches=_runs(counted),
        layout=layout_of(rows),
        grads={row.index: (row.cells[1], row.kind.grad) for row in rows},
        pending=[(tables.chunks[:total], host), (tables.spans, spans), (tables.rows, cells_of(rows, parameters))],
    )


def layout_of(rows: Sequence[Row]) -> tuple[object, ...]:
    """What two lists of rows must share to have one chunk table."""
    return tuple((row.index, row.numel, row.kind) for row in rows)


def cells_of(rows: Sequence[Row], parameters: int) -> Tensor:
    """The table of addresses, on the host."""
    table: list[tuple[int, ...]] = [(0, 0, 0, 0, 0, 0, 0, -1)] * parameters
    for row in rows:
        table[row.index] = row.cells
    return torch.tensor(table, dtype=torch.int64).reshape(parameters, 8)


def _runs(counted: Sequence[tuple[Kind, int]]) -> tuple[Run, ...]:
    runs, first = [], 0
    for kind, run in groupby(counted, key=lambda pair: pair[0]):
        count = sum(n for _, n in run)
        if count:
            runs.append(Run(kind=kind, first=first, count=count))
        first += count
    return tuple(runs)
