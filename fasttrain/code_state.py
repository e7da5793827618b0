"""What a step's code keeps outside of its objects: on classes, in its files' globals, closures and defaults. Kept, to be put back.

Found once, by the names the code mentions; bounded, because what a file holds may be anything: data, other people's caches.
"""

from __future__ import annotations

import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fasttrain.reach import filled, named_in
from fasttrain.state import COPIED, is_array, is_plain, is_stream, kept_of, put_back, set_stream_state, stream_state

MOST = 2000  # functions and classes looked at
SMALL = 4096  # elements of a container (of a tensor: 16 times as many) that are kept with what they hold; of a larger one they alone
THEIRS = sys.stdlib_module_names - {"__main__"} | {
    "torch", "numpy", "pandas", "scipy", "fasttrain", "lightning", "lightning_fabric", "pytorch_lightning", "torchmetrics", "torchvision",
    "pytest", "_pytest",
}  # fmt: skip

Undo = Callable[[], None]


class CodeState:
    """``keep()`` gives back what puts everything again where it is now. ``roots``: objects, classes and functions of a step."""

    def __init__(self, roots: Iterable[Any]) -> None:
        self._names: dict[int, tuple[dict[str, Any], set[str]]] = {}  # of globals
        self._classes: list[type] = []
        self._functions: list[types.FunctionType] = []
        self._objects: list[Any] = []
        queue, seen = deque(roots), set[int]()
        while queue and len(seen) < MOST:
            node = queue.popleft()
            if id(node) not in seen:
                seen.add(id(node))
                queue.extend(self._parts(node))

    def _parts(self, node: Any) -> Iterator[Any]:
        if isinstance(node, (types.MethodType, staticmethod, classmethod)):
            node = node.__func__
        if isinstance(node, property):
            yield from (node.fget, node.fset)
        elif isinstance(node, types.FunctionType) and _ours(node):
            self._functions.append(node)
            names, space = set(named_in(node.__code__)), node.__globals__
            yield from self._mentioned(space, names)
            yield from (c.cell_contents for c in node.__closure__ or () if filled(c) and _leads_on(c.cell_contents))
            yield from (space[n] for n in names if n in space and _leads_on(space[n]))
        elif isinstance(node, type):
            for kind in node.__mro__:
                if _ours(kind):
                    self._classes.append(kind)
                    yield from vars(kind).values()
        elif _leads_on(node) and not isinstance(node, types.ModuleType):
            if not isinstance(node, nn.Module):  # a snapshot has those of the run
                self._objects.append(node)
            yield type(node)

    def _mentioned(self, space: dict[str, Any], names: set[str]) -> Iterator[Any]:
        """Globals of a function's file, and of the modules that it names there."""
        self._names.setdefault(id(space), (space, set()))[1].update(names)
        for module in [space[n] for n in names if isinstance(space.get(n), types.ModuleType)]:
            if module.__name__.split(".")[0] not in THEIRS:
                inner = vars(module)
                self._names.setdefault(id(inner), (inner, set()))[1].update(names)
                yield from (inner[n] for n in names if n in inner and _leads_on(inner[n]))

    def keep(self) -> Undo:
        undo: list[Undo] = []
        for space, names in self._names.values():
            undo.append(_items(space, names, space.__setitem__, space.__delitem__))
        for kind in self._classes:
            own = {n for n in vars(kind) if not n.startswith("__")}
            undo.append(_items(vars(kind), own, partial(setattr, kind), partial(delattr, kind), alone=True))
        for function in self._functions:
            cells = {str(i): c.cell_contents for i, c in enumerate(function.__closure__ or ()) if filled(c)}
            undo.append(_cells(function, cells))
            for held in (function.__defaults__ or ()), (function.__kwdefaults__ or {}).values():
                undo += [_value(v) for v in held if isinstance(v, COPIED)]
            undo.append(_within(vars(function)))
        for thing in self._objects:
            undo.append(_stream(thing) if _is_stream(thing) else _within(_dict_of(thing) or {}))

        def put_all_back() -> None:
            for one in undo:
                one()

        return put_all_back


