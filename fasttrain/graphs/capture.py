"""Picks the rung, checks it, and is the only place that changes a global setting of torch."""

from __future__ import annotations

import math
import random
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from fasttrain.errors import CaptureError, DataError, FasttrainError
from fasttrain.graphs import decisions
from fasttrain.graphs.attempt import attempt, attempt_in_pieces, name_the_breaks
from fasttrain.graphs.contract import copied, describe
from fasttrain.graphs.device_tail import DeviceTail
from fasttrain.graphs.explain import AROUND, BETWEEN, EARLIER, gradient_hooks, hook_obstacles, obstacle_from
from fasttrain.graphs.look import look, other_gradients, toggles_are_local
from fasttrain.graphs.maker import StepMaker, tried, updates_fused
from fasttrain.graphs.script import ScriptStep
from fasttrain.graphs.step import Step
from fasttrain.graphs.tail import owns_zero_grad, tail_obstacle, trainable_params
from fasttrain.graphs.verify import verified
from fasttrain.options import Options
from fasttrain.results import Build, CaptureReport, Obstacle

SAVING = 0.3  # the least share of an eager step that compiling is expected to save when nothing was measured yet


def as_decided(maker: StepMaker, decided: dict[str, Any] | None) -> None:
    """A resumed run computes with the threads, and later takes the rung, that the saved one had chosen."""
    maker.decided = decided
    if decided is not None:
        torch.set_num_threads(decided["threads"])


def built_as(decided: dict[str, Any]) -> Build | None:
    """How the saved run had compiled its step; None when it ran eagerly."""
    return Build(**decided["build"]) if decided["build"] is not None else None


def dry_look(maker: StepMaker, batch: Any) -> None:
    """Run the first batch once, say what is wrong with it before anything is compiled, put everything back.

    Raises ModuleError for a wrong loss, DataError when the module cannot take the batch.
    """
    module = maker.trainable.module
    before = maker.snapshot()
    try:
        with maker.trial(heard=True):
            look(maker, copied(batch))
    except FasttrainError:
        raise
    except Exception as error:
        raise DataError(
            f"{type(module).__name__}.training_step could not take the first batch:\n{describe(batch)}\n"
            f"Make the loader's batches what the step unpacks. Its own error: {type(error).__name__}: {error}"
        ) from error
    finally:
        before.restore()


def capture_step(maker: StepMaker, batch: Any, remaining_steps: float) -> tuple[Step, CaptureReport]:
    """The highest rung that works and pays, with the report that says which and why.

    Raises CaptureError when a rung was named and cannot be had.
    """
    step, report = _choose(maker, batch, remaining_steps)
    if not maker.options.verify and maker.decided is None and not report.timings_us and (wrong := other_gradients(maker, step, batch)):
        _refuse(maker, report, wrong)
        step, report = _eager(maker, report, wrong)
    if isinstance(step, ScriptStep):
        step.take_gradients()
    if maker.options.verify and step.rung != "eager":
        return verified(maker, step, report), report
    return step, report


def _choose(maker: StepMaker, batch: Any, remaining_steps: float) -> tuple[Step, CaptureReport]:
    wanted, device = maker.options.capture, maker.spec.device.type
    report = CaptureReport(tail=_tail_name(maker), threads=torch.get_num_threads())
    report.obstacles = obstacles_of(maker)
    if wanted == "graph" and maker.device is None:
        raise CaptureError(f"capture='graph' needs a CUDA device; this run is on {device}. Use capture='auto' or 'compile'.")
    if wanted == "eager":
        return _eager(maker, report, "asked for")
    if report.obstacles:
        if wanted != "auto":
            raise CaptureError(f"capture={wanted!r} cannot be had:\n" + "\n".join(f"  - {o}" for o in report.obstacles))
        return _eager(maker, report, str(report.obstacles[0]))
    if wanted != "auto":
        return _traced(maker, report, batch, "asked for", graph=wanted == "graph")
    return _auto(maker, report, batch, remaining_steps)


def obstacles_of(maker: StepMaker) -> list[Obstacle]:
    """What is known to stand in the way before anything is traced."""
    hooks, module = maker.hooks.live, maker.trainable.module
    scripted = maker.trainable.form in ("generator", "manual")
    refused = hooks if scripted or maker.options.capture == "graph" else hooks - AROUND - BETWEEN
    found = hook_obstacles(module, sorted(refused))
    if scripted or maker.options.capture == "auto":  # they cannot be kept silent while eager steps are timed
        advice = "It is called on the eager rung; capture='compile' calls it too, on the captured gradient."
        found += [Obstacle(f"a gradient hook on parameter {n}", advice=advice) for n in gradient_hooks(module)]
    if scripted and any(isinstance(o, torch.optim.LBFGS) for o in maker.optimizers):
        found.append(Obstacle("LBFGS asks for the loss again through a closure"))
    if maker.trainable.form == "generator" and any(map(owns_zero_grad, maker.optimizers)):
        found.append(Obstacle("an optimizer has a zero_grad of its own, which looks at gradients where torch has them"))
    if not maker.parameters():
        found.append(Obstacle("no optimizer holds a parameter that trains: what the module updates by itself is not seen"))
    if maker.options.detect_anomaly:
        found.append(Obstacle("detect_anomaly follows autograd op by op"))
    return found


