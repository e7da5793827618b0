"""Looks at the first batch: what is wrong with a module's losses before anything is compiled, with a captured step after."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fasttrain.errors import ModuleError, reject
from fasttrain.forms import Carried
from fasttrain.graphs.contract import copied
from fasttrain.graphs.cuda import GraphStep
from fasttrain.graphs.explain import gradient_hooks
from fasttrain.graphs.generator import GeneratorStep
from fasttrain.graphs.maker import StepMaker, tried
from fasttrain.graphs.manual import ManualStep
from fasttrain.graphs.packed import looking
from fasttrain.graphs.program import REFUSED, check_loss, forward, keys_and_values
from fasttrain.graphs.speculated import Watch
from fasttrain.graphs.splits import splitter
from fasttrain.graphs.step import Step
from fasttrain.graphs.tail import frozen, trainable_params
from fasttrain.graphs.turns import Turns
from fasttrain.module import Trainable, hiddens_of
from fasttrain.state import Snapshot

MIXED = ("bf16-mixed", "16-mixed", "bf16-true")


def look(maker: StepMaker, batch: Any) -> None:
    """Run the batch as the module's form has it. The caller puts everything back. Raises ModuleError."""
    if maker.trainable.form in ("generator", "manual"):
        _whole_step(maker, batch)
    elif maker.trainable.split_length:
        _splits(maker, batch)
    else:
        turns = maker.eager()
        for i in range(len(maker.optimizers)):
            with turns.toggled(i) if isinstance(turns, Turns) else nullcontext():
                _forward(maker, batch, i)


def _forward(maker: StepMaker, batch: Any, i: int) -> Any:
    with looking(), Watch(maker.outcomes.setdefault(i, {})):
        output, items = forward(maker.trainable, maker.spec, "train", batch, 0, i)
    keys_and_values(items)
    if output is not None:
        _check(maker, i, output)
    return output


def _check(maker: StepMaker, i: int, output: Any) -> Tensor:
    name, finite = type(maker.trainable.module).__name__, maker.options.nonfinite == "raise"
    if (len(maker.optimizers) > 1 or maker.trainable.form == "generator") and not trainable_params(maker.optimizers[i]):
        raise frozen(maker.optimizers[i], f"optimizer {i}")
    return check_loss(output, name, finite=finite, leaf=_leaf(maker, i))


def _leaf(maker: StepMaker, i: int) -> str:
    """What the loss of optimizer ``i`` must depend on."""
    alone = len(maker.optimizers) == 1
    return "a trainable parameter" if alone else f"a trainable parameter of optimizer {i}, {type(maker.optimizers[i]).__name__}"


def _splits(maker: StepMaker, batch: Any) -> None:
    parts = splitter(maker.trainable)(batch)
    for i in range(len(maker.optimizers)):
        output = _forward(maker, Carried(parts[0], None), i)
        if len(parts) > 1 and output is not None and hiddens_of(output) is None:
            came = f"{len(parts)} splits and no hiddens in what training_step returned"
            raise ModuleError(reject("hiddens", came, "{'loss': loss, 'hiddens': state} (or a TrainResult with hiddens)",
                                     "Return the state the next split starts from."))  # fmt: skip


def toggles_are_local(maker: StepMaker, batch: Any) -> bool:
    """Does toggle_optimizer only choose whose gradients are taken, on this batch? Then a capture, which does just that, is
    right; a module that uses under one toggle what it computed under another is not. The caller puts everything back."""
    if maker.trainable.form != "manual":
        return True
    weights: list[list[Tensor]] = []
    for gently in (False, True):
        before, step = maker.snapshot(), maker.eager()
        assert isinstance(step, ManualStep)
        step.gently = gently
        out = step.micro_step(copied(batch), 0, first=True, last=True, divisor=1, opened=1)
        told = [v.detach().clone() for v in (out.loss, *out.values) if isinstance(v, Tensor)]
        weights.append([*told, *(p.detach().clone() for p in maker.parameters())])
        before.restore()
        if not step.toggles:
            return True
    return len(weights[0]) == len(weights[1]) and all(
        torch.allclose(a, b, rtol=1e-5, atol=1e-7, equal_nan=True) for a, b in zip(*weights, strict=False)
    )


def first_part(trainable: Trainable, batch: Any) -> Any:
    """What ``training_step`` sees first: the batch, or its first split."""
    return Carried(splitter(trainable)(batch)[0], None) if trainable.split_length else batch


