"""One function traced whole by torch.compile, and the way past its guards for the steps between which nobody's code ran."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from operator import is_, itemgetter
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fasttrain.errors import CaptureError
from fasttrain.graphs.checks import CheckFailed, checked, checking
from fasttrain.graphs.contract import batch_size_of, reader_for, structure, tensors_of
from fasttrain.graphs.lifted import HostWorkError, Lifted, name_of
from fasttrain.graphs.products import small_products
from fasttrain.graphs.program import Raw, StepOutput, StepSpec, gradients_of, keys_and_values
from fasttrain.graphs.recurrent import whole_layers
from fasttrain.graphs.tracer import DYNAMO, VALIDATION, compiled, left_detached, passing, transformers, unvalidated
from fasttrain.results import Build

VARYING = ("batch_idx", "global_step", "batches_seen")  # a guard on one of these fails at the next step
STOOD_IN = ("._VF.", "._detect_is_causal_mask")


class Trace:
    """One ``torch.compile`` of a step, and what its last guarded call really ran."""

    def __init__(
        self, function: Callable[..., Raw], own: tuple[Any, ...], spec: StepSpec, *, dynamic: bool, build: Build,
        updates: bool = False, recorded: bool = False,
    ) -> None:  # fmt: skip
        self._recorded = recorded  # in a CUDA graph, which holds nothing but the device's own work
        self._updates = updates  # are optimizers moved inside the function?
        self._checks = not updates and spec.device.type == "cpu"  # may it fail in its middle? A device that does is lost
        self._own, self._spec = own, spec  # ``own``: objects of ours that a step may change, the sink first
        # Sizes are checked against the contract before a direct call, and by the guards before any other.
        self._patches: dict[str, Any] = {"fallback_random": True, "size_asserts": False, "triton.cudagraphs": False}
        self._patches |= {"cpp_wrapper": build.cpp_wrapper, "cpp.threads": build.kernel_threads}
        if build.loops and torch._inductor.config.post_grad_custom_pre_pass is None:
            self._patches["post_grad_custom_pre_pass"] = small_products()
        self.count = 0
        self.entry: _Entry | None = None
        self._entries: list[_Entry] = []
        self._unvalidated = self._stood_in = False  # do guards look at what is otherwise within a trace?
        self._function, self._dynamic = function, True if dynamic else None
        self._lifted = Lifted(own[0])
        self._growing: frozenset[str] | None = None  # lists that a step appends to, to be lifted; None: nobody has looked yet
        self._call = self._compiled()

    def __call__(self, *args: Any) -> Raw:
        """The guarded call: traces when it must. Raises whatever the tracer raises."""
        try:
            unchecked = unvalidated() if self._unvalidated else nullcontext()
            with self._spec.default_dtype(), unchecked, stood_in() if self._stood_in else nullcontext():
                raw: Raw = self._call(*args)
        except CheckFailed:
            raise
        except Exception:
            if not self._otherwise():
                raise
            return self(*args)
        work = [i for i in raw.items if type(i[0]) is int]
        if self.entry is not None:
            self.entry.work = work
        for number, *values in work:
            try:
                self._lifted.do(number, values)
            except Exception as error:
                raise HostWorkError(error) from error
        return raw._replace(items=[i for i in raw.items if type(i[0]) is not int]) if work else raw

    def _compiled(self) -> Callable[..., Any]:
        return compiled(self._function, self._backend, DYNAMO, whole=True, dynamic=self._dynamic, around=self._around)

    @contextmanager
    def _around(self) -> Iterator[None]:
        checks = checking() if self._checks else nullcontext()
        with self._lifted.lifting(), passing(), left_detached(gradients_of.__code__), stood_in(), checks:
            yield

    def _otherwise(self) -> bool:
        """After a failure: once with the growing lists lifted, and where that fails with them in the trace."""
        if not self._growing and not self._lifted.lists:
            return False
        self._lifted.lists, self._growing = self._growing or frozenset(), frozenset()
        self._call = self._compiled()
        return True

    def _backend(self, graph: torch.fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        entry = _Entry(self._lifted)
        entry.inspect(self._own, self._updates)
        if entry.growing and self._growing is None:
            self._growing = entry.growing
            raise CaptureError("lists grow, and are lifted now")
        _refuse_frozen_floats(graph)
        if self._recorded:
            _refuse_elsewhere(graph, self._spec.device)
        self.count += 1
        self._unvalidated |= entry.unvalidated
        self._stood_in |= entry.stood_in
        run = cast(Callable[..., Any], compile_fx(graph, examples, config_patches=self._patches))
        entry.run = entry.compiled = checked(graph, run) if self._checks else run

        self._entries.append(entry)
        known, trace = ref(entry), ref(self)  # Dynamo keeps what follows for good

        def recorded(*args: Any) -> Any:
            entry, self = known(), trace()
            assert entry is not None
            assert self is not None
            versions = _versions(args) if entry.written is None else ()
            outs = entry.run(*args)
            if entry.written is None:
                entry.written = {i for i, (v, w) in enumerate(zip(versions, _versions(args), strict=True)) if v != w}
            entry.args, entry.outs, self.entry = args, outs, entry
            return outs

        return recorded


@contextmanager
def stood_in() -> Iterator[None]:
    """Within: what stands in for functions of torch's is there, for a trace or for the guards it left."""
    with whole_layers(), transformers():
        yield


