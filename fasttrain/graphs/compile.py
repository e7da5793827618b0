"""The compile rung: forward and backward traced as one graph, called past its guards while nobody's code ran between."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor

from fasttrain.errors import CaptureError
from fasttrain.graphs.contract import Key, batch_size_of, key_of, reader_for, tensors_of
from fasttrain.graphs.explain import obstacle_from
from fasttrain.graphs.program import Raw, StepOutput, StepSpec, keys_and_values, make_micro_step
from fasttrain.graphs.tail import LossScale, Tail, make_tail, trainable_params
from fasttrain.module import Trainable
from fasttrain.options import Options
from fasttrain.results import LogKey, Obstacle

VARYING = ("batch_idx", "global_step", "batches_seen")  # a guard on one of these fails at the next step


# Ints on a module (counters) become symbols at their second value; a step that still changes is given up early.
DYNAMO = {"trace_autograd_ops": True, "allow_unspec_int_on_nn_module": True, "recompile_limit": 5, "verbose": False}


class Trace:
    """One ``torch.compile`` of the micro-step, and what its last guarded call really ran."""

    def __init__(self, micro_step: Callable[..., Raw], sink: object, spec: StepSpec, *, dynamic: bool, cpp_wrapper: bool) -> None:
        self._sink, self._spec = sink, spec
        # Sizes are checked against the contract before a direct call, and by the guards before any other.
        self._patches = {"fallback_random": True, "cpp_wrapper": cpp_wrapper, "size_asserts": False}
        self.count = 0
        self.entry: _Entry | None = None
        # A code object of its own: Dynamo's cache and its recompile limit belong to the code, not to the closure.
        assert isinstance(micro_step, FunctionType)
        own = FunctionType(
            micro_step.__code__.replace(), micro_step.__globals__, "micro_step", micro_step.__defaults__, micro_step.__closure__
        )
        self._call = torch.compile(own, fullgraph=True, dynamic=True if dynamic else None, backend=self._backend)

    def __call__(self, *args: Any) -> Raw:
        """The guarded call: traces when it must. Raises whatever the tracer raises."""
        with self._spec.default_dtype(), torch._dynamo.config.patch(DYNAMO), _quiet():
            out: Raw = self._call(*args)
        return out

    def _backend(self, graph: torch.fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        entry = _Entry()
        entry.inspect(self._sink)
        self.count += 1
        entry.run = cast(Callable[..., Any], compile_fx(graph, examples, config_patches=self._patches))

        def recorded(*args: Any) -> Any:
            outs = entry.run(*args)
            entry.args, entry.outs, self.entry = args, outs, entry
            return outs

        return recorded


@contextmanager
def _quiet() -> Iterator[None]:
    """Dynamo logs what we report in a sentence ourselves; its errors still come as exceptions."""
    log = logging.getLogger("torch._dynamo")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


class _Entry:
    """One compiled graph: its callable, whether calling it alone is the whole step, and its last call."""

    def __init__(self) -> None:
        self.run: Callable[..., Any] = _never
        self.args: Sequence[Any] = ()
        self.outs: Sequence[Any] = ()
        self.pure = False
        self.why_not = ""

    def inspect(self, sink: object) -> None:
        """Called while Dynamo traces. Pure: no Python side effect but our sink's, no guard on what changes every step."""
        from torch._dynamo.symbolic_convert import InstructionTranslator

        output = InstructionTranslator.current_tx().output
        effects = output.side_effects
        if getattr(effects, "tensor_hooks", None):
            raise CaptureError("Tensor.register_hook inside training_step: the tracer would drop it in silence.")
        changed = [v for v in effects.id_to_variable.values() if effects.is_modified(v)]
        foreign = [v for v in changed if not _is_new(v) and getattr(v, "value", None) is not sink]
        guards = {_name(g) for g in output.guards}
        varying = [n for n in guards if n.rstrip("']").endswith(VARYING)]
        if foreign:
            self.why_not = f"the step changes Python state ({type(getattr(foreign[0], 'value', foreign[0])).__name__})"
        elif varying:
            self.why_not = f"the step reads {varying[0]}, which changes every step"
        self.pure = not (foreign or varying)


def _is_new(variable: Any) -> bool:
    return "New" in type(variable.mutation_type).__name__


def _name(guard: Any) -> str:
    name = guard.name
    return str(name() if callable(name) else name)


def _never(*args: Any) -> Any:
    raise AssertionError("a graph that was never compiled")


