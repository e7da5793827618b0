"""Adoption: Lightning's own callbacks, recognised without importing it, replaced by ours with the same settings.

The user keeps the object they made: what our counterpart finds out (best path, stopped epoch, ...) is written to it.
"""

from __future__ import annotations

import warnings
from typing import Any

from fasttrain.callbacks.early_stopping import EarlyStopping
from fasttrain.callbacks.lr_monitor import LearningRateMonitor
from fasttrain.callbacks.model_checkpoint import ModelCheckpoint
from fasttrain.callbacks.timer import Timer
from fasttrain.callbacks.top_k import Kept
from fasttrain.callbacks.trainer_view import TrainerView
from fasttrain.errors import FasttrainWarning, OptionError, reject

_HOMES = ("lightning.pytorch.callbacks.", "pytorch_lightning.callbacks.")
_DRAWN_BY_US = ("ProgressBar", "ModelSummary")
_INSTEAD = {  # of those that work on Lightning's own trainer from within
    "StochasticWeightAveraging": "Give WeightAveraging() or EMAWeightAveraging() of the same package, which work here.",
    "GradientAccumulationScheduler": "Give compile_fit(..., accumulate_grad_batches={scheduling}).",
    "LearningRateFinder": "Find the rate with Lightning's Tuner, or with a few fits of max_steps=100, and give it to the optimizer.",
    "BatchSizeFinder": "Find the size with Lightning's Tuner, or with a few fits of max_steps=3, and give it to the DataLoader.",
    "ThroughputMonitor": "The batches and seconds of a fit are in its result's ledger; while it runs the progress bar shows the pace.",
    "DeviceStatsMonitor": "Log torch.cuda.memory_stats() in on_train_batch_end of a callback of your own.",
    "OnExceptionCheckpoint": "Give ModelCheckpoint(dirpath, save_on_exception=True).",
    "BasePredictionWriter": "Write in on_predict_batch_end(trainer, module, outputs, batch, batch_idx) of a plain callback, "
    "or keep what predict() returns.",
    "SpikeDetection": "Look at the loss in on_train_batch_end of a callback of your own; nonfinite='skip' leaves bad steps out.",
}


def adopt(callback: object) -> object | None:
    """Our equivalent of a Lightning callback, None for its progress bars and summaries, else the object as it is.

    Subclasses of ModelCheckpoint, EarlyStopping, LearningRateMonitor and Timer are the user's own code: as they are.

    Raises:
        OptionError: a Lightning callback, or one derived from it, that works on parts of Lightning's trainer alone.
    """
    for cls in type(callback).__mro__:
        if cls.__module__.startswith(_HOMES) and cls.__name__ in _DRAWN_BY_US:
            _mention_own_drawing(callback)
            return None
        if cls.__module__.startswith(_HOMES) and cls.__name__ in _INSTEAD:
            then = _INSTEAD[cls.__name__].replace("{scheduling}", str(getattr(callback, "scheduling", {})))
            wanted = "a callback that works through its hooks, the module and the optimizer"
            came = f"a {type(callback).__name__}, which works on Lightning's trainer from within"
            raise OptionError(reject("callbacks", came, wanted, then))
    if not type(callback).__module__.startswith(_HOMES):
        return callback
    take = {
        "ModelCheckpoint": _model_checkpoint,
        "EarlyStopping": _early_stopping,
        "LearningRateMonitor": _lr_monitor,
        "Timer": _timer,
    }.get(type(callback).__name__)
    return take(callback) if take else callback


def _mention_own_drawing(callback: object) -> None:
    if not type(callback).__module__.startswith(_HOMES):
        message = f"{type(callback).__name__} is not used: fasttrain draws its own progress. Leave the callback out."
        warnings.warn(message, FasttrainWarning, stacklevel=3)


def _model_checkpoint(theirs: Any) -> ModelCheckpoint:
    return _EchoingModelCheckpoint(
        theirs,
        dirpath=theirs.dirpath,
        filename=theirs.filename,
        monitor=theirs.monitor,
        verbose=theirs.verbose,
        save_last=theirs.save_last,
        save_top_k=theirs.save_top_k,
        save_on_exception=theirs.save_on_exception,
        save_weights_only=theirs.save_weights_only,
        mode=theirs.mode,
        auto_insert_metric_name=theirs.auto_insert_metric_name,
        every_n_train_steps=theirs._every_n_train_steps,
        train_time_interval=theirs._train_time_interval,
        every_n_epochs=theirs._every_n_epochs,
        save_on_train_epoch_end=theirs._save_on_train_epoch_end,
        enable_version_counter=theirs._enable_version_counter,
    )


def _early_stopping(theirs: Any) -> EarlyStopping:
    return _EchoingEarlyStopping(
        theirs,
        monitor=theirs.monitor,
        min_delta=abs(theirs.min_delta),
        patience=theirs.patience,
        verbose=theirs.verbose,
        mode=theirs.mode,
        strict=theirs.strict,
        check_finite=theirs.check_finite,
        stopping_threshold=theirs.stopping_threshold,
        divergence_threshold=theirs.divergence_threshold,
        check_on_train_epoch_end=theirs._check_on_train_epoch_end,
        log_rank_zero_only=theirs.log_rank_zero_only,
    )


def _lr_monitor(theirs: Any) -> LearningRateMonitor:
    ours = LearningRateMonitor(theirs.logging_interval, theirs.log_momentum, theirs.log_weight_decay)
    ours.lrs = theirs.lrs  # one dict for both, so that theirs stays readable
    ours.last_momentum_values = theirs.last_momentum_values
    ours.last_weight_decay_values = theirs.last_weight_decay_values
    return ours


def _timer(theirs: Any) -> Timer:
    ours = Timer(None, str(getattr(theirs._interval, "value", theirs._interval)), theirs._verbose)
    ours._duration = theirs._duration
    ours._start_time, ours._end_time = theirs._start_time, theirs._end_time  # one dict for both
    return ours


class _EchoingModelCheckpoint(ModelCheckpoint):
    __qualname__ = "ModelCheckpoint"  # the state key is the one of both

    def __init__(self, theirs: Any, **settings: Any) -> None:
        super().__init__(**settings)
        self._theirs = theirs
        for name in ("CHECKPOINT_NAME_LAST", "STARTING_VERSION"):
            setattr(self, name, getattr(theirs, name))

    def setup(self, trainer: TrainerView, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._theirs.dirpath = self.dirpath

    def _commit(self, kept: Kept) -> None:
        super()._commit(kept)
        for name in (
            "best_model_path",
            "best_model_score",
            "best_k_models",
            "kth_best_model_path",
            "kth_value",
            "last_model_path",
            "current_score",
        ):
            setattr(self._theirs, name, getattr(self, name))


class _EchoingEarlyStopping(EarlyStopping):
    __qualname__ = "EarlyStopping"  # the state key is the one of both

    def __init__(self, theirs: Any, **settings: Any) -> None:
        super().__init__(**settings)
        self._theirs = theirs

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._echo()

    def _check(self, trainer: TrainerView) -> None:
        super()._check(trainer)
        self._echo()

    def _echo(self) -> None:
        for name in ("wait_count", "stopped_epoch", "best_score", "patience", "stopping_reason_message"):
            setattr(self._theirs, name, getattr(self, name))
        self._theirs.stopping_reason = type(self._theirs.stopping_reason)(self.stopping_reason.value)
