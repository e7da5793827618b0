"""Host work lifted out of a trace: prints, messages, warnings, lists that grow. It comes behind the graph, on that step's values."""

from __future__ import annotations

import collections
import copy
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fasttrain.graphs.checks import is_caught
from fasttrain.graphs.explain import traced_place
from fasttrain.graphs.later import (
    MARK,
    Kept,
    Made,
    expression,
    held,
    is_metric_object,
    kept_by,
    kept_later,
    later,
    placed,
    without_gradient,
)
from fasttrain.graphs.tracer import instead
from fasttrain.module import Sink
from fasttrain.results import Obstacle

BEHIND = "lifted: it runs behind the graph, on the values of that step"
MODULE_LEVEL = frozenset((logging.debug, logging.info, logging.warning, logging.error, logging.critical))


class HostWorkError(Exception):
    """What host work of the user's raised, which is no failure of a trace."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Values(list[Any]):
    """What a graph gives to one piece of host work, and what the pieces before it in that step have given, by their numbers."""

    before: dict[int, Any]


class Lifted:
    """What one trace has lifted. An item of the sink that starts with a number is host work: the number, then its values."""

    def __init__(self, own: tuple[Any, ...]) -> None:
        self._sink: Sink = own[0]
        self._own = own  # what of all that a step changes is ours
        self._calls: list[Callable[[Values], Any]] = []
        self._from: list[Obstacle] = []  # by number: what was lifted from where
        self._least: list[float] = []  # and the least seconds that it took
        self.kept = Kept(metrics=True)  # what a step keeps on the host and never looks at
        self.metrics = False  # has it met a metric object?
        self.leaked = Kept()  # where it put values that only the host knows
        self.attributes: set[tuple[str, str]] = set()  # that hold what only the host knows
        self.writes: set[int] = set()  # pieces of work that leave something on an object
        self.clocks: set[Callable[[], float]] = set()  # that it reads
        self.started: dict[Callable[[], float], float] = {}  # as they stood when it began

    def leaks(self, output: Any) -> None:
        """Such a value is put into something that the host has not been left with."""
        changed = [v for v in output.side_effects.id_to_variable.values() if output.side_effects.is_modified(v)]
        changed = [v for v in changed if not any(held(v) is o for o in self._own)]
        self.leaked = kept_by(changed, {name_of(g) for g in output.guards}, output.side_effects, name_of, self.attributes)

    def begin(self, clocks: Iterable[Callable[[], float]]) -> None:
        """A step begins, at these clocks' time."""
        for clock in clocks:
            self.started[clock] = clock()

    def do(self, work: Iterable[Sequence[Any]]) -> dict[int, Any]:
        """A step's host work in order; what each piece gives. While a step is only tried nothing, in numbers, but what it writes on
        objects: another graph of the next step tried may read that, and it is put back."""
        found: dict[int, Any] = {}
        for number, *given in work:
            values = Values(given)
            values.before = found
            begun = time.perf_counter()
            found[number] = 0.0 if self._sink.muted and number not in self.writes else self._calls[number](values)
            if not self._sink.muted:
                self._least[number] = min(self._least[number], time.perf_counter() - begun)
        return found

    @property
    def dealt(self) -> list[Obstacle]:
        """What was lifted and has been done, place by place, with what it takes at least."""
        spent: dict[Obstacle, float] = {}
        for what, seconds in zip(self._from, self._least, strict=True):
            if seconds < math.inf:
                spent[what] = spent.get(what, 0.0) + seconds * 1e6
        return [replace(what, cost_us=us) for what, us in spent.items()]

    def found(self, tx: Any, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], *, kept: bool = False) -> Any:
        """A lifted call's result, for the host alone."""
        from torch._dynamo.exc import Unsupported

        if function is not _itself and is_caught(tx):
            raise Unsupported(f"host work that may raise, with somebody who catches it: {function}")
        if kept and getattr(args[0], "metric", False):  # no graph sees what it makes of what it is given: that needs no gradient
            args, kwargs = [without_gradient(a, tx) for a in args], {k: without_gradient(v, tx) for k, v in kwargs.items()}
            kept = False
        if (number := self.lift(tx, function, args, kwargs, kept=kept)) is None:
            raise Unsupported(f"host work on what no graph gives back: {function}")
        return later()(self, number)

    def marked(self, tx: Any, variable: Any) -> Any:
        """A logged value: a number that the host will know is a mark in its place."""
        from torch._dynamo.variables.base import VariableTracker
        from torch._dynamo.variables.tensor import SymNodeVariable

        variable = variable.realize() if hasattr(variable, "realize") else variable
        number = variable.number if isinstance(variable, later()) else None
        if isinstance(variable, SymNodeVariable):
            number = self.lift(tx, _itself, [variable], {})
        return variable if number is None else VariableTracker.build(tx, (MARK, number))

    def lift(self, tx: Any, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], *, kept: bool = False) -> int | None:
        """Leave a traced call for later, and give its number; None where one of its arguments is nothing that a graph gives back.

        ``kept``: it keeps its arguments themselves, where others see what they hold at this moment.
        """
        sink = tx.output.side_effects.id_to_variable.get(id(self._sink))
        values: list[Any] = []
        try:
            made = [_made(a, values, tx, kept) for a in args]
            named = {k: _made(v, values, tx, kept) for k, v in kwargs.items()}
        except LookupError:
            return None
        items = tx.output.side_effects.store_attr_mutations.get(sink, {}).get("items")
        if not hasattr(items, "items"):  # no step of ours is being traced
            return None
        from torch._dynamo.variables import ConstantVariable, TupleVariable

        number = len(self._calls)
        self._calls.append(lambda v: function(*(m(v) for m in made), **{k: m(v) for k, m in named.items()}))
        reason = f"{function.__name__} in the step." if function in (print, list.append) else "work on the host in the step."
        self._least.append(math.inf)
        self._from.append(Obstacle(reason, traced_place(), "Doing it in on_train_batch_end would spare it.", BEHIND))
        items.call_method(tx, "append", [TupleVariable([ConstantVariable.create(number), *values])], {})
        return number

    @contextmanager
    def lifting(self) -> Iterator[None]:
        """Within a trace: what can be lifted is."""
        from torch._dynamo.exc import Unsupported
        from torch._dynamo.guards import GuardBuilder
        from torch._dynamo.variables import ConstantVariable, misc
        from torch._dynamo.variables.builder import VariableBuilder

        says: Any = misc.LoggingLoggerVariable.call_method
        wraps: Any = VariableBuilder._wrap

        def call_function(this: Any, tx: Any, args: Any, kwargs: Any) -> Any:
            if self.lift(tx, _placed(this.value, _frame(tx, kwargs)), args, kwargs) is not None:
                return ConstantVariable.create(None)
            raise Unsupported(f"operator `{this.value.__name__}` on what no graph gives back: an object, a tensor that requires grad")

        def call_method(this: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
            level: Any = getattr(logging, name.upper(), None)
            heard = isinstance(level, int) and this.value.isEnabledFor(level)
            if heard and self.lift(tx, _said(this.value, level, _frame(tx, kwargs)), args, kwargs) is not None:
                return ConstantVariable.create(None)
            return says(this, tx, name, args, kwargs)

        left: set[int] = set()  # objects that are the host's
        ours: set[int] = set()  # and containers of the trace's

        def wrap(this: Any, value: Any) -> Any:
            is_left = bool(self.kept.containers) and name_of(this.source) in self.kept.containers
            if id(value) in (ours if is_left else left):
                raise Unsupported("one container under two names, of which the host has one")
            if isinstance(value, (list, dict, set, collections.deque)):
                (left if is_left else ours).add(id(value))
            if is_left:
                this.install_guards(GuardBuilder.TYPE_MATCH)
                return self.found(this.tx, _itself, [placed()(source=this.source)], {})
            if self.kept.metrics and is_metric_object(value) and this.source is not None:
                self.metrics = True
                this.install_guards(GuardBuilder.TYPE_MATCH)
                found = self.found(this.tx, _itself, [placed()(source=this.source)], {})
                found.metric = True
                return found
            return wraps(this, value)

        functions = torch._dynamo.config.reorderable_logging_functions | {print, warnings.warn} | MODULE_LEVEL
        with (
            torch._dynamo.config.patch(reorderable_logging_functions=functions),
            instead(misc.DebuggingVariable, "call_function", call_function),
            instead(misc.LoggingLoggerVariable, "call_method", call_method),
            instead(VariableBuilder, "_wrap", wrap),
            kept_later(self, self.kept, name_of),
        ):
            yield


def name_of(source: Any) -> str:
    """Where Dynamo found something, as it would write it."""
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def _made(variable: Any, values: list[Any], tx: Any, kept: bool) -> Made:
    """How an argument is made later; the values it takes are added to ``values``. LookupError: it cannot be."""
    from torch._dynamo import variables
    from torch._dynamo.variables.misc import StringFormatVariable
    from torch._dynamo.variables.tensor import SymNodeVariable

    if hasattr(variable, "realize"):
        variable = variable.realize()
    if kept and isinstance(variable, (variables.ListVariable, variables.ConstDictVariable)):
        if variable.source is not None:  # it is to be that very object
            raise LookupError
        given(tx.output).append((variable, _items_of(variable)))
    if variable.is_python_constant():
        constant = variable.as_python_constant()
        return (lambda _: constant) if isinstance(constant, Hashable) else lambda _: copy.deepcopy(constant)  # a new one each time
    if isinstance(variable, StringFormatVariable):
        form = variable.format_string
        parts = [_made(_number(a, tx), values, tx, kept) for a in variable.sym_args]
        named = {k: _made(_number(a, tx), values, tx, kept) for k, a in variable.sym_kwargs.items()}
        return lambda v: form.format(*(p(v) for p in parts), **{k: p(v) for k, p in named.items()})
    if isinstance(variable, (variables.ListVariable, variables.TupleVariable)):
        kind, items = variable.python_type(), [_made(i, values, tx, kept) for i in variable.items]
        if kind not in (list, tuple):
            raise LookupError
        return lambda v: kind(i(v) for i in items)
    if isinstance(variable, variables.ConstDictVariable) and variable.python_type() is dict:
        pairs = [(_made(k.vt, values, tx, kept), _made(v, values, tx, kept)) for k, v in variable.items.items()]
        return lambda v: {k(v): item(v) for k, item in pairs}
    if isinstance(variable, later()):
        number = variable.number
        return lambda v: v.before[number]
    if isinstance(variable, SymNodeVariable):
        with suppress(LookupError):
            return expression(variable.as_proxy().node, lambda node: _read_from(node, values, tx))
    place = len(values)
    if isinstance(variable, variables.NumpyNdarrayVariable):
        values.append(_copy_of(variable.as_proxy(), tx))
        return lambda v: v[place].numpy()
    if isinstance(variable, (placed(), SymNodeVariable)):
        values.append(variable)
    elif isinstance(variable, variables.TensorVariable) and not _example(variable).requires_grad:
        values.append(variable if kept else variable.call_method(tx, "clone", [], {}))  # it may have moved on when it is read
    else:
        raise LookupError
    return lambda v: v[place]


def given(output: Any) -> list[tuple[Any, list[Any]]]:
    """New containers of this trace that the host was given to keep, and what they held then."""
    found: list[tuple[Any, list[Any]]] = output.__dict__.setdefault("given_to_host", [])
    return found


def changed_since(output: Any) -> bool:
    """Was one of them changed after? What the host keeps is another."""
    return any(len(then) != len(now) or any(a is not b for a, b in zip(then, now, strict=True))
               for variable, then in given(output) for now in (_items_of(variable),))  # fmt: skip


def _items_of(variable: Any) -> list[Any]:
    items = variable.items
    return [x for pair in items.items() for x in pair] if isinstance(items, dict) else list(items)


def _read_from(node: torch.fx.Node, values: list[Any], tx: Any) -> Made:
    """The tensor whose ``.item()`` is a number: it is read later. An int is given back as it is: floats made of it would be frozen."""
    from torch._dynamo.variables.tensor import SymNodeVariable

    place = len(values)
    if isinstance(node.meta["example_value"], torch.SymInt):
        values.append(SymNodeVariable.create(tx, torch.fx.Proxy(node, tx.output.current_tracer), node.meta["example_value"]))
        return lambda v: v[place]
    values.append(_copy_of(torch.fx.Proxy(node, tx.output.current_tracer), tx))
    return lambda v: v[place].item()


def _copy_of(tensor: Any, tx: Any) -> Any:
    from torch._dynamo.variables.builder import wrap_fx_proxy

    detached = wrap_fx_proxy(tx, tx.output.create_proxy("call_method", "detach", (tensor,), {}))
    return detached.call_method(tx, "clone", [], {})


def _itself(value: Any) -> Any:
    return value


def _number(variable: Any, tx: Any) -> Any:
    """A tensor of one number is formatted as that number, whatever gradient it has."""
    example = _example(variable)
    return variable.call_method(tx, "detach", [], {}) if isinstance(example, Tensor) and example.dim() == 0 else variable


def _example(variable: Any) -> Any:
    try:
        return variable.as_proxy().node.meta["example_value"]
    except Exception:  # a variable that stands for no value of the graph
        return None


def _frame(tx: Any, kwargs: dict[str, Any]) -> Any:
    """The traced frame that a message is said to come from."""
    level = kwargs.get("stacklevel")
    up = 1 if level is None else level.as_python_constant()
    while up > 1 and getattr(tx, "parent", None) is not None:
        tx, up = tx.parent, up - 1
    return tx


def _placed(function: Callable[..., Any], frame: Any) -> Callable[..., Any]:
    """``warnings.warn`` and the functions of logging say where they were called: there, not behind the graph."""
    if function is print:
        return function
    if function is not warnings.warn:
        return _said(logging.getLogger(), getattr(logging, function.__name__.upper()), frame)
    path, line, names = frame.f_code.co_filename, frame.lineno, frame.f_globals

    def warn(message: Any, category: Any = None, stacklevel: int = 1, source: Any = None) -> None:
        kind = type(message) if isinstance(message, Warning) else category or UserWarning
        registry = names.setdefault("__warningregistry__", {})
        warnings.warn_explicit(message, kind, path, line, names.get("__name__", ""), registry, names, source)

    return warn


def _said(logger: logging.Logger, level: int, frame: Any) -> Callable[..., None]:
    path, line, name = frame.f_code.co_filename, frame.lineno, frame.f_code.co_name

    def say(message: Any, *args: Any, exc_info: Any = None, extra: Any = None, stacklevel: int = 1) -> None:
        if logger is logging.root and not logger.handlers:
            logging.basicConfig()
        if logger.isEnabledFor(level):
            error = sys.exc_info() if exc_info else None
            logger.handle(logger.makeRecord(logger.name, level, path, line, message, args, error, name, extra))

    return say
