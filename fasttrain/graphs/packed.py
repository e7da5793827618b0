"""Packed sequences in a graph: packing and unpacking are one operation each, whatever the lengths.

``torch.nn.utils.rnn`` is traced as it stands but for the two functions of torch's core that it calls. The number of rows
that are packed is a number read between the kernels; the longest length is the padded one where it was so in the first step
(the graph asserts it), and is read too elsewhere.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import rnn

from fasttrain.graphs.tracer import instead

_CORE = torch._C._VariableFunctions
_SCHEMAS = {  # time first
    "pack": "(Tensor input, Tensor lengths, SymInt rows, SymInt longest) -> (Tensor data, Tensor batch_sizes)",
    "pad": "(Tensor data, Tensor batch_sizes, Scalar value, SymInt batch, SymInt total) -> (Tensor out, Tensor lengths)",
}


def _pack(input: Tensor, lengths: Tensor, rows: int, longest: int) -> tuple[Tensor, Tensor]:
    data, batch_sizes = _CORE._pack_padded_sequence(input, lengths, False)
    return data, batch_sizes


def _pack_shapes(input: Tensor, lengths: Tensor, rows: int, longest: int) -> tuple[Tensor, Tensor]:
    return input.new_empty((rows, *input.shape[2:])), torch.empty(longest, dtype=torch.int64, device="cpu")


def _pad(data: Tensor, batch_sizes: Tensor, value: float, batch: int, total: int) -> tuple[Tensor, Tensor]:
    out, lengths = _CORE._pad_packed_sequence(data, batch_sizes, False, value, total)
    return out, lengths


def _pad_shapes(data: Tensor, batch_sizes: Tensor, value: float, batch: int, total: int) -> tuple[Tensor, Tensor]:
    return data.new_empty((total, batch, *data.shape[1:])), torch.empty(batch, dtype=torch.int64, device="cpu")


def _keep_packed(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    ctx.total, ctx.batch = inputs[0].shape[:2]
    ctx.save_for_backward(output[1])


def _packed_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    (batch_sizes,) = ctx.saved_tensors
    return ops().pad(grad, batch_sizes, 0.0, ctx.batch, ctx.total)[0], None, None, None


def _keep_padded(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    ctx.rows, ctx.longest = inputs[0].shape[0], inputs[1].shape[0]
    ctx.save_for_backward(output[1])


def _padded_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    (lengths,) = ctx.saved_tensors
    return ops().pack(grad, lengths, ctx.rows, ctx.longest)[0], None, None, None, None


@functools.cache
def ops() -> Any:
    """The operations, registered at first use. Each is the other's gradient."""
    library = torch.library.Library("fasttrain_packed", "DEF")  # type: ignore[no-untyped-call]
    for name, run, fake in (("pack", _pack, _pack_shapes), ("pad", _pad, _pad_shapes)):
        library.define(name + _SCHEMAS[name])  # type: ignore[no-untyped-call]
        library.impl(name, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"fasttrain_packed::{name}", fake, lib=library)
    torch.library.register_autograd("fasttrain_packed::pack", _packed_backward, setup_context=_keep_packed, lib=library)
    torch.library.register_autograd("fasttrain_packed::pad", _padded_backward, setup_context=_keep_padded, lib=library)
    ops.library = library  # type: ignore[attr-defined]  # it lives as long as the operations
    return torch.ops.fasttrain_packed


def _full(lengths: Tensor, times: int) -> bool:
    """Is the longest sequence as long as the padding? Asked in the first look where it is, and followed from there."""
    return torch.is_nonzero(lengths.max() == times)


