"""Optimizers and schedulers: every form configure_optimizers may return, checked, and when a scheduler moves."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fasttrain.errors import FasttrainWarning, ModuleError, reject
from fasttrain.facade import SchedulerConfig
from fasttrain.run import Run

FORMS = "an optimizer, ([optimizer], [scheduler]) or {'optimizer': ..., 'lr_scheduler': ...}"
KEYS = ("scheduler", "interval", "frequency", "monitor", "strict", "reduce_on_plateau", "name")


def parse_optimizers(returned: Any) -> tuple[Optimizer, list[SchedulerConfig]]:
    """The one optimizer and its schedulers out of what ``configure_optimizers`` returned."""
    what = "what configure_optimizers returned"
    if returned is None:
        raise ModuleError(reject(what, None, FORMS, "Return the optimizer you built."))
    optimizers, schedulers, monitor = _split(returned, what)
    if len(optimizers) != 1:
        raise ModuleError(
            reject(
                what,
                f"{len(optimizers)} optimizers",
                "one optimizer",
                "Several optimizers are not trained by this version; "
                "put the parameters into groups of one optimizer where the algorithm allows.",
            )
        )
    if not isinstance(optimizers[0], Optimizer) and not hasattr(optimizers[0], "param_groups"):
        raise ModuleError(reject(what, type(optimizers[0]).__name__, FORMS, "Return a torch.optim.Optimizer."))
    configs = [_config(s, monitor) for s in schedulers if s is not None]
    for config in configs:
        moved = getattr(config.scheduler, "optimizer", optimizers[0])
        if isinstance(moved, Optimizer) and moved is not optimizers[0]:
            name = type(config.scheduler).__name__
            raise ModuleError(reject("lr_scheduler", f"a {name} of another optimizer", "one of the optimizer that is returned",
                                     f"It would move nothing: build {name}(optimizer, ...) over that optimizer."))  # fmt: skip
    return optimizers[0], configs


def check_parameters(optimizer: Optimizer, module: nn.Module) -> None:
    """Raise ModuleError when the optimizer holds nothing of this module, or nothing that trains."""
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
    if not any(p.requires_grad for p in held):
        raise ModuleError(f"no parameter of the optimizer trains: all {len(held)} have requires_grad=False. Unfreeze at least one.")


def step_schedulers(run: Run, configs: Sequence[SchedulerConfig], count: int) -> None:
    """Move the schedulers that are due at this ``count`` (steps or epochs, by their interval)."""
    for config in configs:
        if count % config.frequency:
            continue
        metric = _monitored(run, config) if config.reduce_on_plateau else None
        if config.reduce_on_plateau and metric is None:
            continue
        if "lr_scheduler_step" in run.trainable.hooks:
            run.trainable.call("lr_scheduler_step", config.scheduler, metric)
        elif config.reduce_on_plateau:
            config.scheduler.step(metric)
        else:
            config.scheduler.step()


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


def _split(returned: Any, what: str) -> tuple[list[Any], list[Any], str | None]:
    if isinstance(returned, Mapping):
        if "optimizer" not in returned:
            raise ModuleError(reject(what, f"a dict with keys {sorted(returned)}", FORMS, "Give it the key 'optimizer'."))
        unknown = sorted(str(k) for k in returned if k not in ("optimizer", "lr_scheduler", "monitor", "frequency"))
        if unknown:
            message = f"{what}: got keys {unknown} that nobody reads; wanted 'optimizer', 'lr_scheduler', 'monitor'. Correct the keys."
            warnings.warn(message, FasttrainWarning, stacklevel=5)
        scheduler = returned.get("lr_scheduler")
        many = list(scheduler) if isinstance(scheduler, (list, tuple)) else [scheduler]
        return [returned["optimizer"]], many, returned.get("monitor")
    if isinstance(returned, (list, tuple)):
        if len(returned) == 2 and isinstance(returned[0], (list, tuple)):
            return list(returned[0]), list(returned[1] or []), None
        if returned and all(isinstance(r, Mapping) for r in returned):
            parts = [_split(r, what) for r in returned]
            return [o for p in parts for o in p[0]], [s for p in parts for s in p[1]], parts[0][2]
        return list(returned), [], None
    return [returned], [], None


def _config(scheduler: Any, monitor: str | None) -> SchedulerConfig:
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
    if made.reduce_on_plateau and made.monitor is None:
        raise ModuleError(
            "ReduceLROnPlateau without a monitor: say which metric it watches, {'scheduler': scheduler, 'monitor': 'val_loss'}."
        )
    return made