def _versions(args: Sequence[Any]) -> list[int]:
    return [a._version if isinstance(a, Tensor) and not a.is_inference() else 0 for a in args]


class _Entry:
    """One compiled graph: its callable, whether calling it alone is the whole step, and its last call."""

    def __init__(self, lifted: Lifted) -> None:
        self.lifted = lifted
        self.growing: frozenset[str] = frozenset()  # lists that were there before and are longer now
        self.work: Sequence[Sequence[Any]] = ()  # what its last call left to the host
        self.compiled: Callable[..., Any] = _never
        self.run: Callable[..., Any] = _never  # ``compiled``, or what stands in for it
        self.args: Sequence[Any] = ()
        self.outs: Sequence[Any] = ()
        self.pure = False
        self.written: set[int] | None = None  # which arguments it writes into; None before its first call
        self.why_not = ""
        self.unvalidated = False  # checks of arguments' values were left out of it
        self.stood_in = False  # functions of torch's were replaced in it

    def inspect(self, own: tuple[object, ...], updates: bool) -> None:
        """Called while Dynamo traces. Pure: no Python side effect but on ``own``, no guard on what changes every step."""
        from torch._dynamo.symbolic_convert import InstructionTranslator

        output = InstructionTranslator.current_tx().output
        effects = output.side_effects
        if getattr(effects, "tensor_hooks", None):
            raise CaptureError("Tensor.register_hook inside training_step: the tracer would drop it in silence.")
        changed = [v for v in effects.id_to_variable.values() if effects.is_modified(v)]
        foreign = [v for v in changed if not _is_new(v) and not any(_held(v) is o for o in own)]
        foreign = [v for v in foreign if not _as_it_was(effects, v)]
        self.growing = frozenset(name_of(v.source) for v in foreign if type(v).__name__ == "ListVariable" and v.source)
        if any(type(v).__name__ == "RandomVariable" for v in foreign):
            raise CaptureError("a random.Random of the module's own draws inside the step: the tracer would freeze its numbers.")
        guards = {name_of(g) for g in output.guards}
        if any(n.endswith(".grad") and not n.endswith("autograd.grad") for n in guards):
            raise CaptureError("the step looks at the .grad of a parameter, which a captured step does not fill")
        if updates and any("param_groups" in _place(v) for v in foreign):
            raise CaptureError("the step writes param_groups and moves the optimizer: the graph would do it the other way round")
        self.unvalidated = any("distributions" in g or VALIDATION in g for g in guards)
        self.stood_in = any(name in g for name in STOOD_IN for g in guards)
        varying = [n for n in guards if n.rstrip("']").endswith(VARYING) or ".progress." in n]
        if foreign:
            self.why_not = f"the step changes Python state ({type(_held(foreign[0]) or foreign[0]).__name__})"
        elif varying:
            self.why_not = f"the step reads {varying[0]}, which changes every step"
        self.pure = not (foreign or varying)

    def forget(self) -> None:
        """No tensor of its last call is kept."""
        self.args = self.outs = self.work = ()


def _refuse_frozen_floats(graph: torch.fx.GraphModule) -> None:
    """Inductor (2.13) gives back the traced value of a number computed from a Python float that changes, for ever."""
    returned = next(n for n in reversed(graph.graph.nodes) if n.op == "output").args[0]
    for node in returned if isinstance(returned, (list, tuple)) else ():
        source = node.args[0] if isinstance(node, torch.fx.Node) and node.target is torch.scalar_tensor else None
        if isinstance(source, torch.fx.Node) and isinstance(source.meta.get("example_value"), torch.SymFloat) and _from_outside(source):
            raise CaptureError(
                "a number computed from a Python float that changes is logged or kept by the step: the compiler would freeze it. "
                "Log a tensor, or keep it in a buffer."
            )


