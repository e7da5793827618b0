"""A function of a batch, called on the quickest road that is right: past the guards, through them, or op by op."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fasttrain.errors import CaptureError
from fasttrain.graphs.buckets import Buckets
from fasttrain.graphs.checks import CheckFailed
from fasttrain.graphs.contract import Key, key_of
from fasttrain.graphs.explain import obstacle_from
from fasttrain.graphs.lifted import HostWorkError
from fasttrain.graphs.plan import Plan
from fasttrain.graphs.program import Raw, StepOutput, StepSpec, keys_and_values
from fasttrain.graphs.speculated import Speculation
from fasttrain.graphs.trace import Trace
from fasttrain.module import Trainable
from fasttrain.results import Build, LogKey, Obstacle

MOST_STRUCTURES = 4  # kinds of batch (a first split without hidden state, say) that get a graph each
StandIn = Callable[[Callable[..., Any], Plan], Callable[..., Any]]
VALIDATE_EVERY = 1000  # steps between two op by op, where the capture leaves the validation of arguments out
FREQUENT = 8  # batches of other sizes from which they share a graph, if they are a tenth of all


class TracedCall:
    """``f(batch, batch_idx, *extra) -> Raw`` compiled. ``extra`` are tensors whose values change in place.

    While nobody's code ran between (``dirty`` is False) ``plan(batch)`` is the whole call; ``guarded`` is any other.
    """

    def __init__(
        self, function: Callable[..., Raw], trainable: Trainable, spec: StepSpec, *, build: Build, stand_in: StandIn | None = None,
        extra: tuple[Tensor | None, ...] = (), own: tuple[object, ...] = (), eager: Callable[[Any, int], StepOutput] | None = None,
        buckets: Buckets | None = None, op_by_op: Callable[..., Raw] | None = None,
    ) -> None:  # fmt: skip
        self._trainable, self._spec, self._build, self._own = trainable, spec, build, (trainable.sink, *own)
        self._stand_in = stand_in  # what records a compiled graph in one of the device's own
        self._buckets = buckets  # which shapes have a graph, where shapes do not share one
        self.extra = extra
        self._op_by_op = op_by_op  # the function where it is not traced; itself, when None
        self._eager = eager  # what runs a batch that is not traced; the function itself, op by op, when None
        self.dirty = True
        self.plan: Plan | None = None
        self.compile_s = 0.0
        self.ended: list[Obstacle] = []  # what ended tracing on the way
        self.speculation = Speculation({})
        self.direct = False
        self.why_guarded = ""
        self.failed = self._unvalidated = False
        self._check: CheckFailed | None = None  # by the last call
        self.op_by_op = False  # was the last call nobody's trace?
        self.guarded_calls = 0  # whose guards were evaluated
        self.count = 0  # calls, past the guards or through them
        self._static: dict[str, str] = {}  # by structure: the batch that has the graph of its own
        self._others, self._dynamic = 0, False  # calls with batches that have none; do they share one?
        self._doubted = 0  # such calls until what a checkpoint has said of ``_static`` is forgotten
        self._before = (0, 0, False, 0)
        self._names: dict[Key, tuple[str, str]] = {}
        self._ran = False
        self._traces: dict[str, Trace] = {}  # by the batch's structure, and "" for the one of changing sizes
        self._traced_before = 0
        self.bind(function)

    @property
    def replays(self) -> bool:
        """Are results a CUDA graph's own tensors, which the next call overwrites?"""
        return self._stand_in is not None

    @property
    def traces(self) -> int:
        return self._traced_before + sum(t.count for t in self._traces.values())

    @property
    def obstacles(self) -> Sequence[Obstacle]:
        """What ended tracing, what was dealt with in what was traced, and what is followed."""
        return [*self.ended, *(o for t in self._traces.values() for o in t.dealt), *self.speculation.obstacles(self.count)]

    @property
    def guards_us(self) -> float:
        """What evaluating the guards takes of a step; 0 where no call has shown it."""
        least = min((t.guards_s for t in self._traces.values()), default=math.inf)
        return 0.0 if least == math.inf else least * 1e6

    def bind(self, function: Callable[..., Raw]) -> None:
        """Another function from now on: everything traced so far is forgotten."""
        self._traced_before = self.traces
        self._function = function
        self._traces, self.plan = {}, None
        self._plans: dict[Key, Plan] = {}
        self._clean: set[Key] = set()  # kinds of batch whose guards were evaluated since anybody's code ran
        self._keys: tuple[LogKey, ...] = ()

    def anew(self) -> None:
        """As if it had never been called, without following what went both ways while it was tried."""
        self.speculation.forgo()
        self.bind(self._function)
        self._traced_before, self._ran = 0, False

    def state(self) -> dict[str, Any]:
        """Which batches run captured from here on, as a checkpoint keeps it."""
        state = {"count": self.count, "others": self._others, "dynamic": self._dynamic, "failed": self.failed, "static": dict(self._static)}
        state |= {"speculation": self.speculation.state()}
        return state if self._buckets is None else state | {"buckets": self._buckets.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """As in the run that was saved; unless its batches do not come any more."""
        self.count, self._others, self._dynamic = state["count"], state["others"], state["dynamic"]
        self.failed, self._static, self._doubted, self._ran = state["failed"], dict(state["static"]), FREQUENT, True
        self.speculation.load_state(state["speculation"])
        if self._buckets is not None and state.get("buckets") is not None:
            self._buckets.load_state(state["buckets"])

    def tried(self, on: bool) -> None:
        """What is called from True to False counts for nothing."""
        if on:
            self._before = (self.count, self._others, self._dynamic, self._doubted)
        else:
            self.count, self._others, self._dynamic, self._doubted = self._before
        self.speculation.tried(on)

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
        check = None if self.plan is None else self.plan.failed()  # just now, with this batch
        if self.dirty:
            self.dirty = False
            self._clean.clear()
        elif check is None and key in self._clean and (known := self._plans.get(key)) is not None and not self._look_due():
            known.left = self._unlooked()
            out = known(batch)
            if out is not None:
                if self._buckets is not None:
                    self._buckets.used(self._named(key)[1])
                self.plan, self.op_by_op = known, False
                return out
            check = known.failed()
        self.guarded_calls += 1
        self.op_by_op = False
        if self._look_due():
            if self.plan is not None:
                self.plan.left = VALIDATE_EVERY - 1
            looked = self.untraced(batch, batch_idx)
            return StepOutput(looked.loss, *keys_and_values(looked.items), looked.returned, looked.grads)
        trace, self._check = self._trace_for(key) if check is None else None, check
        raw = self._traced(trace, batch, batch_idx) if trace is not None else None
        if raw is None or trace is None:
            self.plan = None
            if self._eager is not None:
                return self._eager(batch, batch_idx)
            raw = self.untraced(batch, batch_idx)  # raises what a failed check raises
            if self._check is not None:
                self._judge(self._check)
        else:
            self._make_plan(trace, raw, batch, key)
        keys, values = keys_and_values(raw.items)
        if keys != self._keys:
            self._keys = keys
        return StepOutput(raw.loss, self._keys, values, raw.returned, raw.grads)

    def _judge(self, check: CheckFailed) -> None:
        """After a captured call that failed, and one op by op that did not."""
        given_up, self._check = self.speculation.failed(check, self.count), None
        if given_up is None:
            raise CaptureError(f"captured, {check} fails in call {self.count}; op by op it does not. Use capture='eager'.")
        self.dirty = True  # the step's own code has gone another way, and may have left other things behind
        if given_up:
            self.bind(self._function)

    def _look_due(self) -> bool:
        """Where a capture leaves the validation of arguments out, every so many steps run op by op, which validates."""
        return self._unvalidated and self._eager is None and self.count % VALIDATE_EVERY == 0

    def _unlooked(self) -> float:
        """Calls until the next look, this one among them."""
        return VALIDATE_EVERY - self.count % VALIDATE_EVERY if self._unvalidated and self._eager is None else math.inf

    def untraced(self, batch: Any, batch_idx: int) -> Raw:
        """The same function op by op."""
        self.op_by_op = True
        with self._spec.default_dtype():
            return (self._op_by_op or self._function)(batch, batch_idx, *self.extra)

    def _traced(self, trace: Trace, batch: Any, batch_idx: int) -> Raw | None:
        """The guarded call. A first trace that fails is the caller's to judge; a later one ends tracing for good."""
        started, before, rng = time.perf_counter(), trace.count, torch.get_rng_state()
        try:
            return trace(batch, batch_idx, *self.extra)
        except HostWorkError as work:
            raise work.error from None
        except CheckFailed as error:
            if not self._ran and not self.speculation:
                raise
            self._trainable.sink.items, self._check = None, error
            return None
        except Exception as error:
            if not self._ran:
                raise
            torch.set_rng_state(rng)
            self._trainable.sink.items = None
            self.failed = True
            self.ended.append(obstacle_from(error))
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
            plan.left = self._unlooked() - 1
            self._clean.add(key)
            self.direct = True
        entry.forget()

    def _new_plan(self, trace: Trace, raw: Raw, batch: Any, key: Key) -> Plan | None:
        entry = trace.entry
        assert entry is not None
        self.why_guarded = entry.why_not
        kind, name = self._named(key)
        own = name in self._buckets if self._buckets is not None else self._static.get(kind) == name
        if not own or (raw.loss is None and raw.grads):
            return None  # sizes that change, or a batch the module passed over
        try:
            plan = Plan(entry, raw, batch)
        except LookupError as reason:
            self.why_guarded = self.why_guarded or str(reason)
            return None
        if self._stand_in is not None:
            entry.run = plan.run = self._stand_in(entry.compiled, plan)
        return plan

    def _trace_for(self, key: Key) -> Trace | None:
        """The first shape of a kind gets its own graph; others run eagerly until they are frequent, then share a dynamic one."""
        if self.failed:
            return None
        kind, name = self._named(key)
        if self._buckets is not None:
            return self._bucket(name, self._buckets)
        if kind not in self._static and len(self._static) < MOST_STRUCTURES:
            self._static[kind] = name
        if self._static.get(kind) == name:
            self._doubted = 0
            return self._trace(kind, dynamic=False)
        self._others += 1
        self._dynamic = self._dynamic or (self._others >= FREQUENT and self._others >= 0.1 * self.count)
        if self._doubted and not self._dynamic:
            self._doubted -= 1
            if not self._doubted:  # somebody resumed with batches of another size
                self._static, self._others = {kind: name}, 0
                return self._trace(kind, dynamic=False)
        return self._trace("", dynamic=True) if self._dynamic else None

    def _bucket(self, name: str, buckets: Buckets) -> Trace | None:
        """A graph for each shape that comes often; another's goes when there are too many."""
        admitted, gone = buckets.sees(name)
        for other in gone:
            self._traces_gone(other)
        return self._trace(name, dynamic=False) if admitted else None

    def _traces_gone(self, name: str) -> None:
        trace = self._traces.pop(name, None)
        self._traced_before += 0 if trace is None else trace.count
        for key in [k for k in self._plans if self._named(k)[1] == name]:
            plan = self._plans.pop(key)
            self._clean.discard(key)
            if plan is self.plan:
                self.plan = None

    def _named(self, key: Key) -> tuple[str, str]:
        """The structure and the whole of a key as texts, the same in every process."""
        if key not in self._names:
            kind, name = (hashlib.sha256(repr(k).encode()).hexdigest()[:16] for k in (key[0], key))
            self._names[key] = kind, name
        return self._names[key]

    def _trace(self, kind: str, *, dynamic: bool) -> Trace:
        if kind not in self._traces:
            self._traces[kind] = Trace(self._function, self._own, self._spec, dynamic=dynamic, build=self._build,
                                       updates=self._eager is not None, speculation=self.speculation,
                                       recorded=self._stand_in is not None)  # fmt: skip
        return self._traces[kind]
