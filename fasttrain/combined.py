"""Several loaders as one: whose turn it is, when the pass is over, and what a batch of all of them looks like."""

from __future__ import annotations

import difflib
import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten
from torch.utils.data import Dataset

from fasttrain.errors import DataError, reject
from fasttrain.module import LIGHTNING

MODES: Mapping[str, Callable[[Iterable[float]], float]] = {"max_size_cycle": max, "min_size": min, "max_size": max, "sequential": sum}
DICTS = (dict, OrderedDict, defaultdict)
_END = object()
Begin = Callable[[int], Iterator[Any]]


class CombinedLoader:
    """Several loaders as one; a dict or a list of loaders given to ``fit`` is this in mode "max_size_cycle".

    Args:
        iterables: loaders in a dict, a list or a tuple, nested as you like; a batch has the same form.
        mode: "max_size_cycle" is as long as the longest loader, the others begin anew; "min_size" as long as the shortest;
            "max_size" as long as the longest, with None in the place of a loader that has ended; "sequential" gives one
            loader's batches after the other's, each as it is.

    Iterating gives the batches alone. Raises DataError for an unknown mode.

    Example::

        trainer.fit(fasttrain.CombinedLoader({"labelled": a, "unlabelled": b}, "min_size"))
        # training_step(self, batch, batch_idx): batch["labelled"], batch["unlabelled"]
    """

    def __init__(self, iterables: Any, mode: str = "max_size_cycle") -> None:
        if mode not in MODES:
            near = difflib.get_close_matches(str(mode), MODES, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else "The default is 'max_size_cycle'."
            raise DataError(reject("CombinedLoader(mode)", repr(mode), " | ".join(map(repr, MODES)), hint))
        found, self._form = tree_flatten_with_path(iterables, is_leaf=lambda x: x is not iterables and not _is_collection(x))
        self.iterables, self.mode = iterables, mode
        self.loaders: list[Any] = [loader for _, loader in found] or [iterables]
        self.paths: list[str] = [keystr(path) for path, _ in found] or [""]
        for loader, path in zip(self.loaders, self.paths, strict=True):
            if isinstance(loader, CombinedLoader) or _is_lightnings(loader):
                raise DataError(
                    reject(f"CombinedLoader(iterables){path}", "a CombinedLoader", "a loader", "Write one collection of all loaders.")
                )

    def with_loaders(self, loaders: Sequence[Any]) -> CombinedLoader:
        """The same, of other loaders in the old ones' places."""
        return CombinedLoader(tree_unflatten(loaders, self._form), self.mode)

    def size(self, lengths: Iterable[float]) -> float:
        """Batches of a pass over loaders of these lengths; ``inf`` is a loader that cannot say."""
        return MODES[self.mode](lengths)

    def __len__(self) -> int:
        return int(self.size([len(x) for x in self.loaders]))

    def __iter__(self) -> Iterator[Any]:
        return self.batches(self._begin, self._begin, [math.inf] * len(self.loaders), math.inf)

    def _begin(self, i: int) -> Iterator[Any]:
        return iter(self.loaders[i])

    def batches(self, begin: Begin, again: Begin, limits: Sequence[float], total: float) -> Iterator[Any]:
        """At most ``total`` batches of a pass in which ``begin(i)`` iterates loader i and ``again(i)`` does where it follows or is cycled.

        Every ``begin`` is called before this returns, every ``again`` as a batch asks for it.
        """
        n = len(self.loaders)
        if self.mode == "sequential":
            return _one_after_another(begin(0), again, limits)
        iterators = [begin(i) for i in range(n)]
        rows = {"max_size_cycle": _cycled, "min_size": _shortest, "max_size": _longest}[self.mode](iterators, again)
        return (tree_unflatten(row, self._form) for row in (rows if total == math.inf else islice(rows, int(total))))


def _cycled(iterators: list[Iterator[Any]], again: Begin) -> Iterator[list[Any]]:
    ended = [False] * len(iterators)
    while True:
        row = []
        for i in range(len(iterators)):
            batch = next(iterators[i], _END)
            if batch is _END:
                ended[i] = True
                if all(ended):
                    return
                iterators[i] = again(i)
                batch = next(iterators[i], _END)
                if batch is _END:
                    return
            row.append(batch)
        yield row


def _shortest(iterators: list[Iterator[Any]], again: Begin) -> Iterator[list[Any]]:
    while True:
        row = []
        for iterator in iterators:
            batch = next(iterator, _END)
            if batch is _END:
                return
            row.append(batch)
        yield row


def _longest(iterators: list[Iterator[Any]], again: Begin) -> Iterator[list[Any]]:
    open_ones: list[Iterator[Any] | None] = list(iterators)
    while True:
        row = []
        for i, iterator in enumerate(open_ones):
            batch = _END if iterator is None else next(iterator, _END)
            if batch is _END:
                open_ones[i] = None
            row.append(None if batch is _END else batch)
        if all(x is None for x in open_ones):
            return
        yield row


def _one_after_another(first: Iterator[Any], again: Begin, limits: Sequence[float]) -> Iterator[Any]:
    for i, limit in enumerate(limits):
        iterator = first if i == 0 else again(i)
        yield from iterator if limit == math.inf else islice(iterator, int(limit))


def as_combined(loaders: Any, mode: str) -> Any:
    """A :class:`CombinedLoader` of several loaders, in ``mode`` where they do not bring one; one loader as it is."""
    if _is_lightnings(loaders):
        return CombinedLoader(loaders.iterables, loaders._mode)
    return CombinedLoader(loaders, mode) if _is_collection(loaders) else loaders


def _is_lightnings(thing: Any) -> bool:
    return any(c.__name__ == "CombinedLoader" and c.__module__.startswith(LIGHTNING) for c in type(thing).__mro__)


def _is_collection(thing: Any) -> bool:
    """Is it a collection in a loader's place? A dict there is; a list is one that holds loaders, else it is a list of batches."""
    return bool(thing) if type(thing) in DICTS else isinstance(thing, (list, tuple)) and _holds_loaders(thing)


def _holds_loaders(thing: Any) -> bool:
    """Is it more like loaders than like batches? Batches are tensors, arrays and what holds them, or know how to move."""
    if isinstance(thing, (list, tuple)) or type(thing) in DICTS:
        return any(map(_holds_loaders, thing.values() if isinstance(thing, Mapping) else thing))
    batch = isinstance(thing, (Tensor, Mapping, set, str, bytes)) or hasattr(thing, "to") or hasattr(thing, "__array__")
    return isinstance(thing, Dataset) or (hasattr(thing, "__iter__") and not batch)
