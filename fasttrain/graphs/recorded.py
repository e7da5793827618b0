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
from fasttrain.graphs.launches import Queue
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
    together: int  # whole steps of one launch

    def prepare(self, n: int) -> None:
        """So many updates will be recorded in one graph."""

    def waits(self, recorded: Recorded) -> None:
        """The step is launched later: with others, or by ``recorded.flush``."""

    def launched(self, earlier: Sequence[list[Any]]) -> None:
        """With this step those that waited were, and this is what they gave back."""

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
        rest, small = self._done[-1]
        packed, outs = self._graph.outs
        return copied_out(packed, outs, small, self._read), rest


def copied_out(packed: Tensor | None, static: Sequence[Any], small: Sequence[int], read: Sequence[int]) -> list[Any]:
    """What the next replay will not overwrite."""
    outs = list(static)
    if packed is not None:
        for i, value in zip(small, packed.clone().unbind(), strict=True):
            outs[i] = value
    for i in read:
        if i not in small and isinstance(outs[i], Tensor):
            outs[i] = outs[i].clone()
    return outs


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
        self._inputs: Slots | None = None  # every moment's: replays follow one another
        self._queue: Queue | None = None
        self._alone = False  # several steps could not be recorded in one graph
        self._met: set[Moment] = set()  # of which there was a real one: whatever it launches is loaded

    def __call__(self, *args: Any) -> list[Any]:
        owner, moment = self._owner, self._owner.moment
        recording = self._recordings.get(moment)
        if recording is None and self._warm >= WARM_CALLS and moment in self._met and not self._failed:
            recording = self._record(args, moment)
        if recording is None:
            return self._as_it_is(args, moment)
        if moment.whole and owner.together > 1 and not self._alone:
            return self._together(args, moment)
        return self._replay(recording, args, moment)

    def _replay(self, recording: _Recording, args: Sequence[Any], moment: Moment) -> list[Any]:
        self._owner.before_replay(moment)
        outs, rest = recording(args)
        self._owner.finished(moment, rest)
        return outs

    def _together(self, args: Sequence[Any], moment: Moment) -> list[Any]:
        """Waits (and gives back nothing, in as many places), or is launched with those that wait."""
        n, owner = self._owner.together, self._owner
        if self._queue is None or len(self._queue.slots) != n:
            self._queue = Queue(n, args, self._slots, self._device)
        queue = self._queue
        if not queue.take(args):
            owner.waits(self)
            return [None] * self._results
        if queue.graph is None and not self._record_all(queue, moment):
            *earlier, last = self.flush(moment)
        else:
            assert queue.graph is not None
            queue.waiting = 0
            owner.before_replay(moment)
            queue.graph.replay()
            done = self._all_done[-n:]
            results = zip(queue.graph.outs, done, strict=True)
            *earlier, last = [copied_out(packed, outs, small, self._read) for (packed, outs), (_, small) in results]
            for rest, _ in done:
                owner.finished(moment, rest)
        owner.launched(earlier)
        return last

    def flush(self, moment: Moment) -> list[list[Any]]:
        """What waits runs now, one by one."""
        taken = [] if self._queue is None else self._queue.drain()
        return [self._replay(self._recordings[moment], slots.args, moment) for slots in taken]

    def _record_all(self, queue: Queue, moment: Moment) -> bool:
        self._owner.prepare(len(queue.slots))
        self._all_done: list[tuple[Rest, list[int]]] = []

        def work() -> list[tuple[Tensor | None, list[Any]]]:
            return [self._work(slots.args, moment, self._all_done) for slots in queue.slots]

        try:
            queue.graph = self._device.record(work)
        except CaptureError as error:
            self._alone = True
            self._owner.refused(error)
            return False
        return True

    def forget(self) -> None:
        """The graphs die; the compiled code stays, and warms up anew."""
        self._recordings.clear()
        self._met.clear()
        self._inputs = self._queue = None
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
        small = [i for i in self._read if isinstance(o := outs[i], Tensor) and o.dim() == 0 and o.dtype == torch.float32]
        return torch.stack([outs[i] for i in small]) if small else None, small

    def _once(self, args: Sequence[Any], moment: Moment, *, recording: bool) -> tuple[list[Any], Rest]:
        outs = list(self._run(*args))
        self._results = len(outs)
        rest = self._owner.finish(outs[self._scaled], outs[self._loss], moment, recording=recording)
        return [o.detach() if isinstance(o, Tensor) else o for o in outs], rest

    def _work(self, args: Sequence[Any], moment: Moment, done: list[tuple[Rest, list[int]]]) -> tuple[Tensor | None, list[Any]]:
        """What a graph holds of one micro-step; what it came to goes to ``done``."""
        outs, rest = self._once(args, moment, recording=True)
        packed, small = self._packed(outs)
        done.append((rest, small))
        return packed, outs

    def _record(self, args: Sequence[Any], moment: Moment) -> _Recording | None:
        static = self._inputs = self._inputs or Slots(args, self._slots, self._device)
        static.fill(args)
        done: list[tuple[Rest, list[int]]] = []

        try:
            graph = self._device.record(lambda: self._work(static.args, moment, done))
        except CaptureError as error:
            if self._owner.trial:
                raise
            self._failed = True
            self._owner.refused(error)
            return None
        recording = self._recordings[moment] = _Recording(graph, static, done, self._read)
        return recording
