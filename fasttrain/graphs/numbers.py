"""Numbers read out of tensors, while a step is traced: none of them is decided by what it was the first time."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from fasttrain.graphs.checks import COMPARISONS, ON_NUMBERS, is_caught
from fasttrain.graphs.later import AS_PYTHON, ON_VALUES
from fasttrain.graphs.tracer import instead

# What a number's methods give that Dynamo (2.11 - 2.15) takes for a constant although it is none.
TAKEN_AS_CONSTANT = frozenset(("__round__", "hex", "is_integer", "as_integer_ratio", "bit_length", "__format__", "__hash__"))

AS_INTS = (operator.mod, operator.floordiv)  # that sympy simplifies as if floats were ints: ``x % 1`` is 0
OF_NAN = (torch.sym_max, torch.sym_min)  # that give another than Python where one of two is nan
UNDECIDED = "a comparison that nobody decides"
NEVER_RAISE = (operator.add, operator.sub, operator.mul, *COMPARISONS, torch.sym_float, torch.sym_not)


@contextmanager
def never_decided(lifted: Any = None) -> Iterator[None]:
    """Within a trace: a tensor's number is unknown, whatever its dtype, and what is written with it is too.

    ``lifted``: what the tracer would make another number of is left to the host; without it the trace ends there.
    """
    from torch._dynamo import symbolic_convert
    from torch._dynamo.exc import ObservedException, Unsupported
    from torch._dynamo.source import FloatTensorSource
    from torch._dynamo.symbolic_convert import InstructionTranslatorBase
    from torch._dynamo.variables import BuiltinVariable, ConstantVariable, builder
    from torch._dynamo.variables.misc import StringFormatVariable
    from torch._dynamo.variables.tensor import SymNodeVariable
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    wraps: Any = builder.wrap_to_fake_tensor_and_record
    formats: Any = InstructionTranslatorBase._format_value
    creates: Any = SymNodeVariable.create
    methods: Any = SymNodeVariable.call_method
    asserts: Any = symbolic_convert._detect_and_normalize_assert_statement
    builtins: Any = BuiltinVariable.call_function

    def wrap(e: Any, tx: Any, *, source: Any, is_tensor: bool, **kwargs: Any) -> Any:
        """An int tensor of one element that comes in is said to be the value it has, under a guard that a direct call passes by."""
        fake = wraps(e, tx, source=source, is_tensor=is_tensor, **kwargs)
        if is_tensor and getattr(fake, "item_memo", None) is not None and not isinstance(source, FloatTensorSource):
            fake.item_memo = None
        return fake

    def create(tx: Any, proxy: Any, sym_num: Any = None, **options: Any) -> Any:
        """An int that is decided by its range is; of a float ``x % 1`` is not 0, and ``x != x`` is a question."""
        node, out = proxy.node, creates(tx, proxy, sym_num, **options)
        given = [_symbol(a) for a in node.args] if node.op == "call_function" else []
        floats, unknown = (
            [n for n in given if isinstance(n, torch.SymFloat)],
            any(n is not None and free_unbacked_symbols(n) for n in given),
        )
        name = getattr(node.target, "__name__", node.target)
        if floats and lifted is not None and node.target in COMPARISONS and not getattr(_expr(out), "free_symbols", None):
            return _undecided(tx, proxy)
        if floats and (node.target in AS_INTS or (unknown and node.target in OF_NAN) or not getattr(_expr(out), "free_symbols", None)):
            given = [ConstantVariable.create(a) if n is None else creates(tx, torch.fx.Proxy(a, proxy.tracer), n)
                     for a, n in zip(node.args, given, strict=True)]  # fmt: skip
            return on_host(tx, AS_PYTHON.get(node.target, node.target), given)
        if unknown and node.target not in NEVER_RAISE and is_caught(tx):
            raise Unsupported(f"`{name}` of a number that a tensor holds, with somebody who catches what it raises")
        return out

    def format_value(tx: Any, spec: Any, flags: int) -> None:
        """``f"{x:.1f}"``: torch 2.11 and 2.13 find the number itself under the name of what is written."""
        if not isinstance(tx.stack[-1], SymNodeVariable):
            formats(tx, spec, flags)
            return
        if flags & 0x03:  # ``!r`` and the like
            raise Unsupported("a number of a tensor's, written with a conversion")
        tx.push(StringFormatVariable.create("{:" + spec.as_python_constant() + "}", [tx.pop()], {}))

    def call_method(this: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name in TAKEN_AS_CONSTANT and (name != "__round__" or args):
            return on_host(tx, partial(_ask, name), [this, *args])
        return methods(this, tx, name, args, kwargs)

    def call_builtin(this: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if this.fn is not print and any(type(a) is StringFormatVariable for a in args):
            return on_host(tx, this.fn, args)
        try:
            return builtins(this, tx, args, kwargs)
        except ObservedException as error:  # a TypeError of the tracer's own, which somebody may catch
            if any(isinstance(a, SymNodeVariable) for a in args):
                raise Unsupported(f"`{this.fn.__name__}` of a number that a tensor holds") from error
            raise

    def is_assert(tx: Any, *args: Any) -> bool:
        """Of a whole step checks are made of them; in pieces they raise a RuntimeError, which nobody may wait for."""
        return lifted is None and not is_caught(tx) and asserts(tx, *args)

    def on_host(tx: Any, function: Any, args: Any) -> Any:
        if lifted is not None and (function in ON_VALUES or isinstance(function, partial)):
            return lifted.found(tx, function, args, {})
        name = getattr(function, "__name__", "a method")
        raise Unsupported(f"`{name}` of a number that a tensor holds")

    with (
        instead(builder, "wrap_to_fake_tensor_and_record", wrap),
        instead(InstructionTranslatorBase, "_format_value", format_value),
        instead(SymNodeVariable, "create", staticmethod(create)),
        instead(SymNodeVariable, "call_method", call_method),
        instead(BuiltinVariable, "call_function", call_builtin),
        instead(symbolic_convert, "_detect_and_normalize_assert_statement", is_assert),
    ):
        yield


def _symbol(node: Any) -> Any:
    """The number that a traced argument stands for; None where it is a constant."""
    value = node.meta.get("example_value") if isinstance(node, torch.fx.Node) else None
    return value if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) else None


def _expr(variable: Any) -> Any:
    number = getattr(variable, "sym_num", None)
    return number.node.expr if isinstance(number, (torch.SymInt, torch.SymFloat, torch.SymBool)) else None


def settled(asked: Any, answer: bool, tx: Any) -> str:
    """The tracer is told what a graph asserts of sizes, and asserts it too: what it computes of them may depend on it."""
    number = asked.sym_num
    if isinstance(number, torch.SymFloat) or UNDECIDED in asked.as_proxy().node.meta or not _of_ints(number.node.expr):
        return ""
    truth = number if isinstance(number, torch.SymBool) else number != 0
    truth = truth if answer else torch.sym_not(truth)  # type: ignore[no-untyped-call]
    if not isinstance(truth, torch.SymBool):  # so it is whatever those are
        return ""
    tx.output.shape_env.guard_or_defer_runtime_assert(truth.node.expr, "a branch that is followed")
    return str(truth.node.expr)


def _of_ints(expr: Any) -> bool:
    return bool(expr.free_symbols) and all(s.is_integer for s in expr.free_symbols)


def _undecided(tx: Any, proxy: Any) -> Any:
    """``x != x``, which sympy says is false: nobody knows."""
    from torch._dynamo.variables.tensor import SymNodeVariable

    shapes = tx.output.shape_env
    with shapes.ignore_fresh_unbacked_symbols():
        truth = shapes.create_unbacked_symbool()
    proxy.node.meta |= {"example_value": truth, UNDECIDED: True}
    return SymNodeVariable(proxy, truth)


def undecided(graph: torch.fx.GraphModule) -> bool:
    """Does a graph compute with a comparison that the compiler would decide?"""
    return any(UNDECIDED in node.meta and node.users for node in graph.graph.nodes)


def _ask(name: str, of: Any, *args: Any) -> Any:
    return getattr(of, name)(*args)


class Hints:
    """What the numbers and sizes of one trace, which nobody knows while tracing, were in the first look."""

    def __init__(self) -> None:
        self._values: dict[Any, int | float] = {}  # by the tracer's symbols

    def learn(self, variable: Any, noted: Any) -> None:
        """The number that ``.item()`` gave there, or the shape of what was picked."""
        from torch._dynamo.variables.tensor import SymNodeVariable, TensorVariable

        if isinstance(variable, SymNodeVariable):
            self._learn(variable.sym_num, noted)
        elif type(variable) is TensorVariable and isinstance(noted, (tuple, list)):
            shape = variable.as_proxy().node.meta["example_value"].shape
            for size, was in zip(shape, noted, strict=False):
                self._learn(size, was)

    def _learn(self, number: Any, was: Any) -> None:
        expr = number.node.expr if isinstance(number, (torch.SymInt, torch.SymFloat)) else None
        if getattr(expr, "is_symbol", False) and type(was) is (int if isinstance(number, torch.SymInt) else float):
            self._values[expr] = was

    def value(self, node: Any) -> Any:
        """A traced number, computed by Python from what those were. LookupError where one of them was not seen."""
        if not isinstance(node, torch.fx.Node):
            return node
        number = _symbol(node)
        if number is None:
            raise LookupError
        if (expr := number.node.expr) in self._values:
            return self._values[expr]
        if isinstance(number, torch.SymInt):
            found = expr.xreplace(self._values)
            if not found.is_number:
                raise LookupError
            return int(found)
        if node.op != "call_function" or node.target not in (*ON_NUMBERS, torch.sym_float):
            raise LookupError
        return AS_PYTHON.get(node.target, node.target)(*map(self.value, node.args))
