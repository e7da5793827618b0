"""Every knob, checked once, at the door: names and meanings are Lightning's current ones, ours are marked."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypedDict

from fasttrain.errors import OptionError, reject
from fasttrain.retired import NOT_HERE, RETIRED

Precision = Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed", "64-true"]
Rung = Literal["eager", "compile", "graph"]
Limit = int | float | None

PRECISIONS: Mapping[object, Precision] = {
    "32-true": "32-true", "32": "32-true", 32: "32-true",
    "bf16-mixed": "bf16-mixed", "bf16": "bf16-mixed",
    "bf16-true": "bf16-true",
    "16-mixed": "16-mixed", "16": "16-mixed", 16: "16-mixed",
    "64-true": "64-true", "64": "64-true", 64: "64-true",
}  # fmt: skip

BARE: Mapping[str, Any] = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    "log_every_n_steps": 0, "num_sanity_val_steps": 0, "fast_dev_run": 0, "detect_anomaly": False, "track_grad_norm": None,
}  # fmt: skip


class OptionsDict(TypedDict, total=False):
    """The keyword arguments of ``compile_fit``; the meanings stand at :class:`Options`."""

    max_epochs: int | None
    min_epochs: int | None
    max_steps: int
    min_steps: int | None
    max_time: str | timedelta | Mapping[str, float] | None
    limit_train_batches: Limit
    limit_val_batches: Limit
    limit_test_batches: Limit
    limit_predict_batches: Limit
    fast_dev_run: bool | int
    overfit_batches: int | float
    val_check_interval: int | float | str | timedelta | None
    check_val_every_n_epoch: int | None
    val_every_n_steps: int | None
    num_sanity_val_steps: int | None
    reload_dataloaders_every_n_epochs: int
    log_every_n_steps: int | None
    accumulate_grad_batches: int | Mapping[int, int]
    gradient_clip_val: float | None
    gradient_clip_algorithm: str | None
    track_grad_norm: int | float | str | None
    precision: str | int | None
    accelerator: str
    devices: int | str
    callbacks: Any
    logger: Any
    default_root_dir: str | os.PathLike[str] | None
    enable_checkpointing: bool | None
    enable_progress_bar: bool | None
    enable_model_summary: bool | None
    barebones: bool
    inference_mode: bool
    deterministic: bool
    detect_anomaly: bool
    seed: int | None
    capture: str
    verify: int
    nonfinite: str
    steps_per_launch: int


@dataclass(frozen=True, kw_only=True)
class Options:
    """Checked options; every field has one owner that reads it."""

    max_epochs: int = 1000
    epochs_were_set: bool = True
    min_epochs: int = 0
    max_steps: int = -1
    min_steps: int = 0
    max_seconds: float | None = None
    limit_train_batches: int | float = 1.0
    limit_val_batches: int | float = 1.0
    limit_test_batches: int | float = 1.0
    limit_predict_batches: int | float = 1.0
    fast_dev_run: int = 0
    overfit_batches: int | float = 0.0
    val_check_interval: int | float = 1.0
    val_check_seconds: float | None = None
    check_val_every_n_epoch: int | None = 1
    val_every_n_steps: int | None = None
    num_sanity_val_steps: int = 2
    reload_dataloaders_every_n_epochs: int = 0
    log_every_n_steps: int = 50
    accumulate_grad_batches: Mapping[int, int]
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: Literal["norm", "value"] = "norm"
    track_grad_norm: float | None = None
    precision: Precision = "32-true"
    accelerator: str = "auto"
    callbacks: tuple[Any, ...] = ()
    logger: Any = True
    default_root_dir: Path
    enable_checkpointing: bool = True
    enable_progress_bar: bool = True
    enable_model_summary: bool = True
    barebones: bool = False
    inference_mode: bool = True
    deterministic: bool = False
    detect_anomaly: bool = False
    seed: int | None = None
    capture: Literal["auto", "eager", "compile", "graph"] = "auto"
    verify: int = 0
    nonfinite: Literal["raise", "skip", "ignore"] = "raise"
    steps_per_launch: int = 1

    def window(self, epoch: int) -> int:
        """Batches in one accumulation window in this epoch (the schedule's newest entry)."""
        return self.accumulate_grad_batches[max(e for e in self.accumulate_grad_batches if e <= epoch)]


def make_options(given: Mapping[str, Any]) -> Options:
    """Check what the user gave; the first wrong option raises :class:`OptionError` with what to write instead."""
    known = set(OptionsDict.__annotations__)
    for name in given:
        if name not in known and name not in ("strategy", "num_nodes"):
            raise OptionError(_unknown(name, known))
    g = dict(given)
    _single_machine(g)
    bare = _bool(g, "barebones", False)
    if bare:
        _only_bare(g)
    fast = _fast_dev_run(g.get("fast_dev_run", False))
    max_epochs, max_steps = g.get("max_epochs"), _int(g, "max_steps", -1, low=-1)
    overfit = _limit("overfit_batches", g.get("overfit_batches", 0.0))
    interval, seconds = _val_interval(g.get("val_check_interval"))
    every_epoch = _optional_int(g, "check_val_every_n_epoch", 1, low=1)
    sanity = _int(g, "num_sanity_val_steps", 2, low=-1)
    clip, algorithm = _clip(g)
    values: dict[str, Any] = dict(
        max_epochs=_epochs(max_epochs, max_steps, g.get("max_time")),
        epochs_were_set=max_epochs is not None or max_steps != -1 or g.get("max_time") is not None,
        min_epochs=_int(g, "min_epochs", 0 if g.get("min_steps") is None else 1), max_steps=max_steps, min_steps=_int(g, "min_steps", 0),
        max_seconds=None if g.get("max_time") is None else _seconds("max_time", g["max_time"]),
        fast_dev_run=fast, overfit_batches=overfit,
        val_check_interval=interval, val_check_seconds=seconds, check_val_every_n_epoch=every_epoch,
        val_every_n_steps=_optional_int(g, "val_every_n_steps", None, low=1),
        num_sanity_val_steps=sanity, log_every_n_steps=_int(g, "log_every_n_steps", 50), barebones=bare,
        reload_dataloaders_every_n_epochs=_int(g, "reload_dataloaders_every_n_epochs", 0),
        track_grad_norm=_norm(g.get("track_grad_norm")),
        accumulate_grad_batches=_accumulate(g.get("accumulate_grad_batches", 1)),
        gradient_clip_val=clip, gradient_clip_algorithm=algorithm, precision=_precision(g.get("precision")),
        accelerator=_choice(g, "accelerator", "auto", ("auto", "cpu", "gpu", "cuda")),
        callbacks=_tuple(g.get("callbacks")), logger=g.get("logger", True),
        default_root_dir=Path(g.get("default_root_dir") or "."),
        enable_checkpointing=_bool(g, "enable_checkpointing", True),
        enable_progress_bar=_bool(g, "enable_progress_bar", True),
        enable_model_summary=_bool(g, "enable_model_summary", True),
        inference_mode=_bool(g, "inference_mode", True), deterministic=_bool(g, "deterministic", False),
        detect_anomaly=_bool(g, "detect_anomaly", False), seed=_optional_int(g, "seed", None),
        capture=_choice(g, "capture", "auto", ("auto", "eager", "compile", "graph")),
        verify=_int(g, "verify", 0), nonfinite=_choice(g, "nonfinite", "raise", ("raise", "skip", "ignore")),
        steps_per_launch=_int(g, "steps_per_launch", 1, low=1),
    )  # fmt: skip
    for stage in ("train", "val", "test", "predict"):
        values[f"limit_{stage}_batches"] = _limit(f"limit_{stage}_batches", g.get(f"limit_{stage}_batches"))
    if overfit:
        values |= {"limit_train_batches": overfit, "limit_val_batches": overfit}
    if fast:
        values |= {f"limit_{s}_batches": fast for s in ("train", "val", "test", "predict")}
        values |= {"max_steps": fast, "max_epochs": 1, "num_sanity_val_steps": 0, "logger": False,
                   "enable_checkpointing": False, "val_check_interval": 1.0, "val_check_seconds": None,
                   "check_val_every_n_epoch": 1, "val_every_n_steps": None}  # fmt: skip
    _contradictions(g, values)
    return Options(**{**values, **(BARE if bare else {})})


def _unknown(name: str, known: set[str]) -> str:
    if name in RETIRED:
        return f"option {name!r} is retired: use {RETIRED[name]}."
    if name in NOT_HERE:
        return f"option {name!r} is Lightning's and this version does not have it. {NOT_HERE[name]}"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"Did you mean {near[0]!r}?" if near else "The options are: " + ", ".join(sorted(known)) + "."
    return f"unknown option {name!r}. {hint}"


def _contradictions(given: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    if given.get("val_every_n_steps") is not None and given.get("val_check_interval") is not None:
        raise OptionError("val_every_n_steps and val_check_interval both say when to validate: give one of them.")
    by_float = isinstance(values["val_check_interval"], float) and values["val_check_seconds"] is None
    if values["check_val_every_n_epoch"] is None and by_float and values["val_every_n_steps"] is None:
        raise OptionError(reject("check_val_every_n_epoch", None, "an integer val_check_interval (batches) beside it",
                                 "Without epochs to count by, give val_check_interval=n or val_every_n_steps=n."))  # fmt: skip
    if values["capture"] in ("compile", "graph") and values["detect_anomaly"]:
        raise OptionError("detect_anomaly follows autograd op by op: it needs capture='eager' (or 'auto').")
    if values["steps_per_launch"] > 1:
        if values["capture"] in ("eager", "compile"):
            raise OptionError(f"steps_per_launch is the graph rung's: it cannot be had with capture={values['capture']!r}. Leave it out.")
        if max(values["accumulate_grad_batches"].values()) > 1:
            raise OptionError("steps_per_launch puts whole steps of one batch each together: leave it or accumulate_grad_batches out.")
    for unit in ("steps", "epochs") if not values["fast_dev_run"] else ():
        least, most = values[f"min_{unit}"], values[f"max_{unit}"]
        if 0 <= most < least and given.get(f"min_{unit}") is not None and given.get(f"max_{unit}") is not None:
            raise OptionError(reject(f"min_{unit}", least, f"at most max_{unit}={most}", "Lower it."))


def _only_bare(given: Mapping[str, Any]) -> None:
    """Raise OptionError for an option that wants back what ``barebones`` leaves out."""
    for name, off in BARE.items():
        value = given.get(name)
        if value is not None and value != off and not (name == "track_grad_norm" and value == -1):
            raise OptionError(reject(name, repr(value), f"{off!r}, because barebones=True leaves it out", "Leave one of the two out."))


def _single_machine(g: dict[str, Any]) -> None:
    if g.pop("strategy", "auto") not in ("auto", None) or g.pop("num_nodes", 1) != 1:
        raise OptionError(reject("strategy / num_nodes", "a distributed run", "strategy='auto' on one machine",
                                 "This version trains on one device."))  # fmt: skip
    devices = g.get("devices", "auto")
    if devices not in ("auto", 1, "1", -1, [0]):
        raise OptionError(reject("devices", repr(devices), "'auto' or 1", "This version trains on one device."))


def _fast_dev_run(value: object) -> int:
    if value is True or value is False:
        return int(value)
    if isinstance(value, int) and value >= 0:
        return value
    raise OptionError(reject("fast_dev_run", repr(value), "True, False or a number of batches", "Give fast_dev_run=True."))


def _epochs(max_epochs: object, max_steps: int, max_time: object) -> int:
    if max_epochs is None:
        return -1 if max_steps != -1 or max_time is not None else 1000
    if isinstance(max_epochs, bool) or not isinstance(max_epochs, int) or max_epochs < -1:
        raise OptionError(reject("max_epochs", repr(max_epochs), "an integer >= 0, or -1 for no limit", "Give e.g. 3."))
    return max_epochs


def _int(g: Mapping[str, Any], name: str, default: int, *, low: int = 0) -> int:
    return default if g.get(name) is None else _integer(name, g[name], default, low)


def _optional_int(g: Mapping[str, Any], name: str, default: int | None, *, low: int = 0) -> int | None:
    if g.get(name) is None:
        return None if name in g else default
    return _integer(name, g[name], default, low)


def _integer(name: str, value: object, default: int | None, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise OptionError(reject(name, repr(value), f"an integer >= {low}", f"The default is {default}."))
    return value


def _bool(g: Mapping[str, Any], name: str, default: bool) -> bool:
    value = g.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise OptionError(reject(name, repr(value), "True or False", f"The default is {default}."))
    return value


def _choice(g: Mapping[str, Any], name: str, default: str, choices: tuple[str, ...]) -> str:
    value = g.get(name, default)
    if not isinstance(value, str) or value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"The default is {default!r}."
        raise OptionError(reject(name, repr(value), " | ".join(map(repr, choices)), hint))
    return value


def _precision(value: object) -> Precision:
    if value is None:
        return "32-true"
    if value not in PRECISIONS:
        names = sorted(set(PRECISIONS.values()))
        raise OptionError(reject("precision", repr(value), " | ".join(names), "The default is '32-true'."))
    return PRECISIONS[value]


def _clip(g: Mapping[str, Any]) -> tuple[float | None, str]:
    value = g.get("gradient_clip_val")
    algorithm = g.get("gradient_clip_algorithm") or "norm"
    if algorithm not in ("norm", "value"):
        raise OptionError(reject("gradient_clip_algorithm", repr(algorithm), "'norm' or 'value'", "The default is 'norm'."))
    if value is None or value == 0:
        return None, algorithm
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise OptionError(reject("gradient_clip_val", repr(value), "a number > 0, or None for no clipping", "Try 1.0."))
    return float(value), algorithm


def _norm(value: object) -> float | None:
    """The p of the gradient norms to log; None and -1, its old default, are none."""
    if value is None or value == -1:
        return None
    number = math.inf if value == "inf" else value
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not number > 0:
        raise OptionError(reject("track_grad_norm", repr(value), "a number > 0, 'inf', or None for no norms", "Try 2."))
    return float(number)


def _accumulate(value: object) -> Mapping[int, int]:
    given: dict[Any, Any] = dict(value) if isinstance(value, Mapping) else {0: value}
    schedule = given if given and value is not None else {0: 1}
    for epoch, k in schedule.items():
        if isinstance(k, bool) or not isinstance(k, int) or k < 1 or not isinstance(epoch, int) or epoch < 0:
            raise OptionError(reject("accumulate_grad_batches", repr(value), "an integer >= 1 or {epoch: integer >= 1}",
                                     "The default is 1."))  # fmt: skip
    return schedule if 0 in schedule else {0: 1} | schedule


def _limit(name: str, value: object) -> int | float:
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise OptionError(reject(name, repr(value), "an integer >= 0 (batches) or a float in [0, 1] (a share)", "1.0 is all."))
    if isinstance(value, float) and value > 1.0:
        if value.is_integer():
            return int(value)
        wanted = "a float in [0, 1] (a share of the batches) or an integer (a number of batches)"
        raise OptionError(reject(name, repr(value), wanted, "1.0 is all."))
    return value


def _val_interval(value: object) -> tuple[int | float, float | None]:
    if value is None:
        return 1.0, None
    if isinstance(value, (str, timedelta, Mapping)):
        return 1.0, _seconds("val_check_interval", value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise OptionError(reject("val_check_interval", repr(value), "n batches (int), a share (float) or a time", "1.0 is once an epoch."))
    if isinstance(value, float) and value > 1.0:
        raise OptionError(reject("val_check_interval", repr(value), "a float in (0, 1]", "Give an integer to count batches."))
    return value, None


def _seconds(name: str, value: object) -> float:
    """Seconds in a timedelta, "DD:HH:MM:SS", or {"minutes": 5}."""
    if isinstance(value, (timedelta, Mapping)):
        try:
            seconds = (value if isinstance(value, timedelta) else timedelta(**value)).total_seconds()
        except TypeError as error:
            raise OptionError(reject(name, repr(value), "keys of datetime.timedelta", "E.g. {'minutes': 5}.")) from error
        if seconds < 0:
            raise OptionError(reject(name, repr(value), "a time that has not passed", "E.g. {'minutes': 5}."))
        return seconds
    parts = str(value).split(":")
    if len(parts) == 4 and all(p.strip().isdigit() for p in parts):
        return timedelta(**dict(zip(("days", "hours", "minutes", "seconds"), map(int, parts), strict=True))).total_seconds()
    raise OptionError(reject(name, repr(value), '"DD:HH:MM:SS", a timedelta or a dict', 'Five minutes is "00:00:05:00".'))


def _tuple(value: object) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def defaults() -> dict[str, Any]:
    """Every option's name and default, for the documentation and its test."""
    made = make_options({})
    return {f.name: getattr(made, f.name) for f in fields(Options)}
