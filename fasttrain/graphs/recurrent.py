"""torch.nn's recurrent layers as one operation of a graph: what runs is the eager layer, forward and backward.

The tracer would take them apart into time steps. The operation calls ``torch._VF.lstm`` and its like under an autograd of its
own and gives back, beside the results, a *tape*: a tensor whose storage owns that autograd graph for as long as gradients may
be asked for.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from fasttrain.errors import CaptureError

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_SCHEMAS = {
    # ``needs``: which of input, hx and weights want a gradient; ``c`` is empty but for an LSTM
    "rnn": "(str cell, Tensor input, Tensor? batch_sizes, Tensor[] hx, Tensor[] weights, bool bias, int layers, float dropout, "
    "bool training, bool bidirectional, ScalarType? autocast, bool[] needs) -> (Tensor out, Tensor h, Tensor c, Tensor tape)",
    "rnn_backward": "(Tensor tape, Tensor? out, Tensor? h, Tensor? c, Tensor[] wanted) -> Tensor[]",
}


class _Tape(ctypes.Structure):
    """What autograd has recorded of one call. Its eight bytes, which lie under a tensor, are its number."""

    _fields_ = (("number", ctypes.c_int64),)
    results: Sequence[Tensor]
    leaves: Sequence[Tensor]


_TAPES: WeakValueDictionary[int, _Tape] = WeakValueDictionary()
_NUMBERS = itertools.count()


def _run(
    cell: str, input: Tensor, batch_sizes: Tensor | None, hx: Sequence[Tensor], weights: Sequence[Tensor], bias: bool, layers: int,
    dropout: float, training: bool, bidirectional: bool, autocast: torch.dtype | None, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with _as_eager(any(needs)), _cast(input, autocast):
        given = [_own(t).requires_grad_(n) for t, n in zip((input, *hx, *weights), needs, strict=True)]
        state, flat = given[1 : 1 + len(hx)], given[1 + len(hx) :]
        first = state if cell == "lstm" else state[0]
        how = (flat, bias, layers, dropout, training, bidirectional)
        layer = getattr(torch._C._VariableFunctions, cell)
        results = layer(given[0], first, *how, False) if batch_sizes is None else layer(given[0], _own(batch_sizes), first, *how)
    tape = _Tape()
    tape.number, tape.results, tape.leaves = next(_NUMBERS), results, [t for t in given if t.requires_grad]
    _TAPES[tape.number] = tape
    out, h, *c = map(_own, results)
    return out, h, c[0] if c else h.new_empty(0), torch.frombuffer(tape, dtype=torch.int64)


def _run_backward(tape: Tensor, out: Tensor | None, h: Tensor | None, c: Tensor | None, wanted: Sequence[Tensor]) -> list[Tensor]:
    record = _TAPES[int(tape)]  # in host memory
    asked = [(r, g) for r, g in zip(record.results, (out, h, c), strict=False) if g is not None and r.requires_grad]
    with _as_eager(True):
        grads = torch.autograd.grad(
            [r for r, _ in asked], record.leaves, [g for _, g in asked], allow_unused=True, materialize_grads=True, retain_graph=True
        )
    return [g.contiguous() for g in grads]


def _own(t: Tensor) -> Tensor:
    """Memory that nobody else writes: a compiler uses a buffer again as soon as no operation of its graph asks for it."""
    return t.detach() if isinstance(t, nn.Parameter) else t.detach().clone(memory_format=torch.contiguous_format)


@contextmanager
def _as_eager(grad: bool) -> Iterator[None]:
    """Autograd as it was before an operation of ours was called."""
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        exclude = exclude.remove(getattr(torch._C.DispatchKey, key))
    include = torch._C._dispatch_tls_local_include_set().add(torch._C.DispatchKey.ADInplaceOrView)
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.inference_mode(False), torch.set_grad_enabled(grad):
        yield


def _cast(input: Tensor, dtype: torch.dtype | None) -> Any:
    """The autocast that the layer was called under."""
    return nullcontext() if dtype is None else torch.autocast(input.device.type, dtype=dtype, cache_enabled=False)


def _shapes(
    cell: str, input: Tensor, batch_sizes: Tensor | None, hx: Sequence[Tensor], weights: Sequence[Tensor], bias: bool, layers: int,
    dropout: float, training: bool, bidirectional: bool, autocast: torch.dtype | None, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    out, h, c = input.dtype, hx[0].dtype, hx[-1].dtype
    if autocast is not None:  # which results it changes depends on the layer and on the processor: one step says
        width, hidden = weights[0].shape[-1], [weights[1].shape[-1], weights[0].shape[0] // 4]
        with _disable_current_modes():
            sizes = None if batch_sizes is None else torch.ones(1, dtype=torch.int64)
            one = _zeros(input, (1, 1, width) if sizes is None else (1, width))
            first = [_zeros(t, (layers * (1 + bidirectional), 1, n)) for t, n in zip(hx, hidden, strict=False)]
            flat = [_zeros(w, w.shape) for w in weights]
            tried = _run(cell, one, sizes, first, flat, bias, layers, 0.0, training, bidirectional, autocast, needs)
        out, h, c = (t.dtype for t in tried[:3])
    results = input.new_empty((*input.shape[:-1], hx[0].shape[-1] * (1 + bidirectional)), dtype=out)
    cell_state = hx[-1].new_empty(hx[-1].shape if cell == "lstm" else 0, dtype=c)
    return results, hx[0].new_empty(hx[0].shape, dtype=h), cell_state, torch.empty(1, dtype=torch.int64)


def _zeros(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.zeros(shape, dtype=like.dtype, device=like.device)


def _no_grads(tape: Tensor, out: Tensor | None, h: Tensor | None, c: Tensor | None, wanted: Sequence[Tensor]) -> list[Tensor]:
    return [w.new_empty(w.shape) for w in wanted]


def _keep(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    _, input, _, hx, weights, *_, needs = inputs
    ctx.needs, ctx.states = needs, len(hx)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[3], *(t for t, n in zip((input, *hx, *weights), needs, strict=True) if n))


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    tape, *wanted = ctx.saved_tensors
    found = iter(ops().rnn_backward(tape, *grads[:3], wanted))
    input, *rest = (next(found) if n else None for n in ctx.needs)
    return None, input, None, rest[: ctx.states], rest[ctx.states :], *[None] * 7


def _no_second(ctx: Any, *grads: Any) -> Any:
    raise CaptureError("a gradient of a recurrent layer's gradient")


@functools.cache
def ops() -> Any:
    """The operations, registered at first use."""
    library = torch.library.Library("fasttrain_recurrent", "DEF")  # type: ignore[no-untyped-call]
    for name, run, fake in (("rnn", _run, _shapes), ("rnn_backward", _run_backward, _no_grads)):
        library.define(name + _SCHEMAS[name], tags=(torch.Tag.nondeterministic_seeded,))  # type: ignore[no-untyped-call]
        library.impl(name, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"fasttrain_recurrent::{name}", fake, lib=library)
    torch.library.register_autograd("fasttrain_recurrent::rnn", _backward, setup_context=_keep, lib=library)
    torch.library.register_autograd("fasttrain_recurrent::rnn_backward", _no_second, lib=library)
    ops.library = library  # type: ignore[attr-defined]  # it lives as long as the operations
    return torch.ops.fasttrain_recurrent


def _layer(cell: str) -> Callable[..., tuple[Tensor, ...]]:
    """What stands in for ``torch._VF.<cell>`` while a step is traced."""
    rnn = ops().rnn

    def layer(input: Tensor, *args: Any) -> tuple[Tensor, ...]:
        batch_sizes, (first, weights, *how) = (None, args) if isinstance(args[2], bool) else (args[0], args[1:])
        hx = first if cell == "lstm" else (first,)
        time_first = batch_sizes is not None or not how[5]
        steps = input if time_first else input.transpose(0, 1)
        needs = [torch.is_grad_enabled() and t.requires_grad for t in (input, *hx, *weights)]
        kind = input.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        out, h, c, _ = rnn(cell, steps, batch_sizes, hx, weights, *how[:5], autocast, needs)
        states = (h, c) if cell == "lstm" else (h,)
        return (out if time_first else out.transpose(0, 1), *states)

    return layer


@functools.cache
def _layers() -> dict[str, Callable[..., tuple[Tensor, ...]]]:
    return {cell: _layer(cell) for cell in CELLS}


@contextmanager
def whole_layers() -> Iterator[None]:
    """Within a trace: a recurrent layer is one operation."""
    own = vars(torch._VF)  # what is not there it takes from torch._C
    before = {cell: own[cell] for cell in CELLS if cell in own}
    own.update(_layers())
    try:
        yield
    finally:
        for cell in CELLS:
            del own[cell]
        own.update(before)


@functools.cache
def _untraced() -> dict[type[nn.RNNBase], Any]:
    return {kind: torch._dynamo.disable(kind.forward) for kind in (nn.LSTM, nn.GRU, nn.RNN)}  # type: ignore[no-untyped-call]


@functools.cache
def _pad() -> Any:
    return torch._dynamo.disable(torch._C._VariableFunctions._pad_packed_sequence)  # type: ignore[no-untyped-call]


@contextmanager
def layers_apart() -> Iterator[None]:
    """Within a trace in stretches: one ends before a recurrent layer, which runs as it is, and the next begins behind it."""
    before = {kind: kind.forward for kind in _untraced()}
    own = vars(torch._VF)
    for kind, forward in _untraced().items():
        kind.forward = forward
    own["_pad_packed_sequence"] = _pad()  # torch 2.11 follows it into an operation that it cannot fake
    try:
        yield
    finally:
        del own["_pad_packed_sequence"]
        for kind, forward in before.items():
            kind.forward = forward
