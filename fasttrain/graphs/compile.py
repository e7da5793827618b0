"""The compile rung: forward and backward traced as one graph, called past its guards while nobody's code ran between."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fasttrain.graphs.contract import Key, key_of
from fasttrain.graphs.cuda import GraphMemory, Replay
from fasttrain.graphs.explain import obstacle_from
from fasttrain.graphs.program import Raw, StepOutput, StepSpec, keys_and_values, make_micro_step
from fasttrain.graphs.tail import LossScale, Tail, make_tail, trainable_params
from fasttrain.graphs.trace import Plan, Trace
from fasttrain.module import Trainable
from fasttrain.options import Options
from fasttrain.results import Build, LogKey, Obstacle


class CompileStep:
    """Whole-graph forward and backward, then one fused update. Same signature as every rung."""

    rung = "compile"
    takes_closure = False

    def __init__(
        self, trainable: Trainable, spec: StepSpec, optimizer: torch.optim.Optimizer, options: Options,
        scaler: LossScale | None, *, build: Build, graph: bool,
    ) -> None:  # fmt: skip
        self._trainable, self._spec, self._optimizer, self._options = trainable, spec, optimizer, options
        self._scaler, self._build = scaler, build
        self._accumulates = max(options.accumulate_grad_batches.values()) > 1
        self._memory = GraphMemory(spec.device) if graph else None
        if graph:
            self.rung = "graph"
        self._divisor_value, self._divisor = 1, torch.tensor(1.0, device=spec.device)
        self._grads: Sequence[Tensor | None] | None = None
        self._bad: Tensor | None = None
        self._plan: Plan | None = None
        self._dirty = True
        self._traces: dict[bool, Trace | None] = {}
        self._seen: Counter[Key] = Counter()
        self._static_keys: set[Key] = set()
        self._keys: tuple[LogKey, ...] = ()
        self.compile_s = 0.0
        self.obstacles: list[Obstacle] = []
        self._ran = self._failed = False
        self.direct = False
        self.why_guarded = ""
        self.epoch = 0
        self._traced_before = 0
        self._bind()

    def micro_step(self, batch: Any, batch_idx: int, *, first: bool, last: bool, divisor: int) -> StepOutput:
        """One batch forward and backward; the window's gradients stay here until ``update_step``."""
        if divisor != self._divisor_value:
            self._divisor_value = divisor
            self._divisor.fill_(divisor)
        out = self._plan(batch) if self._plan is not None and not self._dirty else None
        if out is None:
            out = self._guarded(batch, batch_idx)
        if first:
            # A replay's gradients are the graph's own: what must outlive the next replay is copied.
            kept = out.grads if last or self._memory is None else [None if g is None else g.clone() for g in out.grads or ()]
            self._grads, self._bad = kept, out.loss
        else:
            self._accumulate(out)
        return out

    def update_step(self, rescale: float) -> bool:
        """Unscale, clip and update in one call; False when the step was skipped as non-finite."""
        grads, self._grads = self._grads, None
        return self.tail.step(grads, rescale, self._bad)  # type: ignore[arg-type]

    def refresh(self) -> None:
        """User code ran: check the guards, the addresses and the set of trainable parameters at the next step."""
        self._dirty = True

    @property
    def traces(self) -> int:
        return self._traced_before + sum(t.count for t in self._traces.values() if t is not None)

    def gradients(self) -> dict[str, Tensor]:
        """The open window's gradients by parameter name, for a checkpoint in mid-window."""
        names = {id(p): n for n, p in self._trainable.module.named_parameters()}
        return {names[id(p)]: g for p, g in zip(self.params, self._grads or (), strict=False) if g is not None and id(p) in names}

    def held(self) -> tuple[Sequence[Tensor | None] | None, Tensor | None]:
        """The open window's gradients in parameter order, and its losses' sum."""
        return self._grads, self._bad

    def hold(self, held: tuple[Sequence[Tensor | None] | None, Tensor | None]) -> None:
        self._grads, self._bad = held

    def parameter_names(self) -> list[str]:
        names = {id(p): n for n, p in self._trainable.module.named_parameters()}
        return [names.get(id(p), "") for p in self.params]

    def untraced(self, batch: Any, batch_idx: int, *, first: bool, divisor: int) -> StepOutput:
        """The same micro-step run op by op: what the traced one is compared with."""
        self._divisor.fill_(divisor)
        with self._spec.default_dtype():
            raw = self._micro_step(*self._arguments(batch, batch_idx))
        out = StepOutput(raw.loss, *keys_and_values(raw.items), raw.returned, raw.grads)
        if first:
            self._grads, self._bad = out.grads, out.loss
        else:
            self._accumulate(out)
        return out

    def load_gradients(self, gradients: dict[str, Tensor]) -> None:
        names = {id(p): n for n, p in self._trainable.module.named_parameters()}
        self._grads = [gradients[n].to(p.device) if (n := names.get(id(p), "")) in gradients else None for p in self.params]
        self._bad = torch.zeros((), device=self._spec.device)

    def _bind(self) -> None:
        """(Re)build what depends on which parameters train."""
        self.params = trainable_params(self._optimizer)
        self._micro_step = make_micro_step(self._trainable, self._spec, self.params)
        self._bind_tail()
        self._traced_before = self.traces
        self._traces, self._plan = {}, None
        self._seen.clear()
        self._static_keys.clear()

    def _arguments(self, batch: Any, batch_idx: int) -> tuple[Any, ...]:
        """What the micro-step takes; the divisor and the loss scale are tensors whose value changes in place."""
        divisor = self._divisor if self._accumulates else None
        return (batch, batch_idx, divisor, None if self._scaler is None else self._scaler.tensor)

    def _guarded(self, batch: Any, batch_idx: int) -> StepOutput:
        if self._dirty:
            self._dirty = False
            self._recheck()
        key = key_of(batch)
        self._seen[key] += 1
        args = self._arguments(batch, batch_idx)
        trace = self._trace_for(key)
        raw = self._traced(trace, args) if trace is not None else None
        if raw is None or trace is None:
            with self._spec.default_dtype():
                raw, self._plan = self._micro_step(*args), None
        else:
            self._make_plan(trace, raw, batch, key)
        keys, values = keys_and_values(raw.items)
        if keys != self._keys:
            self._keys = keys
        return StepOutput(raw.loss, self._keys, values, raw.returned, raw.grads)

    def _traced(self, trace: Trace, args: tuple[Any, ...]) -> Raw | None:
        """The guarded call. A first trace that fails is the caller's to judge; a later one ends tracing for good."""
        started, before, rng = time.perf_counter(), trace.count, torch.get_rng_state()
        try:
            return trace(*args)
        except Exception as error:
            if not self._ran:
                raise
            torch.set_rng_state(rng)
            self._trainable.sink.items = None
            self._failed = True
            self.obstacles.append(obstacle_from(error))
            return None
        finally:
            if trace.count != before:
                self.compile_s += time.perf_counter() - started
            self._ran = True

    def _make_plan(self, trace: Trace, raw: Raw, batch: Any, key: Key) -> None:
        entry, plan, self._plan, self.direct = trace.entry, self._plan, None, False
        if entry is not None and plan is not None and plan.still_fits(entry, batch, keys_and_values(raw.items)[0]):
            self._plan, self.direct = plan, True
            entry.args, entry.outs = (), ()
            return
        if entry is None or raw.loss is None:  # the module passed over this batch: there is nothing to call directly
            return
        self.why_guarded = entry.why_not
        if key in self._static_keys:
            try:
                self._plan = Plan(entry, raw, batch)
                self.direct = True
                if self._memory is not None:
                    entry.run = self._plan.run = Replay(
                        entry.compiled, [i for i, _ in self._plan.slots], self._plan.read_by_user, self._memory
                    )
            except LookupError as reason:
                self.why_guarded = self.why_guarded or str(reason)
        entry.args, entry.outs = (), ()

    def _trace_for(self, key: Key) -> Trace | None:
        """The first shape gets its own graph; others run eagerly until they are frequent, then share a dynamic one."""
        if self._failed:
            return None
        if key in self._static_keys or not self._static_keys:
            self._static_keys.add(key)
            return self._trace(dynamic=False)
        others = sum(n for k, n in self._seen.items() if k not in self._static_keys)
        total = sum(self._seen.values())
        if True in self._traces or (others >= 8 and others >= 0.1 * total):
            return self._trace(dynamic=True)
        return None

    def _trace(self, *, dynamic: bool) -> Trace:
        if self._traces.get(dynamic) is None:
            self._traces[dynamic] = Trace(self._micro_step, self._trainable.sink, self._spec, dynamic=dynamic, build=self._build)
        trace = self._traces[dynamic]
        assert trace is not None
        return trace

    def _recheck(self) -> None:
        if len(self.params) != len(now := trainable_params(self._optimizer)) or any(
            a is not b for a, b in zip(now, self.params, strict=True)
        ):
            grads, old = self._grads, self.params
            self._bind()
            if grads is not None:
                by_id = {id(p): g for p, g in zip(old, grads, strict=True)}
                self._grads = [by_id.get(id(p)) for p in self.params]
        if self._plan is not None and self._plan.moved():
            self._plan.entry.run, self._plan = self._plan.entry.compiled, None
        if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in self.params):
            self._failed, self._plan = True, None  # only op by op are they called
        if _has_step_hooks(self._optimizer) != self._step_hooks:
            self._bind_tail()
        self.tail.refresh()

    def _bind_tail(self) -> None:
        self._step_hooks = _has_step_hooks(self._optimizer)
        self.tail: Tail = make_tail(self._optimizer, self.params, self._options, self._scaler)

    def _accumulate(self, out: StepOutput) -> None:
        assert out.grads is not None
        old = self._grads if self._grads is not None else [None] * len(out.grads)
        both = [(a, b) for a, b in zip(old, out.grads, strict=True) if a is not None and b is not None]
        sums = iter(torch._foreach_add([a for a, _ in both], [b for _, b in both]) if both else [])
        self._grads = [
            next(sums) if a is not None and b is not None else (a if b is None else b) for a, b in zip(old, out.grads, strict=True)
        ]
        if out.loss is not None:
            self._bad = out.loss if self._bad is None else self._bad + out.loss


def _has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    return any(getattr(optimizer, name, None) for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"))
