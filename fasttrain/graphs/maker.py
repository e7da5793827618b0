"""Everything a rung is made of, and the step of a rung for the form of the module at hand."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch

from fasttrain.code_state import CodeState
from fasttrain.graphs.ahead import Ahead
from fasttrain.graphs.compile import CompileStep
from fasttrain.graphs.cuda import GraphStep
from fasttrain.graphs.cut import CutFunction
from fasttrain.graphs.device import Device
from fasttrain.graphs.eager import EagerStep
from fasttrain.graphs.explain import AROUND, gradient_hooks
from fasttrain.graphs.generator import GeneratorStep
from fasttrain.graphs.hooks import InStepHooks
from fasttrain.graphs.launches import Launches
from fasttrain.graphs.manual import ManualStep, Verbs
from fasttrain.graphs.pieces import CutStep, EagerFusedStep, PiecedStep
from fasttrain.graphs.program import StepSpec
from fasttrain.graphs.scale import LossScale
from fasttrain.graphs.script import ScriptStep
from fasttrain.graphs.speculated import Outcomes, Speculation
from fasttrain.graphs.splits import SplitStep, splitter
from fasttrain.graphs.staging import Staging
from fasttrain.graphs.step import Step
from fasttrain.graphs.tail import owns_zero_grad, tail_obstacle, trainable_params
from fasttrain.graphs.turns import Turns
from fasttrain.module import Trainable
from fasttrain.options import Options
from fasttrain.results import Build
from fasttrain.state import Snapshot, helpers_of


@dataclass(kw_only=True)
class StepMaker:
    """What the steps of a run share."""

    trainable: Trainable
    spec: StepSpec
    optimizers: Sequence[torch.optim.Optimizer]
    options: Options
    scaler: LossScale | None
    hooks: InStepHooks
    say: Callable[[str], None]
    frequencies: Sequence[int] | None = None  # batches in a row that each optimizer owns
    schedulers: Sequence[Any] = ()
    verbs: Verbs = field(default_factory=Verbs)
    seen: Callable[[], int] = lambda: 0  # batches of the fit before this one
    workers: int = 0  # loader processes that want a core
    outcomes: dict[int, Outcomes] = field(default_factory=dict)  # by optimizer: how branches on data went in the look
    device: Device | None = None  # what records graphs; None where there is nothing of the kind
    staging: Staging | None = None  # what brings batches to it
    launches: Launches | None = None  # steps that wait for others
    code: CodeState | None = None  # what the step's code keeps outside of its objects
    decided: dict[str, Any] | None = None  # what ``auto`` chose in the run that is being resumed
    ahead: Ahead | None = None  # who compiles beside the steps
    stopped: Callable[[], bool] = lambda: False  # does somebody want the run to end?
    threads: int = field(default_factory=torch.get_num_threads)  # torch's, before anything was decided

    def eager(self) -> Step:
        """The truth: every form in plain torch."""
        return self._split(self._eager())

    def uncaptured(self) -> Step:
        """The eager step; under ``auto``, which may choose, with the fused update where there is one for it."""
        return self._split(self._eager(fused=self.options.capture == "auto"))

    def manual(self, cut: CutFunction | None = None) -> ManualStep:
        given = (self.trainable, self.spec, self.optimizers, self.schedulers, self.options, self.scaler)
        return ManualStep(*given, self.verbs, self.hooks, cut)

    def captured(self, build: Build, *, graph: bool = False) -> Step:
        """The compile (or graph) rung of this module's form."""
        form = self.trainable.form
        step: Step
        if build.cut and form == "manual":
            step = self.manual(CutFunction(self.trainable.step("train"), self.spec, build))
        elif build.cut:
            step = self._turns([self._cut_one(i, build) for i in range(len(self.optimizers))])
        elif form in ("generator", "manual"):
            eager = self._eager()
            assert isinstance(eager, (GeneratorStep, ManualStep))
            verbs = self.verbs if form == "manual" else None
            step = ScriptStep(self.trainable, self.spec, self.optimizers, self.schedulers, self.options, self.scaler, verbs, eager,
                              build=build)  # fmt: skip
        else:
            step = self._turns([self._captured_one(i, build, graph) for i in range(len(self.optimizers))])
        step, saved = self._split(step), (self.decided or {}).get("calls", ())
        for i, call in enumerate(step.calls):
            call.speculation = Speculation(self.outcomes.get(i, {}))
        if len(saved) == len(step.calls):
            for call, state in zip(step.calls, saved, strict=True):
                call.load_state(state)
        return step

    def snapshot(self) -> Snapshot:
        if self.code is None:
            self.code = CodeState([*self.trainable.module.modules(), *helpers_of(self.trainable.module), *self.trainable.beside()])
        others = [*self.schedulers, *self.trainable.helpers()]
        return Snapshot(self.trainable.module, list(self.optimizers), others, self.code.keep)

    def parameters(self) -> list[torch.nn.Parameter]:
        """What trains, each once."""
        return list({id(p): p for o in self.optimizers for p in trainable_params(o)}.values())

    def in_pieces(self, i: int = 0) -> bool:
        """Does somebody stand between the backward pass and the update?"""
        return (
            bool(self.hooks.live & AROUND)
            or isinstance(self.optimizers[i], torch.optim.LBFGS)
            or bool(gradient_hooks(self.trainable.module))
            or owns_zero_grad(self.optimizers[i])
        )

    @contextmanager
    def trial(self, *, heard: bool = False) -> Iterator[None]:
        """Within: a step is tried. What it says is nobody's news, and no hook hears of it.

        ``heard``: but its messages and warnings are, for some come only once.
        """
        sink = self.trainable.sink
        before = sink.outside, sink.muted, self.hooks.muted
        sink.outside, sink.muted, self.hooks.muted = None, True, True
        scale = None if self.scaler is None else self.scaler.state_dict()
        try:
            with redirect_stdout(io.StringIO()), warnings.catch_warnings(), nullcontext() if heard else _unheard():
                warnings.filterwarnings("ignore", "The .grad attribute of a Tensor")  # the tracer looks at everything
                yield
        finally:
            sink.outside, sink.muted, self.hooks.muted = before
            if self.scaler is not None and scale is not None:
                self.scaler.load_state_dict(scale)
            if self.spec.pending is not None:
                self.spec.pending.forget()

    def _eager(self, *, fused: bool = False) -> Step:
        form, common = self.trainable.form, (self.options, self.scaler)
        if form == "manual":
            return self.manual()
        if form == "generator":
            return GeneratorStep(self.trainable, self.spec, self.optimizers, *common, self.hooks)
        return self._turns([self._eager_one(i, fused) for i in range(len(self.optimizers))])

    def _eager_one(self, i: int, fused: bool) -> Step:
        optimizer, common = self.optimizers[i], (self.options, self.scaler, self.hooks, i)
        params = trainable_params(optimizer)
        if fused and tail_obstacle(optimizer, params) is None:
            return EagerFusedStep(self.trainable, self.spec, optimizer, *common)
        return EagerStep(self.trainable, self.spec, optimizer, params, *common)

    def _captured_one(self, i: int, build: Build, graph: bool) -> Step:
        optimizer = self.optimizers[i]
        if self.in_pieces(i):
            return PiecedStep(self.trainable, self.spec, optimizer, self.options, self.scaler, self.hooks, i, build=build)
        given = (self.trainable, self.spec, optimizer, self.options, self.scaler, i)
        if graph and not build.joint:
            assert self.device is not None
            launches = self.launches if len(self.optimizers) == 1 else None
            return GraphStep(*given, build=build, device=self.device, staging=self.staging, launches=launches)
        return CompileStep(*given, build=build, eager=lambda: self._eager_one(i, False), device=self.device if graph else None)

    def _cut_one(self, i: int, build: Build) -> Step:
        return CutStep(self.trainable, self.spec, self.optimizers[i], self.options, self.scaler, self.hooks, i, build=build)

    def _turns(self, steps: Sequence[Step]) -> Step:
        if len(steps) == 1:
            return steps[0]
        return Turns(steps, self.optimizers, self.frequencies, self.seen, self.scaler)

    def _split(self, step: Step) -> Step:
        return SplitStep(step, splitter(self.trainable)) if self.trainable.split_length else step


