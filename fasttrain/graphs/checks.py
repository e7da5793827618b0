"""A branch on data that does nothing but raise is an assertion of the graph: it fails in its place, before what stands behind it."""

from __future__ import annotations

import dis
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fasttrain.graphs.tracer import instead
from fasttrain.results import Obstacle

JUMPS = {code: name.endswith("TRUE") for name, code in dis.opmap.items() if re.match(r"POP_JUMP_.*IF_(TRUE|FALSE)$", name)}
COMPARISONS = (operator.gt, operator.ge, operator.lt, operator.le, operator.eq, operator.ne)
ON_NUMBERS = (*COMPARISONS, operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.abs, abs)
LARGEST = 2**31  # of a constant beside a number: what Python makes of larger ones may be no int64
RAISES, LEAVES = ("RAISE_VARARGS", "RERAISE"), ("RETURN_VALUE", "RETURN_CONST", "YIELD_VALUE")

CHECK = "the check at "
Handler = Any  # ``f(tx, inst)``: what Dynamo does at one instruction


class CheckFailed(RuntimeError):
    """A graph with checks in it did not run to its end. Op by op, the step says why in the user's own words."""


class Checked:
    """A compiled graph with checks in it: a call of it that fails has changed nothing, whatever it had written before."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run
        self._written: list[int] | None = None  # which arguments it writes into; None before its first call
        self._kept: list[Tensor] = []

    def __call__(self, *args: Any) -> Any:
        rng, tensors = torch.get_rng_state(), range(len(args)) if self._written is None else self._written
        live = [args[i] for i in tensors if isinstance(args[i], Tensor)]
        versions = versions_of(args) if self._written is None else ()
        with torch.no_grad():
            if [k.shape for k in self._kept] != [t.shape for t in live]:
                self._kept = [t.detach().clone() for t in live]
            elif live:
                torch._foreach_copy_(self._kept, live)
        try:
            outs = self._run(*args)
        except Exception as error:
            torch.set_rng_state(rng)
            with torch.no_grad():
                for tensor, kept in zip(live, self._kept, strict=True):
                    if not torch.equal(tensor, kept):
                        tensor.copy_(kept)
            raise CheckFailed(str(error)) from error
        if self._written is None:
            self._written = [i for i, (v, w) in enumerate(zip(versions, versions_of(args), strict=True)) if v != w]
            self._kept = []
        return outs


def has_checks(graph: torch.fx.GraphModule) -> bool:
    return any(node.target is torch._assert_async for node in graph.graph.nodes)


def versions_of(args: Sequence[Any]) -> list[int]:
    """What changes of an argument when it is written into."""
    return [a._version if isinstance(a, Tensor) and not a.is_inference() else 0 for a in args]


def checks_of(graph: torch.fx.GraphModule) -> list[Obstacle]:
    """The user's checks that this graph makes itself; what they cost is part of its kernels."""
    said = [str(node.args[1]) for node in graph.graph.nodes if node.target is torch._assert_async]
    places = [text.removeprefix(CHECK) for text in said if text.startswith(CHECK)]
    return [Obstacle("a branch on data that raises.", p, done="checked in the graph; a step that fails it runs op by op") for p in places]


