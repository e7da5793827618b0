"""Values that only the host will know - a clock, a counter on the module, what a list holds - while a step is traced.

Each stands for what one piece of lifted work gives. More host work may be done on it; a graph, a branch or a returned value that
wants it ends the trace, and the step is traced again without any.
"""

from __future__ import annotations

import builtins
import dis
import functools
import math
import operator
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fasttrain.graphs.checks import handled
from fasttrain.graphs.left import without_graph
from fasttrain.graphs.tracer import instead
from fasttrain.module import Sink

CLOCKS: dict[Any, str] = {
    f: f"{f.__name__}" for f in (time.time, time.perf_counter, time.monotonic, time.time_ns, time.perf_counter_ns, time.monotonic_ns)
}
BUILTINS = (abs, dict, divmod, float, int, len, list, max, min, pow, repr, round, sorted, str, sum, tuple, str.format, math.sqrt, math.exp)
ON_VALUES = frozenset(f for f in vars(operator).values() if callable(f) and not isinstance(f, type)) | frozenset(BUILTINS)
AS_PYTHON: dict[Any, Callable[..., Any]] = {torch.sym_int: int, torch.sym_float: float, torch.sym_max: max, torch.sym_min: min}
CONTAINERS = frozenset(
    f"{kind}Variable" for kind in ("List", "ConstDict", "DefaultDict", "UserDefinedDict", "OrderedDict", "Counter", "Set", "Deque")
)
ASKS = tuple(n for n in dis.opmap if n.startswith(("POP_JUMP_", "JUMP_IF_", "TO_BOOL", "GET_ITER", "UNPACK_")))
MODULES = nn.Module.__setattr__.__code__.co_filename  # torch's own attributes of modules, by way of their dict
PLAIN_STORES: tuple[Any, ...] = (object.__setattr__, nn.Module.__setattr__)
MARK = "a value of host work"  # before the number of the piece of work whose result is logged

