"""Which checkpoints are kept: a record, and the pure functions that rank a new one into it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fasttrain.callbacks.plain import as_plain


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a ModelCheckpoint knows of what it wrote. Paths are absolute; a score is the metric's value at the save."""

    scores: Mapping[str, float] = field(default_factory=dict)
    metric_steps: Mapping[str, int] = field(default_factory=dict)  # the step that the score is of, per path
    best_path: str = ""
    best_score: float | None = None
    kth_path: str = ""
    kth_score: float | None = None
    current_score: float | None = None
    last_path: str = ""
    last_step: int = -1  # global_step of what is at last_path
    saved_path: str = ""
    saved_step: int = 0  # global_step of the newest save; nothing is saved before the first step


def enters(kept: Kept, score: float, *, k: int, mode: str) -> bool:
    """Whether a checkpoint with this score belongs to the best k; k = -1 keeps all."""
    if k == -1 or len(kept.scores) < k:
        return True
    worst = kept.scores[kept.kth_path]
    return score < worst if mode == "min" else score > worst


def leaves(kept: Kept, *, k: int) -> str:
    """The path that a new entry pushes out; empty when there is room."""
    return kept.kth_path if 0 < k <= len(kept.scores) else ""


def entered(kept: Kept, path: str, score: float, metric_step: int | None, *, k: int, mode: str) -> Kept:
    """The record after `path` entered with `score`; a NaN counts as the worst value."""
    if math.isnan(score):
        score = math.inf if mode == "min" else -math.inf
    gone = leaves(kept, k=k)
    scores = {other: value for other, value in kept.scores.items() if other not in (gone, path)} | {path: score}
    steps = {other: step for other, step in kept.metric_steps.items() if other in scores and other != path}
    if metric_step is not None:
        steps[path] = metric_step
    best, worst = (min, max) if mode == "min" else (max, min)
    best_path = best(scores, key=scores.__getitem__)
    full = k in (-1, len(scores))
    kth_path = worst(scores, key=scores.__getitem__) if full else kept.kth_path
    return replace(
        kept,
        scores=scores,
        metric_steps=steps,
        best_path=best_path,
        best_score=scores[best_path],
        kth_path=kth_path,
        kth_score=scores[kth_path] if full else kept.kth_score,
        current_score=score,
    )


def as_state(kept: Kept) -> dict[str, Any]:
    """The record under Lightning's key names, as values that JSON takes."""
    return {
        "best_model_score": as_plain(kept.best_score),
        "best_model_path": kept.best_path,
        "current_score": as_plain(kept.current_score),
        "best_k_models": {path: as_plain(score) for path, score in kept.scores.items()},
        "kth_best_model_path": kept.kth_path,
        "kth_value": as_plain(kept.kth_score),
        "last_model_path": kept.last_path,
        "metric_steps": dict(kept.metric_steps),
        "last_step": kept.last_step,
        "saved_path": kept.saved_path,
        "saved_step": kept.saved_step,
    }


def from_state(state: Mapping[str, Any]) -> Kept:
    """The record that `as_state` gave, or that of a Lightning checkpoint, whose scores are tensors."""
    return Kept(
        scores={path: float(score) for path, score in state.get("best_k_models", {}).items()},
        metric_steps={path: int(step) for path, step in state.get("metric_steps", {}).items()},
        best_path=state["best_model_path"],
        best_score=_number(state.get("best_model_score")),
        kth_path=state.get("kth_best_model_path", ""),
        kth_score=_number(state.get("kth_value")),
        current_score=_number(state.get("current_score")),
        last_path=state.get("last_model_path", ""),
        last_step=int(state.get("last_step", -1)),
        saved_path=state.get("saved_path", ""),
        saved_step=int(state.get("saved_step", 0)),
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
