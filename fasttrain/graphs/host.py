"""What a captured step does between its kernels: gradients kept, weights updated, schedules moved - operations of the graph.

Each is a ``torch.library`` operation that names what it writes, so a compiler keeps it where it stands: the code after an
update sees the new weights. What they do is plain Python over one :class:`Host`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from fasttrain.graphs.program import REFUSED, StepSpec
from fasttrain.graphs.scale import LossScale
from fasttrain.graphs.tail import Tail, make_tail, owns_zero_grad, step_of, still_moved, trainable_params
from fasttrain.options import Options

_HOSTS: WeakValueDictionary[int, Host] = WeakValueDictionary()
Key = tuple[int, int]  # the optimizer (0 where gradients are not apart) and the parameter's id
_SCHEMAS = {
    # ``order`` is written by all of them and by nothing else: they run in the order of the program
    "turn": "(int host, int index, Tensor(a!) order, Tensor(b!)[] params, Tensor?[] grads, Tensor loss) -> ()",
    "add": "(int host, int which, Tensor(a!) order, Tensor?[] grads, Tensor loss) -> ()",
    "step": "(int host, int index, Tensor(a!) order, Tensor(b!)[] params) -> ()",
    "zero": "(int host, int index, Tensor(a!) order) -> ()",
    "clip": "(int host, int index, Tensor(a!) order, float value, bool by_norm) -> ()",
    "move": "(int host, int index, Tensor(a!) order) -> ()",
}


@functools.cache
def ops() -> Any:
    """The operations, registered at first use."""
    library = torch.library.Library("fasttrain", "DEF")  # type: ignore[no-untyped-call]
    for name, schema in _SCHEMAS.items():
        library.define(name + schema)  # type: ignore[no-untyped-call]
        library.impl(name, functools.partial(_run, name), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"fasttrain::{name}", _nothing, lib=library)
    ops.library = library  # type: ignore[attr-defined]  # it lives as long as the operations
    return torch.ops.fasttrain


def _run(name: str, host: int, *args: Any) -> None:
    getattr(_HOSTS[host], name)(*args)


def _nothing(*args: Any) -> None:
    return None


class Host:
    """Gradients and updates of several optimizers in one captured step.

    ``apart``: a parameter that two optimizers hold has a gradient for each, else one for both, as ``p.grad`` is.
    ``begin`` and ``end`` stand around a batch; between them the graph calls ``turn``, ``add``, ``step``, ``zero``, ``clip``, ``move``.
    """

    def __init__(
        self, optimizers: Sequence[torch.optim.Optimizer], options: Options, scaler: LossScale | None, schedulers: Sequence[Any],
        spec: StepSpec, *, apart: bool,
    ) -> None:  # fmt: skip
        ops()
        self.number = next(i for i in range(len(_HOSTS) + 1) if i not in _HOSTS)
        _HOSTS[self.number] = self
        self.optimizers, self._options, self._scaler, self._schedulers = optimizers, options, scaler, schedulers
        self._norms, self._apart = spec.norms, apart
        self.may_refuse = scaler is not None or options.nonfinite == "skip"  # a step, and the run goes on
        self.order = torch.zeros((), device=spec.device)
        self.moved = [0] * len(optimizers)
        self.refused = False
        self._bad: list[Tensor | None] = [None] * len(optimizers)
        self._last, self._rescale = True, 1.0
        self._steps = [step_of(o) for o in optimizers]
        self.bind()

    def bind(self) -> None:
        """(Re)build what depends on which parameters train; gathered gradients stay."""
        before = self.gradients() if hasattr(self, "leaves") else {}
        old = getattr(self, "params", [[] for _ in self.optimizers])
        self.trains = [trainable_params(o) for o in self.optimizers]
        frozen = [still_moved(ps, [before.get(self._key(i, p)) for p in ps]) for i, ps in enumerate(old)]
        self.params: list[list[nn.Parameter]] = [[*ps, *more] for ps, more in zip(self.trains, frozen, strict=True)]
        leaves = {self._key(i, p): p for lists in (self.trains, frozen) for i, ps in enumerate(lists) for p in ps}
        self.keys, self.leaves = list(leaves), list(leaves.values())
        self.training = len({self._key(i, p) for i, ps in enumerate(self.trains) for p in ps})  # of the leaves; frozen ones follow
        place = {k: j for j, k in enumerate(self.keys)}
        self.places = [[place[self._key(i, p)] for p in ps] for i, ps in enumerate(self.params)]
        self._kept: list[Tensor | None] = [before.get(k) for k in self.keys]
        self._buffers: list[Tensor | None] = [None] * len(self.leaves)
        self.tails: list[Tail] = [
            make_tail(o, ps, self._options, self._scaler, self._norms) for o, ps in zip(self.optimizers, self.params, strict=True)
        ]

    def changed(self) -> bool:
        """Do other parameters train than when this was bound?"""
        now = [[id(p) for p in trainable_params(o)] for o in self.optimizers]
        return now != [[id(p) for p in ps] for ps in self.trains]

    def touched(self) -> bool:
        """Has somebody put a step or a zero_grad of his own on an optimizer since?"""
        return self._steps != [step_of(o) for o in self.optimizers] or any(map(owns_zero_grad, self.optimizers))

    def _key(self, i: int, p: nn.Parameter) -> Key:
        return i if self._apart else 0, id(p)

    def begin(self, *, last: bool, rescale: float) -> None:
        self.moved, self.refused = [0] * len(self.optimizers), False
        self._last, self._rescale = last, rescale
        if self._scaler is not None:
            self._scaler.gather()

    def end(self) -> None:
        if self._scaler is not None:
            self._scaler.settle()

    def result(self) -> int:
        return REFUSED if self.refused else max(self.moved, default=0)

    def new_window(self) -> None:
        self._kept, self._bad = [None] * len(self.leaves), [None] * len(self.params)

    def close(self) -> None:
        """Everybody who has gathered gradients in this window and had no turn at its end steps now."""
        for i in range(len(self.params)):
            if self._bad[i] is not None:
                self._update(i, [self._kept[j] for j in self.places[i]], self._bad[i])
        self.new_window()

    def open(self) -> bool:
        return any(b is not None for b in self._bad)

    def gradients(self) -> dict[Key, Tensor]:
        """What was gathered and not used yet."""
        return {k: g for k, g in zip(self.keys, self._kept, strict=True) if g is not None}

    def load_gradients(self, gradients: dict[Key, Tensor]) -> None:
        self._kept = [gradients.get(k) for k in self.keys]
        for i, places in enumerate(self.places):
            gathered = not self._apart or any(self._kept[j] is not None for j in places)
            self._bad[i] = torch.zeros((), device=self.order.device) if gathered else None

    # -- the operations -----------------------------------------------------------------------------------------
    @torch.no_grad()
    def turn(self, index: int, order: Tensor, params: Sequence[Tensor], grads: Sequence[Tensor | None], loss: Tensor) -> None:
        """An optimizer's gradients of this batch; at the end of a window also its update."""
        bad = self._bad[index]
        if self._last and bad is None:
            self._update(index, grads, loss, params)
            return
        self._bad[index] = loss.clone() if bad is None else bad + loss
        self._keep(self.places[index], grads)
        if self._last:
            self._update(index, [self._kept[j] for j in self.places[index]], self._bad[index], params)
            self._bad[index] = None
            for j in self.places[index]:
                self._kept[j] = None

    @torch.no_grad()
    def add(self, which: int, order: Tensor, grads: Sequence[Tensor | None], loss: Tensor) -> None:
        """``manual_backward``: gradients of the leaves of optimizer ``which`` (-1: of all) are added to what is there."""
        for i, bad in enumerate(self._bad):
            if bad is not None and all(self._kept[j] is None for j in self.places[i]):  # the losses of gradients that are gone
                bad = None
            self._bad[i] = loss.clone() if bad is None else bad + loss
        self._keep(range(len(self.leaves)) if which < 0 else self.places[which], grads)

    @torch.no_grad()
    def step(self, index: int, order: Tensor, params: Sequence[Tensor]) -> None:
        self._update(index, [self._kept[j] for j in self.places[index]], self._bad[index], params)

    def zero(self, index: int, order: Tensor) -> None:
        self._bad[index] = None
        for j in self.places[index]:
            self._kept[j] = None

    @torch.no_grad()
    def clip(self, index: int, order: Tensor, value: float, by_norm: bool) -> None:
        present = [g for j in self.places[index] if (g := self._kept[j]) is not None]
        if not present:
            return
        if by_norm:
            norm = torch.nn.utils.get_total_norm(present)
            torch._foreach_mul_(present, torch.clamp(value / (norm + 1e-6), max=1.0))
        else:
            torch._foreach_clamp_min_(present, -value)
            torch._foreach_clamp_max_(present, value)

    def move(self, index: int, order: Tensor) -> None:
        self._schedulers[index].step()

    # -- how ----------------------------------------------------------------------------------------------------
    def _update(self, index: int, grads: Sequence[Tensor | None], loss: Tensor | None, params: Sequence[Tensor] = ()) -> None:
        """The tail writes the optimizer's own parameters. Where the compiler hands copies over - it still wants the old
        weights - the new ones go into the copies, and it puts them where they belong."""
        apart: list[tuple[Tensor, nn.Parameter]] = []
        if params and tuple(map(Tensor.data_ptr, params)) != tuple(map(Tensor.data_ptr, self.params[index])):
            apart = [(a, b) for a, b in zip(params, self.params[index], strict=True) if a.data_ptr() != b.data_ptr()]
        old = [p.detach().clone() for _, p in apart]
        if apart:
            torch._foreach_copy_([p for _, p in apart], [a for a, _ in apart])
        if self.tails[index].step(grads, self._rescale, loss):
            self.moved[index] += 1
        else:
            self.refused = True
        if apart:
            torch._foreach_copy_([a for a, _ in apart], [p for _, p in apart])
            torch._foreach_copy_([p for _, p in apart], old)

    def _keep(self, places: Sequence[int], grads: Sequence[Tensor | None]) -> None:
        """A graph's gradients are gone with its next kernel: they are added into, or copied to, memory of our own."""
        fresh = [(j, g) for j, g in zip(places, grads, strict=True) if g is not None and self._kept[j] is None]
        more: list[tuple[Any, Tensor]] = [
            (self._kept[j], g) for j, g in zip(places, grads, strict=True) if g is not None and self._kept[j] is not None
        ]
        if more:
            torch._foreach_add_([a for a, _ in more], [g for _, g in more])
        if fresh:
            targets = [self._buffer(j, g) for j, g in fresh]
            torch._foreach_copy_(targets, [g for _, g in fresh])
            for (j, _), t in zip(fresh, targets, strict=True):
                self._kept[j] = t

    def _buffer(self, j: int, grad: Tensor) -> Tensor:
        buffer = self._buffers[j]
        if buffer is None or buffer.dtype != grad.dtype:
            buffer = self._buffers[j] = torch.empty_like(self.leaves[j], dtype=grad.dtype, requires_grad=False)
        return buffer
