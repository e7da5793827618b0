"""The forms a training_step comes in: one loss, one loss an optimizer (asked for or yielded), or a step that does it all itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from fasttrain.errors import ModuleError, reject

Form = Literal["single", "indexed", "generator", "manual"]
OPTIMIZER_IDX = ("optimizer_idx", "opt_idx", "optimizer_i")
HIDDENS = ("hiddens", "hidden")
BATCH_IDX = ("batch_idx", "batch_nb", "batch_id")
DATALOADER_IDX = ("dataloader_idx", "dataloader_i")


class Carried(NamedTuple):
    """One split of a batch and the hidden state that the split before it left."""

    batch: Any
    hiddens: Any


def form_of(module: Any, turns: Callable[..., Any] | None) -> Form:
    """How this module's training step says what to minimize. ``turns``: the user's own order of turns, a generator."""
    if turns is not None:
        return "generator"
    if not getattr(module, "automatic_optimization", True):
        return "manual"
    step = getattr(module, "training_step", None)
    if inspect.isgeneratorfunction(inspect.unwrap(getattr(step, "__func__", step)) if step is not None else None):
        return "generator"
    return "indexed" if step is not None and takes(step, OPTIMIZER_IDX) else "single"


def takes(method: Callable[..., Any], names: tuple[str, ...]) -> bool:
    """Does it have a parameter of one of these names?"""
    return any(n in names for n in (*_parameters(method), *_by_name_only(method)))


def split_length(module: Any) -> int:
    """``truncated_bptt_steps`` of a module: time steps in one split of a batch; 0 when batches stay whole.

    Raises ModuleError when it is not a number of steps, or ``training_step`` has no ``hiddens`` to hand on.
    """
    steps = getattr(module, "truncated_bptt_steps", 0) or 0
    if not steps:
        return 0
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ModuleError(reject("truncated_bptt_steps", repr(steps), "an integer >= 1", "It counts time steps in one split."))
    step = getattr(module, "training_step", None)
    if step is not None and not takes(step, HIDDENS):
        name = type(module).__name__
        raise ModuleError(
            f"{name}.truncated_bptt_steps is {steps}, but training_step takes no 'hiddens': "
            "define training_step(self, batch, batch_idx, hiddens) and return {'loss': loss, 'hiddens': state}."
        )
    return steps


def train_adapter(method: Callable[..., Any], *, carries: bool) -> Callable[[Any, int, int], Any]:
    """``f(batch, batch_idx, optimizer_idx)`` for a training_step that takes any of them, by name where it says so.

    ``carries``: the batch comes as :class:`Carried`. Raises ModuleError for what nobody hands over.
    """
    names = _parameters(method)
    if "dataloader_iter" in names:
        raise ModuleError("training_step takes 'dataloader_iter', which is not handed over. Wanted training_step(self, batch, batch_idx).")
    if takes(method, HIDDENS) and not carries:
        raise ModuleError(
            "training_step takes 'hiddens', but truncated_bptt_steps is not set: set self.truncated_bptt_steps = n in the module's "
            "__init__ (time steps in a split), or leave hiddens out."
        )
    by_name = {n: _kind(n) for n in _by_name_only(method) if _kind(n) or n in BATCH_IDX}
    kinds = [0] if names[1:] == ["*"] else [_kind(n) for i, n in enumerate(names[1:]) if i == 0 or _kind(n) or n in BATCH_IDX]
    if not carries and not by_name and kinds in ([], [0], [1], [0, 1]):  # the plain forms, without a detour: these are traced as they are
        if not kinds:
            return lambda batch, batch_idx, optimizer_idx: method(batch)
        if kinds == [0]:
            return lambda batch, batch_idx, optimizer_idx: method(batch, batch_idx)
        if kinds == [1]:
            return lambda batch, batch_idx, optimizer_idx: method(batch, optimizer_idx)
        return lambda batch, batch_idx, optimizer_idx: method(batch, batch_idx, optimizer_idx)

    if carries and not by_name and kinds == [0, 2]:
        return lambda batch, batch_idx, optimizer_idx: method(batch[0], batch_idx, batch[1])
    if carries and not by_name and kinds == [0, 1, 2]:
        return lambda batch, batch_idx, optimizer_idx: method(batch[0], batch_idx, optimizer_idx, batch[1])

    def step(batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
        hiddens = None
        if carries:
            batch, hiddens = batch
        given = (batch_idx, optimizer_idx, hiddens, 0)
        return method(batch, *[given[k] for k in kinds], **{n: given[k] for n, k in by_name.items()})

    return step


def eval_adapter(method: Callable[..., Any], *, alone: bool) -> Callable[[Any, int, int], Any]:
    """``f(batch, batch_idx, dataloader_idx)`` for a step that takes any of them; defaults of the user's own stay.

    ``alone``: there is one loader, so a ``dataloader_idx`` with a default keeps it too, and ``*rest`` has none.
    """
    parameters = list(inspect.signature(method).parameters.values())
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        if alone:
            return lambda batch, batch_idx, dataloader_idx: method(batch, batch_idx)
        return lambda batch, batch_idx, dataloader_idx: method(batch, batch_idx, dataloader_idx)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [p for p in parameters if p.kind in kinds][:3]
    third = parameters[2] if len(parameters) == 3 else None
    if third is not None and third.default is not inspect.Parameter.empty and (alone or third.name not in DATALOADER_IDX):
        parameters.pop()
    if len(parameters) == 3:
        return lambda batch, batch_idx, dataloader_idx: method(batch, batch_idx, dataloader_idx)
    if len(parameters) == 2 and parameters[1].name in DATALOADER_IDX:
        return lambda batch, batch_idx, dataloader_idx: method(batch, dataloader_idx)
    if len(parameters) == 2:
        return lambda batch, batch_idx, dataloader_idx: method(batch, batch_idx)
    return lambda batch, batch_idx, dataloader_idx: method(batch)


def ended_by(end: Callable[[Any], Any], step: Callable[[Any, int, int], Any], form: Form) -> Callable[[Any, int, int], Any]:
    """The step with ``training_step_end`` behind everything it returns or yields."""
    if form != "generator":
        return lambda batch, batch_idx, optimizer_idx: end(step(batch, batch_idx, optimizer_idx))

    def each(batch: Any, batch_idx: int, optimizer_idx: int) -> Iterator[Any]:
        for output in step(batch, batch_idx, optimizer_idx):
            yield end(output)

    return each


def named(method: Callable[..., Any], **known: Any) -> Any:
    """Call a hook with those of ``known`` that it names; positions it names otherwise get the ``known`` in order."""
    parameters = inspect.signature(method).parameters.values()
    older = {*OPTIMIZER_IDX, *(["optimizer"] if "loss" in known else [])}  # arguments of former years: only by name
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        return method(*(v for k, v in known.items() if k not in older))
    aliases = {"closure": "optimizer_closure", "opt_idx": "optimizer_idx", "optimizer_i": "optimizer_idx", "current_epoch": "epoch"}
    aliases |= {"batch_nb": "batch_idx", "opt": "optimizer", "second_order_closure": "optimizer_closure", "epoch_idx": "epoch"}
    left = [k for k in known if k not in older]
    values: list[Any] = []
    for p in parameters:
        if p.kind not in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD):
            continue
        name = aliases.get(p.name, p.name)
        if name in known:
            values.append(known[name])
            left = [k for k in left if k != name]
        elif left and p.default is inspect.Parameter.empty:
            values.append(known[left.pop(0)])
        else:
            break  # the rest has defaults
    return method(*values)


def _kind(name: str) -> int:
    if name in OPTIMIZER_IDX:
        return 1
    return 2 if name in HIDDENS else 3 if name in DATALOADER_IDX else 0


def _by_name_only(method: Callable[..., Any]) -> list[str]:
    try:
        return [p.name for p in inspect.signature(method).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    except (TypeError, ValueError):
        return []


def _parameters(method: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):
        return []
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters) and len(parameters) <= 2:
        return ["batch", "*"]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in positional]
