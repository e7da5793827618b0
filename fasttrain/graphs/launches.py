"""``steps_per_launch=n``: whole steps wait in slots of their own until there are n, and run as one graph. For tiny models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fasttrain.graphs.device import Device, Graph
from fasttrain.graphs.program import StepOutput
from fasttrain.graphs.replay import Slots


class Launches:
    """Of a run. ``open``: may steps wait? Not where somebody's code, or a learning rate, comes between two of them."""

    def __init__(self, n: int) -> None:
        self.n, self.open = n, False
        self.flushed: Callable[[], Sequence[StepOutput]] = lambda: ()

    def flush(self) -> Sequence[StepOutput]:
        """Runs what waits, one by one: what came of it."""
        return self.flushed()


class Queue:
    """Batches of one shape in n slots, and the graph that runs a step on each."""

    def __init__(self, n: int, args: Sequence[Any], slots: Sequence[int], device: Device) -> None:
        self.slots = [Slots(args, slots, device) for _ in range(n)]
        self.waiting = 0
        self.graph: Graph | None = None

    def take(self, args: Sequence[Any]) -> bool:
        """Copies a batch into the next slot, in stream order behind the graph that last read it. Are they full?"""
        self.slots[self.waiting].fill(args)
        self.waiting += 1
        return self.waiting == len(self.slots)

    def drain(self) -> list[Slots]:
        """Those that wait, which do no longer."""
        taken, self.waiting = self.slots[: self.waiting], 0
        return taken