def _refuse_elsewhere(graph: torch.fx.GraphModule, device: torch.device) -> None:
    """A replay would go on with what the host computed, drew or held when the graph was recorded."""
    for node in graph.graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, Tensor) and value.device.type not in (device.type, "meta"):
            raise CaptureError(f"the step computes on the {value.device.type}, which no graph of the {device.type} holds ({node.name})")


def _as_it_was(effects: Any, variable: Any) -> bool:
    """Were all that the step wrote on this object constants that stood there before (a flag set and put back)?"""
    written = getattr(effects, "store_attr_mutations", {}).get(variable)
    holder = _held(variable)
    if not written or holder is None:
        return False
    try:
        return all(
            v.is_python_constant() and hasattr(holder, n) and v.as_python_constant() is getattr(holder, n) for n, v in written.items()
        )
    except Exception:  # a variable that will not say what it is
        return False


def _held(variable: Any) -> Any:
    """The object that Dynamo stands a variable for; None where it is no constant."""
    try:
        return getattr(variable, "value", None)
    except Exception:  # a list of tensors
        return None


def _place(variable: Any) -> str:
    """Where Dynamo found an object, as it would write it."""
    return name_of(getattr(variable, "source", None))


def _from_outside(number: torch.fx.Node) -> bool:
    """Is it computed from a Python float that came in (and not only from tensors' values)? Some come in wrapped in a tensor."""
    stack, seen = [number], set[torch.fx.Node]()
    while stack:
        node = stack.pop()
        wrapped = getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False)
        is_tensor = isinstance(node.meta.get("example_value"), Tensor)
        if node.op == "placeholder" and (wrapped or not is_tensor):
            return True
        if node not in seen and not is_tensor:
            stack += node.all_input_nodes
        seen.add(node)
    return False


def _is_new(variable: Any) -> bool:
    return "New" in type(variable.mutation_type).__name__


def _never(*args: Any) -> Any:
    raise AssertionError("a graph that was never compiled")