def _ours(node: Any) -> bool:
    """Is it neither torch's nor of any library that keeps nothing for a step?"""
    return (getattr(node, "__module__", None) or "builtins").split(".")[0] not in THEIRS


def _leads_on(value: Any) -> bool:
    """A function, a class or an object that may keep something."""
    if isinstance(value, (types.FunctionType, type)):
        return _ours(value)
    if _is_stream(value):
        return True
    return _ours(type(value)) and not isinstance(value, (Tensor, types.ModuleType)) and _dict_of(value) is not None


def _dict_of(value: Any) -> dict[str, Any] | None:
    """Without asking the object itself, which may load something."""
    try:
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return found if isinstance(found, dict) else None


def _is_stream(value: Any) -> bool:
    return type(value).__module__.startswith(("torch", "random", "numpy.random")) and is_stream(value)


def _items(space: Any, names: set[str], put: Callable[[str, Any], None], drop: Callable[[str], None], *, alone: bool = False) -> Undo:
    """Plain values under these names. ``alone``: nothing but code of the step writes there, so that all that is new goes."""
    there = {n: (space[n], _small(space[n])) for n in names if n in space and is_plain(space[n])}
    absent = names - space.keys()
    before = set(space) if alone else set()

    def undo() -> None:
        for n, (value, kept) in there.items():
            _put(value, kept)
            if n not in space or space[n] is not value:
                put(n, value)
        for n in {n for n in space if n not in before and not n.startswith("__")} if alone else absent:
            if n in space and is_plain(space[n]):
                drop(n)

    return undo


def _cells(function: types.FunctionType, held: dict[str, Any]) -> Undo:
    kept = {n: (v, _small(v)) for n, v in held.items() if is_plain(v)}

    def undo() -> None:
        for n, (value, inner) in kept.items():
            _put(value, inner)
            cell = (function.__closure__ or ())[int(n)]
            if not filled(cell) or cell.cell_contents is not value:
                cell.cell_contents = value

    return undo


def _value(value: Any) -> Undo:
    kept = _small(value)
    return partial(_put, value, kept)


def _stream(stream: Any) -> Undo:
    state = stream_state(stream)
    return lambda: set_stream_state(stream, state)


def _within(own: dict[str, Any]) -> Undo:
    return _items(own, set(own), own.__setitem__, own.__delitem__, alone=True)


def _put(value: Any, kept: Any) -> None:
    """What is as it was is left alone: others may be looking at it."""
    if not _same(value, kept):
        put_back(value, kept)


def _same(value: Any, kept: Any) -> bool:
    if kept is None:
        return True
    if isinstance(value, Tensor):
        return torch.equal(value, kept)
    if isinstance(value, dict):
        pairs = zip(value.items(), kept, strict=False)
        return len(value) == len(kept) and all(k is was and v is held and _same(v, inner) for (k, v), (was, held, inner) in pairs)
    if isinstance(value, (list, tuple, deque)):
        return len(value) == len(kept) and all(v is held and _same(v, inner) for v, (_, held, inner) in zip(value, kept, strict=False))
    return bool((value == kept).all()) if is_array(value) else bool(value == kept)


def _small(value: Any) -> Any:
    """What ``put_back`` needs; of what is large the elements alone, of large tensors nothing."""
    left = SMALL
    stack = [value]
    while stack and left >= 0:
        one = stack.pop()
        if isinstance(one, Tensor):
            left -= 1 + one.numel() // 16
        elif is_array(one):
            left -= 1 + one.size // 16
        elif isinstance(one, (*COPIED, tuple)):
            left -= 1 + len(one)
            if left >= 0:
                stack += one.values() if isinstance(one, dict) else one
    if left >= 0:
        return kept_of(value)
    if isinstance(value, dict):
        return [(k, v, None) for k, v in value.items()]
    return [(None, v, None) for v in value] if isinstance(value, (list, deque)) else value.copy() if isinstance(value, set) else None
