"""What a first user runs into: mistakes that would train something else in silence, what a run prints, ctrl-C and going on."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain import Callback, DataError, FasttrainWarning, ModuleError, OptionError, compile_fit
from tests.parity import modules as m

BARE: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "capture": "eager", "max_epochs": 1}


def refused(error: type[Exception], words: str, module: Any, **options: Any) -> None:
    with pytest.raises(error, match=words):
        compile_fit(module, **BARE | options).fit(m.labelled())


# -- mistakes that would otherwise pass unnoticed ---------------------------------------------------------------------
@pytest.mark.parametrize("options", [{"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 2}])
def test_manual_optimization_clips_and_accumulates_by_itself(options: dict[str, Any]) -> None:
    """The loop would do it behind the module's back, or not at all: said, with what to write instead."""
    module = m.Base()
    module.automatic_optimization = False
    refused(OptionError, "automatic_optimization=False.*Leave the option out", module, **options)


def test_a_scheduler_of_another_optimizer() -> None:
    """It would move the rate of nobody."""

    class Mine(m.Base):
        def configure_optimizers(self) -> Any:
            one, two = (torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(2))
            return [one], [torch.optim.lr_scheduler.StepLR(two, 1)]

    refused(ModuleError, "StepLR of another optimizer", Mine())


def test_a_misspelled_key_beside_the_optimizer() -> None:
    """Lightning warns; so do we, with the keys there are."""

    class Mine(m.Base):
        def configure_optimizers(self) -> Any:
            opt = torch.optim.SGD(self.parameters(), lr=0.1)
            return {"optimizer": opt, "lr_schedulers": torch.optim.lr_scheduler.StepLR(opt, 1)}

    with pytest.warns(FasttrainWarning, match=r"\['lr_schedulers'\].*'lr_scheduler'") as caught:
        compile_fit(Mine(), **BARE).fit(m.labelled())
    assert caught[0].filename == __file__


def test_a_huggingface_batch_without_labels() -> None:
    """Its output has no loss: said, not skipped."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
    trainer = compile_fit(transformers.GPT2LMHeadModel(config), optimizer=torch.optim.SGD, **BARE)
    with pytest.raises(ModuleError, match=r"no loss.*\['input_ids'\].*'labels'"):
        trainer.fit([{"input_ids": torch.zeros(2, 4, dtype=torch.int64)}])


@pytest.mark.parametrize(("loss", "words"), [("mse", "'mse'"), (nn.MSELoss, "the class MSELoss")])
def test_a_loss_that_is_no_function(loss: Any, words: str) -> None:
    """A name, or the class instead of an instance."""
    refused(ModuleError, f"loss: got {words}; wanted a function", nn.Linear(2, 2), loss=loss, optimizer=torch.optim.SGD)


def test_things_in_the_loaders_place() -> None:
    """The module once more, as with Lightning's Trainer; a datamodule's class."""
    module = m.Base()
    with pytest.raises(DataError, match=r"a module \(Base\).*fit\(train_loader\)"):
        compile_fit(module, **BARE).fit(module, m.labelled())
    with pytest.raises(DataError, match=r"the class Data;.*Data\(\)"):
        compile_fit(module, **BARE).fit(datamodule=m.Data)


@pytest.mark.parametrize("name", ["profiler", "benchmark", "sync_batchnorm"])
def test_options_of_lightning_that_are_not_here(name: str) -> None:
    """Told apart from a misspelling."""
    with pytest.raises(OptionError, match=f"{name}' is Lightning's"):
        compile_fit(m.Base(), **{name: None})  # type: ignore[arg-type]


# -- what it prints ---------------------------------------------------------------------------------------------------
class Logs(m.Base):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss_seen", loss, on_epoch=True, on_step=False, prog_bar=True)
        return loss


def test_every_epoch_ends_with_its_own_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a validation too, at its last batch, with the metrics of that epoch and not of the one before."""
    seen: list[str] = []

    class Notes(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(f"loss_seen {float(trainer.callback_metrics['loss_seen']):.4g}")

    compile_fit(Logs(), **BARE | {"enable_progress_bar": True, "max_epochs": 3, "callbacks": [Notes()]}).fit(m.labelled())
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch")]
    assert [line.split("  ")[0] for line in lines] == [f"epoch {i}/3 6/6" for i in (1, 2, 3)]
    assert all(text in line for text, line in zip(seen, lines, strict=True))


def test_an_evaluation_is_shown_to_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    """The last line of a validation names its last batch."""
    compile_fit(m.Base(), **BARE | {"enable_progress_bar": True}).validate(m.labelled())
    assert [line.strip() for line in capsys.readouterr().err.splitlines()] == ["validate 6/6"]


# -- ctrl-C -----------------------------------------------------------------------------------------------------------
class Interrupts(Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 8:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_in_mid_epoch_loses_no_batch(tmp_path: Path) -> None:
    """Interrupted in the second epoch and resumed from "last", bit for bit the run that was left alone."""
    first = m.Base()
    start = {k: v.clone() for k, v in first.state_dict().items()}
    options = BARE | {"enable_checkpointing": True, "max_epochs": 3, "seed": 1, "default_root_dir": tmp_path / "whole"}
    assert compile_fit(first, **options).fit(m.labelled()).steps == 18
    options["default_root_dir"] = tmp_path / "stopped"
    second = m.Base()
    second.load_state_dict(start)
    trainer = compile_fit(second, **options, callbacks=[Interrupts()])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(m.labelled())
    assert trainer.result is not None
    assert (trainer.result.steps, trainer.result.stopped_by) == (8, "interrupt")
    third = m.Base()
    assert compile_fit(third, **options).fit(m.labelled(), ckpt_path="last").steps == 18
    assert all(torch.equal(v, third.state_dict()[k]) for k, v in first.state_dict().items())


def test_explain_after_a_step_of_ones_own_loop() -> None:
    """``trainer.step`` captures too, and is explained."""
    trainer = compile_fit(m.Base(), **BARE)
    trainer.step(next(iter(m.labelled())))
    assert "rung: eager" in trainer.explain()


# -- what is given twice, and older hooks -----------------------------------------------------------------------------
def test_what_would_be_ignored_is_refused() -> None:
    """A scheduler or a loss beside a module that decides them itself."""
    refused(ModuleError, "lr_scheduler: got one without optimizer=", m.Base(), lr_scheduler=lambda o: None)
    refused(ModuleError, "training_step returns its own loss", m.Base(), loss=F.cross_entropy)


@pytest.mark.filterwarnings("ignore:.*hooks of older names:fasttrain.FasttrainWarning")
@pytest.mark.parametrize("capture", ["eager", "compile"])
def test_the_older_training_hooks_run(capture: str) -> None:
    """``training_step_end`` makes the loss; ``training_epoch_end`` has every batch's output, before on_train_epoch_end."""
    told: list[Any] = []

    class Old(m.Base):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch[0]), batch[1]

        def training_step_end(self, outputs: Any) -> Tensor:
            return F.cross_entropy(*outputs)

        def training_epoch_end(self, outputs: list[dict[str, Tensor]]) -> None:
            told.append([set(o) for o in outputs])

        def on_train_epoch_end(self) -> None:
            told.append("on_train_epoch_end")

    module = Old()
    result = compile_fit(module, **BARE | {"capture": capture, "max_epochs": 2}).fit(m.labelled())
    assert result.steps == 12
    assert told == [[{"loss"}] * 6, "on_train_epoch_end"] * 2
