"""What a user can get wrong is said in a sentence before anything is compiled: what, what came, what was wanted, what to do."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fasttrain import CaptureError, DataError, FasttrainWarning, ModuleError, NonFiniteError, OptionError, compile_fit
from tests.parity import modules as m

BARE: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "capture": "compile", "max_epochs": 1}


@pytest.fixture(autouse=True)
def _nothing_is_compiled() -> Any:
    """Dynamo has seen no frame when the message comes."""
    torch._dynamo.utils.counters.clear()
    yield
    assert not torch._dynamo.utils.counters["frames"], "compiled before it complained"


def refused(error: type[Exception], *words: str, module: Any = None, train: Any = None, **options: Any) -> str:
    """The message fit refuses with: of this type, with every one of ``words`` in it."""
    fit = {k: options.pop(k) for k in ("val_dataloaders", "datamodule", "ckpt_path") if k in options}
    with pytest.raises(error) as caught:
        compile_fit(module if module is not None else m.Base(), **BARE | options).fit(m.labelled() if train is None else train, **fit)
    message = str(caught.value)
    for word in words:
        assert re.search(word, message), f"{word!r} is not in: {message}"
    return message


def with_loss(step: Callable[[Any, Any, Any], Any]) -> m.Base:
    """A module whose training_step is ``step(module, x, y)``."""
    return type("Mine", (m.Base,), {"training_step": lambda self, batch, batch_idx: step(self, *batch)})()


class Plain(nn.Module):
    """An nn.Module with nothing but layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(m.WIDTH, m.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


# -- the module -------------------------------------------------------------------------------------------------------
def test_no_training_step() -> None:
    """Named, with both ways out: define it, or give loss=."""
    refused(
        ModuleError,
        "Plain has no training_step",
        "define training_step",
        r"loss=",
        module=Plain(),
        optimizer=torch.optim.SGD(Plain().parameters(), lr=0.1),
    )


def test_no_training_step_on_a_lightning_module() -> None:
    """Lightning's own empty training_step is none."""

    class Empty(LightningModule):
        def configure_optimizers(self) -> Any:
            return None

    refused(ModuleError, "Empty has no training_step", module=Empty())


def test_no_configure_optimizers() -> None:
    """Named, with both ways out: define it, or give optimizer=."""
    refused(ModuleError, "Plain has no configure_optimizers", r"optimizer=", module=Plain(), loss=F.cross_entropy)


def test_configure_optimizers_that_returns_nothing() -> None:
    """None is no optimizer: allowed, as in Lightning, and said, because it may be a forgotten return. An empty list is not."""
    module = type("Mine", (m.Base,), {"configure_optimizers": lambda s: None})()
    with pytest.warns(FasttrainWarning, match="returned None: the steps run and nothing is updated"):
        compile_fit(module, max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False).fit(m.labelled())
    refused(ModuleError, "configure_optimizers", "no optimizer", module=type("Mine", (m.Base,), {"configure_optimizers": lambda s: []})())


def test_not_a_module() -> None:
    """A class, a function or a path in the module's place."""
    for thing in (m.Base, lambda x: x, "model.pt"):
        with pytest.raises(ModuleError, match=r"module: got .*wanted a torch.nn.Module"):
            compile_fit(thing)  # type: ignore[arg-type]


def test_loss_missing() -> None:
    """A dict without 'loss' is told by its keys."""
    refused(
        ModuleError,
        "Mine.training_step",
        r"keys \['logits'\]",
        "'loss'",
        "Return the loss",
        module=with_loss(lambda s, x, y: {"logits": s(x)}),
    )


def test_loss_not_scalar() -> None:
    """The shape that came is in the sentence."""
    refused(ModuleError, "loss of Mine", r"shape \[8, 3\]", "one number", r"\.mean\(\)", module=with_loss(lambda s, x, y: s(x)))


def test_loss_a_number() -> None:
    """A Python float has no gradient."""
    refused(ModuleError, "loss of Mine", "float", r"\.item\(\)", module=with_loss(lambda s, x, y: s(x).sum().item()))


def test_loss_without_a_gradient() -> None:
    """Detached on the way."""
    refused(ModuleError, "without a gradient", "trainable parameter", "detach", module=with_loss(lambda s, x, y: s(x).sum().detach()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_loss_not_finite(bad: float) -> None:
    """On the first batch: before anything is compiled, with the value."""
    refused(ModuleError, "loss of Mine", str(bad), "finite", "nonfinite=", module=with_loss(lambda s, x, y: s(x).sum() * bad))


def test_loss_not_finite_later() -> None:
    """At a later batch: the error names step, epoch and batch, and the weights are as before that step."""
    module = type("Mine", (m.Base,), {"training_step": lambda s, b, i: s(b[0]).sum() * (float("nan") if i == 3 else 1.0)})()
    kept: list[Tensor] = []
    module.on_train_batch_start = lambda b, i: kept.append(module.net[0].weight.detach().clone())
    message = refused(NonFiniteError, "step 3", "epoch 0", "batch 3", "nan", "gradient_clip_val", module=module, capture="eager")
    assert "as they were before" in message
    assert torch.equal(kept[-1], module.net[0].weight)


def test_an_optimizer_over_another_module() -> None:
    """It would train something else."""
    other = m.Base()
    mine = m.Base()
    mine.configure_optimizers = lambda: torch.optim.SGD(other.parameters(), lr=0.1)  # type: ignore[method-assign]
    refused(ModuleError, "none of them belongs to Base", r"self\.parameters\(\)", module=mine)


def test_no_parameter_trains() -> None:
    """All frozen, or none at all."""
    frozen = m.Base().requires_grad_(False)
    refused(ModuleError, "requires_grad=False", "Unfreeze", module=frozen)
    empty = type(
        "Mine",
        (LightningModule,),
        {"training_step": lambda s, b, i: b[0].sum(), "configure_optimizers": lambda s: torch.optim.SGD([torch.zeros(1)])},
    )()
    refused(ModuleError, "no parameters", "nothing to train", module=empty)


def test_a_plateau_without_a_monitor() -> None:
    """And one whose monitor is never logged: the metrics that exist are listed."""

    class Mine(m.Base):
        def configure_optimizers(self) -> Any:
            opt = torch.optim.SGD(self.parameters(), lr=0.1)
            return [opt], [torch.optim.lr_scheduler.ReduceLROnPlateau(opt)]

    refused(ModuleError, "ReduceLROnPlateau without a monitor", "'monitor': 'val_loss'", module=Mine())
    refused(ModuleError, "'val_loss'", "never logged", "train_loss", module=m.Plateau(), capture="eager")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"interval": "batch"}, ["interval", "'batch'", "'step' or 'epoch'"]),
        ({"frequency": 0}, ["frequency", "0", ">= 1"]),
        ({"intervall": "step"}, ["lr_scheduler", "intervall", "Correct"]),
    ],
)
def test_a_wrong_scheduler_configuration(config: dict[str, Any], words: list[str]) -> None:
    """What came and what may stand there."""

    class Mine(m.Base):
        def configure_optimizers(self) -> Any:
            opt = torch.optim.SGD(self.parameters(), lr=0.1)
            return {"optimizer": opt, "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.ConstantLR(opt), **config}}

    refused(ModuleError, *words, module=Mine())


# -- the data ---------------------------------------------------------------------------------------------------------
def test_a_dataset_where_a_loader_goes() -> None:
    """Told by its type, with the DataLoader to write."""
    refused(DataError, "train_dataloaders", "TensorDataset", "DataLoader", train=TensorDataset(*m.rows(8)))
    refused(DataError, "val_dataloaders", "TensorDataset", "DataLoader", val_dataloaders=TensorDataset(*m.rows(8)))


@pytest.mark.parametrize("thing", [torch.zeros(4, 8), "data.csv", 3])
def test_no_loader_at_all(thing: Any) -> None:
    """A tensor, a path, a number."""
    refused(DataError, "train_dataloaders", "iterable of batches|DataLoader", train=thing)


def test_no_train_loader() -> None:
    """Neither given, nor in a datamodule, nor on the module."""
    with pytest.raises(DataError, match=r"train_dataloader: got nothing.*datamodule.*train_dataloader\(\)"):
        compile_fit(m.Base(), **BARE).fit()


def test_an_empty_loader() -> None:
    """No rows, or drop_last with fewer rows than a batch."""
    refused(DataError, "train_dataloaders", "empty", "drop_last", train=m.labelled(4, 8, drop_last=True))
    refused(DataError, "train_dataloaders", "empty", train=[])


def test_a_stream_that_gives_nothing() -> None:
    """An iterable without a length that has no batch is an empty loader too."""

    class Nothing:
        def __iter__(self) -> Any:
            return iter(())

    refused(DataError, "train_dataloaders", "empty|no batch", train=Nothing())


def test_a_generator_for_more_than_one_epoch() -> None:
    """A one-shot generator is trained once and then said to be used up, or refused; never trained on silently."""
    batches = (b for b in [next(iter(m.labelled()))] * 3)
    refused(DataError, "train_dataloaders", "generator|used up|exhausted|iterator", train=batches, max_epochs=2, capture="eager")


def test_a_batch_the_module_cannot_take() -> None:
    """Shapes and types a line each, and the module's own error at the end."""
    loader = DataLoader(TensorDataset(torch.zeros(16, m.WIDTH + 1), torch.zeros(16, dtype=torch.long)), batch_size=8)
    message = refused(
        DataError, r"training_step could not take the first batch", r"batch\[0\]: float32\[8, 9\]", r"batch\[1\]: int64\[8\]", train=loader
    )
    assert message.rstrip().endswith("(8x9 and 8x16)") or "mat1 and mat2" in message.splitlines()[-1]


def test_batches_of_the_wrong_form() -> None:
    """A dict where the step unpacks a pair."""
    message = refused(DataError, "first batch", r"batch\['x'\]: float32\[8, 8\]", train=m.dicts())
    assert "Error" in message.splitlines()[-1]


def test_a_validation_loader_without_validation_step() -> None:
    """Warned, once, and nothing is validated."""
    module = type(
        "Mine",
        (LightningModule,),
        {
            "__init__": lambda s: (LightningModule.__init__(s), setattr(s, "net", nn.Linear(m.WIDTH, 1)))[0],
            "training_step": lambda s, b, i: s.net(b[0]).sum(),
            "configure_optimizers": lambda s: torch.optim.SGD(s.parameters(), lr=0.1),
        },
    )()
    with pytest.warns(FasttrainWarning, match="Mine has no validation_step.*Define"):
        compile_fit(module, **BARE | {"capture": "eager"}).fit(m.labelled(), m.labelled())


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_without_its_step(stage: str) -> None:
    """validate needs validation_step, test needs test_step."""
    module = Plain()
    with pytest.raises(ModuleError, match=f"Plain has no {'validation' if stage == 'validate' else 'test'}_step"):
        getattr(compile_fit(module, **BARE), stage)(m.labelled())


def test_a_loader_and_a_datamodule() -> None:
    """One of them; and a datamodule in the loader's place is told where it goes."""
    refused(DataError, "both a loader and a datamodule", datamodule=m.Data())
    refused(DataError, r"fit\(datamodule=dm\)", train=m.Data())


# -- the options ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_epoch": 3}, ["max_epoch", "Did you mean 'max_epochs'"]),
        ({"gradient_clip": 1.0}, ["gradient_clip'", "retired", "gradient_clip_val"]),
        ({"gpus": 1}, ["gpus", "retired", "accelerator"]),
        ({"terminate_on_nan": True}, ["retired", "nonfinite='raise'"]),
        ({"resume_from_checkpoint": "x"}, ["retired", "ckpt_path"]),
        ({"zzz": 1}, ["unknown option 'zzz'", "max_epochs"]),
        ({"precision": "bf16-mix"}, ["precision", "'bf16-mix'", "bf16-mixed"]),
        ({"precision": 8}, ["precision", "8", "32-true"]),
        ({"max_epochs": -2}, ["max_epochs", "-2", ">= 0"]),
        ({"max_epochs": 1.5}, ["max_epochs", "1.5", "integer"]),
        ({"max_epochs": True}, ["max_epochs", "True", "integer"]),
        ({"max_steps": -5}, ["max_steps", "-5", ">= -1"]),
        ({"min_steps": 5, "max_steps": 3}, ["min_steps", "5", "max_steps=3"]),
        ({"max_time": "5 minutes"}, ["max_time", "5 minutes", "DD:HH:MM:SS"]),
        ({"max_time": {"minute": 5}}, ["max_time", "minute", "timedelta"]),
        ({"limit_train_batches": -1}, ["limit_train_batches", "-1"]),
        ({"limit_train_batches": 1.5}, ["limit_train_batches", "1.5", r"\[0, 1\]"]),
        ({"limit_train_batches": 0.01}, ["limit_train_batches", "0.01", "no batch"]),
        ({"overfit_batches": "2"}, ["overfit_batches", "'2'"]),
        ({"fast_dev_run": -1}, ["fast_dev_run", "-1"]),
        ({"fast_dev_run": "yes"}, ["fast_dev_run", "'yes'"]),
        ({"val_check_interval": 0}, ["val_check_interval", "0"]),
        ({"val_check_interval": 1.5}, ["val_check_interval", "1.5"]),
        ({"val_check_interval": 100}, ["val_check_interval", "100", "6 batches", "check_val_every_n_epoch=None"]),
        ({"val_check_interval": 3, "val_every_n_steps": 3}, ["val_every_n_steps", "one of them"]),
        ({"check_val_every_n_epoch": None}, ["check_val_every_n_epoch", "val_check_interval"]),
        ({"check_val_every_n_epoch": 0}, ["check_val_every_n_epoch", "0", ">= 1"]),
        ({"num_sanity_val_steps": -2}, ["num_sanity_val_steps", "-2"]),
        ({"accumulate_grad_batches": 0}, ["accumulate_grad_batches", "0", ">= 1"]),
        ({"accumulate_grad_batches": {0: 2, "a": 3}}, ["accumulate_grad_batches", "epoch"]),
        ({"accumulate_grad_batches": "4"}, ["accumulate_grad_batches", "'4'"]),
        ({"gradient_clip_val": -1.0}, ["gradient_clip_val", "-1.0", "> 0"]),
        ({"gradient_clip_val": "1"}, ["gradient_clip_val", "'1'"]),
        ({"gradient_clip_algorithm": "l2"}, ["gradient_clip_algorithm", "'l2'", "'norm' or 'value'"]),
        ({"accelerator": "tpu"}, ["accelerator", "'tpu'", "'cpu'"]),
        ({"devices": 4}, ["devices", "4", "one device"]),
        ({"strategy": "ddp"}, ["strategy", "'auto'"]),
        ({"capture": "compiled"}, ["capture", "'compiled'", "'compile'"]),
        ({"capture": "compile", "detect_anomaly": True}, ["detect_anomaly", "eager"]),
        ({"nonfinite": "stop"}, ["nonfinite", "'stop'", "'raise'"]),
        ({"seed": "a"}, ["seed", "'a'", "integer"]),
        ({"deterministic": "warn"}, ["deterministic", "'warn'", "True or False"]),
        ({"logger": "tensorboard"}, ["logger", "tensorboard", "log_metrics"]),
        ({"callbacks": [nn.Linear]}, ["callbacks", "class Linear", "instance"]),
        ({"callbacks": [3]}, ["callbacks", "int", "hook"]),
        ({"log_every_n_steps": -1}, ["log_every_n_steps", "-1"]),
    ],
)
def test_a_wrong_option(options: dict[str, Any], words: list[str]) -> None:
    """The option, what came, and what may stand there or the nearest right name."""
    refused(OptionError, *words, val_dataloaders=m.labelled(), **options)


