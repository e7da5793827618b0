"""One function traced whole by torch.compile, and what its last guarded call really ran."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor, nn

from fasttrain.errors import CaptureError
from fasttrain.graphs.checks import Checked, CheckFailed, checking, checks_of, has_checks, versions_of
from fasttrain.graphs.frozen import frozen_float
from fasttrain.graphs.later import CLOCKS, MARK, Kept, held, kept_by
from fasttrain.graphs.left import as_left, left_detached, left_in
from fasttrain.graphs.lifted import HostWorkError, Lifted, changed_since, name_of
from fasttrain.graphs.lookups import looked_up
from fasttrain.graphs.numbers import never_decided, undecided
from fasttrain.graphs.packed import packing, whole_packing
from fasttrain.graphs.products import product_patches
from fasttrain.graphs.program import Raw, StepSpec, gradients_of
from fasttrain.graphs.recurrent import whole_layers
from fasttrain.graphs.speculated import Speculation
from fasttrain.graphs.tracer import (
    DYNAMO,
    VALIDATION,
    chance_apart,
    compiled,
    faithful,
    lengths_asked_gently,
    optimizers_alone,
    passing,
    transformers,
    unvalidated,
    without_inference_mode,
)
from fasttrain.results import Build, Obstacle

VARYING = ("batch_idx", "global_step", "batches_seen")  # a guard on one of these fails at the next step
STOOD_IN = ("._VF.", "._detect_is_causal_mask")


class Trace:
    """One ``torch.compile`` of a step, and what its last guarded call really ran."""

    def __init__(
        self, function: Callable[..., Raw], own: tuple[Any, ...], spec: StepSpec, *, dynamic: bool, build: Build,
        updates: bool = False, speculation: Speculation | None = None, recorded: bool = False,
    ) -> None:  # fmt: skip
        self._speculation = speculation
        self._recorded = recorded  # in a CUDA graph, which holds nothing but the device's own work
        self._updates = updates  # are optimizers moved inside the function?
        self._checks = not updates and spec.device.type == "cpu"  # may it fail in its middle? A device that does is lost
        self._own, self._spec = own, spec  # ``own``: objects of ours that a step may change, the sink first
        # Sizes are checked against the contract before a direct call, and by the guards before any other.
        self._patches: dict[str, Any] = {"fallback_random": True, "size_asserts": False, "triton.cudagraphs": False}
        self._patches |= {"cpp_wrapper": build.cpp_wrapper, "cpp.threads": build.kernel_threads}
        self._patches |= product_patches(build)
        self.count = 0
        self.guards_s = math.inf  # a call takes beside its graph, at least
        self._ran_s = 0.0  # the last call's graph
        self.entry: Entry | None = None
        self._entries: list[Entry] = []
        self._unvalidated = self._stood_in = False  # do guards look at what is otherwise within a trace?
        self._function, self._dynamic = function, True if dynamic else None
        self._lifted = Lifted(own)
        self._kept: list[Kept] | None = None  # what may be left to the host, in the order to be tried; None: nobody has looked yet
        self._leaves = False  # has anything but metrics been left to the host?
        self._call = self._compiled()

    def __call__(self, *args: Any) -> Raw:
        """The guarded call: traces when it must. Raises whatever the tracer raises."""
        try:
            unchecked, traces, begun = unvalidated() if self._unvalidated else nullcontext(), self.count, time.perf_counter()
            self._lifted.begin(CLOCKS)
            with self._spec.default_dtype(), unchecked, stood_in() if self._stood_in else nullcontext():
                raw: Raw = self._call(*args)
            if self.count == traces:
                self.guards_s = min(self.guards_s, time.perf_counter() - begun - self._ran_s)
        except CheckFailed:
            raise
        except Exception as error:
            if _by_the_compiler(error) or not self._otherwise(str(error)):
                raise
            return self(*args)
        work = [i for i in raw.items if type(i[0]) is int]
        if self.entry is not None:
            self.entry.work = work
        if not work:
            return raw
        try:
            found = self._lifted.do(work)
        except Exception as error:
            raise HostWorkError(error) from error
        items = [i for i in raw.items if type(i[0]) is not int]
        marks = {at: i[1][1] for at, i in enumerate(items) if type(i[1]) is tuple and i[1][:1] == (MARK,)}
        if self.entry is not None:
            self.entry.marks = marks
        return raw._replace(items=[(i[0], found[marks[at]], *i[2:]) if at in marks else i for at, i in enumerate(items)])

    @property
    def dealt(self) -> Sequence[Obstacle]:
        """What would have ended the trace and was dealt with."""
        return self._lifted.dealt + list(dict.fromkeys(o for e in self._entries for o in e.checks))

    def _compiled(self) -> Callable[..., Any]:
        return compiled(self._function, self._backend, DYNAMO, whole=True, dynamic=self._dynamic, around=self._around)

    @contextmanager
    def _around(self) -> Iterator[None]:
        checks = checking() if self._checks else nullcontext()
        follows = self._speculation.following() if self._checks and self._speculation is not None else nullcontext()
        with (
            never_decided(self._lifted),
            self._lifted.lifting(),
            looked_up(),
            chance_apart(),
            optimizers_alone(),
            faithful(),
            without_inference_mode(),
            lengths_asked_gently(),
            passing(),
            left_detached(gradients_of.__code__),
            stood_in(),
            packing(),
            follows,
            checks,
        ):
            yield

    def _otherwise(self, said: str) -> bool:
        """After a failure: once more with less left to the host, nothing at last - a metric only where the failure speaks of it."""
        if self._kept is None:
            self._kept, self._leaves = _fewer_and_fewer(self._lifted.leaked), bool(self._lifted.leaked)
        left = self._lifted.kept
        if (
            not self._kept
            and not left
            and not (left.metrics and self._lifted.metrics and re.search("the host|host work|LaterVariable", said))
        ):
            return False
        self._lifted.kept = self._kept.pop(0) if self._kept else Kept()
        self._call = self._compiled()
        return True

    def _backend(self, graph: torch.fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        from torch._dynamo.symbolic_convert import InstructionTranslator
        from torch._inductor.compile_fx import compile_fx

        entry = Entry(self._lifted)
        entry.inspect(self._own, self._updates)
        if entry.kept and (self._kept is None or not self._leaves):
            self._kept, self._leaves = _fewer_and_fewer(entry.kept, metrics=self._lifted.kept.metrics), True
            raise CaptureError("what is kept on the host is lifted now")
        if changed_since(InstructionTranslator.current_tx().output):
            raise CaptureError("a container that the host was given to keep is changed after")
        if frozen_float(graph):
            raise CaptureError(
                "a number computed from a Python float that changes is logged or kept by the step: the compiler would freeze it. "
                "Log a tensor, or keep it in a buffer."
            )
        if undecided(graph):
            raise CaptureError("a comparison of a float with itself is computed with: the compiler would decide it")
        if self._recorded:
            _refuse_elsewhere(graph, self._spec.device)
        self.count += 1
        self._unvalidated |= entry.unvalidated
        self._stood_in |= entry.stood_in
        # An exception cannot leave a loop on several threads: what fails in a kernel would end the process.
        patches = self._patches | ({"cpp.threads": 1} if has_checks(graph) else {})
        run = cast(Callable[..., Any], compile_fx(graph, examples, config_patches=patches))
        entry.run = entry.compiled = Checked(run) if self._checks and has_checks(graph) else run
        entry.checks, entry.left = checks_of(graph), left_in(graph)
        self._entries.append(entry)
        known, trace = ref(entry), ref(self)  # Dynamo keeps what follows for good

        def recorded(*args: Any) -> Any:
            entry, self = known(), trace()
            assert entry is not None
            assert self is not None
            versions = versions_of(args) if entry.written is None else ()
            begun = time.perf_counter()
            outs = entry.call(*args)
            self._ran_s = time.perf_counter() - begun
            if entry.written is None:
                entry.written = {i for i, (v, w) in enumerate(zip(versions, versions_of(args), strict=True)) if v != w}
            entry.args, entry.outs, self.entry = args, outs, entry
            return outs

        return recorded


def _fewer_and_fewer(kept: Kept, *, metrics: bool = True) -> list[Kept]:
    """What is left to the host, in the order to be tried: a counter that is asked for keeps no list in the trace."""
    containers = Kept(containers=kept.containers)
    both = (replace(kept, metrics=True), replace(containers, metrics=True), Kept(metrics=True), containers)
    return list(dict.fromkeys(both if metrics else (kept, containers)))


@contextmanager
def stood_in() -> Iterator[None]:
    """Within: what stands in for functions of torch's is there, for a trace or for the guards it left."""
    with whole_layers(), whole_packing(), transformers():
        yield


