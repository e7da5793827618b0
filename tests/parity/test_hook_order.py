"""Every hook of a module and of a callback is called where Lightning calls it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from fasttrain import FasttrainWarning, compile_fit
from fasttrain.callbacks.callback import HOOKS
from tests.parity import modules as m
from tests.parity.harness import BARE

WRAPPERS = (
    "optimizer_step",
    "optimizer_zero_grad",
    "backward",
    "configure_gradient_clipping",
    "lr_scheduler_step",
)  # these call Lightning's own
AROUND = (
    "prepare_data",
    "setup",
    "teardown",
    "configure_model",
    "configure_optimizers",
    "configure_callbacks",
    "train_dataloader",
    "val_dataloader",
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
    "on_validation_model_eval",
    "on_validation_model_train",
    "on_save_checkpoint",
    "on_load_checkpoint",
)
MOMENTS = tuple(
    n
    for n in vars(pl.Callback)
    if n.startswith("on_")
    and n not in ("on_save_checkpoint", "on_load_checkpoint", "on_exception", "on_sanity_check_start", "on_sanity_check_end")
)


def recording_module(calls: list[str], names: tuple[str, ...]) -> m.Base:
    """A module that overrides every hook in ``names``: it notes the call and goes on to what Lightning does."""

    def override(name: str) -> Any:
        def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return getattr(super(cls, self), name)(*args, **kwargs)

        return hook

    def step(name: str) -> Any:
        def hook(self: Any, batch: Any, batch_idx: int) -> Any:
            calls.append(name)
            return getattr(Scheduled, name, lambda *_: None)(self, batch, batch_idx)

        return hook

    body = {n: override(n) for n in names} | {n: step(n) for n in ("training_step", "validation_step", "test_step", "predict_step")}
    cls = type("Recording", (Scheduled,), body)
    return cls()


class Scheduled(m.Base):
    """One scheduler of each kind."""

    def configure_optimizers(self) -> Any:
        opt = torch.optim.SGD(self.parameters(), lr=0.1)
        by = torch.optim.lr_scheduler
        plateau = by.ReduceLROnPlateau(opt)
        return [opt], [
            {"scheduler": by.ConstantLR(opt), "interval": "step"},
            by.ConstantLR(opt),
            {"scheduler": plateau, "monitor": "val_loss", "strict": False},
        ]

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0])


def recording_callback(calls: list[str], base: type) -> Any:
    def note(name: str) -> Any:
        def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(f"cb.{name}")
            return {} if name == "state_dict" else None

        return hook

    return type("Recorder", (base,), {n: note(n) for n in HOOKS if hasattr(pl.Callback, n) and n != "state_key"})()


def recorded(fast: bool, stage: str, names: tuple[str, ...], callback: bool, **options: Any) -> list[str]:
    """The hook calls of one run."""
    calls: list[str] = []
    torch.manual_seed(0)
    module = recording_module(calls, names)
    arguments: dict[str, Any] = {"train_dataloaders": m.labelled(15, 5, shuffle=False)} if stage == "fit" else {}
    arguments["val_dataloaders" if stage == "fit" else "dataloaders"] = m.labelled(10, 5, shuffle=False)
    settings = BARE | {"max_epochs": 2} | options
    if callback:
        settings["callbacks"] = [recording_callback(calls, object if fast else pl.Callback)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if not fast else "default")
        warnings.simplefilter("ignore", FasttrainWarning)
        if fast:
            getattr(compile_fit(module, **settings, capture="eager"), stage)(**arguments)
        else:
            getattr(pl.Trainer(**settings), stage)(module, **arguments)
    return calls


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"val_check_interval": 1},
        {"gradient_clip_val": 1.0},
        {"num_sanity_val_steps": 0},
        {"check_val_every_n_epoch": 2},
        {"max_steps": 2},
        {"limit_val_batches": 0},
        {"fast_dev_run": True},
    ],
)
def test_the_moments_of_a_fit_come_in_lightnings_order(options: dict[str, Any]) -> None:
    """Callback before module, hook by hook, over two epochs with validation and every kind of scheduler."""
    ours, theirs = (recorded(fast, "fit", (*MOMENTS, "lr_scheduler_step"), True, **options) for fast in (True, False))
    keep = lambda calls: [c for c in calls if c.removeprefix("cb.") not in ("state_dict", "load_state_dict")]  # noqa: E731
    assert keep(ours) == keep(theirs)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_the_moments_of_an_evaluation_come_in_lightnings_order(stage: str) -> None:
    """validate, test and predict on their own."""
    ours, theirs = (recorded(fast, stage, (*MOMENTS, *AROUND), True) for fast in (True, False))
    assert ours == theirs


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0}])
def test_the_hooks_around_and_inside_a_step_come_in_lightnings_order(options: dict[str, Any]) -> None:
    """Transfers, zero_grad, backward, clipping, schedulers: the same calls. What wraps a call (optimizer_step) is looked at alone."""
    names = (*MOMENTS, *AROUND, *WRAPPERS)
    ours, theirs = (recorded(fast, "fit", names, True, **options) for fast in (True, False))
    drop = ("optimizer_step", "configure_callbacks", "state_dict", "load_state_dict")
    keep = lambda calls: [c for c in calls if c.removeprefix("cb.") not in drop]  # noqa: E731
    assert keep(ours) == keep(theirs)
    assert ours.count("optimizer_step") == theirs.count("optimizer_step")