def _tail_name(maker: StepMaker) -> str:
    names = []
    for i, optimizer in enumerate(maker.optimizers):
        why_not = tail_obstacle(optimizer, trainable_params(optimizer))
        hooked = maker.trainable.form in ("single", "indexed") and maker.in_pieces(i)
        around = sorted(maker.hooks.live & AROUND)
        around += ["gradient hooks"] * bool(gradient_hooks(maker.trainable.module))
        if maker.device is not None and not hooked and DeviceTail.obstacle(optimizer, trainable_params(optimizer)) is None:
            names.append("fused Triton")
            continue
        fused = "fused native" + (f" behind a captured piece; around it: {', '.join(around)}" if hooked and around else "")
        names.append(fused if why_not is None else f"torch ({why_not})")
    return " | ".join(dict.fromkeys(names)) or "none"


def _eager(maker: StepMaker, report: CaptureReport, why: str) -> tuple[Step, CaptureReport]:
    step = maker.uncaptured()
    report.rung, report.why, report.threads = "eager", why, torch.get_num_threads()
    said = report.tail.replace(" behind a captured piece", "")
    report.tail = said if updates_fused(step) or (maker.options.capture == "auto" and said.startswith("torch (")) else "torch"
    return step, report


def _traced(
    maker: StepMaker, report: CaptureReport, batch: Any, why: str, build: Build | None = None, *, graph: bool = False
) -> tuple[Step, CaptureReport]:
    """Trace now, on a snapshot, so that a failure costs nothing but time; what cannot be had whole is cut in pieces."""
    build = build or Build(kernel_threads=torch.get_num_threads(), loops=not graph)
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
            return _traced(maker, report, batch, why or "no graph can be had", build)
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
        return _eager(maker, report, f"it cannot be traced whole, and its pieces are small: {why_not}")
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
    return _eager(maker, report, f"it cannot be traced whole: {report.obstacles[-1]}")


def _auto(maker: StepMaker, report: CaptureReport, batch: Any, remaining: float) -> tuple[Step, CaptureReport]:
    """What a checkpoint or this machine has decided before, else by measuring."""
    graph = maker.device is not None
    if maker.options.deterministic:
        return _traced(maker, report, batch, "deterministic: nothing is measured", graph=graph)
    if maker.decided is not None:
        build = built_as(maker.decided)
        if build is None:
            return _eager(maker, report, "as in the checkpoint")
        return _traced(maker, report, batch, "as in the checkpoint", build, graph=graph)
    key = decisions.key_for(maker.trainable.module, maker.optimizers, batch, maker.options, maker.trainable.beside())
    known = decisions.recall(key)
    if known is None:
        try:
            eager_s, threads = _time_eager(maker, batch)
        except Exception as error:  # the second of two steps, or one of many on one batch: the run itself will say what is wrong
            return _eager(maker, report, f"its steps could not be timed: {obstacle_from(error)}")
        known = {"eager_us": eager_s * 1e6, "eager_threads": threads}
        decisions.remember(key, known)
    report.timings_us = {"eager": known["eager_us"]}
    if maker.options.max_seconds is not None:
        remaining = min(remaining, maker.options.max_seconds / known["eager_us"] * 1e6)
    left_s = remaining * known["eager_us"] * 1e-6
    if "captured_us" not in known:
        return _measured(maker, report, batch, key, known, left_s, graph)
    report.timings_us["captured"] = known["captured_us"]
    report.obstacles += [Obstacle(**o) for o in known.get("obstacles", [])]
    if left_s * (1 - known["captured_us"] / known["eager_us"]) < known["warm_compile_s"]:
        torch.set_num_threads(known["eager_threads"])
        return _eager(maker, report, "measured before on this machine")
    torch.set_num_threads(known["threads"])
    return _traced(maker, report, batch, "measured before on this machine", Build(**known["build"]), graph=graph)