class Entry:
    """One compiled graph: its callable, whether calling it alone is the whole step, and its last call."""

    def __init__(self, lifted: Lifted) -> None:
        self.lifted = lifted
        self.kept = Kept()  # what of all that it changes may be left to the host
        self.marks: dict[int, int] = {}  # which of the values it logs are a result of host work, and of which piece
        self.work: Sequence[Sequence[Any]] = ()  # what its last call left to the host
        self.compiled: Callable[..., Any] = _never
        self.run: Callable[..., Any] = _never  # ``compiled``, or what stands in for it
        self.args: Sequence[Any] = ()
        self.outs: Sequence[Any] = ()
        self.pure = False
        self.written: set[int] | None = None  # which arguments it writes into; None before its first call
        self.why_not = ""
        self.unvalidated = False  # checks of arguments' values were left out of it
        self.checks: Sequence[Obstacle] = ()  # that are assertions in it
        self.stood_in = False  # functions of torch's were replaced in it
        self.left: dict[int, str] = {}  # which of its results the step leaves on an object with their graph, and their names

    def call(self, *args: Any) -> Sequence[Any]:
        """Its results as the step leaves them."""
        outs: Sequence[Any] = self.run(*args)
        if not self.left:
            return outs
        return as_left(outs, self.left, next((a for a in args if isinstance(a, nn.Parameter) and a.requires_grad), None))

    def inspect(self, own: tuple[object, ...], updates: bool) -> None:
        """Called while Dynamo traces. Pure: no Python side effect but on ``own``, no guard on what changes every step."""
        from torch._dynamo.symbolic_convert import InstructionTranslator

        output = InstructionTranslator.current_tx().output
        effects = output.side_effects
        if getattr(effects, "tensor_hooks", None):
            raise CaptureError("Tensor.register_hook inside training_step: the tracer would drop it in silence.")
        changed = [v for v in effects.id_to_variable.values() if effects.is_modified(v)]
        foreign = [v for v in changed if not _is_new(v) and not any(held(v) is o for o in own)]
        foreign = [v for v in foreign if not _as_it_was(effects, v)]
        if any(type(v).__name__ == "RandomVariable" for v in foreign):
            raise CaptureError("a random.Random of the module's own draws inside the step: the tracer would freeze its numbers.")
        guards = {name_of(g) for g in output.guards}
        self.kept = kept_by(foreign, guards, effects, name_of, self.lifted.attributes)
        if any(n.endswith(".grad") and not n.endswith("autograd.grad") for n in guards):
            raise CaptureError("the step looks at the .grad of a parameter, which a captured step does not fill")
        if updates and any("param_groups" in _place(v) for v in foreign):
            raise CaptureError("the step writes param_groups and moves the optimizer: the graph would do it the other way round")
        self.unvalidated = any("distributions" in g or VALIDATION in g for g in guards)
        self.stood_in = any(name in g for name in STOOD_IN for g in guards)
        varying = [n for n in guards if n.rstrip("']").endswith(VARYING) or ".progress." in n]
        if foreign:
            self.why_not = f"the step changes Python state ({type(held(foreign[0]) or foreign[0]).__name__})"
        elif varying:
            self.why_not = f"the step reads {varying[0]}, which changes every step"
        self.pure = not (foreign or varying)

    def forget(self) -> None:
        """No tensor of its last call is kept."""
        self.args = self.outs = self.work = ()