class Plan:
    """A pure compiled graph called directly: batch leaves in, loss, gradients and logged values out."""

    def __init__(self, entry: _Entry, raw: Raw, batch: Any) -> None:
        leaves = tensors_of(batch)
        if leaves is None or len({id(t) for t in leaves}) != len(leaves):
            raise LookupError("the batch is not made of distinct tensors alone")
        if any(t.__dict__ for t in leaves) or (isinstance(batch, (list, tuple, dict)) and getattr(batch, "__dict__", None)):
            raise LookupError("the batch carries attributes of its own")
        if {id(entry.args[i]) for i in entry.written or ()} & {id(t) for t in leaves}:
            raise LookupError("the step writes into its batch: only the guards see which of its tensors share memory")
        if not entry.pure:
            raise LookupError(entry.why_not)
        if not all(isinstance(a, Tensor) for a in entry.args):
            raise LookupError("the graph takes numbers that change")
        place = {id(o): i for i, o in enumerate(entry.outs)}
        where = {id(t): i for i, t in enumerate(leaves)}
        self.entry, self.run, self.read, self.kind = entry, entry.run, reader_for(batch), type(batch)
        self.args: list[Any] = [None if id(a) in where else a for a in entry.args]
        self.slots = [(i, where[id(a)]) for i, a in enumerate(entry.args) if id(a) in where]
        self.contract = [(t.shape, t.stride(), t.dtype) for t in leaves]
        self.batch_size = batch_size_of(batch)
        self.names = list(batch) if isinstance(batch, dict) else None
        self.structure = structure(batch) if self.read is tensors_of else None
        self.keys, values = keys_and_values(raw.items)
        results = [*([] if raw.loss is None else [raw.loss]), *values, *(g for g in raw.grads if g is not None)]
        if any(id(r) not in place for r in results):
            raise LookupError("the step gives back something that is no output of its graph")
        self.loss = None if raw.loss is None else place[id(raw.loss)]
        self.values = _picker([place[id(v)] for v in values])
        self.differentiated = next((place[id(g)] for g in raw.grads if g is not None), None)
        self.grads = _picker([None if g is None else place[id(g)] for g in raw.grads])
        self.returned, read = _builder(raw.returned, place)
        self.do = entry.lifted.do
        self.work = [(number, [_place_of(v, place) for v in values]) for number, *values in entry.work]
        read += [i for _, values in self.work for i in values if type(i) is int]
        self.read_by_user = sorted({*read, *(place[id(r)] for r in results[: len(results) - sum(g is not None for g in raw.grads)])})
        self.left = math.inf  # calls until the arguments' values are looked at
        slots = {i for i, _ in self.slots}
        self._fixed = _picker([i for i in range(len(self.args)) if i not in slots])  # weights, buffers, scalars of ours
        self._addresses = list(map(Tensor.data_ptr, self._fixed(self.args)))

    def still_fits(self, entry: _Entry, batch: Any, raw: Raw) -> bool:
        """After a guarded call: is this the graph that ran, over the same tensors?"""
        if (raw.returned is None) != (self.returned is None) or keys_and_values(raw.items)[0] != self.keys:
            return False
        same = len(self.args) == len(entry.args) and all(map(is_, self._fixed(self.args), self._fixed(entry.args)))
        if self.work:
            known = [v for _, values in self.work for v in values if type(v) is list]
            lists = [v for _, *values in entry.work for v in values if type(v) is list]
            same = same and len(lists) == len(known) and all(map(is_, lists, known))
        return same and entry is self.entry and type(batch) is self.kind and not self.moved()

    def moved(self) -> bool:
        """Does a weight or buffer lie elsewhere than when this plan was made?"""
        return list(map(Tensor.data_ptr, self._fixed(self.args))) != self._addresses

    def __call__(self, batch: Any) -> StepOutput | None:
        """The step past its guards, or None: this batch is not what the graph was made for, fails a check, or is to be looked at."""
        self.left -= 1
        if self.left < 0:
            return None
        if type(batch) is not self.kind or (self.names is not None and list(batch) != self.names):
            return None
        if self.structure is not None and structure(batch) != self.structure:
            return None
        leaves = batch if self.read is None else tuple(self.read(batch) or ())
        if len(leaves) != len(self.contract):
            return None
        for t, (shape, stride, dtype) in zip(leaves, self.contract):  # noqa: B905 - lengths were just compared
            if not isinstance(t, Tensor) or t.dtype is not dtype or t.shape != shape or t.stride() != stride or t.requires_grad:
                return None
            if t.is_neg() or t.is_conj():  # bits that the code generated for this batch would not see
                return None
        args = self.args
        for i, j in self.slots:
            args[i] = leaves[j]
        try:
            outs = self.run(*args)
        except CheckFailed:
            return None
        for number, values in self.work:
            self.do(number, [outs[v] if type(v) is int else v for v in values])
        loss = None if self.loss is None else outs[self.loss]
        returned = None if self.returned is None else self.returned(outs)
        return StepOutput(loss, self.keys, self.values(outs), returned, self.grads(outs), self.batch_size)


def _place_of(value: Any, place: dict[int, int]) -> Any:
    """Where a graph gives back a value that host work takes; a list that grows is itself."""
    if type(value) is not list and id(value) not in place:
        raise LookupError("host work takes a value that is no output of the graph")
    return value if type(value) is list else place[id(value)]


def _builder(returned: Any, place: dict[int, int]) -> tuple[Callable[[Sequence[Any]], Any] | None, list[int]]:
    """What makes the step's own output anew out of a graph's outputs, and which of them it takes."""
    if returned is None:
        return None, []
    leaves, spec = tree_flatten(returned)
    if any(not isinstance(v, (Tensor, int, float, str, bool, type(None))) for v in leaves):
        raise LookupError("somebody reads what the step returns, and it is not made of tensors and constants alone")
    if any(isinstance(v, Tensor) and id(v) not in place for v in leaves):
        raise LookupError("the step returns something that is no output of its graph")
    where = [place[id(v)] if isinstance(v, Tensor) else None for v in leaves]

    def build(outs: Sequence[Any]) -> Any:
        return tree_unflatten([v if i is None else outs[i] for v, i in zip(leaves, where, strict=True)], spec)

    leaves = [None if isinstance(v, Tensor) else v for v in leaves]  # no tensor of this call is kept
    return build, [i for i in where if i is not None]


def _picker(indices: Sequence[int | None]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """A function that picks these places out of a graph's outputs, in C wherever it can be."""
    present = [i for i in indices if i is not None]
    if not present:
        return lambda outs: indices
    if len(present) == len(indices) and present == list(range(present[0], present[0] + len(present))):
        return itemgetter(slice(present[0], present[0] + len(present)))
    if len(present) == len(indices):
        return itemgetter(*present)
    return lambda outs: [None if i is None else outs[i] for i in indices]
