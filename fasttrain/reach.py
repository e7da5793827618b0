"""Can somebody else's code get at the module? Then it may change it between two steps, and guards are checked at each."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

MOST = 5000  # objects looked at; whatever needs more is taken to reach
FIRST = 32  # elements of one container looked at: a dataset's rows are alike
OURS = ("torch", "numpy", "builtins", "collections", "functools", "random")


def reaches(roots: Iterable[Any], targets: Iterable[Any]) -> bool:
    """Does code of ``roots`` (their attributes, methods, closures and the globals they name) hold one of ``targets``?"""
    wanted = {id(t) for t in targets}
    stack, seen = list(roots), set[int]()
    while stack:
        node = stack.pop()
        if id(node) in wanted:
            return True
        if id(node) in seen or node is None or isinstance(node, (str, bytes, int, float, complex, Tensor, types.ModuleType)):
            continue
        seen.add(id(node))
        if len(seen) > MOST:
            return True
        stack.extend(_parts(node))
    return False


def _parts(node: Any) -> Iterator[Any]:
    if isinstance(node, types.FunctionType):
        yield from (node.__globals__[n] for n in named_in(node.__code__) if n in node.__globals__)
        yield from (c.cell_contents for c in node.__closure__ or () if filled(c))
        yield from node.__defaults__ or ()
        return
    if isinstance(node, types.MethodType):
        yield from (node.__self__, node.__func__)
        return
    if isinstance(node, types.GeneratorType):
        yield from () if node.gi_frame is None else list(node.gi_frame.f_locals.values())
        return
    if isinstance(node, type):
        if node.__module__.split(".")[0] not in OURS:
            for base in node.__mro__:
                yield from () if base.__module__.split(".")[0] in OURS else list(vars(base).values())
        return
    if isinstance(node, Mapping):
        yield from [v for _, v in zip(range(FIRST), node.values(), strict=False)]
    elif isinstance(node, (list, tuple, set, frozenset)):
        yield from [v for _, v in zip(range(FIRST), node, strict=False)]
    elif isinstance(node, (staticmethod, classmethod)):
        yield node.__func__
    elif isinstance(node, property):
        yield from (node.fget, node.fset)
    elif hasattr(node, "func") and hasattr(node, "keywords"):  # functools.partial
        yield from (node.func, node.args, node.keywords)
    yield type(node)
    yield from list(getattr(node, "__dict__", {}).values())


def named_in(code: types.CodeType) -> Iterator[str]:
    """Every name that a code object mentions, and those within it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from named_in(constant)


def filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
