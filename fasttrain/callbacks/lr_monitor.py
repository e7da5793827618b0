"""LearningRateMonitor: tells the loggers the learning rate (momentum, weight decay) of every parameter group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fasttrain.callbacks.callback import Callback
from fasttrain.callbacks.trainer_view import TrainerView
from fasttrain.errors import OptionError, reject


@dataclass(frozen=True, kw_only=True)
class _Named:
    """One optimizer, the names of its groups, and when its scheduler moves (None without one)."""

    optimizer: Any
    names: tuple[str, ...]
    interval: str | None


class LearningRateMonitor(Callback):
    """Logs every lr under its scheduler's name, else `lr-<Optimizer>`; `/pg1`, `/pg2` or the group's name with several.

    `logging_interval` "step", "epoch", or None: each as often as its scheduler moves. Steps are logged every
    `log_every_n_steps`.

    Attributes:
        lrs: name -> the values logged so far.
        last_momentum_values, last_weight_decay_values: name -> the newest value.

    Raises:
        OptionError: a wrong interval, no logger, or two groups of one optimizer with the same name.
    """

    def __init__(
        self,
        logging_interval: Literal["step", "epoch"] | None = None,
        log_momentum: bool = False,
        log_weight_decay: bool = False,
    ) -> None:
        if logging_interval not in (None, "step", "epoch"):
            wanted = '"step", "epoch" or None'
            then = "Say when to log."
            raise OptionError(reject("LearningRateMonitor(logging_interval)", repr(logging_interval), wanted, then))
        self.logging_interval = logging_interval
        self.log_momentum = log_momentum
        self.log_weight_decay = log_weight_decay
        self.lrs: dict[str, list[float]] = {}
        self.last_momentum_values: dict[str, float] = {}
        self.last_weight_decay_values: dict[str, float] = {}
        self._logged_step = -1

    @property
    def idle_hooks(self) -> frozenset[str]:
        return frozenset({"on_train_batch_start"}) if self.logging_interval == "epoch" else frozenset()

    def on_train_start(self, trainer: TrainerView, pl_module: Any) -> None:
        if not trainer.loggers and not trainer.fast_dev_run:
            then = "Give logger=True, or leave this callback out."
            raise OptionError(reject("LearningRateMonitor", "a run without a logger", "at least one logger", then))
        self.lrs.clear()
        self.lrs.update({name: [] for named in _optimizers(trainer) for name in named.names})
        self._logged_step = -1

    def on_train_batch_start(self, trainer: TrainerView, pl_module: Any, batch: Any, batch_idx: int) -> None:
        every, step = trainer.log_every_n_steps, trainer.global_step
        due = every > 0 and (step + 1) % every == 0 and step != self._logged_step
        if due and self.logging_interval != "epoch":
            self._logged_step = step  # the batches of one accumulated step are one
            self._log(trainer, "step" if self.logging_interval is None else None)

    def on_train_epoch_start(self, trainer: TrainerView, pl_module: Any) -> None:
        if self.logging_interval != "step":
            self._log(trainer, "epoch" if self.logging_interval is None else None)

    def _log(self, trainer: TrainerView, interval: str | None) -> None:
        values: dict[str, float] = {}
        for named in _optimizers(trainer):
            if interval is None or named.interval in (interval, None):
                values.update(self._read(named))
        if values and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)

    def _read(self, named: _Named) -> dict[str, float]:
        """Host reads where lr is a device tensor: once per logged step."""
        values: dict[str, float] = {}
        for name, group in zip(named.names, named.optimizer.param_groups, strict=True):
            values[name] = float(group["lr"])
            self.lrs.setdefault(name, []).append(values[name])
            if self.log_momentum:
                momentum = float(group["betas"][0] if "betas" in group else group.get("momentum", 0.0))
                values[f"{name}-momentum"] = self.last_momentum_values[f"{name}-momentum"] = momentum
            if self.log_weight_decay:
                decay = float(group.get("weight_decay", 0.0))
                values[f"{name}-weight_decay"] = self.last_weight_decay_values[f"{name}-weight_decay"] = decay
        return values


def _optimizers(trainer: TrainerView) -> Iterator[_Named]:
    """Those with a scheduler first, in its order, then the others; equal classes are counted: -1, -2."""
    seen: list[Any] = []
    count: defaultdict[type, int] = defaultdict(int)
    for config in trainer.lr_scheduler_configs:
        optimizer = config.scheduler.optimizer
        seen.append(optimizer)
        yield _named(optimizer, config.name, config.interval, count)
    for wrapped in trainer.optimizers:
        optimizer = getattr(wrapped, "optimizer", wrapped)
        if not any(optimizer is other for other in seen):
            seen.append(optimizer)
            yield _named(optimizer, None, None, count)


def _named(optimizer: Any, name: str | None, interval: str | None, count: defaultdict[type, int]) -> _Named:
    kind = type(optimizer)
    if name is None:
        count[kind] += 1
        name = f"lr-{kind.__name__}"
    if count[kind] > 1:
        name = f"{name}-{count[kind] - 1}"
    return _Named(optimizer=optimizer, names=_group_names(name, optimizer.param_groups), interval=interval)


def _group_names(name: str, groups: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    own = [group.get("name") for group in groups]
    if len(groups) == 1:
        return (f"{name}/{own[0]}" if own[0] else name,)
    names = tuple(f"{name}/{given or f'pg{i}'}" for i, given in enumerate(own, start=1))
    if len(set(names)) != len(names):
        then = "Give each parameter group its own `name`."
        raise OptionError(reject(f"the parameter groups of {name}", ", ".join(names), "different names", then))
    return names