def test_an_unwritable_directory(tmp_path: Path) -> None:
    """Found before the first batch, not at the first checkpoint."""
    (tmp_path / "file").write_text("")
    refused(
        OptionError, "default_root_dir", "file", "can be written", enable_checkpointing=True, default_root_dir=tmp_path / "file" / "runs"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory(tmp_path: Path) -> None:
    """The same for missing permissions."""
    tmp_path.chmod(0o500)
    refused(OptionError, "default_root_dir", enable_checkpointing=True, default_root_dir=tmp_path / "runs")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_rung_that_cannot_be_had() -> None:
    """graph on a CPU, and cuda without one: each with what to use instead."""
    refused(CaptureError, "capture='graph'", "CUDA", "'compile'", capture="graph")
    refused(OptionError, "accelerator", "CUDA", "'auto'", accelerator="gpu")


def test_several_optimizers() -> None:
    """Said at once, with the count."""

    class Two(m.Base):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 2)]

    refused(ModuleError, "configure_optimizers", "2 optimizers", "optimizer_idx", module=Two())


def test_a_refused_fit_leaves_the_module_as_it_was() -> None:
    """Weights, mode and the random streams after a dry look that complains."""
    module = with_loss(lambda s, x, y: s(x).detach().sum() + torch.rand(()))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    refused(ModuleError, "gradient", module=module)
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in before.items())
    assert module.training
    assert all(p.grad is None for p in module.parameters())
