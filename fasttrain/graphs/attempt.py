"""Tries a capture on a snapshot that is put back: whole micro-steps, or the compiled stretches of a step, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fasttrain.errors import CaptureError
from fasttrain.graphs.contract import copied
from fasttrain.graphs.cut import CUT_THERE, LEAST_OPS, CutFunction, graph_of
from fasttrain.graphs.explain import EARLIER
from fasttrain.graphs.look import first_part
from fasttrain.graphs.maker import StepMaker, cut_functions, tried
from fasttrain.graphs.program import forward
from fasttrain.graphs.step import Step
from fasttrain.module import loss_of
from fasttrain.results import Build, CaptureReport


def attempt(maker: StepMaker, step: Step, batch: Any, functions: Sequence[CutFunction] = (), *, runs: int = 1) -> Exception | None:
    """Whole micro-steps (or these ``functions`` of one) from a snapshot that is put back; what went wrong."""
    before = maker.snapshot()
    tried(step, True)
    try:
        with maker.trial():
            for i, function in enumerate(functions):
                forward(maker.trainable, maker.spec, "train", first_part(maker.trainable, copied(batch)), 0, i, function)
            traces = [0]
            for i in range(0 if functions else runs):
                step.micro_step(copied(batch), i, first=True, last=True, divisor=1, opened=1)
                traces.append(sum(c.traces for c in step.calls))
            if len(traces) > 3 and traces[-1] > traces[-2] > traces[-3]:
                raise CaptureError("a Python number changes with every step, and the graph with it")
    except Exception as error:
        return error
    finally:
        before.restore()
        tried(step, False)
        maker.trainable.sink.items = None
    return None


def _goes_back(maker: StepMaker, batch: Any) -> bool:
    """Does a second loss hang on what the first step has made? The backward pass through a compiled stretch uses up the whole of it,
    where eager operations may not. Op by op."""
    part, before = first_part(maker.trainable, batch), maker.snapshot()
    try:
        with maker.trial():
            for i in range(len(maker.optimizers)):
                forward(maker.trainable, maker.spec, "train", copied(part), 0, i)
                begun = torch.ones((), requires_grad=True).clone().grad_fn._sequence_nr()  # type: ignore[union-attr]
                loss = loss_of(forward(maker.trainable, maker.spec, "train", copied(part), 1, i)[0])
                if loss is not None and any(node._sequence_nr() < begun for node in graph_of([loss])):
                    return True
    finally:
        before.restore()
        maker.trainable.sink.items = None
    return False


def name_the_breaks(maker: StepMaker, report: CaptureReport, step: Step, batch: Any) -> None:
    """What ends each stretch and what it costs, in place of the one thing that kept the step from being traced whole."""
    functions = cut_functions(step)
    tried_ones = functions if maker.trainable.form != "manual" else ()
    found = [o for f in functions for o in f.costs(lambda: attempt(maker, step, batch, tried_ones))]
    places = {o.where for o in found}
    report.obstacles = [o if o.where not in places else replace(o, done=CUT_THERE) for o in report.obstacles]
    known = {o.where: i for i, o in enumerate(report.obstacles)}
    for o in found:
        if o.where in known:
            report.obstacles[known[o.where]] = replace(report.obstacles[known[o.where]], done=CUT_THERE, cost_us=o.cost_us)
        else:
            report.obstacles.append(o)


def attempt_in_pieces(maker: StepMaker, batch: Any, build: Build, least: int = LEAST_OPS) -> tuple[Step, int, Exception | None]:
    """The cut step, how many compiled stretches it runs, and what went wrong."""
    step = maker.captured(build)
    functions, error, pieces = cut_functions(step), None, 0
    for f in functions:
        f.least = least
    for _ in range(3):  # counters and numbers change at the second; forward alone, so that no gradient hook hears of it
        before = sum(f.ran for f in functions)
        # A manual step twice, for what the first may leave for the second.
        error = error or attempt(maker, step, batch, functions if maker.trainable.form != "manual" else (), runs=2)
        pieces = sum(f.ran for f in functions) - before
    if error is None and pieces and maker.trainable.form != "manual" and _goes_back(maker, batch):
        error = CaptureError(EARLIER)
    for f in functions:
        f.settle()
    return step, pieces, error
