"""What ``auto`` decides: by a checkpoint, by what this machine has measured before, else by measuring."""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from typing import Any

import torch

from fasttrain.graphs import decisions
from fasttrain.graphs.ahead import Ahead, can_compile_ahead
from fasttrain.graphs.contract import copied
from fasttrain.graphs.explain import obstacle_from
from fasttrain.graphs.look import other_gradients
from fasttrain.graphs.maker import StepMaker, tried
from fasttrain.graphs.products import products
from fasttrain.graphs.rungs import eager, refuse, traced
from fasttrain.graphs.step import Step
from fasttrain.results import Build, CaptureReport, Obstacle

LONG = 6  # times what compiling is expected to take: from here on a run does not wait for it
SAVING = 0.3  # the least share of an eager step that compiling is expected to save when nothing was measured yet


def built_as(decided: dict[str, Any]) -> Build | None:
    """How the saved run had compiled its step; None when it ran eagerly."""
    return Build(**decided["build"]) if decided["build"] is not None else None


def choose(
    maker: StepMaker, report: CaptureReport, batch: Any, remaining: float, may_wait: bool, mid_window: bool
) -> tuple[Step, CaptureReport]:
    """What a checkpoint or this machine has decided before, else by measuring.

    ``may_wait``: it may be the eager step for now, with ``maker.ahead`` saying from which batch on this is asked again;
    a window that is open is ended by the step that opened it.
    """
    graph = maker.device is not None
    if maker.options.deterministic:
        return traced(maker, report, batch, "deterministic: nothing is measured", graph=graph)
    until: Any = None if maker.decided is None else maker.decided.get("from")
    if maker.decided is not None and until is None:
        build = built_as(maker.decided)
        if build is None:
            return eager(maker, report, "as in the checkpoint")
        return traced(maker, report, batch, "as in the checkpoint", build, graph=graph)
    if maker.decided is not None:
        maker.decided, may_wait = None, may_wait and (until > maker.seen() or mid_window)
        torch.set_num_threads(maker.threads)
    key = decisions.key_for(maker.trainable.module, maker.optimizers, batch, maker.options, maker.trainable.beside())
    known = decisions.recall(key)
    if known is None:
        try:
            eager_s, threads = _time_eager(maker, batch)
        except Exception as error:  # the second of two steps, or one of many on one batch: the run itself will say what is wrong
            return eager(maker, report, f"its steps could not be timed: {obstacle_from(error)}")
        known = {"eager_us": eager_s * 1e6, "eager_threads": threads, "steps_to_compile": math.ceil(_cost(maker) / eager_s)}
        decisions.remember(key, known)
    report.timings_us = {"eager": known["eager_us"]}
    if maker.options.max_seconds is not None:
        remaining = min(remaining, maker.options.max_seconds / known["eager_us"] * 1e6)
    if may_wait and (until is not None or _waits(maker, known, remaining)):
        return _begin(maker, report, batch, key, known, remaining, until)
    left_s = remaining * known["eager_us"] * 1e-6
    if "captured_us" not in known:
        return _measured(maker, report, batch, key, known, remaining, graph)
    report.timings_us["captured"] = known["captured_us"]
    report.obstacles += [Obstacle(**o) for o in known.get("obstacles", [])]
    gained_s = left_s * (1 - known["captured_us"] / known["eager_us"])
    if gained_s <= 0 or (remaining * SAVING < known["steps_to_compile"] and gained_s < known["warm_compile_s"]):
        torch.set_num_threads(known["eager_threads"])
        return eager(maker, report, "measured before on this machine")
    torch.set_num_threads(known["threads"])
    return traced(maker, report, batch, "measured before on this machine", Build(**known["build"]), graph=graph)


def _cost(maker: StepMaker) -> float:
    """About how many seconds compiling takes the first time."""
    return (8.0 + 0.08 * len(maker.parameters())) * (len(maker.optimizers) if maker.trainable.form == "indexed" else 1)


def _waits(maker: StepMaker, known: dict[str, Any], remaining: float) -> bool:
    """Is the run long enough to begin with eager steps while it is compiled, and may it? One that did begins so again."""
    long = remaining > LONG * known["steps_to_compile"]
    undecided = known.get("captured_us", 0.0) < known["eager_us"]
    return long and (undecided or "begun" in known) and can_compile_ahead(maker.trainable.module, maker.options, maker.spec.device)


def _begin(
    maker: StepMaker, report: CaptureReport, batch: Any, key: str, known: dict[str, Any], remaining: float, until: int | None
) -> tuple[Step, CaptureReport]:
    """Eager steps for now, as many as would take the time that compiling is expected to take; it is compiled beside them."""
    known = {"build": vars(_build(maker, known, remaining)), "begun": True, **known}
    decisions.remember(key, known)
    batch, build = copied(batch), Build(**known["build"])

    def work() -> None:
        maker.say = lambda line: None
        traced(maker, CaptureReport(), batch, "", build)

    at = maker.seen() + known["steps_to_compile"] if until is None else until
    given = maker.trainable.module, maker.options, maker.spec.device
    wanted = known.get("captured_us", 0.0) < known["eager_us"] and can_compile_ahead(*given)
    threads = torch.get_num_threads()
    maker.ahead = Ahead(at, threads, work if wanted else None)
    torch.set_num_threads(max(1, min(known["eager_threads"], threads - 1)))
    return eager(maker, report, f"it is compiled beside the first steps; from batch {at} of the run on the quicker one is taken")


def _build(maker: StepMaker, known: dict[str, Any], remaining: float) -> Build:
    # Where eager steps are no quicker with more threads, the fused kernels between the matrix products are too small to share.
    graph = maker.device is not None
    cpp_wrapper = not graph and remaining * 0.1 > known["steps_to_compile"] and known["eager_us"] < 20_000
    return Build(kernel_threads=known["eager_threads"], cpp_wrapper=cpp_wrapper, **products(graph))


def _measured(
    maker: StepMaker, report: CaptureReport, batch: Any, key: str, known: dict[str, Any], remaining: float, graph: bool
) -> tuple[Step, CaptureReport]:
    """Compile when what is left can pay for it, time both rungs, keep the quicker, remember."""
    most, eager_threads = max(1, torch.get_num_threads() - maker.workers), known["eager_threads"]
    if remaining * SAVING < known["steps_to_compile"]:
        torch.set_num_threads(eager_threads)
        left_s, cost = remaining * known["eager_us"] * 1e-6, _cost(maker)
        return eager(maker, report, f"the {left_s:.0f} s that eager steps would take cannot pay for compiling (about {cost:.0f} s)")
    build = Build(**known["build"]) if "build" in known else _build(maker, known, remaining)
    step, report = traced(maker, report, batch, "", build, graph=graph)
    if step.rung == "eager":
        return step, report
    if wrong := other_gradients(maker, step, batch):
        refuse(maker, report, wrong)
        obstacles = [vars(o) for o in report.obstacles]
        decisions.remember(key, known | {"captured_us": 10 * known["eager_us"], "warm_compile_s": 3.0, "obstacles": obstacles})
        torch.set_num_threads(eager_threads)
        return eager(maker, report, wrong)
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
        return eager(maker, report, "measured: eager is quicker here")
    torch.set_num_threads(threads)
    step.refresh()
    report.why, report.threads = f"measured: {times['eager'] / captured:.1f}x quicker than eager", threads
    return step, report


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
