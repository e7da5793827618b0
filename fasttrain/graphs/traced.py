"""A function of a batch, called on the quickest road that is right: past the guards, through them, or op by op."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fasttrain.graphs.contract import Key, key_of
from fasttrain.graphs.cuda import GraphMemory, Replay
from fasttrain.graphs.explain import obstacle_from
from fasttrain.graphs.program import Raw, StepOutput, StepSpec, keys_and_values
from fasttrain.graphs.trace import VALIDATE_EVERY, Plan, Trace
from fasttrain.module import Trainable
from fasttrain.results import Build, LogKey, Obstacle

MOST_STRUCTURES = 4  # kinds of batch (a first split without hidden state, say) that get a graph each


class TracedCall:
    """``f(batch, batch_idx, *extra) -> Raw`` compiled. ``extra`` are tensors whose values change in place.

    While nobody's code ran between (``dirty`` is False) ``plan(batch)`` is the whole call; ``guarded`` is any other.
    """

    def __init__(
        self, function: Callable[..., Raw], trainable: Trainable, spec: StepSpec, *, build: Build, graph: bool = False,
        extra: tuple[Tensor | None, ...] = (), own: tuple[object, ...] = (), eager: Callable[[Any, int], StepOutput] | None = None,
    ) -> None:  # fmt: skip
        self._trainable, self._spec, self._build, self._own = trainable, spec, build, (trainable.sink, *own)
        self._memory = GraphMemory(spec.device) if graph else None
        self.extra = extra
        self._eager = eager  # what runs a batch that is not traced; the function itself, op by op, when None
        self.dirty = True
        self.plan: Plan | None = None
        self.compile_s = 0.0
        self.obstacles: list[Obstacle] = []
        self.direct = False
        self.why_guarded = ""
        self.failed = self._unvalidated = False
        self._unlooked = 0
        self.op_by_op = False  # was the last call nobody's trace?
        self.guarded_calls = 0  # whose guards were evaluated
        self._ran = False
        self._traces: dict[Any, Trace] = {}  # by the batch's structure, and True for the one of changing sizes
        self._traced_before = 0
        self.bind(function)

    @property
    def replays(self) -> bool:
        """Are results a CUDA graph's own tensors, which the next call overwrites?"""
        return self._memory is not None

    @property
    def traces(self) -> int:
        return self._traced_before + sum(t.count for t in self._traces.values())

    def bind(self, function: Callable[..., Raw]) -> None:
        """Another function from now on: everything traced so far is forgotten."""
        self._traced_before = self.traces
        self._function = function
        self._traces, self.plan = {}, None
        self._plans: dict[Key, Plan] = {}
        self._clean: set[Key] = set()  # kinds of batch whose guards were evaluated since anybody's code ran
        self._seen: Counter[Key] = Counter()
        self._static_keys: dict[Key, Key] = {}  # by structure
        self._keys: tuple[LogKey, ...] = ()

    def forget_moved(self) -> None:
        """Plans over weights or buffers that lie elsewhere now are of no use."""
        for key, plan in list(self._plans.items()):
            if plan.moved():
                plan.entry.run = plan.entry.compiled
                del self._plans[key]
                if plan is self.plan:
                    self.plan = None

    def guarded(self, batch: Any, batch_idx: int) -> StepOutput:
        """The call with its guards evaluated, unless another plan of ours is known to fit."""
        key = key_of(batch)
        if self.dirty:
            self.dirty = False
            self._clean.clear()
        elif key in self._clean and (known := self._plans.get(key)) is not None and known is not self.plan:
            out = known(batch)
            if out is not None:
                self.plan, self.op_by_op = known, False
                return out
        self._seen[key] += 1
        self.guarded_calls += 1
        self.op_by_op = False
        if self._look_due():
            looked = self.untraced(batch, batch_idx)
            return StepOutput(looked.loss, *keys_and_values(looked.items), looked.returned, looked.grads)
        trace = self._trace_for(key)
        raw = self._traced(trace, batch, batch_idx) if trace is not None else None
        if raw is None or trace is None:
            self.plan = None
            if self._eager is not None:
                return self._eager(batch, batch_idx)
            raw = self.untraced(batch, batch_idx)
        else:
            self._make_plan(trace, raw, batch, key)
        keys, values = keys_and_values(raw.items)
        if keys != self._keys:
            self._keys = keys
        return StepOutput(raw.loss, self._keys, values, raw.returned, raw.grads)

    def _look_due(self) -> bool:
        """Where a capture leaves the validation of arguments out, every so many steps run op by op, which validates."""
        if not self._unvalidated or self._eager is not None:
            return False
        if self.plan is not None:
            due, self.plan.left = self.plan.left < 0, VALIDATE_EVERY if self.plan.left < 0 else self.plan.left
            return due
        self._unlooked += 1
        return self._unlooked % VALIDATE_EVERY == 0

    def untraced(self, batch: Any, batch_idx: int) -> Raw:
        """The same function op by op."""
        self.op_by_op = True
        with self._spec.default_dtype():
            return self._function(batch, batch_idx, *self.extra)

    def _traced(self, trace: Trace, batch: Any, batch_idx: int) -> Raw | None:
        """The guarded call. A first trace that fails is the caller's to judge; a later one ends tracing for good."""
        started, before, rng = time.perf_counter(), trace.count, torch.get_rng_state()
        try:
            return trace(batch, batch_idx, *self.extra)
        except Exception as error:
            if not self._ran:
                raise
            torch.set_rng_state(rng)
            self._trainable.sink.items = None
            self.failed = True
            self.obstacles.append(obstacle_from(error))
            return None
        finally:
            if trace.count != before:
                self.compile_s += time.perf_counter() - started
            self._ran = True

    def _make_plan(self, trace: Trace, raw: Raw, batch: Any, key: Key) -> None:
        entry, plan, self.plan, self.direct = trace.entry, self._plans.pop(key, None), None, False
        if entry is None:  # nothing but Python was traced: there is no graph
            return
        self._unvalidated = entry.unvalidated
        if plan is None or not plan.still_fits(entry, batch, raw):
            plan = self._new_plan(trace, raw, batch, key)
        if plan is not None:
            self.plan = self._plans[key] = plan
            self._clean.add(key)
            self.direct = True
        entry.forget()

    def _new_plan(self, trace: Trace, raw: Raw, batch: Any, key: Key) -> Plan | None:
        entry = trace.entry
        assert entry is not None
        self.why_guarded = entry.why_not
        if self._static_keys.get(key[0]) != key or (raw.loss is None and raw.grads):
            return None  # sizes that change, or a batch the module passed over
        try:
            plan = Plan(entry, raw, batch)
        except LookupError as reason:
            self.why_guarded = self.why_guarded or str(reason)
            return None
        if self._memory is not None:
            entry.run = plan.run = Replay(entry.compiled, [i for i, _ in plan.slots], plan.read_by_user, self._memory)
        return plan

    def _trace_for(self, key: Key) -> Trace | None:
        """The first shape of a kind gets its own graph; others run eagerly until they are frequent, then share a dynamic one."""
        if self.failed:
            return None
        kind = key[0]
        if kind not in self._static_keys and len(self._static_keys) < MOST_STRUCTURES:
            self._static_keys[kind] = key
        if self._static_keys.get(kind) == key:
            return self._trace(kind, dynamic=False)
        others = sum(n for k, n in self._seen.items() if self._static_keys.get(k[0]) != k)
        total = sum(self._seen.values())
        if True in self._traces or (others >= 8 and others >= 0.1 * total):
            return self._trace(True, dynamic=True)
        return None

    def _trace(self, kind: Any, *, dynamic: bool) -> Trace:
        if kind not in self._traces:
            self._traces[kind] = Trace(self._function, self._own, self._spec, dynamic=dynamic, build=self._build,
                                       updates=self._eager is not None)  # fmt: skip
        return self._traces[kind]
