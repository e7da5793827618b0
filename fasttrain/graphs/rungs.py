"""One rung, made and tried: the eager step, the step traced whole, the step in pieces, and what is said of each."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

from fasttrain.errors import CaptureError
from fasttrain.graphs.attempt import attempt, attempt_in_pieces, name_the_breaks
from fasttrain.graphs.explain import BETWEEN, EARLIER, obstacle_from
from fasttrain.graphs.look import toggles_are_local
from fasttrain.graphs.maker import StepMaker, updates_fused
from fasttrain.graphs.products import products
from fasttrain.graphs.step import Step
from fasttrain.graphs.tail import owns_zero_grad
from fasttrain.results import Build, CaptureReport, Obstacle


def eager(maker: StepMaker, report: CaptureReport, why: str) -> tuple[Step, CaptureReport]:
    step = maker.uncaptured()
    report.rung, report.why, report.threads = "eager", why, torch.get_num_threads()
    said = report.tail.replace(" behind a captured piece", "")
    report.tail = said if updates_fused(step) or (maker.options.capture == "auto" and said.startswith("torch (")) else "torch"
    return step, report


def traced(
    maker: StepMaker, report: CaptureReport, batch: Any, why: str, build: Build | None = None, *, graph: bool = False
) -> tuple[Step, CaptureReport]:
    """Trace now, on a snapshot, so that a failure costs nothing but time; what cannot be had whole is cut in pieces."""
    build = build or Build(kernel_threads=torch.get_num_threads(), **products(graph))
    between = sorted(maker.hooks.live & BETWEEN)
    if between and not build.cut:
        advice = "It is honoured between compiled stretches; on_after_backward would leave the step whole."
        report.obstacles += [Obstacle(f"the hook {h} runs between the forward and the backward pass", advice=advice) for h in between]
        build = replace(build, cut=True, cpp_wrapper=False)
    if maker.trainable.form == "manual" and any(map(owns_zero_grad, maker.optimizers)) and not build.cut:
        report.obstacles.append(Obstacle("an optimizer has a zero_grad of its own, which looks at gradients where torch has them"))
        build = replace(build, cut=True, cpp_wrapper=False)
    if build.cut:
        return _cut(maker, report, batch, why, build)
    step = maker.captured(build, graph=graph)
    maker.say("compiling the step (seconds for a small model, a minute for a large one; the next start is quicker) ...")
    error = attempt(maker, step, batch, runs=4)
    while error is None and any(c.speculation.fickle for c in step.calls):
        for call in step.calls:
            call.anew()
        error = attempt(maker, step, batch, runs=4)
    with maker.trial():
        if error is None and not toggles_are_local(maker, batch):
            error = CaptureError("what is computed under one toggle_optimizer is used under another, or outside it")
    if error is None and any(g.layout is not torch.strided for g in step.gradients().values()):
        error = CaptureError("a sparse gradient: the captured update takes dense ones")
    back = [o for c in step.calls for o in c.ended if EARLIER in o.reason]
    back += [o for o in [obstacle_from(error)] if EARLIER in o.reason] if error is not None else []
    if back:  # compiled stretches would use up what eager operations may not
        report.obstacles.append(back[0])
        return _not_captured(maker, report, error)
    if error is not None:
        report.obstacles.append(obstacle_from(error))
        if graph and maker.options.capture != "graph":  # the next rung: the same step compiled, and not recorded
            return traced(maker, report, batch, why or "no graph can be had", build)
        if maker.trainable.form != "generator" and maker.options.capture != "graph":
            return _cut(maker, report, batch, why, replace(build, cut=True, cpp_wrapper=False))
        return _not_captured(maker, report, error)
    report.compile_s, report.traces = sum(c.compile_s for c in step.calls), sum(c.traces for c in step.calls)
    maker.say(f"compiled in {report.compile_s:.1f} s")
    step.refresh()
    report.rung, report.pieces, report.why = step.rung, len(step.calls), why
    report.whole = report.pieces == 1 and not (maker.trainable.form in ("single", "indexed") and maker.in_pieces())
    report.threads, report.build = torch.get_num_threads(), build
    return step, report


def _cut(maker: StepMaker, report: CaptureReport, batch: Any, why: str, build: Build) -> tuple[Step, CaptureReport]:
    """Compiled stretches around what cannot be traced; eager where they come to next to nothing."""
    started = time.perf_counter()
    step, pieces, error = attempt_in_pieces(maker, batch, build)
    if pieces == 0 and error is None and maker.options.capture == "auto" and maker.decided is None:
        why_not = report.obstacles[-1] if report.obstacles else ""
        return eager(maker, report, f"it cannot be traced whole, and its pieces are small: {why_not}")
    if pieces == 0 and error is None:  # asked for, or as it was
        step, pieces, error = attempt_in_pieces(maker, batch, build, least=1)
    if error is not None and EARLIER in (o := obstacle_from(error)).reason:
        report.obstacles.append(o)
    if error is not None or pieces == 0:
        return _not_captured(maker, report, error)
    report.compile_s = time.perf_counter() - started
    name_the_breaks(maker, report, step, batch)
    maker.say(f"compiled in {pieces} pieces in {report.compile_s:.1f} s")
    report.rung, report.whole, report.pieces, report.why = "compile", False, pieces, why
    report.threads, report.build = torch.get_num_threads(), build
    return step, report


def _not_captured(maker: StepMaker, report: CaptureReport, error: Exception | None) -> tuple[Step, CaptureReport]:
    if not report.obstacles:
        report.obstacles.append(Obstacle("nothing of it can be traced") if error is None else obstacle_from(error))
    if maker.options.capture != "auto":
        raise CaptureError(f"capture={maker.options.capture!r} cannot be had: {report.obstacles[-1]}") from error
    return eager(maker, report, f"it cannot be traced whole: {report.obstacles[-1]}")


def refuse(maker: StepMaker, report: CaptureReport, wrong: str) -> None:
    """A capture that was looked at and is wrong: an obstacle, or an error where it was asked for."""
    advice = "The compiler is at fault: what it makes of this step is not what the step computes."
    report.obstacles.append(Obstacle(wrong, advice=advice))
    if maker.options.capture != "auto":
        raise CaptureError(f"capture={maker.options.capture!r} cannot be had: {report.obstacles[-1]}")