def _check_yield(maker: StepMaker, i: int, output: Any) -> None:
    """No other optimizer's parameters are switched off at a yield: only the gradient says what the loss depends on."""
    loss, own = _check(maker, i, output), trainable_params(maker.optimizers[i])
    if all(g is None for g in torch.autograd.grad(loss, own, retain_graph=True, allow_unused=True)):
        what = f"loss {i} of {type(maker.trainable.module).__name__}.training_step"
        raise ModuleError(reject(what, "one that depends on none of its optimizer's parameters", f"one that depends on {_leaf(maker, i)}",
                                 "Yield the losses in the order of the optimizers."))  # fmt: skip


def _whole_step(maker: StepMaker, batch: Any) -> None:
    """Updates and all: only a whole run of it says how many losses come, and what the verbs are called with."""
    step = maker.eager()
    inner = getattr(step, "step", step)
    if isinstance(inner, GeneratorStep):
        inner.check = lambda i, output: _check_yield(maker, i, output)
    step.micro_step(batch, 0, first=True, last=True, divisor=1, opened=1)
    if step.update_step(1.0) == REFUSED and maker.options.nonfinite == "raise" and maker.scaler is None:
        got = "one that is not finite on the first batch"
        raise ModuleError(reject(f"a loss of {type(maker.trainable.module).__name__}.training_step", got, "a finite number",
                                 "Look at the data for nan/inf and at the learning rate, or set nonfinite='ignore'."))  # fmt: skip


@contextmanager
def gradients_apart(step: Step) -> Iterator[None]:
    """Within: no update belongs to a micro-step, and gradients can be looked at between."""
    if isinstance(step, GraphStep):
        step.whole = False
    yield
    if isinstance(step, GraphStep):
        step.whole = True


def other_gradients(maker: StepMaker, step: Step, batch: Any) -> str:
    """One sentence where a captured step gives gradients that are not the eager ones, beyond all rounding; "" where it does."""
    unseen = any(isinstance(o, torch.optim.LBFGS) for o in maker.optimizers) or gradient_hooks(maker.trainable.module)
    if step.rung == "eager" or unseen:
        return ""
    wanted, got = _left_by(maker, maker.eager(), batch), _left_by(maker, step, batch)
    wrong = _apart(maker, wanted, got)
    # A step that is another each time (something outside counts or draws) cannot be judged so.
    return "" if wrong and _apart(maker, wanted, _left_by(maker, maker.eager(), batch)) else wrong


def _left_by(maker: StepMaker, step: Step, batch: Any) -> dict[str, Tensor]:
    """The gradients of one step, from a snapshot that is put back."""
    updates = maker.trainable.form in ("generator", "manual")  # by itself: its gradients are seen in what they have moved
    before = maker.snapshot()
    step.refresh()
    tried(step, True)
    with maker.trial(), gradients_apart(step):
        last = updates or isinstance(step, GraphStep)  # which would record another graph for it
        step.micro_step(copied(batch), 0, first=True, last=last, divisor=1, opened=1)
        left = {} if updates else {name: g.detach().clone() for name, g in step.gradients().items()}
        step.update_step(1.0)
        left = _moved(maker, before) if updates else left
    tried(step, False)
    before.restore()
    return left


def _apart(maker: StepMaker, wanted: dict[str, Tensor], got: dict[str, Tensor]) -> str:
    kinds: dict[str, float] = {}
    for name, g in wanted.items():
        kinds[_kind(name)] = math.hypot(kinds.get(_kind(name), 0.0), float(g.double().norm()))
    for name, g in wanted.items():
        size, total = float(g.double().norm()), kinds[_kind(name)]
        apart = float((g.double() - got[name].double()).norm()) if name in got else size
        if apart > (0.5 if maker.spec.precision in MIXED else 0.05) * size and apart > 1e-3 * total and math.isfinite(total):
            return f"captured, the gradient of {name.split(_SLOT)[0]} is another ({apart / size:.0e} of its norm apart)"
    return ""


_SLOT = " in its slot "


def _kind(name: str) -> str:
    """Tensors of one kind are of one unit."""
    return name.partition(_SLOT)[2]


def _moved(maker: StepMaker, before: Snapshot) -> dict[str, Tensor]:
    """What an update has left of each weight's gradient: in the optimizer's slots, in the weight where there are none.

    Adam divides a gradient by its own size, noise too: there the weights themselves say nothing.
    """
    was, now = before.values(), maker.snapshot().values()
    weights = [n for n, _ in maker.trainable.module.named_parameters() if n in now]
    moved: dict[str, Tensor] = {}
    for n in weights:
        slots = {k: v for k, v in now.items() if k.startswith(f"{n}.") and v.dim() and v.shape == now[n].shape}
        moved |= {n + _SLOT + k.removeprefix(f"{n}."): v - was[k] if k in was else v for k, v in slots.items()} or {n: now[n] - was[n]}
    return moved