@contextmanager
def _unheard() -> Iterator[None]:
    """Within: no message of any logger reaches a handler, and no warning anybody. Levels stay, for a trace goes by them."""
    kind: Any = logging.Logger
    before = kind.callHandlers
    kind.callHandlers = lambda self, record: None
    warnings.simplefilter("ignore")
    try:
        yield
    finally:
        kind.callHandlers = before


def cut_functions(step: Step) -> list[CutFunction]:
    """Those of a step in compiled stretches; none for any other."""
    if isinstance(step, SplitStep):
        step = step.step
    steps = step.steps if isinstance(step, Turns) else [step]
    return [s.cut for s in steps if isinstance(s, (CutStep, ManualStep)) and s.cut is not None]


def updates_fused(step: Step) -> bool:
    """Is the update behind uncaptured operations a fused one?"""
    if isinstance(step, SplitStep):
        step = step.step
    return all(isinstance(s, EagerFusedStep) and s.is_fused for s in (step.steps if isinstance(step, Turns) else [step]))


def tried(step: Step, on: bool) -> None:
    """While a step is tried every optimizer has its turn; after it nothing is left of what it gathered and counted."""
    for call in step.calls:
        call.tried(on)
    if isinstance(step, SplitStep):
        step = step.step
    for one in step.steps if isinstance(step, Turns) else [step]:
        if isinstance(one, GraphStep):
            one.tried(on)
    if isinstance(step, Turns):
        step.everyone = on
    if isinstance(step, ScriptStep) and not on:
        step.host.new_window()
