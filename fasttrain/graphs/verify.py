"""``verify=n``: the first n captured steps beside eager ones from the same snapshot; a difference is named and ends capture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fasttrain.graphs.compile import CompileStep
from fasttrain.graphs.contract import copied
from fasttrain.graphs.eager import EagerStep
from fasttrain.graphs.generator import GeneratorStep
from fasttrain.graphs.maker import StepMaker
from fasttrain.graphs.manual import ManualStep
from fasttrain.graphs.program import MIXED_DTYPES, StepOutput, StepSpec
from fasttrain.graphs.script import ScriptStep
from fasttrain.graphs.splits import SplitStep
from fasttrain.graphs.step import Step
from fasttrain.graphs.tail import StockTail
from fasttrain.graphs.traced import TracedCall
from fasttrain.graphs.turns import Turns
from fasttrain.results import CaptureReport, Obstacle
from fasttrain.state import Snapshot


class Judge:
    """Says which of two computations' values lie further apart than rounding explains."""

    def __init__(self, spec: StepSpec) -> None:
        # Sums are taken in another order by the compiled code: rounding of the forward's dtype, a few hundred terms deep.
        self._coarse = spec.precision in MIXED_DTYPES or spec.precision == "bf16-true"
        self._ratio = {"64-true": 1e-10, "32-true": 1e-4, "bf16-true": 0.3}.get(spec.precision, 0.1)

    def __call__(self, named: Sequence[tuple[str, Any, Any]], *, floor: float = 0.0) -> str:
        """The first pair further apart than rounding explains, in words; empty when there is none. Host reads."""
        for name, a, b in named:
            if (a is None) != (b is None):
                return f"{name} is missing on one side"
            if not isinstance(a, Tensor) or not isinstance(b, Tensor):
                continue
            x, y = a.detach().double(), b.detach().double()
            size = _rms if self._coarse else _largest  # single elements of a bf16 gradient are mostly rounding
            scale, apart = size(y), size(x - y)
            if not torch.equal(x.isfinite(), y.isfinite()) or apart > self._ratio * max(scale, floor) + 1e-12:
                return f"{name} is off by {apart:.3g} (its size {scale:.3g})"
        return ""


