"""Optimizers and schedulers: every form configure_optimizers may return, checked, and when a scheduler moves."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fasttrain.errors import FasttrainWarning, ModuleError, reject
from fasttrain.facade import SchedulerConfig
from fasttrain.forms import Form
from fasttrain.graphs.tail import frozen
from fasttrain.run import Run

FORMS = "an optimizer, several, ([optimizers], [schedulers]) or {'optimizer': ..., 'lr_scheduler': ...}"
KEYS = ("scheduler", "interval", "frequency", "monitor", "strict", "reduce_on_plateau", "name", "opt_idx")


class NoOptimizer(Optimizer):
    """Stands where a module wants none: it holds nothing and updates nothing."""

    def __init__(self) -> None:
        super().__init__([torch.zeros(0)], {})

    def step(self, closure: Any = None) -> Any:
        return None if closure is None else closure()


class Parsed(NamedTuple):
    """What ``configure_optimizers`` returned."""

    optimizers: list[Optimizer]
    frequencies: list[int] | None  # batches in a row that each owns; None: every optimizer has every batch
    schedulers: list[SchedulerConfig]


def parse_optimizers(returned: Any, form: Form) -> Parsed:
    """The optimizers, whose turn is when, and the schedulers out of what ``configure_optimizers`` returned."""
    what = "what configure_optimizers returned"
    if returned is None and form == "manual":
        return Parsed([NoOptimizer()], None, [])
    if returned is None:
        told = f"configure_optimizers returned None: the steps run and nothing is updated. Return {FORMS}."
        warnings.warn(told, FasttrainWarning, stacklevel=4)
        return Parsed([NoOptimizer()], None, [])
    optimizers, schedulers, frequencies = _split(returned, what)
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer) and not hasattr(optimizer, "param_groups"):
            raise ModuleError(reject(what, type(optimizer).__name__, FORMS, "Return a torch.optim.Optimizer."))
    if not optimizers:
        raise ModuleError(reject(what, "no optimizer", FORMS, "Return the optimizer you built."))
    if len(optimizers) > 1 and form == "single":
        raise ModuleError(
            reject(what, f"{len(optimizers)} optimizers, and a training_step that returns one loss", "a loss for each",
                   "Take the turn as an argument, training_step(self, batch, batch_idx, optimizer_idx); or yield one loss for each; "
                   "or set self.automatic_optimization = False and step them yourself.")
        )  # fmt: skip
    if form == "generator" and any(isinstance(o, torch.optim.LBFGS) for o in optimizers):
        raise ModuleError(reject(what, "LBFGS, and a training_step that yields", "optimizers that step once a loss",
                                 "LBFGS asks for its loss again: take optimizer_idx instead of yielding, or step it by hand."))  # fmt: skip
    return Parsed(optimizers, _frequencies(frequencies, form), [_config(s, m, optimizers, form) for s, m in schedulers if s is not None])


def _frequencies(given: list[Any], form: Form) -> list[int] | None:
    if all(f is None for f in given) or len(given) < 2:
        return None
    if form != "indexed":
        raise ModuleError(reject("frequency", given, "none in this form of training_step",
                                 "It says whose turn a batch is: take optimizer_idx, or leave frequency out."))  # fmt: skip
    if any(isinstance(f, bool) or not isinstance(f, int) or f < 1 for f in given):
        raise ModuleError(reject("frequency", given, "an integer >= 1 for every optimizer, or for none", "E.g. 5 and 1 for a WGAN."))
    return given


def check_parameters(optimizer: Optimizer, module: nn.Module, *, may_wait: bool) -> None:
    """Raise ModuleError when an optimizer holds nothing of this module, or nothing that trains (and it may not wait for its time)."""
    if isinstance(optimizer, NoOptimizer):
        return
    mine = {id(p) for p in module.parameters()}
    held = [p for g in optimizer.param_groups for p in g["params"]]
    name = type(module).__name__
    if not mine:
        raise ModuleError(f"{name} has no parameters: there is nothing to train. Register layers as attributes or in an nn.ModuleList.")
    if not any(id(p) in mine for p in held):
        raise ModuleError(
            f"the optimizer holds {len(held)} parameters and none of them belongs to {name}: it would train another module. "
            "Build it from self.parameters() of the module you give, after replacing layers."
        )
    if not may_wait and not any(p.requires_grad for p in held):
        raise frozen(optimizer)


def step_schedulers(run: Run, configs: Sequence[SchedulerConfig], count: int) -> None:
    """Move the schedulers that are due at this ``count`` (steps or epochs, by their interval)."""
    for config in configs:
        if count % config.frequency:
            continue
        metric = _monitored(run, config) if config.reduce_on_plateau else None
        if config.reduce_on_plateau and metric is None:
            continue
        if "lr_scheduler_step" in run.trainable.hooks:
            run.trainable.call_named("lr_scheduler_step", scheduler=config.scheduler, optimizer_idx=config.opt_idx, metric=metric)
        elif config.reduce_on_plateau:
            config.scheduler.step(metric)
        else:
            config.scheduler.step()


def moved_schedulers(run: Run, configs: Sequence[SchedulerConfig], moved: Sequence[int]) -> None:
    """After an update of several optimizers: the schedulers of those that ``moved``, by each one's own count of steps."""
    steps = run.facade.progress.optimizer_steps
    steps.extend([0] * (len(moved) - len(steps)))
    for i, n in enumerate(moved):
        for _ in range(n):
            steps[i] += 1
            if configs:
                step_schedulers(run, [c for c in configs if c.opt_idx == i], steps[i])


