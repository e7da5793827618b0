"""What changes in a run and is saved: progress counters, random streams, and a snapshot to put everything back."""

from __future__ import annotations

import collections
import copy
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType, GeneratorType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler


@dataclass
class Progress:
    """Where a fit stands. Plain integers, readable by callbacks, saved as they are."""

    epoch: int = 0
    global_step: int = 0  # completed optimizer steps
    batch_idx: int = -1  # of the batch that is being trained
    batches_done: int = 0  # in this epoch
    batches_seen: int = 0  # over all epochs
    stepping_batches: int = 0  # batches that ended a window before the current one; the loggers' x axis
    validated_step: int = 0  # global_step at the newest validation
    window_open: int = 0  # batches in the window since the last step
    optimizer_steps: list[int] = field(default_factory=list)  # of each optimizer, where there are several
    divisor: int = 1  # what the open window's losses are divided by
    epoch_open: bool = False
    phase: str = ""  # hooks that may save are running: "batch_end" | "validation" | "epoch_end"; says what a resume still owes
    eval_dataloader_idx: int = 0  # of the loader that is (or was last) validated, tested or predicted
    eval_batch_idx: int = -1
    restarting: bool = False  # until the first batch after a resume

    def state_dict(self) -> dict[str, Any]:
        return {k: v for k, v in copy.deepcopy(vars(self)).items() if k != "restarting"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in vars(self):
            if name in state:
                setattr(self, name, copy.deepcopy(state[name]))
        self.restarting = True


def rng_state() -> dict[str, Any]:
    """Every random stream of this process: python, numpy if it was imported, torch, and CUDA if it was started."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if "numpy" in sys.modules:
        kind, keys, pos, has_gauss, cached = sys.modules["numpy"].random.get_state()
        state["numpy"] = [kind, torch.from_numpy(keys.astype("int64")), int(pos), int(has_gauss), float(cached)]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put every stream back to where ``rng_state`` found it."""
    torch.set_rng_state(state["torch"].to(torch.uint8))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "numpy" in state:
        import numpy as np

        kind, keys, pos, has_gauss, cached = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype("uint32"), pos, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(list(state["cuda"]))


class Snapshot:
    """Weights, buffers, slots, gradients, random streams and plain attributes of a module, to be put back bit for bit.

    ``others``: further objects (schedulers) whose plain attributes are kept too. Optimizers and schedulers that the module
    itself holds are kept as those that were given. ``beside``: keeps what is on no object, and gives back what puts it back.
    """

    def __init__(
        self, module: nn.Module, optimizers: list[torch.optim.Optimizer] | None = None, others: Sequence[Any] = (),
        beside: Callable[[], Callable[[], None]] | None = None,
    ) -> None:  # fmt: skip
        self._module = module
        self._put_beside = None if beside is None else beside()
        self._tensors = [(t, t.detach().clone()) for t in _tensors(module)]
        self._trains = [(p, p.requires_grad) for p in module.parameters()]
        self._grads = [(p, None if p.grad is None else p.grad.clone()) for p in module.parameters()]
        own = [o for o in _held(module) if all(o is not known for known in (*(optimizers or ()), *others))]
        optimizers = [*(optimizers or []), *(o for o in own if isinstance(o, torch.optim.Optimizer))]
        holders: list[Any] = [*module.modules(), *helpers_of(module), *optimizers, *others, *(o for o in own if o not in optimizers)]
        self._attributes = [(m, _plain_attributes(m), set(m.__dict__)) for m in holders]
        self._modes = [(m, m.training) for m in module.modules()]
        self._slots = [(o, {p: _copy_slots(s) for p, s in o.state.items()}) for o in optimizers]
        self._groups = [(g, {k: (v, kept_of(v)) for k, v in g.items() if k != "params"}) for o in optimizers for g in o.param_groups]
        self._lists = [(o, o.param_groups, [(g, g["params"], list(g["params"])) for g in o.param_groups]) for o in optimizers]
        registered = [d for m in module.modules() for d in (m._parameters, m._buffers, m._modules)]
        self._registered: list[tuple[Any, dict[str, Any]]] = [(d, dict(d)) for d in registered]
        owners = (*module.modules(), *helpers_of(module))
        self._streams = [(s, stream_state(s)) for o in owners for s in o.__dict__.values() if is_stream(s)]
        self._rng = rng_state()

    @torch.no_grad()
    def restore(self) -> None:
        """In place where the tensors live on, so that every reference to them stays valid."""
        for live, registered in self._registered:  # a buffer that was replaced by another tensor, a layer by another
            if live.keys() != registered.keys() or any(live[k] is not v for k, v in registered.items()):
                live.clear()
                live.update(registered)
        for stream, state in self._streams:
            set_stream_state(stream, state)
        for tensor, value in self._tensors:
            tensor.copy_(value)
        for parameter, trains in self._trains:
            if parameter.requires_grad != trains:
                parameter.requires_grad_(trains)
        for parameter, grad in self._grads:
            parameter.grad = grad
        for m, attributes, names in self._attributes:
            for name in [n for n, v in m.__dict__.items() if n not in names and not isinstance(v, type)]:
                del m.__dict__[name]  # a class made on the way (a namedtuple for outputs) stays: made anew it would be another one
            _restore_attributes(m, attributes)
        for m, training in self._modes:
            m.training = training
        for optimizer, slots in self._slots:
            for p in [p for p in optimizer.state if p not in slots]:
                del optimizer.state[p]
            for p, saved in slots.items():
                _restore_slots(optimizer.state[p], saved)
        for optimizer, groups, held in self._lists:  # a group that was added, a parameter put into one
            for group, params, members in held:
                params[:], group["params"] = members, params
            groups[:], optimizer.param_groups = [group for group, _, _ in held], groups
        for group, values in self._groups:
            group.update({k: put_back(v, kept) for k, (v, kept) in values.items()})
        if self._put_beside is not None:
            self._put_beside()
        set_rng_state(self._rng)

    def buffers(self) -> dict[str, Tensor]:
        """The buffers as they were, by name."""
        values = {id(t): v for t, v in self._tensors}
        return {n: values[id(b)] for n, b in self._module.named_buffers() if id(b) in values}

    def values(self) -> dict[str, Tensor]:
        """Weights and optimizer slots as they were, by name."""
        kept = {id(t): v for t, v in self._tensors}
        names: dict[Tensor, str] = {p: n for n, p in self._module.named_parameters()}
        out = {n: kept[id(p)] for p, n in names.items()}
        for _, slots in self._slots:
            out |= {f"{names.get(p, '?')}.{k}": v for p, s in slots.items() for k, (_, v) in s.items() if isinstance(v, Tensor)}
        return out


def helpers_of(module: nn.Module) -> list[Any]:
    """Plain objects that hang on the module's attributes and may count or keep something; not torch's, not ours."""
    found = {id(v): v for m in module.modules() for n, v in m.__dict__.items() if n not in _SKIPPED and hasattr(v, "__dict__")}
    theirs = ("torch", "fasttrain", "pytorch_lightning", "lightning", "builtins")
    return [
        v for v in found.values()
        if not isinstance(v, (nn.Module, type, FunctionType, ModuleType)) and type(v).__module__.split(".")[0] not in theirs
    ]  # fmt: skip


def _held(module: nn.Module) -> list[Any]:
    """Optimizers and schedulers on the module's own attributes and those of its helpers, in containers too, each once."""
    found: dict[int, Any] = {}
    owners = (*module.modules(), *helpers_of(module))
    stack: list[tuple[Any, int]] = [(v, 0) for o in owners for n, v in o.__dict__.items() if n not in _SKIPPED]
    while stack:
        value, depth = stack.pop()
        if isinstance(value, (torch.optim.Optimizer, LRScheduler)):
            found[id(value)] = value
        elif type(value) in (*COPIED, tuple) and depth < 3 and len(value) <= MOST_HELD:
            stack += [(v, depth + 1) for v in (value.values() if isinstance(value, dict) else value)]
    return list(found.values())


def is_stream(value: Any) -> bool:
    """A random generator of the module's own: torch's, Python's or numpy's."""
    return isinstance(value, (torch.Generator, random.Random)) or hasattr(value, "bit_generator") or _is_older(value)


def _is_older(value: Any) -> bool:
    """numpy's ``RandomState``; numpy is not imported to find out."""
    return type(value).__name__ == "RandomState" and hasattr(value, "get_state")


def stream_state(stream: Any) -> Any:
    if isinstance(stream, torch.Generator):
        return stream.get_state()
    if _is_older(stream):
        return stream.get_state(legacy=False)
    return stream.getstate() if isinstance(stream, random.Random) else stream.bit_generator.state


def set_stream_state(stream: Any, state: Any) -> None:
    if isinstance(stream, torch.Generator):
        stream.set_state(state)
    elif isinstance(stream, random.Random):
        stream.setstate(state)
    elif _is_older(stream):
        stream.set_state(state)
    else:
        stream.bit_generator.state = state


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _copy_slots(slots: Any) -> dict[str, Any]:
    return {k: (v, kept_of(v)) for k, v in slots.items()} if isinstance(slots, dict) else {}


def _restore_slots(live: dict[str, Any], saved: Mapping[str, Any]) -> None:
    for k in [k for k in live if k not in saved]:
        del live[k]
    for k, (value, kept) in saved.items():
        if isinstance(value, Tensor) and isinstance(live.get(k), Tensor):
            live[k].copy_(kept)
        else:
            live[k] = put_back(value, kept)


COPIED = (list, dict, set, collections.deque)
MOST_NESTED = 4096  # a longer container is data: its elements are kept, not what they hold
MOST_HELD = 256  # no list of optimizers is longer
_SKIPPED = ("_parameters", "_buffers", "_modules", "_trainer", "trainer", "training", "param_groups", "state")


def _plain_attributes(module: Any) -> dict[str, Any]:
    """Counters, flags, containers, arrays and loose tensors a step may change, whatever they are nested in."""
    out: dict[str, Any] = {}
    for name, value in module.__dict__.items():
        if name in _SKIPPED or "hooks" in name:
            continue
        if is_plain(value):
            out[name] = (value, kept_of(value))
        elif _is_iterator(value):
            out[name] = (_Iterator(copy.copy(value)), None)
    return out


class _Iterator(NamedTuple):
    """An iterator as it stood: stepping it cannot be undone, so a copy takes its place."""

    before: Any


def _is_iterator(value: Any) -> bool:
    """One of Python's own that can be copied where it stands (a generator cannot)."""
    return type(value).__module__ in ("builtins", "itertools") and hasattr(value, "__next__") and not isinstance(value, GeneratorType)


def is_plain(value: Any) -> bool:
    """Is it of a kind that ``kept_of`` and ``put_back`` know: a number, a container, an array or a loose tensor?"""
    return isinstance(value, (*COPIED, Tensor, int, float, str, bool, tuple, type(None))) or is_array(value)


def is_array(value: Any) -> bool:
    return type(value).__module__ == "numpy" and type(value).__name__ == "ndarray"


def kept_of(value: Any, depth: int = 0) -> Any:
    """What ``put_back`` needs to make ``value`` again what it is now: its elements, each with what it holds."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    within = depth < 6 and not (isinstance(value, COPIED) and len(value) > MOST_NESTED)
    if isinstance(value, dict):
        return [(k, v, kept_of(v, depth + 1) if within else None) for k, v in value.items()]
    if isinstance(value, (list, tuple, collections.deque)):
        return [(None, v, kept_of(v, depth + 1) if within else None) for v in value]
    return value.copy() if isinstance(value, set) or is_array(value) else None


def put_back(value: Any, kept: Any) -> Any:
    if isinstance(value, _Iterator):
        return copy.copy(value.before)
    if kept is None:
        return value
    if isinstance(value, Tensor):
        value.copy_(kept)
    elif isinstance(value, dict):
        value.clear()  # not update(): a Counter's adds
        for k, v, inner in kept:
            value[k] = put_back(v, inner)
    elif isinstance(value, (list, tuple, collections.deque)):
        elements = [put_back(v, inner) for _, v, inner in kept]
        if not isinstance(value, tuple):
            value.clear()
            value.extend(elements)
    elif isinstance(value, set):
        value.clear()
        value.update(kept)
    elif is_array(value):
        value[...] = kept
    return value


def _restore_attributes(module: Any, saved: Mapping[str, Any]) -> None:
    for name, (value, kept) in saved.items():
        module.__dict__[name] = put_back(value, kept)