def _looked(input: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    data, batch_sizes = _CORE._pack_padded_sequence(input, lengths, batch_first)
    times = input.shape[1 if batch_first else 0]
    if len(batch_sizes) == times:
        _full(lengths, times)
    return data, batch_sizes


@functools.cache
def _traced() -> dict[str, Callable[..., Any]]:
    """What stands in for torch's core while a step is traced."""
    pack, pad = ops().pack, ops().pad

    def packed(input: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
        steps = input.transpose(0, 1) if batch_first else input
        times = steps.shape[0]
        longest, rows = times if _full(lengths, times) else lengths.max().item(), lengths.sum().item()
        torch._check(longest >= 1)  # type: ignore[no-untyped-call]
        torch._check(longest <= times)  # type: ignore[no-untyped-call]
        torch._check(rows >= longest)  # type: ignore[no-untyped-call]
        data, batch_sizes = pack(steps, lengths, rows, longest)
        return data, batch_sizes

    def padded(data: Tensor, batch_sizes: Tensor, batch_first: bool, value: float, total: int) -> tuple[Tensor, Tensor]:
        out, lengths = pad(data, batch_sizes, value, int(batch_sizes[0]), total)
        return out.transpose(0, 1) if batch_first else out, lengths

    return {"_pack_padded_sequence": packed, "_pad_packed_sequence": padded}


@contextmanager
def looking() -> Iterator[None]:
    """Within the first look: whether sequences fill their padding is asked where a speculation hears of it."""
    with _instead_of_core({"_pack_padded_sequence": _looked}):
        yield


@contextmanager
def whole_packing() -> Iterator[None]:
    """Within a trace, and where its guards are evaluated: what stands in for torch's core."""
    with _instead_of_core(_traced()):
        yield


@contextmanager
def packing() -> Iterator[None]:
    """Within a trace: packing and unpacking end it no more."""
    from torch._dynamo.variables import BuiltinVariable, ConstantVariable, SkipFunctionVariable, TorchInGraphFunctionVariable
    from torch._dynamo.variables.functions import UserFunctionVariable
    from torch._dynamo.variables.tensor import SymNodeVariable

    skipped: Any = SkipFunctionVariable.call_function
    torchs: Any = TorchInGraphFunctionVariable.call_function
    builtins: Any = BuiltinVariable.call_function

    def call_skipped(this: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        own = _FOLLOWED.get(this.value)
        return skipped(this, tx, args, kwargs) if own is None else UserFunctionVariable(own).call_function(tx, args, kwargs)

    def call_torch(this: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if tx.f_code is _full.__code__ and this.value is torch.is_nonzero:
            return ConstantVariable.create(False)  # nobody follows it
        return torchs(this, tx, args, kwargs)

    def call_builtin(this: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        lengths = _packed_by(*args) if this.fn is operator.getitem and len(args) == 2 else None
        if lengths is None:
            return builtins(this, tx, args, kwargs)
        many = lengths.meta["example_value"].shape[0]
        if isinstance(many, int):
            return ConstantVariable.create(many)
        of = torch.fx.Proxy(lengths, tx.output.current_tracer)
        return SymNodeVariable.create(tx, tx.output.create_proxy("call_method", "size", (of, 0), {}), many)

    with (
        instead(SkipFunctionVariable, "call_function", call_skipped),
        instead(TorchInGraphFunctionVariable, "call_function", call_torch),
        instead(BuiltinVariable, "call_function", call_builtin),
    ):
        yield


def _packed_by(tensor: Any, at: Any) -> Any:
    """The lengths of the sequences of which this is the number: the first of the batch sizes that an operation of ours has made."""
    from torch._dynamo.variables import ConstantVariable, TensorVariable

    tensor, at = (v.realize() if hasattr(v, "realize") else v for v in (tensor, at))
    if type(tensor) is not TensorVariable or not isinstance(at, ConstantVariable) or at.value != 0:
        return None
    node = tensor.as_proxy().node
    made = node.args[0] if node.target is operator.getitem and node.args[1] == 1 else None
    return made.args[1] if isinstance(made, torch.fx.Node) and made.target is ops().pack else None


def _as_ours(function: Any) -> Any:
    """The same function, in a file that the tracer goes into."""
    code = function.__code__.replace(co_filename=__file__)
    return FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)


_PACK, _PAD = _as_ours(rnn.pack_padded_sequence), _as_ours(rnn.pad_packed_sequence)


def _packed(input: Tensor, lengths: Any, batch_first: bool = False, enforce_sorted: bool = True) -> Any:
    if not isinstance(lengths, Tensor):  # numbers that were read from one: no tensor is made of a list of them
        lengths = torch.stack([torch.scalar_tensor(n, dtype=torch.int64) for n in lengths])
    return _PACK(input, lengths, batch_first, enforce_sorted)


_FOLLOWED = {rnn.pack_padded_sequence: _packed, rnn.pad_packed_sequence: _PAD}


@contextmanager
def _instead_of_core(functions: dict[str, Callable[..., Any]]) -> Iterator[None]:
    own = vars(torch._VF)  # what is not there it takes from torch._C
    before = {name: own[name] for name in functions if name in own}
    own.update(functions)
    try:
        yield
    finally:
        for name in functions:
            del own[name]
        own.update(before)
