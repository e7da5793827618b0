"""Host lookups in a step - a column's place in a pandas index, ``bisect`` in milestones - are looked up while it is traced."""

from __future__ import annotations

import bisect
import fnmatch
import json
import os
import platform
import socket
import statistics
import sys
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from fasttrain.graphs.tracer import instead

# Of constants they give the same constant, in this process at least.
PURE = frozenset(
    (
        *(bisect.bisect, bisect.bisect_left, bisect.bisect_right, fnmatch.fnmatch, fnmatch.fnmatchcase, json.dumps, json.loads),
        *(statistics.mean, statistics.median, statistics.pstdev, statistics.stdev, zlib.crc32, zlib.adler32),
        *(os.cpu_count, os.getpid, platform.node, platform.system, platform.machine, socket.gethostname),
    )
)
# What is installed stays installed. Named, for they are others' functions, which are not imported to find out.
INSTALLED = frozenset((("skbase.utils.dependencies._dependencies", "_check_soft_dependencies"), ("importlib.metadata", "version")))
PLAIN = (type(None), bool, int, float, str, bytes, slice)
LABELS = ("columns", "index")  # of a table: immutable objects, replaced when the table gets others


class Unknown(Exception):
    """What is no constant while a step is traced."""


@contextmanager
def looked_up(*, numbers: bool = True) -> Iterator[None]:
    """Within a trace: such calls are made at once. An index is guarded by what it holds.

    ``numbers``: an int that has changed before (an epoch) may be looked up too, as the constant it is now.
    """
    from torch._dynamo.variables import functions, user_defined

    kinds: list[Any] = [functions.UserFunctionVariable, functions.UserMethodVariable, functions.SkipFunctionVariable]
    tables: Any = user_defined.UserDefinedObjectVariable
    reads = "var_getattr" if hasattr(tables, "var_getattr") else "tp_getattro_impl"  # as from torch 2.15 on
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(instead(kind, "call_function", _or_known(kind.call_function, numbers)))
        stack.enter_context(instead(tables, reads, _or_labels(getattr(tables, reads))))
        yield


def _or_known(before: Any, numbers: bool) -> Any:
    def call_function(this: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        function, given = _called(this), [*_bound(this), *args]
        if not (_is_pure(function) or (given and "inplace" not in kwargs and _looks_up(function, given))):
            return before(this, tx, args, kwargs)
        try:
            values, named = [_known(a, tx, numbers) for a in given], {k: _known(v, tx, numbers) for k, v in kwargs.items()}
            found = function(*values, **named)
            return _variable(found, tx)
        except Exception:  # not known, or the lookup fails: the user's own exception comes op by op
            return before(this, tx, args, kwargs)

    return call_function


def _bound(variable: Any) -> list[Any]:
    """What a method is one of."""
    return [v for name in ("obj", "im_self") if (v := getattr(variable, name, None)) is not None]  # as from torch 2.15 on, the second


def _called(variable: Any) -> Any:
    return getattr(variable, "fn", None) or getattr(variable, "value", None)


def _is_pure(function: Any) -> bool:
    try:
        return function in PURE or (getattr(function, "__module__", ""), getattr(function, "__name__", "")) in INSTALLED
    except TypeError:  # no hash
        return False


def _looks_up(function: Any, given: list[Any]) -> bool:
    """A method of an index's own class, whose values none of them changes; a property that is set is another matter."""
    index, module = _index(given[0]), getattr(function, "__module__", None) or ""
    sets = len(given) > 1 and isinstance(getattr(type(index), function.__name__, None), property)
    return index is not None and module.startswith("pandas.") and not sets


def _index(variable: Any) -> Any:
    """The pandas index that a variable stands for, or None."""
    from torch._dynamo.variables import UserDefinedObjectVariable

    if hasattr(variable, "realize"):
        variable = variable.realize()
    pandas = sys.modules.get("pandas")
    is_one = pandas is not None and isinstance(variable, UserDefinedObjectVariable) and isinstance(variable.value, pandas.Index)
    return variable.value if is_one else None


def _known(variable: Any, tx: Any, numbers: bool) -> Any:
    """The value of a traced argument; an index is guarded from here on. Raises Unknown."""
    from torch._dynamo.guards import install_guard
    from torch._dynamo.variables import ListVariable, TupleVariable
    from torch._dynamo.variables.tensor import SymNodeVariable
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    if hasattr(variable, "realize"):
        variable = variable.realize()
    if (index := _index(variable)) is not None:
        if variable.source is not None:
            install_guard(variable.source.make_guard(_same_labels))
        return index
    if isinstance(variable, (ListVariable, TupleVariable)):
        return variable.python_type()(_known(v, tx, numbers) for v in variable.items)
    if numbers and isinstance(variable, SymNodeVariable) and not free_unbacked_symbols(variable.sym_num):
        return variable.evaluate_expr(tx.output)
    if not variable.is_python_constant():
        raise Unknown
    return variable.as_python_constant()


def _same_labels(builder: Any, guard: Any) -> None:
    """A guard: the index there is this one, or one that answers alike (a loader's workers make a new one for each batch)."""
    index = builder.get(guard)

    def same(other: Any) -> bool:
        if other is index:
            return True
        alike = type(other) is type(index) and other.dtype == index.dtype and other.names == index.names
        return alike and bool(index.equals(other))

    builder.get_guard_manager(guard).add_lambda_guard(same, [f"{guard.name} holds the same labels"], guard.user_stack)


def _variable(value: Any, tx: Any) -> Any:
    """What stands for something found. Raises Unknown for what a trace has no constant for."""
    from torch._dynamo.variables import UserDefinedObjectVariable
    from torch._dynamo.variables.base import VariableTracker

    pandas, numpy = sys.modules.get("pandas"), sys.modules.get("numpy")
    if pandas is not None and isinstance(value, pandas.Index):
        return UserDefinedObjectVariable(value)
    if numpy is not None and isinstance(value, numpy.ndarray) and value.dtype.kind in "iufb":
        return _array(value, tx)
    if not _is_plain(value):
        raise Unknown
    return VariableTracker.build(tx, value)


def _is_plain(value: Any) -> bool:
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(_is_plain(k) and _is_plain(v) for k, v in value.items())
    return type(value) in PLAIN


def _array(value: Any, tx: Any) -> Any:
    """Numbers found in an index, as the tensor that a trace has for an array."""
    import torch
    from torch._dynamo.variables import NumpyNdarrayVariable

    dtype = torch.from_numpy(value[:0].copy()).dtype
    return NumpyNdarrayVariable.create(tx, tx.output.create_proxy("call_function", torch.tensor, (value.tolist(),), {"dtype": dtype}))


def _or_labels(before: Any) -> Any:
    def var_getattr(this: Any, tx: Any, name: str) -> Any:
        from torch._dynamo.source import AttrSource
        from torch._dynamo.variables.base import VariableTracker

        if name in LABELS and this.source is not None and _is_table(this.value):
            return VariableTracker.build(tx, getattr(this.value, name), AttrSource(this.source, name))
        return before(this, tx, name)

    return var_getattr


def _is_table(value: Any) -> bool:
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(value, (pandas.DataFrame, pandas.Series))
