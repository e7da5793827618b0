"""Picks the rung, checks it, and is the only place that changes a global setting of torch."""

from __future__ import annotations

import random
import sys
from contextlib import contextmanager
from typing import Any

import torch

from fasttrain.errors import CaptureError, DataError, FasttrainError
from fasttrain.graphs import auto
from fasttrain.graphs.contract import copied, describe
from fasttrain.graphs.device_tail import DeviceTail
from fasttrain.graphs.explain import AROUND, BETWEEN, gradient_hooks, hook_obstacles
from fasttrain.graphs.look import look, other_gradients
from fasttrain.graphs.maker import StepMaker
from fasttrain.graphs.rungs import eager, refuse, traced
from fasttrain.graphs.script import ScriptStep
from fasttrain.graphs.step import Step
from fasttrain.graphs.tail import owns_zero_grad, tail_obstacle, trainable_params
from fasttrain.graphs.verify import verified
from fasttrain.options import Options
from fasttrain.results import CaptureReport, Obstacle


def as_decided(maker: StepMaker, decided: dict[str, Any] | None) -> None:
    """A resumed run computes with the threads, and later takes the rung, that the saved one had chosen."""
    maker.decided = decided
    if decided is not None:
        torch.set_num_threads(decided["threads"])


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


def capture_step(
    maker: StepMaker, batch: Any, remaining_steps: float, *, may_wait: bool = False, mid_window: bool = False
) -> tuple[Step, CaptureReport]:
    """The highest rung that works and pays, with the report that says which and why.

    ``may_wait``: it may be the eager one for now, with ``maker.ahead`` saying from which batch on it is to be asked again.
    Raises CaptureError when a rung was named and cannot be had.
    """
    ahead, maker.ahead = maker.ahead, None
    if ahead is not None:
        if not ahead.wait(maker.say, maker.stopped):  # the last batch of this run; a resumed one captures the next
            maker.ahead = ahead
            return eager(maker, CaptureReport(), "the run was ended while it waited for the compiler")
        torch.set_num_threads(ahead.threads)
    step, report = _choose(maker, batch, remaining_steps, may_wait and ahead is None, mid_window)
    if not maker.options.verify and maker.decided is None and not report.timings_us and (wrong := other_gradients(maker, step, batch)):
        refuse(maker, report, wrong)
        step, report = eager(maker, report, wrong)
    if isinstance(step, ScriptStep):
        step.take_gradients()
    if maker.options.verify and step.rung != "eager":
        return verified(maker, step, report), report
    return step, report


def _choose(maker: StepMaker, batch: Any, remaining_steps: float, may_wait: bool, mid_window: bool) -> tuple[Step, CaptureReport]:
    wanted, device = maker.options.capture, maker.spec.device.type
    report = CaptureReport(tail=_tail_name(maker), threads=torch.get_num_threads())
    report.obstacles = obstacles_of(maker)
    if wanted == "graph" and maker.device is None:
        raise CaptureError(f"capture='graph' needs a CUDA device; this run is on {device}. Use capture='auto' or 'compile'.")
    if wanted == "eager":
        return eager(maker, report, "asked for")
    if report.obstacles:
        if wanted != "auto":
            raise CaptureError(f"capture={wanted!r} cannot be had:\n" + "\n".join(f"  - {o}" for o in report.obstacles))
        return eager(maker, report, str(report.obstacles[0]))
    if wanted != "auto":
        return traced(maker, report, batch, "asked for", graph=wanted == "graph")
    return auto.choose(maker, report, batch, remaining_steps, may_wait, mid_window)


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
