"""``verify=n``: the first n captured steps beside eager ones from the same snapshot; a difference is named and ends capture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fasttrain.graphs.compile import CompileStep
from fasttrain.graphs.contract import copied
from fasttrain.graphs.cuda import GraphStep
from fasttrain.graphs.eager import EagerStep
from fasttrain.graphs.maker import StepMaker
from fasttrain.graphs.manual import ManualStep
from fasttrain.graphs.pieces import CutStep
from fasttrain.graphs.program import MIXED_DTYPES, StepOutput, StepSpec
from fasttrain.graphs.script import ScriptStep
from fasttrain.graphs.splits import SplitStep
from fasttrain.graphs.step import Step
from fasttrain.graphs.tail import StockTail, trainable_params
from fasttrain.graphs.traced import TracedCall
from fasttrain.graphs.turns import Turns
from fasttrain.results import CaptureReport, Obstacle

NEIGHBOURS = 0.05  # of the largest gradient: one that is zero but for cancellation is noise of the size of its neighbours


class Judge:
    """Says which of two computations' values lie further apart than rounding explains."""

    def __init__(self, spec: StepSpec) -> None:
        # Sums are taken in another order by the compiled code: rounding of the forward's dtype, a few hundred terms deep.
        self._coarse = spec.precision in MIXED_DTYPES or spec.precision == "bf16-true"
        self._ratio = {"64-true": 1e-10, "32-true": 1e-4, "bf16-true": 0.3}.get(spec.precision, 0.1)
        self._scaled = spec.precision == "16-mixed"

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

    def outputs(self, out: StepOutput, truth: StepOutput, buffers: dict[str, Tensor], true_buffers: dict[str, Tensor]) -> str:
        """The loss, what was logged, and the buffers."""
        named = [("the loss", out.loss, truth.loss)]
        named += [(f"the logged value {k.name}", a, b) for k, a, b in zip(truth.keys, out.values, truth.values, strict=False)]
        return self([*named, *((f"the buffer {n}", buffers[n], b) for n, b in true_buffers.items())])

    def gradients(self, got: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
        if self.overflowed(got) and self.overflowed(wanted):
            return ""
        named = [(f"the gradient of {n}", got.get(n), wanted.get(n)) for n in sorted({*got, *wanted})]
        return self(named, floor=NEIGHBOURS * max(map(_largest, wanted.values()), default=0.0))

    def overflowed(self, gradients: dict[str, Tensor]) -> bool:
        return self._scaled and any(not bool(g.isfinite().all()) for g in gradients.values())

    def updates(self, got: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
        """Weights, and slots by "weight.slot", after updates from gradients that were not the same to the last bit.

        Adam divides a gradient by its own size, noise too: where all slots are noise an element of the weight says nothing.
        """
        largest: dict[str, float] = {}
        for n, v in [*got.items(), *wanted.items()]:
            largest[_slot(n, wanted)] = max(largest.get(_slot(n, wanted), 0.0), _largest(v))
        for n, v in wanted.items():
            if slot := _slot(n, wanted):
                wrong = self([(f"the slot {n}", got.get(n), v)], floor=NEIGHBOURS * largest[slot])
            else:
                own = [s for s, w in wanted.items() if s.startswith(f"{n}.") and _slot(s, wanted) and w.shape == v.shape and w.dim()]
                least = {s: self._ratio * largest[_slot(s, wanted)] for s in own}
                says = [(wanted[s].abs() > least[s]) | (got[s].abs() > least[s]) for s in own if s in got]
                mask = torch.stack(says).any(0) if says else torch.ones_like(v, dtype=torch.bool)
                wrong = self([(f"the weight {n}", got[n][mask], v[mask])])
            if wrong:
                return wrong
        return ""


def _slot(name: str, values: dict[str, Tensor]) -> str:
    """Of "weight.slot" the slot; empty for a weight."""
    owner, _, slot = name.rpartition(".")
    return slot if owner in values else ""


class Verified(ABC):
    """A captured step beside its eager twin while ``left`` lasts; then one of them alone.

    ``together``: the turns of one step, which go on captured or eagerly together.
    """

    def __init__(self, step: Step, eager: Step, maker: StepMaker, report: CaptureReport, together: list[Verified]) -> None:
        self._captured, self._twin, self._maker, self._report, self._together = step, eager, maker, report, together
        self.active = step
        self.left = self._total = maker.options.verify
        self._judge, self._alone = Judge(maker.spec), 0
        together.append(self)

    @property
    def rung(self) -> str:
        return self.active.rung

    @property
    def takes_closure(self) -> bool:
        return self.active.takes_closure

    @property
    def epoch(self) -> int:
        return self.active.epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._captured.epoch = self._twin.epoch = value

    @property
    def moved(self) -> Sequence[int]:
        return self.active.moved

    @property
    def calls(self) -> Sequence[TracedCall]:
        return self._captured.calls

    @property
    def obstacles(self) -> Sequence[Obstacle]:
        return self._captured.obstacles

    def refresh(self) -> None:
        self.active.refresh()

    def gradients(self) -> dict[str, Tensor]:
        return self.active.gradients()

    def load_gradients(self, gradients: dict[str, Tensor]) -> None:
        self.active.load_gradients(gradients)

    def micro_step(self, batch: Any, batch_idx: int, *, first: bool, last: bool, divisor: int, opened: int) -> StepOutput:
        """The captured micro-step and its twin's; what it leaves is the captured one's when they agree."""
        if self.active is self._twin or self.left == 0:
            return self.active.micro_step(batch, batch_idx, first=first, last=last, divisor=divisor, opened=opened)
        return self._both(batch, batch_idx, first=first, last=last, divisor=divisor, opened=opened)

    @abstractmethod
    def _both(self, batch: Any, batch_idx: int, *, first: bool, last: bool, divisor: int, opened: int) -> StepOutput: ...

    def update_step(self, rescale: float) -> int:
        return self.active.update_step(rescale)

    def _both_updates(self, rescale: float, twin: Callable[[], object], renew: Callable[[], None]) -> int:
        """The fused update and torch's own from the same weights and gradients, compared in weights and slots.

        ``renew``: the slots may be other tensors now; no guard need be evaluated for it."""
        before, scale = self._maker.snapshot(), self._scale()
        stepped = self._captured.update_step(rescale)
        after, scaled = self._maker.snapshot(), self._scale()
        before.restore()
        self._set_scale(scale)
        twin()
        truth = self._maker.snapshot()
        wrong = self._judge([(f"the weight or slot {n}", after.values()[n], v) for n, v in truth.values().items()])
        if wrong:
            self._failed("the update of step", wrong)
            return stepped
        after.restore()
        self._set_scale(scaled)
        renew()
        if not self._alone:
            self._passed()
        return stepped

    def _scale(self) -> dict[str, Any] | None:
        return None if self._maker.scaler is None else self._maker.scaler.state_dict()

    def _set_scale(self, scale: dict[str, Any] | None) -> None:
        if self._maker.scaler is not None and scale is not None:
            self._maker.scaler.load_state_dict(scale)

    def _overflows_alone(self, alone: bool) -> str:
        """At the edge of fp16 it is rounding that decides: once the eager side is taken and nothing said, twice running is a difference."""
        self._alone = self._alone + 1 if alone else 0
        return "one side alone overflows, twice running" if self._alone > 1 else ""

    def _passed(self) -> None:
        self.left -= 1
        if self.left:
            return
        self.micro_step, self.update_step = self._captured.micro_step, self._captured.update_step  # type: ignore[method-assign]
        if not any(v.left for v in self._together):
            self._maker.say(f"verify: {self._total} captured steps agree with eager ones")
            self._report.why += f"; {self._total} steps verified"

    def _failed(self, where: str, wrong: str) -> None:
        report = self._report
        where = f"{where} {self._total - self.left}: {wrong}"
        report.obstacles.append(Obstacle(f"verify found a difference at {where}", advice="The run goes on eagerly; please report it."))
        report.build = None
        report.rung, report.whole, report.why = "eager", False, "the captured step differed from the eager one"
        self._maker.say(f"verify: {report.obstacles[-1]}")
        self.active = self._twin
        for other in self._together:
            other.step_aside()

    def step_aside(self) -> None:
        """From here on eagerly, with the gradients gathered so far."""
        if self.active is not self._twin:
            self._twin.load_gradients(self._captured.gradients())
            self.active = self._twin
            for name in ("micro_step", "update_step"):
                self.__dict__.pop(name, None)


class VerifiedStep(Verified):
    """Forward and backward captured whole, and the fused update behind them."""

    def __init__(
        self,
        step: CompileStep | GraphStep,
        eager: EagerStep,
        stock: StockTail,
        maker: StepMaker,
        report: CaptureReport,
        together: list[Verified],
    ) -> None:
        super().__init__(step, eager, maker, report, together)
        self._step, self._stock = step, stock
        if isinstance(step, GraphStep):
            step.whole = False  # gradients are looked at between

    def _passed(self) -> None:
        super()._passed()
        if not self.left and isinstance(self._step, GraphStep):
            self._step.whole = True

    def _both(self, batch: Any, batch_idx: int, *, first: bool, last: bool, divisor: int, opened: int) -> StepOutput:
        step, maker, judge = self._step, self._maker, self._judge
        before, same, held = maker.snapshot(), copied(batch), step.held()
        out = step.micro_step(batch, batch_idx, first=first, last=last, divisor=divisor, opened=opened)
        after, got = maker.snapshot(), step.gradients()
        before.restore()
        step.hold(held)
        truth = step.untraced(same, batch_idx, first=first, divisor=divisor)
        wanted = step.gradients()
        wrong = judge.outputs(out, truth, after.buffers(), maker.snapshot().buffers())
        alone = judge.overflowed(got) != judge.overflowed(wanted)
        wrong = wrong or self._overflows_alone(alone) or ("" if alone else judge.gradients(got, wanted))
        if wrong:
            self._failed("step", wrong)
            self._twin.load_gradients(wanted)
        if wrong or alone:
            return truth._replace(grads=None)
        after.restore()
        step.hold(([got.get(n) for n in step.parameter_names()], out.loss))
        return out

    def update_step(self, rescale: float) -> int:
        if self.active is self._twin or self.left == 0:
            return self.active.update_step(rescale)
        grads, loss = self._step.held()
        copies = [None if g is None else g.clone() for g in grads or ()]
        return self._both_updates(rescale, lambda: self._stock.step(copies, rescale, loss), self._step.tail.refresh)


class VerifiedCut(Verified):
    """A step in compiled stretches, whose gradients lie in ``p.grad`` as its twin's do; with ``takes_closure`` it updates too."""

    def _both(self, batch: Any, batch_idx: int, *, first: bool, last: bool, divisor: int, opened: int) -> StepOutput:
        maker, judge = self._maker, self._judge
        before, same, scale, updates = maker.snapshot(), copied(batch), self._scale(), self._captured.takes_closure
        out = self._captured.micro_step(batch, batch_idx, first=first, last=last, divisor=divisor, opened=opened)
        after, got, scaled, acts = maker.snapshot(), _cloned(self._captured), self._scale(), maker.verbs.acts
        before.restore()
        self._set_scale(scale)
        with maker.trial():
            truth = self._twin.micro_step(same, batch_idx, first=first, last=last, divisor=divisor, opened=opened)
            true, wanted, true_scale = maker.snapshot(), self._twin.gradients(), self._scale()
        alone = judge.overflowed(got) != judge.overflowed(wanted) or true_scale != scaled
        wrong = judge.outputs(out, truth, after.buffers(), true.buffers()) or self._overflows_alone(alone)
        wrong = wrong or ("" if alone else judge.gradients(got, wanted))
        wrong = wrong or ("" if alone or not updates else judge.updates(after.values(), true.values()))
        if wrong:
            self._set_scale(true_scale)
            self._failed("step", wrong)
            return truth
        maker.verbs.acts = acts
        (true if alone else after).restore()
        self._set_scale(true_scale if alone else scaled)
        self._captured.refresh()
        if updates and last and not alone:
            self._passed()
        return truth if alone else out

    def update_step(self, rescale: float) -> int:
        if self.active is self._twin or self.left == 0 or self._captured.takes_closure:
            return self.active.update_step(rescale)

        def twin() -> None:
            with self._maker.trial():
                self._twin.update_step(rescale)

        return self._both_updates(rescale, twin, self._captured.refresh)


class VerifiedScript(Verified):
    """A whole captured script, updates and all."""

    def __init__(self, step: ScriptStep, maker: StepMaker, report: CaptureReport, together: list[Verified]) -> None:
        super().__init__(step, step.eager, maker, report, together)
        self._step = step

    def _both(self, batch: Any, batch_idx: int, *, first: bool, last: bool, divisor: int, opened: int) -> StepOutput:
        step, maker, judge = self._step, self._maker, self._judge
        before, same, held, scale = maker.snapshot(), copied(batch), _cloned(step), self._scale()
        out = step.micro_step(batch, batch_idx, first=first, last=last, divisor=divisor, opened=opened)
        after, got, scaled, moved = maker.snapshot(), _cloned(step), self._scale(), list(step.moved)
        before.restore()
        self._set_scale(scale)
        with maker.trial():
            truth, wanted = step.eager_twin(same, batch_idx, held)
            true, true_scale = maker.snapshot(), self._scale()
        alone = judge.overflowed(got) != judge.overflowed(wanted) or true_scale != scaled or moved != list(step.eager.moved)
        wrong = judge.outputs(out, truth, after.buffers(), true.buffers()) or self._overflows_alone(alone)
        mine, theirs = self._waiting(got), self._waiting(wanted)
        wrong = wrong or ("" if alone else judge.gradients(mine, theirs) or judge.updates(after.values(), true.values()))
        if wrong or alone:
            self._set_scale(true_scale)
        if wrong:
            self._failed("step", wrong)
            return truth
        if alone:
            step.follow_eager(wanted)
            return truth
        for p in maker.parameters():
            p.grad = None
        after.restore()
        step.load_gradients(got)
        for tail in step.host.tails:
            tail.refresh()
        self._set_scale(scaled)
        if last:
            self._passed()
        return out

    def _waiting(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those an optimizer may still use; an eager update unscales them where they lie, a fused one on the way."""
        spent = self._step.moved if self._maker.scaler is not None else ()
        used = {id(p) for i, n in enumerate(spent) if n for p in trainable_params(self._maker.optimizers[i])}
        wanted = {id(p) for p in self._maker.parameters()} - used
        names = {n for n, p in self._maker.trainable.module.named_parameters() if id(p) in wanted}
        return {n: g for n, g in gradients.items() if n in names}


def _cloned(step: Step) -> dict[str, Tensor]:
    return {n: g.clone() for n, g in step.gradients().items()}


def _largest(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0


def _rms(t: Tensor) -> float:
    return float(t.square().mean().sqrt()) if t.numel() else 0.0


def verified(maker: StepMaker, step: Step, report: CaptureReport) -> Step:
    """The step checked against its eager twin for the first ``verify`` updates, whatever its form."""
    together: list[Verified] = []
    if isinstance(step, SplitStep):
        step.step = verified(maker, step.step, report)
        return step
    if isinstance(step, Turns):
        step.steps = [_verified_one(maker, s, i, report, together) for i, s in enumerate(step.steps)]
        return step
    return _verified_one(maker, step, 0, report, together)


def _verified_one(maker: StepMaker, step: Step, i: int, report: CaptureReport, together: list[Verified]) -> Step:
    if isinstance(step, ScriptStep):
        return VerifiedScript(step, maker, report, together)
    optimizer = maker.optimizers[i]
    params = trainable_params(optimizer)
    eager = EagerStep(maker.trainable, maker.spec, optimizer, params, maker.options, maker.scaler, maker.hooks, i)
    if isinstance(step, (CompileStep, GraphStep)):
        return VerifiedStep(step, eager, StockTail(optimizer, params, maker.options, maker.scaler), maker, report, together)
    if maker.hooks.live or maker.in_pieces(i):
        return step  # what stands around a piece would run twice
    if isinstance(step, CutStep):
        return VerifiedCut(step, eager, maker, report, together)
    return VerifiedCut(step, maker.eager(), maker, report, together) if isinstance(step, ManualStep) else step
