"""Train one module under Lightning, under fasttrain, or in a loop written by hand, from the same weights and seed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn

from fasttrain import FasttrainWarning, compile_fit
from tests.parity.modules import labelled

for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)

BARE: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}


@dataclass(frozen=True)
class Case:
    """A module, what feeds it, and the options both trainers get."""

    make: Callable[[], LightningModule]
    train: Callable[[], Any] | None = labelled
    val: Callable[[], Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    datamodule: Callable[[], Any] | None = None


@dataclass
class Outcome:
    """What a training came to."""

    module: nn.Module
    weights: dict[str, Tensor]
    metrics: dict[str, float]
    steps: int
    epochs: int
    validated: list[int]
    rng: Tensor
    optimizer: Any
    rung: str = ""
    result: Any = None


def lightning_fit(case: Case, **options: Any) -> Outcome:
    """``case`` trained by Lightning itself."""
    torch.manual_seed(0)
    module = case.make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(**BARE | {"max_epochs": 3} | case.options | options)
        torch.manual_seed(7)
        trainer.fit(module, **_data(case))
    return Outcome(
        module,
        _copy(module),
        {k: float(v) for k, v in trainer.callback_metrics.items()},
        trainer.global_step,
        trainer.current_epoch,
        list(getattr(module, "validated", [])),
        torch.get_rng_state(),
        trainer.optimizers[0],
    )


def fast_fit(case: Case, **options: Any) -> Outcome:
    """``case`` trained by fasttrain, eagerly unless ``capture`` says otherwise."""
    torch.manual_seed(0)
    module = case.make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FasttrainWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")
        warnings.filterwarnings("ignore", "<class 'torch.autograd.function", DeprecationWarning)  # Dynamo's own doing
        trainer = compile_fit(module, **BARE | {"max_epochs": 3, "capture": "eager"} | case.options | options)
        torch.manual_seed(7)
        result = trainer.fit(**_data(case))
    return Outcome(
        module,
        _copy(module),
        result.metrics,
        result.steps,
        result.epochs,
        list(getattr(module, "validated", [])),
        torch.get_rng_state(),
        module.trainer.optimizers[0],
        result.capture.rung,
        result,
    )


def _data(case: Case) -> dict[str, Any]:
    if case.datamodule is not None:
        return {"datamodule": case.datamodule()}
    assert case.train is not None
    return {"train_dataloaders": case.train(), "val_dataloaders": case.val() if case.val else None}


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def assert_same_weights(ours: dict[str, Tensor], theirs: dict[str, Tensor], ratio: float = 0.0) -> None:
    """Bit for bit, or |ours - theirs| / |theirs| of every tensor at most ``ratio``."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        got = ours[name]
        assert got.dtype == expected.dtype, name
        if ratio == 0.0:
            assert torch.equal(got, expected), f"{name}: differs by up to {(got.double() - expected.double()).abs().max()}"
        else:
            gap = (got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-12)
            assert gap <= ratio, f"{name}: off by a ratio of {gap:.2e}"


def assert_same_metrics(ours: dict[str, float], theirs: dict[str, float], ratio: float) -> None:
    """The same names, and the same values up to ``ratio``."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert abs(ours[name] - expected) <= ratio * max(abs(expected), 1e-6), f"{name}: {ours[name]} and {expected}"


def assert_same(ours: Outcome, theirs: Outcome, *, weights: float = 0.0, metrics: float = 1e-6) -> None:
    """Weights, metrics, counts and validations of two trainings."""
    assert_same_weights(ours.weights, theirs.weights, weights)
    assert_same_metrics(ours.metrics, theirs.metrics, max(metrics, weights))
    assert (ours.steps, ours.epochs, ours.validated) == (theirs.steps, theirs.epochs, theirs.validated)
