"""The frameworks that own the loop and take a LightningModule: Lightning, and fasttrain with the very same class body."""

from __future__ import annotations

import contextlib
import logging
import math
import tempfile
from typing import Any

import torch
from torch import Tensor

from bench.rounds import Rounds, Stopped, watcher
from bench.sides.job import Job


class Logged:
    """A logger that keeps the losses it is handed: the same little work for both trainers."""

    name, version, save_dir, log_dir = "bench", 0, None, None

    def __init__(self, rounds: Rounds) -> None:
        super().__init__()
        self.rounds = rounds

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "loss_step" in metrics:
            self.rounds.logged(float(metrics["loss_step"]))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """None to keep."""


class Single:
    """One loss and one optimizer."""

    job: Job
    call: Any
    extra: dict[str, Any]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, seen = self.call(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)  # type: ignore[attr-defined]
        for name, value in seen.items():
            self.log(name, value, on_step=True, on_epoch=True)  # type: ignore[attr-defined]
        return loss

    def forward_and_score(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        out = self.model(batch[0])  # type: ignore[attr-defined]
        seen = self.model.observed(out) if self.watched else {}  # type: ignore[attr-defined]
        return self.model.score(out, batch), seen  # type: ignore[attr-defined]

    def configure_optimizers(self) -> Any:
        return self.model.optimizer(**self.extra)  # type: ignore[attr-defined]


class Turns:
    """Two optimizers by manual optimization, as a GAN is written today."""

    job: Job
    extra: dict[str, Any]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        seen = []
        for loss, optimizer in zip(self.model.losses(batch), self.optimizers(), strict=True):  # type: ignore[attr-defined]
            optimizer.zero_grad()
            self.manual_backward(loss)  # type: ignore[attr-defined]
            optimizer.step()
            seen.append(loss.detach())
        self.log("loss", seen[0], on_step=True, on_epoch=True)  # type: ignore[attr-defined]
        self.log("other", seen[1], on_step=True, on_epoch=True)  # type: ignore[attr-defined]

    def configure_optimizers(self) -> Any:
        return self.model.optimizers_of(**self.extra)  # type: ignore[attr-defined]


class ManualSplits:
    """Splits along time by manual optimization: Lightning 2 has no other way."""

    job: Job
    call: Any
    extra: dict[str, Any]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        state, optimizer = None, self.optimizers()  # type: ignore[attr-defined]
        for x, y in self.model.splits(batch):  # type: ignore[attr-defined]
            loss, state = self.call(x, y, state)
            optimizer.zero_grad()
            self.manual_backward(loss)  # type: ignore[attr-defined]
            optimizer.step()
            self.log("loss", loss, on_step=True, on_epoch=True)  # type: ignore[attr-defined]

    def configure_optimizers(self) -> Any:
        return self.model.optimizer(**self.extra)  # type: ignore[attr-defined]


class Splits:
    """Splits along time by ``truncated_bptt_steps`` and ``hiddens``, which Lightning had and fasttrain has."""

    def training_step(self, batch: Any, batch_idx: int, hiddens: Any) -> Any:
        loss, state = self.model.part(*batch, hiddens)  # type: ignore[attr-defined]
        self.log("loss", loss, on_step=True, on_epoch=True)  # type: ignore[attr-defined]
        return {"loss": loss, "hiddens": state}

    def configure_optimizers(self) -> Any:
        return self.model.optimizer()  # type: ignore[attr-defined]


def _module(job: Job, form: type, base: type, *, fused: bool = False, compiled: bool = False) -> Any:
    """The workload's model under ``training_step`` and ``configure_optimizers``, on a framework's base class."""

    class Module(form, base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.model, self.watched = job.model, bool(job.w.log_every)
            self.extra = {"fused": True} if fused else {}
            if form in (Turns, ManualSplits):
                self.automatic_optimization = False
            if form is Splits:
                self.truncated_bptt_steps = job.model.split

    module = Module()
    if form is Turns:
        for network in (module.model.generator, module.model.discriminator) if compiled else ():
            network.compile()
    elif form is not Splits:
        call = module.forward_and_score if form is Single else module.model.part
        module.call = torch.compile(call) if compiled else call
    return module


def _options(job: Job, folder: str) -> dict[str, Any]:
    given: dict[str, Any] = {"accumulate_grad_batches": job.w.window, "gradient_clip_val": job.w.clip} if job.w.form == "one" else {}
    return given | {
        "max_epochs": -1, "accelerator": "cpu" if job.device == "cpu" else "gpu", "devices": 1, "default_root_dir": folder,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "precision": job.w.precision,
        "log_every_n_steps": job.log_every,
    }  # fmt: skip


def lightning(job: Job, *, compiled: bool = False) -> None:
    """Lightning's Trainer; ``compiled``: the step's arithmetic compiled and the optimizer fused, without a graph break."""
    import pytorch_lightning as pl
    from pytorch_lightning.loggers import Logger

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    form = {"one": Single, "turns": Turns, "splits": ManualSplits}[job.w.form]
    fused = compiled and not (job.w.precision == "16-mixed" and job.w.clip is not None)  # Lightning refuses to clip such an optimizer
    watch = type("Watch", (pl.Callback,), watcher(job.rounds, job.size.passes))()
    logger = type("Kept", (Logged, Logger), {})(job.rounds)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Stopped):
        trainer = pl.Trainer(callbacks=[watch], logger=logger, num_sanity_val_steps=0, **_options(job, folder))
        trainer.fit(_module(job, form, pl.LightningModule, fused=fused, compiled=compiled), job.loader)


def fasttrain(job: Job, *, capture: str = "auto") -> None:
    """``compile_fit`` over the same class body as Lightning's side."""
    import fasttrain as ft
    from fasttrain.graphs import auto

    if job.size.batches > 1:  # rounds of the step it ends with; one that is only started begins as any long run
        auto.LONG = math.inf
    form = {"one": Single, "turns": Turns, "splits": Splits}[job.w.form]
    hooks, rounds = watcher(job.rounds, job.size.passes), job.rounds
    first_end = hooks["on_train_epoch_end"]

    def on_train_epoch_end(self: Any, running: Any, module: Any) -> None:
        if "note" not in rounds.notes:
            rounds.notes["note"] = trainer.explain().splitlines()[0]
        first_end(self, running, module)

    watch = type("Watch", (ft.Callback,), hooks | {"on_train_epoch_end": on_train_epoch_end})()
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Stopped):
        trainer = ft.compile_fit(
            _module(job, form, torch.nn.Module), callbacks=[watch], logger=Logged(job.rounds), capture=capture, **_options(job, folder)
        )
        trainer.fit(job.loader)
