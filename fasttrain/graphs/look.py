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
from fasttrain.graphs.compile import CompileStep
from fasttrain.graphs.contract import copied
from fasttrain.graphs.cuda import GraphStep
from fasttrain.graphs.generator import GeneratorStep
from fasttrain.graphs.maker import StepMaker, tried
from fasttrain.graphs.manual import ManualStep
from fasttrain.graphs.pieces import CutStep
from fasttrain.graphs.program import REFUSED, check_loss, forward, keys_and_values
from fasttrain.graphs.splits import splitter
from fasttrain.graphs.step import Step
from fasttrain.graphs.tail import frozen, trainable_params
from fasttrain.graphs.turns import Turns
from fasttrain.module import Trainable, hiddens_of

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
    """One sentence where a captured step of one loss gives gradients that are not the eager ones, beyond all rounding; "" where it does."""
    if not isinstance(step, (CompileStep, CutStep, GraphStep)) or step.takes_closure:
        return ""
    found = []
    for one in (maker.eager(), step):
        before = maker.snapshot()
        one.refresh()
        tried(one, True)
        with maker.trial(), gradients_apart(one):
            one.micro_step(copied(batch), 0, first=True, last=True, divisor=1, opened=1)
            found.append({name: g.detach().clone() for name, g in one.gradients().items()})
            one.update_step(1.0)
        tried(one, False)
        before.restore()
    wanted, got = found
    total = math.sqrt(sum(float(g.double().square().sum()) for g in wanted.values()))
    for name, g in wanted.items():
        size = float(g.double().norm())
        apart = float((g.double() - got[name].double()).norm()) if name in got else size
        if apart > (0.5 if maker.spec.precision in MIXED else 0.05) * size and apart > 1e-3 * total and math.isfinite(total):
            return f"captured, the gradient of {name} is another ({apart / size:.0e} of its norm apart)"
    return ""