class VerifiedStep:
    """A compiled step that is checked while ``left`` lasts, then steps out of the way."""

    rung = "compile"
    takes_closure = False
    moved = (1,)

    def __init__(
        self, step: CompileStep, eager: EagerStep, stock: StockTail, spec: StepSpec, snapshot: Callable[[], Snapshot],
        steps: int, report: CaptureReport, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.active: CompileStep | EagerStep = step
        self._step, self._eager, self._stock = step, eager, stock
        self._snapshot, self._left, self._total = snapshot, steps, steps
        self._report, self._say = report, say
        self._judge, self._scaled = Judge(spec), spec.precision == "16-mixed"

    @property
    def epoch(self) -> int:
        return self.active.epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._step.epoch = self._eager.epoch = value

    @property
    def calls(self) -> Sequence[TracedCall]:
        return self._step.calls

    @property
    def obstacles(self) -> Sequence[Obstacle]:
        return self._step.obstacles

    def refresh(self) -> None:
        self.active.refresh()

    def gradients(self) -> dict[str, Tensor]:
        return self.active.gradients()

    def load_gradients(self, gradients: dict[str, Tensor]) -> None:
        self.active.load_gradients(gradients)

    def micro_step(self, batch: Any, batch_idx: int, *, first: bool, last: bool, divisor: int, opened: int) -> StepOutput:
        """The captured micro-step and the same one traced by nobody, compared in loss, gradients, logged values and buffers."""
        if self.active is not self._step:
            return self.active.micro_step(batch, batch_idx, first=first, last=last, divisor=divisor, opened=opened)
        before, same = self._snapshot(), copied(batch)
        held = self._step.held()
        out = self._step.micro_step(batch, batch_idx, first=first, last=last, divisor=divisor, opened=opened)
        after, got = self._snapshot(), self._step.gradients()
        buffers = after.buffers()
        before.restore()
        self._step.hold(held)
        truth = self._step.untraced(same, batch_idx, first=first, divisor=divisor)
        wanted, true_buffers = self._step.gradients(), self._snapshot().buffers()
        # A gradient that is zero but for cancellation is noise of the size of its neighbours.
        largest = max(map(_largest, wanted.values()), default=0.0)
        gradients = [(f"the gradient of {n}", got.get(n), wanted.get(n)) for n in sorted({*got, *wanted})]
        named = [("the loss", out.loss, truth.loss)]
        named += [(f"the logged value {k.name}", a, b) for k, a, b in zip(truth.keys, out.values, truth.values, strict=False)]
        named += [(f"the buffer {n}", buffers[n], true_buffers[n]) for n in true_buffers]
        overflow = self._scaled and any(not bool(g.isfinite().all()) for g in (*got.values(), *wanted.values()))
        wrong = self._judge(named) or ("" if overflow else self._judge(gradients, floor=0.05 * largest))
        if wrong:
            self._give_up(f"step {self._total - self._left}: {wrong}")
            self._eager.load_gradients(wanted)
            return truth._replace(grads=None)
        after.restore()
        self._step.hold((list(self._in_order(got)), out.loss))
        return out

    def update_step(self, rescale: float) -> int:
        """The fused update and torch's own from the same weights and gradients, compared in weights and slots."""
        if self.active is not self._step:
            return self.active.update_step(rescale)
        before = self._snapshot()
        grads, loss = self._step.held()
        copies = [None if g is None else g.clone() for g in grads or ()]
        stepped = self._step.update_step(rescale)
        after = self._snapshot()
        before.restore()
        self._stock.step(copies, rescale, loss)
        truth = self._snapshot()
        wrong = self._judge([(f"the weight or slot {n}", after.values()[n], v) for n, v in truth.values().items()])
        self._left -= 1
        if wrong:
            self._give_up(f"the update of step {self._total - self._left - 1}: {wrong}")
            return stepped
        after.restore()
        self._step.tail.refresh()  # the slots may be other tensors now; the guards were checked and nobody's code ran
        if self._left == 0:
            self._say(f"verify: {self._total} captured steps agree with eager ones")
            if self._report.rung != "eager":  # another optimizer's turn may have been found wrong
                self._report.why += f"; {self._total} steps verified"
            self.micro_step, self.update_step = self._step.micro_step, self._step.update_step  # type: ignore[method-assign]
        return stepped

    def _in_order(self, named: dict[str, Tensor]) -> Sequence[Tensor | None]:
        return [named.get(n) for n in self._step.parameter_names()]

    def _give_up(self, where: str) -> None:
        _tell(self._report, self._say, where)
        self.active, self.rung = self._eager, "eager"


class VerifiedScript:
    """A whole captured script, updates and all, beside its eager twin from the same weights, while ``left`` lasts."""

    takes_closure = True

    def __init__(self, step: ScriptStep, eager: GeneratorStep | ManualStep, maker: StepMaker, steps: int, report: CaptureReport) -> None:
        self.active: ScriptStep | GeneratorStep | ManualStep = step
        self._step, self._eager, self._maker, self._left, self._total = step, eager, maker, steps, steps
        self._report, self._judge = report, Judge(maker.spec)

    @property
    def rung(self) -> str:
        return self.active.rung

    @property
    def epoch(self) -> int:
        return self._eager.epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._eager.epoch = value

    @property
    def moved(self) -> Sequence[int]:
        return self.active.moved

    @property
    def calls(self) -> Sequence[TracedCall]:
        return self._step.calls

    @property
    def obstacles(self) -> Sequence[Obstacle]:
        return self._step.obstacles

    def micro_step(self, batch: Any, batch_idx: int, *, first: bool, last: bool, divisor: int, opened: int) -> StepOutput:
        step, eager, flags = self._step, self._eager, {"first": first, "last": last, "divisor": divisor, "opened": opened}
        if self._left == 0 or self.active is eager:
            return self.active.micro_step(batch, batch_idx, **flags)  # type: ignore[arg-type]
        before, same, held = self._maker.snapshot(), copied(batch), {n: g.clone() for n, g in step.gradients().items()}
        scale = None if self._maker.scaler is None else self._maker.scaler.state_dict()
        out = step.micro_step(batch, batch_idx, **flags)  # type: ignore[arg-type]
        after, got = self._maker.snapshot(), {n: g.clone() for n, g in step.gradients().items()}
        scaled = None if self._maker.scaler is None else self._maker.scaler.state_dict()
        before.restore()
        if self._maker.scaler is not None and scale is not None:
            self._maker.scaler.load_state_dict(scale)
        truth, wanted = step.eager_twin(same, batch_idx, held)
        true = self._maker.snapshot()
        named = [("the loss", out.loss, truth.loss)]
        named += [(f"the logged value {k.name}", a, b) for k, a, b in zip(truth.keys, out.values, truth.values, strict=False)]
        named += [(f"the weight or slot {n}", after.values().get(n), v) for n, v in true.values().items()]
        named += [(f"the buffer {n}", after.buffers()[n], v) for n, v in true.buffers().items()]
        named += [(f"the gathered gradient of {n}", got.get(n), wanted.get(n)) for n in sorted({*got, *wanted})]
        eager_scale = None if self._maker.scaler is None else self._maker.scaler.state_dict()
        wrong = self._judge(named) if eager_scale == scaled else ""  # one of them overflowed: there is nothing to compare
        if wrong:
            _tell(self._report, self._maker.say, f"step {self._total - self._left}: {wrong}")
            self.active = eager
            return truth
        for p in self._maker.parameters():
            p.grad = None
        after.restore()
        step.load_gradients(got)
        step.refresh()
        if self._maker.scaler is not None and scaled is not None:
            self._maker.scaler.load_state_dict(scaled)
        self._left -= last
        if self._left == 0:
            self._maker.say(f"verify: {self._total} captured steps agree with eager ones")
            self._report.why += f"; {self._total} steps verified"
        return out

    def update_step(self, rescale: float) -> int:
        return self.active.update_step(rescale)

    def refresh(self) -> None:
        self.active.refresh()

    def gradients(self) -> dict[str, Tensor]:
        return self.active.gradients()

    def load_gradients(self, gradients: dict[str, Tensor]) -> None:
        self.active.load_gradients(gradients)


def _tell(report: CaptureReport, say: Callable[[str], None], where: str) -> None:
    report.obstacles.append(Obstacle(f"verify found a difference at {where}", advice="The run goes on eagerly; please report it."))
    report.build = None
    report.rung, report.whole, report.why = "eager", False, "the captured step differed from the eager one"
    say(f"verify: {report.obstacles[-1]}")


def _largest(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0


def _rms(t: Tensor) -> float:
    return float(t.square().mean().sqrt()) if t.numel() else 0.0


def verified(maker: StepMaker, step: Step, report: CaptureReport) -> Step:
    """The step checked against its eager twin for the first ``verify`` updates, whatever its form."""
    if isinstance(step, SplitStep):
        step.step = verified(maker, step.step, report)
        return step
    if isinstance(step, Turns):
        step.steps = [_verified_one(maker, s, i, report) for i, s in enumerate(step.steps)]
        return step
    return _verified_one(maker, step, 0, report)


def _verified_one(maker: StepMaker, step: Step, i: int, report: CaptureReport) -> Step:
    steps = maker.options.verify
    if isinstance(step, CompileStep):
        optimizer = maker.optimizers[i]
        eager = EagerStep(maker.trainable, maker.spec, optimizer, step.params, maker.options, maker.scaler, maker.hooks, i)
        stock = StockTail(optimizer, step.params, maker.options, maker.scaler)
        return VerifiedStep(step, eager, stock, maker.spec, maker.snapshot, steps, report, maker.say)
    if isinstance(step, ScriptStep):
        return VerifiedScript(step, step.eager, maker, steps, report)
    return step  # a captured piece with hooks around it: the hooks would run twice
