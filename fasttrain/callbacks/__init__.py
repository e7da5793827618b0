"""Callbacks: the moments of a run that a user can hook into, and the ones we bring."""

from fasttrain.callbacks.adopt import adopt
from fasttrain.callbacks.callback import HOOKS, Callback, Checkpoint
from fasttrain.callbacks.early_stopping import EarlyStopping, EarlyStoppingReason
from fasttrain.callbacks.hooks import CallbackList, live_hooks
from fasttrain.callbacks.lr_monitor import LearningRateMonitor
from fasttrain.callbacks.model_checkpoint import ModelCheckpoint
from fasttrain.callbacks.timer import Timer, as_seconds

__all__ = [
    "HOOKS",
    "Callback",
    "CallbackList",
    "Checkpoint",
    "EarlyStopping",
    "EarlyStoppingReason",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "Timer",
    "adopt",
    "as_seconds",
    "live_hooks",
]
