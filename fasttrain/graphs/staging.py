"""Batches on their way to the device: fixed slots, a pinned ring and a stream of their own. The only place where a batch is copied.

Events go both ways: the copy of a batch waits for the work that last read its slot, the work for the copy. The host waits only
where it is a whole ring ahead. On a CPU there is no such thing as staging: nothing here is made or called.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fasttrain.graphs.contract import leaf
from fasttrain.graphs.device import Device
from fasttrain.module import to_device

SLOTS = 3  # of a shape: one is read, one is filled, one is on the host's side of the queue
SHAPES = 4  # whose slots are kept


class _Slot:
    """Device memory for one batch, pinned memory before it, and who has used them."""

    def __init__(self, device: Device, leaves: Sequence[Tensor], away: Sequence[int]) -> None:
        self._device, self._away = device, away
        self._landing = {i: device.landing(leaves[i]) for i in away}
        self._pinned: dict[int, Tensor] = {}
        self._filled, self._read = device.event(), device.event()
        self._used = False
        self._sources: list[Tensor] = []  # alive until the copy out of them is over

    def fill(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """The batch here; the caller's stream goes on when it is."""
        device = self._device
        if self._used:
            self._filled.synchronize()  # a ring ago; the pinned memory is written again now
        self._sources = [self._source(i, leaves[i]) for i in self._away]
        with device.copying():
            if self._used:
                self._read.wait()
            for i, source in zip(self._away, self._sources, strict=True):
                device.copy(self._landing[i], source)
            self._filled.record()
        self._filled.wait()
        self._used = True
        return [self._landing.get(i, t) for i, t in enumerate(leaves)]

    def given_up(self) -> None:
        """Everything that reads it has been launched."""
        self._read.record()

    def _source(self, i: int, t: Tensor) -> Tensor:
        if t.is_pinned():
            return t  # a loader's, which makes a new one for each batch
        if i not in self._pinned:
            self._pinned[i] = self._device.pinned(t)
        return self._pinned[i].copy_(t)


class Staging:
    """``staging(batch)``: the batch on the device.

    ``fixed``: in a slot, which a batch some steps later overwrites - where nobody but a recorded step ever sees the batch. Else in
    memory of its own.
    """

    def __init__(self, device: Device, where: torch.device) -> None:
        self._device, self._where = device, where
        self.fixed = False
        self._rings: OrderedDict[tuple[Any, ...], list[_Slot]] = OrderedDict()
        self._newest: _Slot | None = None

    def __call__(self, batch: Any) -> Any:
        if self._newest is not None:  # all that was to be done with the last batch has been launched
            self._newest.given_up()
            self._newest = None
        if not self.fixed:
            return to_device(batch, self._where)
        leaves, spec = tree_flatten(batch)
        if not all(type(t) is Tensor and _is_plain(t) for t in leaves):
            return to_device(batch, self._where)
        return self._staged(leaves, spec)

    def _staged(self, leaves: list[Tensor], spec: TreeSpec) -> Any:
        away = tuple(i for i, t in enumerate(leaves) if self._is_away(t))
        key = (away, *(leaf(t) for t in leaves))
        ring = self._rings.get(key)
        if ring is None:
            ring = self._rings[key] = []
            while len(self._rings) > SHAPES:
                self._rings.popitem(last=False)
        self._rings.move_to_end(key)
        slot = _Slot(self._device, leaves, away) if len(ring) < SLOTS else ring.pop(0)
        ring.append(slot)
        self._newest = slot
        return tree_unflatten(slot.fill(leaves), spec)

    def _is_away(self, t: Tensor) -> bool:
        return not self._device.holds(t)


def _is_plain(t: Tensor) -> bool:
    return t.layout is torch.strided and 0 not in t.stride() and not t.requires_grad and not t.is_neg() and not t.is_conj()
