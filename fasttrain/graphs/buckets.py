"""Which shapes of batch get a graph of their own: the first at once, another at its third sight, the least recently used gives way."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

SIGHTS = 3  # a shape seen once or twice (an epoch's last batch, a short run) is not worth a compile of seconds
MOST = 8  # graphs kept; each holds its inputs and what its replays leave behind


class Buckets:
    """Shapes by name."""

    def __init__(self, most: int = MOST, sights: int = SIGHTS) -> None:
        self._most, self._needed = most, sights
        self._kept: OrderedDict[str, None] = OrderedDict()  # the least recently used first
        self._sights: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    def used(self, name: str) -> None:
        """It runs captured just now."""
        self._kept.move_to_end(name)

    def sees(self, name: str) -> tuple[bool, list[str]]:
        """A batch of this shape has come: does it get a graph, and which others lose theirs?"""
        if name in self._kept:
            self.used(name)
            return True, []
        self._sights[name] = self._sights.get(name, 0) + 1
        if self._kept and self._sights[name] < self._needed:
            return False, []
        gone = [self._kept.popitem(last=False)[0] for _ in range(len(self._kept) - self._most + 1)]
        self._kept[name] = None
        for other in gone:
            self._sights[other] = 0  # it must be worth a compile again
        return True, gone

    def state(self) -> dict[str, Any]:
        """What decides which batches run captured, as a checkpoint keeps it."""
        return {"kept": list(self._kept), "sights": dict(self._sights)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._kept = OrderedDict.fromkeys(state["kept"])
        self._sights = dict(state["sights"])