def _refuse_elsewhere(graph: torch.fx.GraphModule, device: torch.device) -> None:
    """A replay would go on with what the host computed, drew or held when the graph was recorded."""
    for node in graph.graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, Tensor) and value.device.type not in (device.type, "meta"):
            raise CaptureError(f"the step computes on the {value.device.type}, which no graph of the {device.type} holds ({node.name})")


def _as_it_was(effects: Any, variable: Any) -> bool:
    """Were all that the step wrote on this object constants that stood there before (a flag set and put back)?"""
    written = getattr(effects, "store_attr_mutations", {}).get(variable)
    holder = held(variable)
    if not written or holder is None:
        return False
    try:
        return all(
            v.is_python_constant() and hasattr(holder, n) and v.as_python_constant() is getattr(holder, n) for n, v in written.items()
        )
    except Exception:  # a variable that will not say what it is
        return False


def _place(variable: Any) -> str:
    """Where Dynamo found an object, as it would write it."""
    return name_of(getattr(variable, "source", None))


def _is_new(variable: Any) -> bool:
    return "New" in type(variable.mutation_type).__name__


def _by_the_compiler(error: Exception) -> bool:
    """Did what was traced fail to compile? It would fail again, after as long a time."""
    from torch._inductor.exc import InductorError

    return isinstance(error, InductorError)


def _never(*args: Any) -> Any:
    raise AssertionError("a graph that was never compiled")