def _monitored(run: Run, config: SchedulerConfig) -> Any:
    metrics = run.facade.callback_metrics
    assert config.monitor is not None
    if config.monitor in metrics:
        return metrics[config.monitor]
    if config.strict:
        names = ", ".join(sorted(metrics)) or "none"
        raise ModuleError(
            f"the plateau scheduler monitors {config.monitor!r}, which was never logged. The metrics are: {names}. "
            "Log it in validation_step, or set strict=False."
        )
    return None


def _split(returned: Any, what: str) -> tuple[list[Any], list[tuple[Any, str | None]], list[Any]]:
    """Optimizers, schedulers each with the monitor named beside it, and the frequency of each optimizer."""
    if isinstance(returned, Mapping):
        if "optimizer" not in returned:
            raise ModuleError(reject(what, f"a dict with keys {sorted(returned)}", FORMS, "Give it the key 'optimizer'."))
        unknown = sorted(str(k) for k in returned if k not in ("optimizer", "lr_scheduler", "monitor", "frequency"))
        if unknown:
            message = f"{what}: got keys {unknown} that nobody reads; wanted 'optimizer', 'lr_scheduler', 'monitor'. Correct the keys."
            warnings.warn(message, FasttrainWarning, stacklevel=6)
        scheduler = returned.get("lr_scheduler")
        many = list(scheduler) if isinstance(scheduler, (list, tuple)) else [scheduler]
        return [returned["optimizer"]], [(s, returned.get("monitor")) for s in many], [returned.get("frequency")]
    if isinstance(returned, (list, tuple)):
        if len(returned) == 2 and isinstance(returned[0], (list, tuple)):
            optimizers, given = list(returned[0]), returned[1]
            many = list(given or []) if isinstance(given, (list, tuple, type(None))) else [given]
            return optimizers, [(s, None) for s in many], [None] * len(optimizers)
        if returned and all(isinstance(r, Mapping) for r in returned):
            parts = [_split(r, what) for r in returned]
            return [o for p in parts for o in p[0]], [s for p in parts for s in p[1]], [f for p in parts for f in p[2]]
        return list(returned), [], [None] * len(returned)
    return [returned], [], [None]


def _config(scheduler: Any, monitor: str | None, optimizers: Sequence[Optimizer], form: Form) -> SchedulerConfig:
    given = dict(scheduler) if isinstance(scheduler, Mapping) else {"scheduler": scheduler}
    unknown = [k for k in given if k not in KEYS]
    if unknown or "scheduler" not in given:
        raise ModuleError(
            reject("lr_scheduler", f"a dict with keys {sorted(given)}", f"'scheduler' and any of {KEYS[1:]}", "Correct the keys.")
        )
    made = SchedulerConfig(**({"monitor": monitor} | given))
    if not callable(getattr(made.scheduler, "step", None)):
        raise ModuleError(
            reject("lr_scheduler", type(made.scheduler).__name__, "an object with step()", "Return a torch.optim.lr_scheduler.")
        )
    made.reduce_on_plateau |= isinstance(made.scheduler, ReduceLROnPlateau)
    if made.interval not in ("step", "epoch"):
        raise ModuleError(reject("lr_scheduler interval", repr(made.interval), "'step' or 'epoch'", "The default is 'epoch'."))
    if not isinstance(made.frequency, int) or made.frequency < 1:
        raise ModuleError(reject("lr_scheduler frequency", repr(made.frequency), "an integer >= 1", "The default is 1."))
    if made.reduce_on_plateau and made.monitor is None and form != "manual":
        raise ModuleError(
            "ReduceLROnPlateau without a monitor: say which metric it watches, {'scheduler': scheduler, 'monitor': 'val_loss'}."
        )
    moves = getattr(made.scheduler, "optimizer", None)
    found = [i for i, o in enumerate(optimizers) if o is moves]
    if isinstance(moves, Optimizer) and not found:
        name = type(made.scheduler).__name__
        raise ModuleError(reject("lr_scheduler", f"a {name} of another optimizer", "one of an optimizer that is returned",
                                 f"It would move nothing: build {name}(optimizer, ...) over that optimizer."))  # fmt: skip
    made.opt_idx = found[0] if found else 0
    return made
