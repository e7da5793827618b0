"""Host work lifted out of a trace: prints, messages, warnings, lists that grow. It comes behind the graph, on that step's values."""

from __future__ import annotations

import functools
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fasttrain.graphs.explain import traced_place
from fasttrain.graphs.tracer import instead
from fasttrain.module import Sink
from fasttrain.results import Obstacle

BEHIND = "lifted: it runs behind the graph, on the values of that step"
Made = Callable[[Sequence[Any]], Any]  # makes an argument out of the values that only the graph knows

MODULE_LEVEL = frozenset((logging.debug, logging.info, logging.warning, logging.error, logging.critical))


class HostWorkError(Exception):
    """What host work of the user's raised, which is no failure of a trace."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Lifted:
    """What one trace has lifted. An item of the sink that starts with a number is host work: the number, then its values."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._calls: list[Callable[[Sequence[Any]], None]] = []
        self._from: list[Obstacle] = []  # by number: what was lifted from where
        self._least: list[float] = []  # and the least seconds that it took
        self.lists: frozenset[str] = frozenset()  # that a step only appends to, as Dynamo names their places

    def do(self, number: int, values: Sequence[Any]) -> None:
        """One piece of work; nothing while a step is only tried."""
        if self._sink.muted:
            return
        begun = time.perf_counter()
        self._calls[number](values)
        self._least[number] = min(self._least[number], time.perf_counter() - begun)

    @property
    def dealt(self) -> list[Obstacle]:
        """What was lifted and has been done, with what it takes at least."""
        return [replace(o, cost_us=s * 1e6) for o, s in zip(self._from, self._least, strict=True) if s < math.inf]

    def lift(self, tx: Any, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], *, kept: bool = False) -> bool:
        """Leave a traced call for later; False where one of its arguments is nothing that a graph gives back.

        ``kept``: it keeps its arguments themselves, where others see what they hold at this moment.
        """
        sink = tx.output.side_effects.id_to_variable.get(id(self._sink))
        values: list[Any] = []
        try:
            made = [_made(a, values, tx, kept) for a in args]
            named = {k: _made(v, values, tx, kept) for k, v in kwargs.items()}
        except LookupError:
            return False
        items = tx.output.side_effects.store_attr_mutations.get(sink, {}).get("items")
        if not hasattr(items, "items"):  # no step of ours is being traced
            return False
        from torch._dynamo.variables import ConstantVariable, TupleVariable

        number = ConstantVariable.create(len(self._calls))
        self._calls.append(lambda v: function(*(m(v) for m in made), **{k: m(v) for k, m in named.items()}))
        items.call_method(tx, "append", [TupleVariable([number, *values])], {})
        reason = f"{getattr(function, '__name__', 'host work')} in the step."
        self._least.append(math.inf)
        self._from.append(Obstacle(reason, traced_place(), "Calling it in on_train_batch_end would spare it.", BEHIND))
        return True

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
            if self.lift(tx, _placed(this.value, _frame(tx, kwargs)), args, kwargs):
                return ConstantVariable.create(None)
            raise Unsupported(f"operator `{this.value.__name__}` on what no graph gives back: an object, a tensor that requires grad")

        def call_method(this: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
            level: Any = getattr(logging, name.upper(), None)
            heard = isinstance(level, int) and this.value.isEnabledFor(level)
            if heard and self.lift(tx, _said(this.value, level, _frame(tx, kwargs)), args, kwargs):
                return ConstantVariable.create(None)
            return says(this, tx, name, args, kwargs)

        def wrap(this: Any, value: Any) -> Any:
            if type(value) is list and name_of(this.source) in self.lists:
                this.install_guards(GuardBuilder.TYPE_MATCH)
                return _growing()(self, source=this.source)
            return wraps(this, value)

        functions = torch._dynamo.config.reorderable_logging_functions | {print, warnings.warn} | MODULE_LEVEL
        with (
            torch._dynamo.config.patch(reorderable_logging_functions=functions),
            instead(misc.DebuggingVariable, "call_function", call_function),
            instead(misc.LoggingLoggerVariable, "call_method", call_method),
            instead(VariableBuilder, "_wrap", wrap),
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
    if variable.is_python_constant():
        constant = variable.as_python_constant()
        return lambda _: constant
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
    place, read = len(values), _read_from(variable, tx)
    if read is not None:
        values.append(read)
        return lambda v: v[place].item()
    if isinstance(variable, (_growing(), SymNodeVariable)):
        values.append(variable)
    elif isinstance(variable, variables.TensorVariable) and not _example(variable).requires_grad:
        values.append(variable if kept else variable.call_method(tx, "clone", [], {}))  # it may have moved on when it is read
    else:
        raise LookupError
    return lambda v: v[place]


def _read_from(variable: Any, tx: Any) -> Any:
    """The tensor whose ``.item()`` this number is: it is read later; None for anything else."""
    from torch._dynamo.variables.builder import wrap_fx_proxy
    from torch._dynamo.variables.tensor import SymNodeVariable

    node = variable.as_proxy().node if isinstance(variable, SymNodeVariable) else None
    if node is None or (node.op, node.target) != ("call_method", "item"):
        return None
    tensor = torch.fx.Proxy(node.args[0], tx.output.current_tracer)
    detached = wrap_fx_proxy(tx, tx.output.create_proxy("call_method", "detach", (tensor,), {}))
    return detached.call_method(tx, "clone", [], {})


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


@functools.cache
def _growing() -> Any:
    """Dynamo's idea of a list that the step appends to and never looks at."""
    from torch._dynamo.exc import Unsupported
    from torch._dynamo.variables import ConstantVariable
    from torch._dynamo.variables.base import VariableTracker

    class GrowingListVariable(VariableTracker):
        def __init__(self, lifted: Lifted, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.lifted = lifted

        def python_type(self) -> type:
            return list

        def is_python_constant(self) -> bool:
            return False

        def call_method(self, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
            if name == "append" and self.lifted.lift(tx, list.append, [self, *args], kwargs, kept=True):
                return ConstantVariable.create(None)
            raise Unsupported(f"list.{name} on a list that the step appends to")

    return GrowingListVariable
