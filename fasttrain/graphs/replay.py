"""A compiled graph that takes no gradients of ours - an evaluation step, a joint-traced one - recorded once and replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fasttrain.graphs.device import Device, Graph

WARM_CALLS = 2  # real calls on the capture stream before recording, behind the one that traced: kernels loaded, workspaces made


class Slots:
    """The arguments of a graph that change from call to call, copied into tensors of the graph's own: never the user's batch."""

    def __init__(self, args: Sequence[Any], slots: Sequence[int], device: Device) -> None:
        self.args = list(args)
        self._slots = tuple(slots)
        for i in self._slots:
            self.args[i] = device.landing(args[i])

    def fill(self, args: Sequence[Any]) -> None:
        for i in self._slots:
            self.args[i].copy_(args[i], non_blocking=True)


class Replay:
    """Called with the compiled graph's own arguments: run as it is at first, then recorded, then replayed.

    Results in ``copied`` are copied out, because the next replay overwrites what a graph gave back; the others (gradients that
    the update reads at once) are the graph's static tensors.
    """

    def __init__(self, run: Callable[..., Any], slots: Sequence[int], copied: Sequence[int], device: Device) -> None:
        self._run, self._slots, self._copied, self._device = run, tuple(slots), tuple(copied), device
        self._calls = 0
        self._graph: Graph | None = None
        self._static: Slots | None = None

    def __call__(self, *args: Tensor) -> list[Any]:
        if self._graph is None:
            self._calls += 1
            if self._calls <= WARM_CALLS:
                with self._device.aside():
                    return list(self._run(*args))
            static = self._static = Slots(args, self._slots, self._device)
            static.fill(args)
            self._places = [a.data_ptr() for a in static.args]
            self._graph = self._device.record(lambda: self._run(*static.args))
        assert self._static is not None
        self._static.fill(args)
        self._graph.replay()
        outs = list(self._graph.outs)
        for i in self._copied:
            outs[i] = outs[i].clone()
        return outs

    def moved(self, args: Sequence[Any]) -> bool:
        """Does it read weights or buffers that lie elsewhere now? ``args``: a call's, None where a slot is."""
        if self._static is None:
            return False
        pairs = zip(self._static.args, args, strict=True)
        return any(b is not None and (a is not b or a.data_ptr() != p) for (a, b), p in zip(pairs, self._places, strict=True))
