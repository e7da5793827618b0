"""Evaluation steps: eager, or traced once where enough batches are still to come to pay for it."""

from __future__ import annotations

from typing import Any

from fasttrain.graphs.contract import Key, batch_size_of, key_of
from fasttrain.graphs.device import Device
from fasttrain.graphs.explain import obstacle_from
from fasttrain.graphs.plan import Plan
from fasttrain.graphs.program import Raw, StepSpec, keys_and_values, make_eval_step
from fasttrain.graphs.replay import Replay
from fasttrain.graphs.trace import Trace
from fasttrain.module import Trainable
from fasttrain.results import Build, LogKey, Obstacle

PAYS_FROM = 1000  # batches still to be evaluated; a count and not a time, so that every run decides the same


class EvalStep:
    """``step(batch, batch_idx, dataloader_idx) -> (output, keys, values, batch_size)`` of one stage."""

    def __init__(self, trainable: Trainable, spec: StepSpec, stage: str, *, keep: bool, suffix: str) -> None:
        self._trainable, self._spec, self._suffix = trainable, spec, suffix
        self._function = make_eval_step(trainable, spec, stage, keep=keep, alone=not suffix)
        self._trace: Trace | None = None
        self._key: Key | None = None
        self._plan: Plan | None = None
        self._keys: tuple[LogKey, ...] = ()
        self._dirty = True
        self._device: Device | None = None
        self.obstacles: list[Obstacle] = []
        self.traced = False

    def begin(self, batches_left: float, *, build: Build | None, device: Device | None = None) -> None:
        """A pass begins: user code may have run since the last one. Enough ``batches_left`` make tracing pay,
        where the training step was traced (``build``); ``device``: where it was recorded, and this one is too."""
        self._dirty = True
        if build is not None and not self.traced and batches_left >= PAYS_FROM:
            self.traced, self._device = True, device
            self._trace = Trace(
                self._function, (self._trainable.sink,), self._spec, dynamic=False, build=build, recorded=device is not None
            )

    def refresh(self) -> None:
        """User code ran since the last batch: the guards are checked at the next one."""
        self._dirty = True

    def __call__(self, batch: Any, batch_idx: int, dataloader_idx: int) -> tuple[Any, tuple[LogKey, ...], Any, int]:
        if self._plan is not None and not self._dirty:
            out = self._plan(batch)
            if out is not None:
                return out.returned, self._keys, out.values, out.batch_size
        raw = self._guarded(batch, batch_idx, dataloader_idx)
        keys, values = keys_and_values(raw.items, self._suffix)
        if keys != self._keys:
            self._keys = keys
        return raw.returned, self._keys, values, batch_size_of(batch)

    def _guarded(self, batch: Any, batch_idx: int, dataloader_idx: int) -> Raw:
        trace, key = self._trace, key_of(batch)
        if trace is not None and self._key in (None, key):
            self._key, self._dirty = key, False
            try:
                raw = trace(batch, batch_idx, dataloader_idx)
            except Exception as error:
                self._trainable.sink.items, self._trace, self._plan = None, None, None
                self.obstacles.append(obstacle_from(error))
            else:
                self._make_plan(trace, raw, batch)
                return raw
        with self._spec.default_dtype():
            return self._function(batch, batch_idx, dataloader_idx)

    def _make_plan(self, trace: Trace, raw: Raw, batch: Any) -> None:
        entry, self._plan = trace.entry, None
        if entry is None:  # nothing but Python was traced: there is no graph
            return
        try:
            self._plan = plan = Plan(entry, raw, batch)
        except LookupError:
            self._plan = None  # its guards are evaluated at every call then
        else:
            if self._device is not None:
                stand_in = entry.run
                if not isinstance(stand_in, Replay) or stand_in.moved(plan.args):
                    stand_in = Replay(entry.compiled, [i for i, _ in plan.slots], plan.read_by_user, self._device)
                entry.run = plan.run = stand_in
        entry.forget()