class Plan:
    """A pure compiled graph called directly: batch leaves in, loss, gradients and logged values out."""

    def __init__(self, entry: _Entry, raw: Raw, batch: Any) -> None:
        leaves = tensors_of(batch)
        if leaves is None or raw.returned is not None or not entry.pure or not all(isinstance(a, Tensor) for a in entry.args):
            raise LookupError
        place = {id(o): i for i, o in enumerate(entry.outs)}
        where = {id(t): i for i, t in enumerate(leaves)}
        self.run, self.read, self.kind = entry.run, reader_for(batch), type(batch)
        self.args: list[Any] = [None if id(a) in where else a for a in entry.args]
        self.slots = [(i, where[id(a)]) for i, a in enumerate(entry.args) if id(a) in where]
        self.contract = [(t.shape, t.stride(), t.dtype) for t in leaves]
        self.batch_size = batch_size_of(batch)
        self.names = list(batch) if isinstance(batch, dict) else None
        self.keys, values = keys_and_values(raw.items)
        if any(not isinstance(v, Tensor) for v in values):
            raise LookupError
        self.loss = place[id(raw.loss)]
        self.values = _picker([place[id(v)] for v in values])
        self.grads = _picker([None if g is None else place[id(g)] for g in raw.grads])

    def __call__(self, batch: Any) -> StepOutput | None:
        """The step, or None when this batch is not what the graph was made for. No guard is evaluated."""
        if type(batch) is not self.kind or (self.names is not None and list(batch) != self.names):
            return None
        leaves = batch if self.read is None else tuple(self.read(batch) or ())
        if len(leaves) != len(self.contract):
            return None
        for t, (shape, stride, dtype) in zip(leaves, self.contract):  # noqa: B905 - lengths were just compared
            if t.shape != shape or t.dtype is not dtype or t.stride() != stride or t.requires_grad:
                return None
        args = self.args
        for i, j in self.slots:
            args[i] = leaves[j]
        outs = self.run(*args)
        return StepOutput(outs[self.loss], self.keys, self.values(outs), None, self.grads(outs), self.batch_size)


def _picker(indices: list[int | None]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """A function that picks these places out of a graph's outputs, in C wherever it can be."""
    present = [i for i in indices if i is not None]
    if not present:
        return lambda outs: indices
    if len(present) == len(indices) and present == list(range(present[0], present[0] + len(present))):
        return itemgetter(slice(present[0], present[0] + len(present)))
    if len(present) == len(indices):
        return itemgetter(*present)
    return lambda outs: [None if i is None else outs[i] for i in indices]


class CompileStep:
    """Whole-graph forward and backward, then one fused update. Same signature as every rung."""

    rung = "compile"
    takes_closure = False

    def __init__(
        self, trainable: Trainable, spec: StepSpec, optimizer: torch.optim.Optimizer, options: Options,
        scaler: LossScale | None, *, cpp_wrapper: bool,
    ) -> None:  # fmt: skip
        self._trainable, self._spec, self._optimizer, self._options = trainable, spec, optimizer, options
        self._scaler, self._cpp_wrapper = scaler, cpp_wrapper
        self._accumulates = max(options.accumulate_grad_batches.values()) > 1
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
            self._grads, self._bad = out.grads, out.loss
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
        return sum(t.count for t in self._traces.values() if t is not None)

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
            raw = self._micro_step(
                batch, batch_idx, self._divisor if self._accumulates else None, None if self._scaler is None else self._scaler.tensor
            )
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
        self.tail: Tail = make_tail(self._optimizer, self.params, self._options, self._scaler)
        self._traces, self._plan = {}, None
        self._seen.clear()
        self._static_keys.clear()

    def _guarded(self, batch: Any, batch_idx: int) -> StepOutput:
        if self._dirty:
            self._dirty = False
            self._recheck()
        key = key_of(batch)
        self._seen[key] += 1
        args = (batch, batch_idx, self._divisor if self._accumulates else None, None if self._scaler is None else self._scaler.tensor)
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
        entry, self._plan, self.direct = trace.entry, None, False
        if entry is None or raw.loss is None:  # the module passed over this batch: there is nothing to call directly
            return
        self.why_guarded = entry.why_not
        if key in self._static_keys:
            try:
                self._plan = Plan(entry, raw, batch)
                self.direct = True
            except (LookupError, KeyError):
                self.why_guarded = self.why_guarded or "the batch or what is returned is not made of tensors alone"
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
            self._traces[dynamic] = Trace(
                self._micro_step, self._trainable.sink, self._spec, dynamic=dynamic, cpp_wrapper=self._cpp_wrapper
            )
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
        self.tail.refresh()

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