Made = Callable[[Any], Any]  # makes an argument out of the values that only the graph and the host know


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a step changes on the host, as Dynamo names the places."""

    containers: frozenset[str] = frozenset()
    attributes: frozenset[tuple[str, str]] = frozenset()  # of which object, called what
    metrics: bool = False  # are metric objects, which gather by themselves, asked there?

    def __bool__(self) -> bool:
        return bool(self.containers or self.attributes)


class _Anything:
    """What such a value is said to be an instance of."""

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def __delitem__(self, key: Any) -> None: ...


@functools.cache
def later() -> Any:
    """Dynamo's idea of such a value: the number of a piece of work, of which more can be asked."""
    from torch._dynamo.exc import Unsupported
    from torch._dynamo.variables.base import VariableTracker

    class LaterVariable(VariableTracker):
        def __init__(self, lifted: Any, number: int, metric: bool = False, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.lifted, self.number, self.metric = lifted, number, metric

        def is_python_constant(self) -> bool:
            return False

        def python_type(self) -> type:
            return _Anything

        def as_proxy(self) -> Any:
            raise Unsupported("a computation on a value that only the host knows")

        def reconstruct(self, codegen: Any) -> None:
            self.lifted.leaks(codegen.tx.output)
            raise Unsupported("a value that only the host knows, given back by the step")

        def call_function(self, tx: Any, args: Any, kwargs: Any) -> Any:
            return self.lifted.found(tx, _call, [self, *args], kwargs, kept=True)

        def call_method(self, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
            return self.lifted.found(tx, functools.partial(_ask, name), [self, *args], kwargs, kept=True)

        def mp_ass_subscript_impl(self, tx: Any, key: Any, value: Any) -> Any:  # ``x[key] = value``, as from torch 2.15 on
            return self.call_method(tx, "__setitem__", [key, value], {})

    return LaterVariable


def is_metric_object(value: Any) -> bool:
    """One of torchmetrics', which is not imported to find out."""
    return any(c.__name__ == "Metric" and c.__module__ == "torchmetrics.metric" for c in type(value).__mro__)


def _call(of: Any, *args: Any, **kwargs: Any) -> Any:
    return of(*args, **kwargs)


def _ask(name: str, of: Any, *args: Any, **kwargs: Any) -> Any:
    return getattr(of, name)(*args, **kwargs)


@functools.cache
def placed() -> Any:
    """An object handed to host work as it stands in its place."""
    from torch._dynamo.variables.base import VariableTracker

    return type("PlacedVariable", (VariableTracker,), {})


@contextmanager
def kept_later(lifted: Any, kept: Kept, wanted: Callable[[Any], str]) -> Iterator[None]:
    """Within a trace: clocks, and what of ``kept`` is read or written, are host work. ``wanted``: a source's name."""
    from torch._dynamo.exc import Unsupported
    from torch._dynamo.variables import BuiltinVariable, TensorVariable, functions, nn_module, user_defined

    builtin: Any = BuiltinVariable.call_function
    skipped: Any = functions.SkipFunctionVariable.call_function
    user_functions: Any = functions.UserFunctionVariable.call_function
    tensors: Any = TensorVariable.call_method

    def call_builtin(this: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if this.fn is not getattr and any(isinstance(a, later()) for a in (*args, *kwargs.values())):  # getattr: ``x.append``
            if this.fn not in ON_VALUES:
                raise Unsupported(f"{this.fn.__name__} of a value that only the host knows")
            return lifted.found(tx, this.fn, args, kwargs)
        return builtin(this, tx, args, kwargs)

    def stores(before: Any) -> Any:
        def store_attr(tx: Any, inst: Any) -> None:
            value, on = tx.stack[-2:]
            on = on.realize() if hasattr(on, "realize") else on
            key = (wanted(getattr(on, "source", None)), inst.argval)
            if not key[0] or not (isinstance(value, later()) or key in kept.attributes):
                before(tx, inst)
                return
            if key[0] in opened(tx) or type(held(on)).__setattr__ not in PLAIN_STORES:
                raise Unsupported("a value that only the host knows, put where something else stands between the object and its dict")
            tx.popn(2)
            lifted.attributes.add(key)
            given = [placed()(source=on.source), without_gradient(value, tx, inst.argval)]
            lifted.writes.add(lifted.found(tx, functools.partial(_write, inst.argval), given, {}, kept=True).number)
            tx.output.side_effects.__dict__.setdefault("kept_later", {})[key] = value

        return store_attr

    def call_skipped(this: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if this.value in CLOCKS and not args:
            at_start = all(n.op == "placeholder" for n in tx.output.graph.nodes)
            lifted.clocks.add(this.value)
            return lifted.found(tx, functools.partial(lifted.started.get, this.value) if at_start else this.value, [], {})
        return skipped(this, tx, args, kwargs)

    def call_function(this: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if getattr(this, "fn", None) is Sink.log:  # its sink in most versions of torch, a name and a value
            args, kwargs = list(args), dict(kwargs)
            given: Any = kwargs if "value" in kwargs else args
            at: Any = "value" if given is kwargs else 1 + isinstance(held(args[0]), Sink)
            given[at] = lifted.marked(tx, given[at])
        return user_functions(this, tx, args, kwargs)

    def call_tensor(this: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name == "tolist" and this.dtype is not None and this.dtype.is_floating_point:
            return lifted.found(tx, Tensor.tolist, [this.call_method(tx, "detach", [], {})], {})
        return tensors(this, tx, name, args, kwargs)

    def opened(tx: Any) -> set[str]:
        """The objects whose ``__dict__`` this trace has."""
        found: set[str] = tx.output.side_effects.__dict__.setdefault("opened", set())
        return found

    def reads(before: Any) -> Any:
        def var_getattr(this: Any, tx: Any, name: str) -> Any:
            if name == "__dict__" and tx.f_code.co_filename != MODULES and (place := wanted(getattr(this, "source", None))):
                written = tx.output.side_effects.__dict__.get("kept_later", ())
                if any(place == of for of, _ in (*kept.attributes, *written)):
                    raise Unsupported("the __dict__ of an object whose attributes only the host knows")
                opened(tx).add(place)
            key = (wanted(this.source), name) if kept.attributes and this.source is not None else None
            if key is None or key not in kept.attributes:
                return before(this, tx, name)
            written = tx.output.side_effects.__dict__.get("kept_later", {})
            return written[key] if key in written else lifted.found(tx, functools.partial(_read, name), [placed()(source=this.source)], {})

        return var_getattr

    with ExitStack() as stack:
        stack.enter_context(handled([dis.opmap["STORE_ATTR"]], lambda before, _: stores(before)))
        stack.enter_context(handled(map(dis.opmap.__getitem__, ASKS), lambda before, _: _asks(before)))
        for kind in (user_defined.UserDefinedObjectVariable, nn_module.UnspecializedNNModuleVariable):
            method = "var_getattr" if hasattr(kind, "var_getattr") else "tp_getattro_impl"  # as from torch 2.15 on
            stack.enter_context(instead(kind, method, reads(getattr(kind, method))))
        stack.enter_context(instead(BuiltinVariable, "call_function", call_builtin))
        stack.enter_context(instead(functions.SkipFunctionVariable, "call_function", call_skipped))
        stack.enter_context(instead(functions.UserFunctionVariable, "call_function", call_function))
        stack.enter_context(instead(TensorVariable, "call_method", call_tensor))
        yield


def _asks(before: Any) -> Any:
    """A branch on such a value, or a loop over it."""
    from torch._dynamo.exc import Unsupported

    def ask(tx: Any, inst: Any) -> None:
        if isinstance(tx.stack[-1], later()):
            raise Unsupported("a branch on a value that only the host knows")
        before(tx, inst)

    return ask


def _read(name: str, of: Any) -> Any:
    return getattr(of, name)


def _write(name: str, of: Any, value: Any) -> None:
    setattr(of, name, value)


def expression(node: torch.fx.Node, read: Callable[[torch.fx.Node], Made]) -> Made:
    """A number made of ``.item()`` of tensors, of Python's ints and of constants, computed as Python would. LookupError for any other.

    ``read``: how the number in a node's tensor, or the int that a node is, is got at.
    """
    if (node.op, node.target) == ("call_method", "item"):
        return read(node.args[0])  # type: ignore[arg-type]
    if node.op == "placeholder" and isinstance(node.meta.get("example_value"), torch.SymInt):
        return read(node)
    if node.op not in ("call_function", "call_method") or node.kwargs:
        raise LookupError
    parts = [expression(a, read) if isinstance(a, torch.fx.Node) else _constant(a) for a in node.args]
    if node.op == "call_method":
        if not str(node.target).startswith("__"):
            raise LookupError
        return lambda v: getattr(parts[0](v), str(node.target))(*(p(v) for p in parts[1:]))
    function = AS_PYTHON.get(node.target, node.target)
    if function not in ON_VALUES and getattr(builtins, getattr(function, "__name__", ""), None) is not function:
        raise LookupError
    return lambda v: function(*(p(v) for p in parts))  # type: ignore[operator]


def _constant(value: Any) -> Made:
    if not isinstance(value, (bool, int, float, type(None))):
        raise LookupError
    return lambda _: value


def kept_by(changed: list[Any], guards: set[str], effects: Any, named: Callable[[Any], str], known: set[tuple[str, str]]) -> Kept:
    """What of the objects that a step changed may be left to the host: containers, and attributes that are no tensor of the graph.

    ``known``: attributes that hold such values already.
    """
    from torch._dynamo.variables import ConstantVariable, TensorVariable
    from torch._dynamo.variables.tensor import SymNodeVariable

    containers, attributes = set(), set(known)
    for variable in changed:
        place = named(getattr(variable, "source", None))
        if not place:
            continue
        if type(variable).__name__ in CONTAINERS:
            containers.add(place)
        if isinstance(held(variable), type):  # what a class holds is read under other names too
            continue
        for name, value in getattr(effects, "store_attr_mutations", {}).get(variable, {}).items():
            value = value.realize() if hasattr(value, "realize") else value
            read = (f"{place}.{name}", f"{place}._buffers['{name}']")
            unread = type(value) is TensorVariable and not any(g.startswith(read) for g in guards)
            if isinstance(value, (ConstantVariable, SymNodeVariable)) or (unread and not value.requires_grad):
                attributes.add((place, name))
    return Kept(containers=frozenset(containers), attributes=frozenset(attributes))


def held(variable: Any) -> Any:
    """The object that Dynamo stands a variable for; None where it is no constant."""
    try:
        return getattr(variable, "value", None)
    except Exception:  # a list of tensors
        return None


def without_gradient(variable: Any, tx: Any, name: str = "") -> Any:
    """``name``: what the step leaves it as, with its graph; "" where nobody looks for a graph."""
    from torch._dynamo.variables import TensorVariable

    variable = variable.realize() if hasattr(variable, "realize") else variable
    if type(variable) is not TensorVariable or not variable.requires_grad:
        return variable
    return without_graph(variable, tx, name) if name else variable.call_method(tx, "detach", [], {})
