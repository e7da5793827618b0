"""What modules and callbacks read as ``self.trainer``: one run's state, its metrics, and the few things they may ask for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fasttrain.entries import check_entry, check_place
from fasttrain.errors import ModuleError
from fasttrain.graphs.tail import clip_gradients
from fasttrain.module import Trainable
from fasttrain.options import Options
from fasttrain.results import LogKey, MetricStore, MetricView, reduce_named, to_floats
from fasttrain.state import Progress
from fasttrain.step_result import MONITORED, evaluation_wins


@dataclass(kw_only=True)
class SchedulerConfig:
    """One learning-rate scheduler and when it moves."""

    scheduler: Any
    interval: str = "epoch"  # "epoch" | "step"
    frequency: int = 1
    monitor: str | None = None
    strict: bool = True
    reduce_on_plateau: bool = False
    name: str | None = None
    opt_idx: int = 0  # which of the optimizers it moves


@dataclass
class RunState:
    """Which entry point runs (``fn``) and what it is doing (``stage``)."""

    fn: str | None = None
    stage: str | None = None


class Strategy:
    """What older modules ask ``self.trainer.strategy`` for; one device, one process."""

    root_device: torch.device
    world_size = 1
    is_global_zero = True
    global_rank = 0
    local_rank = 0

    def __init__(self, device: torch.device) -> None:
        self.root_device = device
        self._lightning_optimizers: list[torch.optim.Optimizer] = []
        self.optimizers = self._lightning_optimizers

    def barrier(self, name: str | None = None) -> None:
        """One process: nothing to wait for."""

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor

    def all_gather(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj

    def clip_gradients(
        self, optimizer: torch.optim.Optimizer, clip_val: float | None = None, gradient_clip_algorithm: str = "norm"
    ) -> None:
        """Where a module's ``self.clip_gradients`` ends."""
        clip_gradients(optimizer, clip_val, gradient_clip_algorithm)