def _measured(
    maker: StepMaker, report: CaptureReport, batch: Any, key: str, known: dict[str, Any], left_s: float, graph: bool
) -> tuple[Step, CaptureReport]:
    """Compile when what is left can pay for it, time both rungs, keep the quicker, remember."""
    most, eager_threads = max(1, torch.get_num_threads() - maker.workers), known["eager_threads"]
    cost = (8.0 + 0.08 * len(maker.parameters())) * (len(maker.optimizers) if maker.trainable.form == "indexed" else 1)
    if left_s * SAVING < cost:
        torch.set_num_threads(eager_threads)
        return _eager(maker, report, f"the {left_s:.0f} s that eager steps would take cannot pay for compiling (about {cost:.0f} s)")
    # Where eager steps are no quicker with more threads, the fused kernels between the matrix products are too small to share.
    cpp_wrapper = not graph and left_s * 0.1 > cost and known["eager_us"] < 20_000
    build = Build(kernel_threads=eager_threads, cpp_wrapper=cpp_wrapper, loops=not graph)
    step, report = _traced(maker, report, batch, "", build, graph=graph)
    if step.rung == "eager":
        return step, report
    if wrong := other_gradients(maker, step, batch):
        _refuse(maker, report, wrong)
        obstacles = [vars(o) for o in report.obstacles]
        decisions.remember(key, known | {"captured_us": 10 * known["eager_us"], "warm_compile_s": 3.0, "obstacles": obstacles})
        torch.set_num_threads(eager_threads)
        return _eager(maker, report, wrong)
    # Side by side: what else the machine does changes within the seconds a compile takes.
    times: dict[str, float] = {}
    for _ in range(3):
        for name, one, threads in (("eager", maker.uncaptured(), eager_threads), *((f"captured/{n}", step, n) for n in sorted({1, most}))):
            torch.set_num_threads(threads)
            times[name] = min(times.get(name, math.inf), _time(maker, one, batch, 0.15) * 1e6)
    threads = most if times[f"captured/{most}"] < 0.9 * times["captured/1"] else 1
    captured = times[f"captured/{threads}"]
    report.timings_us = times
    assert report.build is not None
    decided = {"threads": threads, "build": vars(report.build), "obstacles": [vars(o) for o in report.obstacles],
               "eager_us": times["eager"], "captured_us": captured, "warm_compile_s": 3.0}  # fmt: skip
    decisions.remember(key, known | decided)
    if captured >= times["eager"]:
        torch.set_num_threads(eager_threads)
        return _eager(maker, report, "measured: eager is quicker here")
    torch.set_num_threads(threads)
    step.refresh()
    report.why, report.threads = f"measured: {times['eager'] / captured:.1f}x quicker than eager", threads
    return step, report


def _refuse(maker: StepMaker, report: CaptureReport, wrong: str) -> None:
    """A capture that was looked at and is wrong: an obstacle, or an error where it was asked for."""
    advice = "The compiler is at fault: what it makes of this step is not what the step computes."
    report.obstacles.append(Obstacle(wrong, advice=advice))
    if maker.options.capture != "auto":
        raise CaptureError(f"capture={maker.options.capture!r} cannot be had: {report.obstacles[-1]}")


def _time_eager(maker: StepMaker, batch: Any) -> tuple[float, int]:
    """Seconds of an eager step and the thread count it is best with: one, or as many as there are free cores."""
    most = max(1, torch.get_num_threads() - maker.workers)
    best: tuple[float, int] | None = None
    with _threads():
        for threads in sorted({1, most}):
            torch.set_num_threads(threads)
            seconds = _time(maker, maker.uncaptured(), batch)
            # More threads must win clearly: they lose far more than they gain when another process wants a core.
            if best is None or seconds < 0.8 * best[0]:
                best = (seconds, threads)
    assert best is not None
    return best


@contextmanager
def settings(options: Options) -> Any:
    """Torch's global settings for one run: seed, determinism, anomaly mode; threads are put back after."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    if options.seed is not None:
        seed_everything(options.seed)
    if options.deterministic:
        torch.use_deterministic_algorithms(True)
    try:
        with torch.autograd.set_detect_anomaly(options.detect_anomaly):  # off, too: as in Lightning, whatever a library has set
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


def seed_everything(seed: int) -> int:
    """Seed python, numpy if it was imported, torch, and through torch the loader workers. Returns the seed."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return seed


@contextmanager
def _threads() -> Any:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _time(maker: StepMaker, step: Step, batch: Any, budget_s: float = 0.4) -> float:
    """Least seconds of a whole step over a few, from a snapshot that is put back."""
    before = maker.snapshot()
    step.refresh()
    tried(step, True)
    best, end = float("inf"), time.perf_counter() + budget_s
    try:
        with maker.trial():
            for i in range(20):
                given = copied(batch)
                started = time.perf_counter()
                step.micro_step(given, i, first=True, last=True, divisor=1, opened=1)
                if not step.takes_closure:
                    step.update_step(1.0)
                if maker.spec.device.type == "cuda":
                    torch.cuda.synchronize()
                now = time.perf_counter()
                best = min(best, now - started) if i else best
                if now > end and i >= 2:
                    break
    finally:
        tried(step, False)
        before.restore()
    return best
