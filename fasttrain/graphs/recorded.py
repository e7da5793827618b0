"""One compiled forward pass with all that follows it in a micro-step: run as it is at first, then recorded for each moment of a window.

Which graph when: a window of one batch has one graph, update and all; else a graph that overwrites the gradients for its first
batch and one that adds for the others, and the update is a graph of its own (``cuda.GraphStep``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fasttrain.errors import CaptureError
from fasttrain.graphs.device import Device, Graph
from fasttrain.graphs.device_tail import Moved
from fasttrain.graphs.replay import WARM_CALLS, Slots
from fasttrain.graphs.window import Present


class Moment(NamedTuple):
    """Where in its window a micro-step stands: what a graph is recorded for."""

    whole: bool  # the window's only one, whose update belongs to it
    before: Present  # the gradients that are there already; () for the window's first


class Rest(NamedTuple):
    """What a micro-step came to, but for the tensors."""

    present: Present  # gradients after it
    moved: Moved | None  # by its update, where a graph holds one


class Owner(Protocol):
    """The step that the moments are of."""

    moment: Moment
    trial: bool

    def finish(self, scaled: Tensor, loss: Tensor, moment: Moment, *, recording: bool) -> Rest:
        """Backward pass and what follows: device work alone when ``recording``."""

    def before_replay(self, moment: Moment) -> None: ...

    def finished(self, moment: Moment, rest: Rest) -> None:
        """The micro-step was launched, captured or not."""

    def refused(self, error: CaptureError) -> None:
        """It could not be recorded, and runs as it is."""


class _Recording:
    """A graph, its inputs, and how what it gives back is copied out: 0-d numbers all in one copy."""

    def __init__(self, graph: Graph, static: Slots, done: list[tuple[Rest, list[int]]], read: Sequence[int]) -> None:
        self._graph, self._static, self._done, self._read = graph, static, done, tuple(read)

    def __call__(self, args: Sequence[Any]) -> tuple[list[Any], Rest]:
        self._static.fill(args)
        self._graph.replay()
        packed, outs = self._graph.outs
        outs, (rest, small) = list(outs), self._done[-1]
        if small:
            for i, value in zip(small, packed.clone().unbind(), strict=True):
                outs[i] = value
        for i in self._read:
            if i not in small:
                outs[i] = outs[i].clone()
        return outs, rest


class Recorded:
    """Stands in for a compiled forward pass. ``slots``: arguments that are the batch's; ``read``: results that somebody keeps;
    ``scaled``, ``loss``: which results are the loss to differentiate and the one to tell."""

    def __init__(
        self, run: Callable[..., Any], slots: Sequence[int], read: Sequence[int], scaled: int, loss: int, owner: Owner, device: Device
    ) -> None:
        self._run, self._slots, self._read, self._scaled, self._loss = run, slots, read, scaled, loss
        self._owner, self._device = owner, device
        self._recordings: dict[Moment, _Recording] = {}
        self._warm, self._failed = 0, False
        self._met: set[Moment] = set()  # of which there was a real one: whatever it launches is loaded

    def __call__(self, *args: Any) -> list[Any]:
        owner, moment = self._owner, self._owner.moment
        recording = self._recordings.get(moment)
        if recording is None and self._warm >= WARM_CALLS and moment in self._met and not self._failed:
            recording = self._record(args, moment)
        if recording is None:
            return self._as_it_is(args, moment)
        owner.before_replay(moment)
        outs, rest = recording(args)
        owner.finished(moment, rest)
        return outs

    def forget(self) -> None:
        """The graphs die; the compiled code stays, and warms up anew."""
        self._recordings.clear()
        self._met.clear()
        self._warm, self._failed = 0, False

    @property
    def graphs(self) -> int:
        return len(self._recordings)

    def _as_it_is(self, args: Sequence[Any], moment: Moment) -> list[Any]:
        """A real micro-step, ordinary but for its stream; in a trial the last before recording may not wait for the device."""
        self._warm += 1
        watched = self._owner.trial and self._warm == WARM_CALLS
        with self._device.aside():
            if watched:
                with self._device.watched():
                    outs, rest = self._once(args, moment, recording=False)
            else:
                outs, rest = self._once(args, moment, recording=False)
            self._packed(outs)  # loads what it takes
        self._met.add(moment)
        self._owner.finished(moment, rest)
        return outs

    def _packed(self, outs: Sequence[Any]) -> tuple[Tensor | None, list[int]]:
        """The 0-d numbers that somebody reads as one tensor, and which they are."""
        small = [i for i in self._read if outs[i].dim() == 0 and outs[i].dtype == torch.float32]
        return torch.stack([outs[i] for i in small]) if small else None, small

    def _once(self, args: Sequence[Any], moment: Moment, *, recording: bool) -> tuple[list[Any], Rest]:
        outs = list(self._run(*args))
        rest = self._owner.finish(outs[self._scaled], outs[self._loss], moment, recording=recording)
        return [o.detach() if isinstance(o, Tensor) else o for o in outs], rest

    def _record(self, args: Sequence[Any], moment: Moment) -> _Recording | None:
        static = Slots(args, self._slots, self._device)
        static.fill(args)
        done: list[tuple[Rest, list[int]]] = []

        def work() -> tuple[Tensor | None, list[Any]]:
            outs, rest = self._once(static.args, moment, recording=True)
            packed, small = self._packed(outs)
            done.append((rest, small))
            return packed, outs

        try:
            graph = self._device.record(work)
        except CaptureError as error:
            if self._owner.trial:
                raise
            self._failed = True
            self._owner.refused(error)
            return None
        recording = self._recordings[moment] = _Recording(graph, static, done, self._read)
        return recording
