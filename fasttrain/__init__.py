"""fasttrain: one captured training step for the module you already have."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fasttrain.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint, Timer
    from fasttrain.combined import CombinedLoader
    from fasttrain.errors import (
        CaptureError,
        CheckpointError,
        DataError,
        FasttrainError,
        FasttrainWarning,
        KernelError,
        ModuleError,
        NonFiniteError,
        OptionError,
    )
    from fasttrain.fit import CompiledFit, compile_fit
    from fasttrain.graphs.capture import seed_everything
    from fasttrain.loggers import CsvLogger, JsonlLogger, TensorBoardLogger
    from fasttrain.results import CaptureReport, FitResult, Ledger, Obstacle
    from fasttrain.step_result import EvalResult, TrainResult

__version__ = "0.1.0"

_HOMES = {
    "Callback": "callbacks", "EarlyStopping": "callbacks", "LearningRateMonitor": "callbacks", "ModelCheckpoint": "callbacks",
    "Timer": "callbacks", "CsvLogger": "loggers", "JsonlLogger": "loggers", "TensorBoardLogger": "loggers",
    "CaptureError": "errors", "CheckpointError": "errors", "DataError": "errors", "FasttrainError": "errors",
    "FasttrainWarning": "errors", "KernelError": "errors", "ModuleError": "errors", "NonFiniteError": "errors", "OptionError": "errors",
    "CombinedLoader": "combined", "CompiledFit": "fit", "compile_fit": "fit", "seed_everything": "graphs.capture",
    "CaptureReport": "results", "FitResult": "results", "Ledger": "results", "Obstacle": "results",
    "EvalResult": "step_result", "TrainResult": "step_result",
}  # fmt: skip

__all__ = [
    "Callback", "CaptureError", "CaptureReport", "CheckpointError", "CombinedLoader", "CompiledFit", "CsvLogger", "DataError",
    "EarlyStopping", "EvalResult", "FasttrainError", "FasttrainWarning", "FitResult", "JsonlLogger", "KernelError", "LearningRateMonitor",
    "Ledger", "ModelCheckpoint", "ModuleError", "NonFiniteError", "Obstacle", "OptionError", "TensorBoardLogger", "Timer", "TrainResult",
    "compile_fit", "seed_everything",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Names are loaded on first use, so that ``import fasttrain`` is quick and touches no device."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fasttrain' has no attribute {name!r}")
    return getattr(import_module(f"fasttrain.{_HOMES[name]}"), name)