@contextmanager
def checking() -> Iterator[None]:
    """Within a trace: neither such a branch nor ``torch._assert`` nor ``torch.equal`` ends it."""
    from torch._dynamo.variables import BuiltinVariable, TensorVariable, TorchInGraphFunctionVariable

    torchs: Any = TorchInGraphFunctionVariable.call_function
    builtins: Any = BuiltinVariable.call_function
    methods: Any = TensorVariable.call_method

    def call_torch(this: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        condition = on_data(args[0], tx) if this.value is torch._assert and args and not is_caught(tx) else None
        if condition is not None:
            return asserted(condition, tx)
        shapes = [shape_of(a) for a in args] if this.value is torch.equal and _decides(tx) else [None]
        if len(shapes) == 2 and shapes[0] is not None and shapes[0] == shapes[1]:
            return args[0].call_method(tx, "eq", [args[1]], {}).call_method(tx, "all", [], {})
        return torchs(this, tx, args, kwargs)

    def call_builtin(this: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        is_bool = this.fn is bool and len(args) == 1 and _decides(tx)
        return (on_data(args[0], tx) if is_bool else None) or builtins(this, tx, args, kwargs)

    def call_method(this: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
        is_bool = name == "item" and this.dtype is torch.bool and _decides(tx)
        return this if is_bool else methods(this, tx, name, args, kwargs)

    with (
        instead(TorchInGraphFunctionVariable, "call_function", call_torch),
        instead(BuiltinVariable, "call_function", call_builtin),
        instead(TensorVariable, "call_method", call_method),
        handled(JUMPS, lambda handler, code: _or_check(handler, JUMPS[code])),
    ):
        yield


@contextmanager
def handled(codes: Iterable[int], make: Callable[[Handler, int], Handler]) -> Iterator[None]:
    """Within: these instructions are traced by what ``make`` makes of their handlers."""
    from torch._dynamo import symbolic_convert

    ours = set(codes)
    kinds = [k for k in vars(symbolic_convert).values() if isinstance(k, symbolic_convert.BytecodeDispatchTableMeta)]
    before = [(kind, kind.dispatch_table) for kind in kinds]
    for kind, table in before:
        kind.dispatch_table = [make(h, code) if code in ours else h for code, h in enumerate(table)]
    try:
        yield
    finally:
        for kind, table in before:
            kind.dispatch_table = table


def _decides(tx: Any) -> bool:
    """Is what this call gives back only asked whether it is true?"""
    return tx.next_instruction.opcode in JUMPS or tx.next_instruction.opname == "TO_BOOL"


def _or_check(handler: Handler, jumps_if: bool) -> Handler:
    def jump(tx: Any, inst: Any) -> None:
        stays, jumps = _raise_from(tx, tx.instruction_pointer), _raise_from(tx, tx.indexof[inst.target])
        condition = on_data(tx.stack[-1], tx) if (stays is None) != (jumps is None) and not is_caught(tx) else None
        if condition is None:
            handler(tx, inst)
            return
        tx.pop()
        asserted(condition if jumps_if == (jumps is None) else condition.call_method(tx, "logical_not", [], {}), tx)
        if jumps is None:
            tx.jump(inst)

    return jump


def _raise_from(tx: Any, start: int) -> Any:
    """The instruction that raises at the end of a straight road from here; None where the road forks or leads elsewhere."""
    for inst in tx.instructions[start:]:
        if inst.opname in RAISES:
            return inst
        if inst.target is not None or inst.opname in LEAVES:
            return None
    return None


def is_caught(tx: Any) -> bool:
    """May somebody around this instruction go on after an exception? A ``with`` of torch's does not, a ``finally`` neither."""
    while tx is not None:
        if tx.active_generic_context_managers:  # somebody's own ``with``
            return True
        entry = tx.current_instruction.exn_tab_entry
        while entry is not None:
            start = tx.indexof[entry.target]
            if tx.instructions[start + 1].opname == "WITH_EXCEPT_START":
                start = next(i for i, inst in enumerate(tx.instructions) if i > start and inst.opcode in JUMPS) + 1
            if (raising := _raise_from(tx, start)) is None:
                return True
            entry = raising.exn_tab_entry
        tx = tx.parent
    return False


def on_data(variable: Any, tx: Any) -> Any:
    """The tensor of one element whose truth is asked for; None for what is known while tracing."""
    from torch._dynamo.variables.tensor import SymNodeVariable

    if hasattr(variable, "realize"):
        variable = variable.realize()
    if isinstance(variable, SymNodeVariable):
        variable = _as_tensor(variable.as_proxy().node, tx)
    shape = shape_of(variable)
    return variable if shape is not None and shape.numel() == 1 else None


def _as_tensor(number: Any, tx: Any, exact: torch.dtype | None = None) -> Any:
    """A number made of ``.item()`` of tensors, of sizes and of constants, as a tensor; None for any other.

    ``exact``: the dtype that all of it is computed in, as Python computes: float64 where a float is among them.
    """
    from torch._dynamo.variables.builder import wrap_fx_proxy

    exact = exact or (torch.float64 if _has_float(number) else torch.int64)

    def call(op: str, target: Any, *args: Any, **kwargs: Any) -> Any:
        return wrap_fx_proxy(tx, tx.output.create_proxy(op, target, args, kwargs))

    def part(arg: Any) -> Any:
        if isinstance(arg, int) and abs(arg) > LARGEST:
            return None
        tensor = _as_tensor(arg, tx, exact) if isinstance(arg, torch.fx.Node) else arg
        truth = isinstance(arg, torch.fx.Node) and arg.target in COMPARISONS  # of which Python makes numbers
        return call("call_method", "to", tensor.as_proxy(), exact) if truth and tensor is not None else tensor

    here = torch.fx.Proxy(number, tx.output.current_tracer)
    if (number.op, number.target) == ("call_method", "item"):
        read = torch.fx.Proxy(number.args[0], tx.output.current_tracer)
        return call("call_method", "detach", call("call_method", "to", read, exact).as_proxy())
    if number.target is torch.sym_float:
        return _as_tensor(number.args[0], tx, exact)
    args: list[Any] = [part(a) for a in number.args] if number.target in ON_NUMBERS and not _by_zero(number) else [None]
    if None not in args:
        return call("call_function", number.target, *(a.as_proxy() if hasattr(a, "as_proxy") else a for a in args))
    is_int = isinstance(number.meta.get("example_value"), torch.SymInt)
    return call("call_function", torch.scalar_tensor, here, dtype=exact) if is_int else None


def _by_zero(number: Any) -> bool:
    """Is it a division that may raise?"""
    return number.target is operator.truediv and (isinstance(number.args[1], torch.fx.Node) or number.args[1] == 0)


def _has_float(number: Any) -> bool:
    if not isinstance(number, torch.fx.Node):
        return isinstance(number, float)
    example = number.meta.get("example_value")
    is_float = isinstance(example, torch.SymFloat) or (isinstance(example, torch.Tensor) and example.is_floating_point())
    return is_float or any(map(_has_float, number.args))


def shape_of(variable: Any) -> torch.Size | None:
    from torch._dynamo.variables import TensorVariable

    if hasattr(variable, "realize"):
        variable = variable.realize()
    if type(variable) is not TensorVariable:
        return None
    shape: torch.Size = variable.as_proxy().node.meta["example_value"].shape
    return shape


def asserted(condition: Any, tx: Any, message: str = "") -> Any:
    """The graph fails here where the tensor is not true."""
    from torch._dynamo.variables import ConstantVariable

    message = message or CHECK + f"{tx.f_code.co_filename}:{tx.lineno}"
    tx.output.create_proxy("call_function", torch._assert_async, (condition.as_proxy(), message), {})
    return ConstantVariable.create(None)
