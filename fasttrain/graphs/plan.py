"""The way past the guards: a compiled graph called directly, for the steps between which nobody's code ran."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import is_, itemgetter
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fasttrain.graphs.checks import CheckFailed
from fasttrain.graphs.contract import batch_size_of, reader_for, structure, tensors_of
from fasttrain.graphs.program import Raw, StepOutput, keys_and_values
from fasttrain.graphs.trace import Entry


class Plan:
    """A pure compiled graph called directly: batch leaves in, loss, gradients and logged values out."""

    def __init__(self, entry: Entry, raw: Raw, batch: Any) -> None:
        leaves = tensors_of(batch)
        if leaves is None or len({id(t) for t in leaves}) != len(leaves):
            raise LookupError("the batch is not made of distinct tensors alone")
        if any(t.__dict__ for t in leaves) or (isinstance(batch, (list, tuple, dict)) and getattr(batch, "__dict__", None)):
            raise LookupError("the batch carries attributes of its own")
        if {id(entry.args[i]) for i in entry.written or ()} & {id(t) for t in leaves}:
            raise LookupError("the step writes into its batch: only the guards see which of its tensors share memory")
        if not entry.pure:
            raise LookupError(entry.why_not)
        if not all(isinstance(a, Tensor) for a in entry.args):
            raise LookupError("the graph takes numbers that change")
        place = {id(o): i for i, o in enumerate(entry.outs)}
        where = {id(t): i for i, t in enumerate(leaves)}
        self.entry, self.run, self.read, self.kind = entry, entry.run, reader_for(batch), type(batch)
        self.args: list[Any] = [None if id(a) in where else a for a in entry.args]
        self.slots = [(i, where[id(a)]) for i, a in enumerate(entry.args) if id(a) in where]
        self.contract = [(t.shape, t.stride(), t.dtype) for t in leaves]
        self.batch_size = batch_size_of(batch)
        self.names = list(batch) if isinstance(batch, dict) else None
        self.structure = structure(batch) if self.read is tensors_of else None
        self.keys, values = keys_and_values(raw.items)
        self.marks = entry.marks
        values = [v for at, v in enumerate(values) if at not in self.marks]
        results = [*([] if raw.loss is None else [raw.loss]), *values, *(g for g in raw.grads if g is not None)]
        if any(id(r) not in place for r in results):
            raise LookupError("the step gives back something that is no output of its graph")
        self.loss = None if raw.loss is None else place[id(raw.loss)]
        self.values = _picker([place[id(v)] for v in values])
        self.differentiated = next((place[id(g)] for g in raw.grads if g is not None), None)
        self.grads = _picker([None if g is None else place[id(g)] for g in raw.grads])
        self.returned, read = _builder(raw.returned, place)
        self.lifted, self.leaves = entry.lifted, entry.left
        self.work = [(number, *(_place_of(v, place) for v in values)) for number, *values in entry.work]
        read += [i for _, *values in self.work for i in values if type(i) is int]
        self.read_by_user = sorted({*read, *(place[id(r)] for r in results[: len(results) - sum(g is not None for g in raw.grads)])})
        self.check: CheckFailed | None = None  # by its last call
        self.left = math.inf  # calls until the arguments' values are looked at
        slots = {i for i, _ in self.slots}
        self._fixed = _picker([i for i in range(len(self.args)) if i not in slots])  # weights, buffers, scalars of ours
        self._addresses = list(map(Tensor.data_ptr, self._fixed(self.args)))

    def still_fits(self, entry: Entry, batch: Any, raw: Raw) -> bool:
        """After a guarded call: is this the graph that ran, over the same tensors?"""
        if (raw.returned is None) != (self.returned is None) or keys_and_values(raw.items)[0] != self.keys:
            return False
        same = len(self.args) == len(entry.args) and all(map(is_, self._fixed(self.args), self._fixed(entry.args)))
        if self.work:
            known = [v for _, *values in self.work for v in values if type(v) is not int]
            now = [v for _, *values in entry.work for v in values if not isinstance(v, Tensor)]
            same = same and len(now) == len(known) and all(map(is_, now, known))
        return same and entry is self.entry and type(batch) is self.kind and not self.moved()

    def failed(self) -> CheckFailed | None:
        """The check that its last call ended with, said once."""
        check, self.check = self.check, None
        return check

    def moved(self) -> bool:
        """Does a weight or buffer lie elsewhere than when this plan was made?"""
        return list(map(Tensor.data_ptr, self._fixed(self.args))) != self._addresses

    def __call__(self, batch: Any) -> StepOutput | None:
        """The step past its guards, or None: this batch is not what the graph was made for, fails a check, or is to be looked at."""
        self.left -= 1
        if self.left < 0:
            return None
        if type(batch) is not self.kind or (self.names is not None and list(batch) != self.names):
            return None
        if self.structure is not None and structure(batch) != self.structure:
            return None
        leaves = batch if self.read is None else tuple(self.read(batch) or ())
        if len(leaves) != len(self.contract):
            return None
        for t, (shape, stride, dtype) in zip(leaves, self.contract):  # noqa: B905 - lengths were just compared
            if not isinstance(t, Tensor) or t.dtype is not dtype or t.shape != shape or t.stride() != stride or t.requires_grad:
                return None
            if t.is_neg() or t.is_conj():  # bits that the code generated for this batch would not see
                return None
        args = self.args
        for i, j in self.slots:
            args[i] = leaves[j]
        if self.lifted.clocks:
            self.lifted.begin(self.lifted.clocks)
        try:
            outs = self.run(*args) if not self.leaves else self.entry.call(*args)
        except CheckFailed as error:
            self.check = error
            return None
        loss = None if self.loss is None else outs[self.loss]
        returned = None if self.returned is None else self.returned(outs)
        values = self.values(outs)
        if self.work:
            found = self.lifted.do((n, *(outs[v] if type(v) is int else v for v in given)) for n, *given in self.work)
            others = iter(values)
            values = [found[self.marks[at]] if at in self.marks else next(others) for at in range(len(self.keys))] if self.marks else values
        return StepOutput(loss, self.keys, values, returned, self.grads(outs), self.batch_size)


def _place_of(value: Any, place: dict[int, int]) -> Any:
    """Where a graph gives back a value that host work takes; an object that it changes is itself."""
    if id(value) in place:
        return place[id(value)]
    if isinstance(value, (Tensor, int, float, complex, str, tuple)):
        raise LookupError("host work takes a value that is no output of the graph")
    return value


def _builder(returned: Any, place: dict[int, int]) -> tuple[Callable[[Sequence[Any]], Any] | None, list[int]]:
    """What makes the step's own output anew out of a graph's outputs, and which of them it takes."""
    if returned is None:
        return None, []
    leaves, spec = tree_flatten(returned)
    if any(not isinstance(v, (Tensor, int, float, str, bool, type(None))) for v in leaves):
        raise LookupError("somebody reads what the step returns, and it is not made of tensors and constants alone")
    if any(isinstance(v, Tensor) and id(v) not in place for v in leaves):
        raise LookupError("the step returns something that is no output of its graph")
    where = [place[id(v)] if isinstance(v, Tensor) else None for v in leaves]

    def build(outs: Sequence[Any]) -> Any:
        return tree_unflatten([v if i is None else outs[i] for v, i in zip(leaves, where, strict=True)], spec)

    leaves = [None if isinstance(v, Tensor) else v for v in leaves]  # no tensor of this call is kept
    return build, [i for i in where if i is not None]


def _picker(indices: Sequence[int | None]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """A function that picks these places out of a graph's outputs, in C wherever it can be."""
    present = [i for i in indices if i is not None]
    if not present:
        return lambda outs: indices
    if len(present) == len(indices) and present == list(range(present[0], present[0] + len(present))):
        return itemgetter(slice(present[0], present[0] + len(present)))
    if len(present) == len(indices):
        return itemgetter(*present)
    return lambda outs: [None if i is None else outs[i] for i in indices]