class TrainerFacade:
    """A run as its module and callbacks see it; names are Lightning's."""

    def __init__(self, options: Options, trainable: Trainable, device: torch.device) -> None:
        self.options, self._trainable = options, trainable
        self.progress = Progress()
        self.state = RunState()
        self.strategy = Strategy(device)
        self.should_stop = False
        self.sanity_checking = False
        self.callbacks: list[Any] = []
        self.loggers: list[Any] = []
        self.lr_scheduler_configs: list[SchedulerConfig] = []
        self.datamodule: Any = None
        self.train_dataloader: Any = None
        self.val_dataloaders: Any = None
        self.num_training_batches: float = math.inf
        self.num_val_batches: list[float] = []
        self.default_root_dir = str(options.default_root_dir)
        self.log_dir = self.default_root_dir
        self.capture: Any = None
        self.train_store, self.eval_store = MetricStore(), MetricStore()
        self.epoch_ended = False
        self.log_on_step = False  # inside a training batch's hooks self.log means this step
        self.last_batch_size = 1
        self.dataloader_suffix = ""  # inside a batch's hooks, when several loaders are evaluated
        self._known = MetricView()
        self._stamps: dict[str, int] = {}
        self.taken: Callable[[], int] | None = None  # manual optimization: steps of the batch that is being trained
        self.write_checkpoint: Callable[[Path, bool], Path] | None = None

    # -- counts -------------------------------------------------------------------------------------------------
    @property
    def global_step(self) -> int:
        return self.progress.global_step + (0 if self.taken is None else self.taken())

    @property
    def current_epoch(self) -> int:
        return self.progress.epoch

    @property
    def batch_idx(self) -> int:
        return self.progress.batch_idx

    @property
    def max_epochs(self) -> int:
        return self.options.max_epochs

    @property
    def min_epochs(self) -> int:
        return self.options.min_epochs

    @property
    def max_steps(self) -> int:
        return self.options.max_steps

    @property
    def min_steps(self) -> int:
        return self.options.min_steps

    @property
    def accumulate_grad_batches(self) -> int:
        return self.options.window(self.progress.epoch)

    @property
    def estimated_stepping_batches(self) -> float:
        """Optimizer steps the whole fit will take; ``inf`` when nothing bounds it."""
        options = self.options
        if math.isinf(self.num_training_batches) or options.max_epochs == -1:
            return options.max_steps if options.max_steps != -1 else math.inf
        steps = sum(math.ceil(self.num_training_batches / options.window(e)) for e in range(options.max_epochs))
        return min(steps, options.max_steps) if options.max_steps != -1 else steps

    # -- stage --------------------------------------------------------------------------------------------------
    @property
    def training(self) -> bool:
        return self.state.stage == "train"

    @property
    def validating(self) -> bool:
        return self.state.stage == "validate" and not self.sanity_checking

    @property
    def testing(self) -> bool:
        return self.state.stage == "test"

    @property
    def predicting(self) -> bool:
        return self.state.stage == "predict"

    @property
    def fast_dev_run(self) -> int:
        return self.options.fast_dev_run

    @property
    def precision(self) -> str:
        return self.options.precision

    @property
    def precision_plugin(self) -> Strategy:
        return self.strategy

    @property
    def gradient_clip_val(self) -> float | None:
        return self.options.gradient_clip_val

    @property
    def gradient_clip_algorithm(self) -> str | None:
        return None if self.options.gradient_clip_val is None else self.options.gradient_clip_algorithm

    @property
    def log_every_n_steps(self) -> int:
        return self.options.log_every_n_steps

    @property
    def val_check_interval(self) -> Any:
        return self.options.val_check_interval if self.options.val_check_seconds is None else f"{self.options.val_check_seconds}s"

    @property
    def check_val_every_n_epoch(self) -> int | None:
        return self.options.check_val_every_n_epoch

    @property
    def val_every_n_steps(self) -> int | None:
        return self.options.val_every_n_steps

    @property
    def barebones(self) -> bool:
        return self.options.barebones

    @property
    def track_grad_norm(self) -> float | None:
        return self.options.track_grad_norm

    @property
    def reload_dataloaders_every_n_epochs(self) -> int:
        return self.options.reload_dataloaders_every_n_epochs

    @property
    def val_enabled(self) -> bool:
        return bool(self.num_val_batches) and sum(self.num_val_batches) > 0

    @property
    def enable_validation(self) -> bool:
        return self.val_enabled

    # -- parts --------------------------------------------------------------------------------------------------
    @property
    def lightning_module(self) -> Any:
        return self._trainable.module

    @property
    def model(self) -> Any:
        return self._trainable.module

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return self.strategy.optimizers

    @optimizers.setter
    def optimizers(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.strategy.optimizers = list(optimizers)

    @property
    def logger(self) -> Any:
        return self.loggers[0] if self.loggers else None

    @property
    def world_size(self) -> int:
        return self.strategy.world_size

    @property
    def global_rank(self) -> int:
        return 0

    @property
    def local_rank(self) -> int:
        return 0

    @property
    def node_rank(self) -> int:
        return 0

    @property
    def num_devices(self) -> int:
        return 1

    @property
    def num_nodes(self) -> int:
        return 1

    @property
    def is_global_zero(self) -> bool:
        return True

    @property
    def is_last_batch(self) -> bool:
        return self.progress.batch_idx + 1 >= self.num_training_batches

    @property
    def progress_bar_callback(self) -> None:
        return None

    @property
    def checkpoint_callbacks(self) -> list[Any]:
        return [c for c in self.callbacks if hasattr(c, "best_model_path")]

    @property
    def checkpoint_callback(self) -> Any:
        return next(iter(self.checkpoint_callbacks), None)

    @property
    def early_stopping_callback(self) -> Any:
        return next((c for c in self.callbacks if type(c).__name__ == "EarlyStopping"), None)

    def save_checkpoint(self, path: str | Path, weights_only: bool = False, **_: Any) -> Path:
        """Write a whole checkpoint directory at ``path``, or nothing; returns where it is."""
        if self.write_checkpoint is None:
            raise ModuleError("save_checkpoint: nothing is being trained yet; call it from a hook, or after fit().")
        return self.write_checkpoint(Path(path), weights_only)

    @property
    def fit_loop(self) -> SimpleNamespace:
        """The few things that libraries look up in Lightning's own loops; read only."""
        source = SimpleNamespace(is_defined=lambda: self.val_dataloaders is not None)
        epoch_loop = SimpleNamespace(
            batch_idx=self.batch_idx,
            total_batch_idx=self.progress.batches_seen,
            global_step=self.global_step,
            val_loop=SimpleNamespace(_data_source=source),
        )
        return SimpleNamespace(epoch_loop=epoch_loop, max_epochs=self.max_epochs, min_epochs=self.min_epochs)

    # -- metrics ------------------------------------------------------------------------------------------------
    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """Every metric, current at this point, as 0-d tensors. Nothing is computed until somebody looks."""
        return evaluation_wins({**self._known.callback, **self._now().callback})

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        return {**self._known.logged, **self._now().logged}

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        return to_floats({**self._known.bar, **self._now().bar})

    def metric_step(self, name: str) -> int | None:
        """The global_step at which this metric was last updated; None when it never was."""
        now = self._now().callback
        if name in MONITORED and (f"val_{name}" in now or f"val_{name}" in self._stamps):
            name = f"val_{name}"
        return self.progress.global_step if name in now else self._stamps.get(name)

    def _now(self) -> MetricView:
        view = self.train_store.at_step()
        evaluating = self.state.stage in ("validate", "test", "predict")
        if self.epoch_ended:
            end = (self.eval_store if evaluating else self.train_store).at_epoch_end()
            for mine, theirs in ((view.callback, end.callback), (view.logged, end.logged), (view.bar, end.bar)):
                mine.update(theirs)
        return view

    def keep(self, view: MetricView) -> None:
        """Metrics that stay readable after their store is reset."""
        self._known.callback.update(view.callback)
        self._known.logged.update(view.logged)
        self._known.bar.update(view.bar)
        self._stamps.update(dict.fromkeys(view.callback, self.progress.global_step))

    @contextmanager
    def metrics_put_back(self) -> Iterator[None]:
        """What is kept within can be read within, and is forgotten after."""
        view, stamps = self._known, self._stamps
        self._known, self._stamps = MetricView(dict(view.callback), dict(view.logged), dict(view.bar)), dict(stamps)
        try:
            yield
        finally:
            self._known, self._stamps = view, stamps

    def restore_known(self, metrics: Mapping[str, Tensor]) -> None:
        """After a resume: metrics stay readable as they were."""
        self._known.callback.update(metrics)

    def send(self, metrics: Mapping[str, Tensor], step: int) -> None:
        """Host read: hand metrics to every logger, with the epoch beside them."""
        if not metrics or not self.loggers:
            return
        floats = {**to_floats(metrics), "epoch": float(self.progress.epoch)}
        for logger in self.loggers:
            logger.log_metrics(floats, step=step)

    def log_outside(self, name: str, value: Any, how: Mapping[str, Any]) -> None:
        """``self.log`` from a hook: into the stage's store, with that hook's defaults."""
        on_step, hook = self.log_on_step, self._trainable.sink.hook
        check_entry(name, value, how["add_dataloader_idx"])
        evaluating = self.state.stage in ("validate", "test")
        step = how["on_step"] if how["on_step"] is not None else on_step
        epoch = how["on_epoch"] if how["on_epoch"] is not None else not on_step
        check_place(name, hook, on_step=step, on_epoch=epoch)
        name += self.dataloader_suffix if how["add_dataloader_idx"] else ""
        key = LogKey(name, how["prog_bar"], how["logger"], step, epoch, reduce_named(how["reduce_fx"]), how["batch_size"])
        store = self.eval_store if evaluating else self.train_store
        store.log(key, value, self.last_batch_size if on_step or evaluating else 1, hook)

    def set_optimizers(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.strategy.optimizers[:] = optimizers
