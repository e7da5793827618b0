"""What self.log comes to: names, reductions, who hears of it and when, and that nothing is read on the way."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from fasttrain import ModuleError, compile_fit
from tests.parity import modules as m
from tests.parity.harness import BARE, Case, assert_same_metrics, fast_fit, lightning_fit


def five() -> DataLoader:
    """Batches of 2, 2 and 1 rows."""
    return DataLoader(TensorDataset(*m.rows(5)), batch_size=2)


class LogsIndex(m.Base):
    """Logs the batch index, with the arguments it is given."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("index", torch.tensor(float(batch_idx)), **self.kw)
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_index", float(batch_idx))


@pytest.mark.parametrize("capture", ["eager", "compile"])
def test_the_epoch_mean_is_weighted_by_batch_size(capture: str) -> None:
    """Batches of 2, 2, 1 that log 0, 1, 2 give 0.8, in training and in validation, numbers and tensors."""
    ours = fast_fit(Case(lambda: LogsIndex(on_epoch=True, on_step=False), five, five, {"max_epochs": 1}), capture=capture)
    assert ours.metrics["index"] == pytest.approx(0.8)
    assert ours.metrics["val_index"] == pytest.approx(0.8)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"on_epoch": True},
        {"on_step": False, "on_epoch": True},
        {"on_step": True, "on_epoch": True, "reduce_fx": "max"},
        {"batch_size": 3, "on_epoch": True},
        {"prog_bar": True},
        {"logger": False, "on_epoch": True},
        {"reduce_fx": torch.mean, "on_epoch": True},
        {"reduce_fx": max, "on_epoch": True},
        {"reduce_fx": "sum", "on_epoch": True, "on_step": False},
    ],
)
def test_names_and_values_are_lightnings(how: dict[str, Any]) -> None:
    """name, name_step, name_epoch, for every combination of arguments."""
    case = Case(lambda: LogsIndex(**how), five, five, {"max_epochs": 2})
    assert_same_metrics(fast_fit(case).metrics, lightning_fit(case).metrics, 1e-6)


@pytest.mark.parametrize("capture", ["eager", "compile"])
@pytest.mark.parametrize("how", [{}, {"on_epoch": True}, {"reduce_fx": "sum", "on_step": False, "on_epoch": True}])
def test_in_one_process_sync_dist_is_the_value_itself(how: dict[str, Any], capture: str) -> None:
    """As without it, and as in Lightning."""
    synced, plain = (Case(lambda more=more: LogsIndex(**how, **more), five, five, {"max_epochs": 2}) for more in ({"sync_dist": True}, {}))
    ours = fast_fit(synced, capture=capture).metrics
    assert_same_metrics(ours, fast_fit(plain, capture=capture).metrics, 0.0)
    assert_same_metrics(ours, lightning_fit(synced).metrics, 1e-6)


def test_a_value_that_nobody_would_hear_of_is_refused() -> None:
    """on_step=False with on_epoch=False, as in Lightning."""
    with pytest.raises(ModuleError, match=r"'index'.*nobody"):
        fast_fit(Case(lambda: LogsIndex(on_step=False, on_epoch=False)))


def test_any_function_reduces_the_stacked_values() -> None:
    """[ours] reduce_fx may be a function of all values of the epoch."""
    ours = fast_fit(
        Case(lambda: LogsIndex(on_epoch=True, on_step=False, reduce_fx=lambda v: v.prod() + len(v)), five, options={"max_epochs": 1})
    )
    assert ours.metrics["index"] == 3.0


def test_a_key_logged_again_with_other_arguments_is_an_error() -> None:
    """The message has the key and both ways it was logged."""

    class Twice(m.Base):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("a", 1.0, on_epoch=batch_idx > 1)
            return F.cross_entropy(self(batch[0]), batch[1])

    with pytest.raises(ModuleError, match=r"'a'.*other arguments.*another name"):
        fast_fit(Case(Twice))


@pytest.mark.parametrize(("value", "words"), [(torch.zeros(3), r"shape \[3\]"), ("text", "self.log")])
def test_only_one_number_can_be_logged(value: Any, words: str) -> None:
    """A vector or a text is refused with what came."""

    class Bad(m.Base):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.log("a", value)

    with pytest.raises(ModuleError, match=words):
        fast_fit(Case(Bad))


class Everywhere(m.Base):
    """self.log in every hook that may log."""

    def on_train_start(self) -> None:
        self.log("train_start", 1.0)

    def on_train_epoch_start(self) -> None:
        self.log("epoch_start", float(self.current_epoch))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.log("batch_start", float(batch_idx))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("batch_end", float(batch_idx), on_epoch=True)
        self.log("batch_mean", float(batch_idx), on_step=False, on_epoch=True)

    def on_train_epoch_end(self) -> None:
        self.log("epoch_end", float(self.current_epoch))

    def on_validation_epoch_start(self) -> None:
        self.log("val_epoch_start", 3.0)

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_batch_end", float(batch_idx))

    def on_validation_epoch_end(self) -> None:
        self.log("val_epoch_end", float(self.global_step))


@pytest.mark.parametrize("loaders", [1, 2])
def test_logging_in_hooks_is_lightnings(loaders: int) -> None:
    """Names, weights and values of what is logged outside the step, with one validation loader and with two."""
    case = Case(
        Everywhere if loaders == 1 else Everywhere2, five, five if loaders == 1 else lambda: [five(), m.labelled(4, 3)], {"max_epochs": 2}
    )
    assert_same_metrics(fast_fit(case).metrics, lightning_fit(case).metrics, 1e-6)


class Everywhere2(Everywhere):
    """The same over several validation loaders."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # type: ignore[override]
        super().validation_step(batch, batch_idx)


class Counted(m.Base):
    """torchmetrics objects, logged as they are."""

    def build(self) -> None:
        super().build()
        self.train_acc = torchmetrics.Accuracy("multiclass", num_classes=m.CLASSES)
        self.val_acc = torchmetrics.Accuracy("multiclass", num_classes=m.CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self(batch[0])
        self.train_acc(out, batch[1])
        self.log("acc", self.train_acc, on_step=False, on_epoch=True)
        return F.cross_entropy(out, batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.val_acc.update(self(batch[0]), batch[1])
        self.log("val_acc", self.val_acc)


def test_torchmetrics_are_computed_at_the_end_and_reset() -> None:
    """Over each epoch on its own, in training and in validation."""
    case = Case(Counted, five, five, {"max_epochs": 3, "num_sanity_val_steps": 1})
    assert_same_metrics(fast_fit(case).metrics, lightning_fit(case).metrics, 1e-6)


class Watch:
    """A callback that copies callback_metrics wherever callbacks may read them."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, float]]] = []

    def _note(self, where: str, trainer: Any) -> None:
        self.seen.append((where, {k: round(float(v), 5) for k, v in sorted(trainer.callback_metrics.items())}))

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self._note("batch end", trainer)

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        self._note("validation end", trainer)

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        self._note("epoch end", trainer)

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        self._note("end", trainer)


def test_callback_metrics_are_current_where_callbacks_read_them() -> None:
    """The same names and values as Lightning's at every batch end, validation end, epoch end and at the end."""
    import pytorch_lightning as pl

    class Theirs(Watch, pl.Callback):
        pass

    ours, theirs = Watch(), Theirs()
    case = Case(m.LogsDict, five, five, {"max_epochs": 2, "val_check_interval": 2, "num_sanity_val_steps": 0})
    fast_fit(case, callbacks=[ours])
    lightning_fit(case, callbacks=[theirs])
    assert ours.seen == theirs.seen


class Heard:
    """A logger that remembers."""

    def __init__(self) -> None:
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, {k: round(v, 5) for k, v in metrics.items()}))


@pytest.mark.parametrize(
    "options",
    [
        {"log_every_n_steps": 2},
        {"log_every_n_steps": 1, "accumulate_grad_batches": 2},
        {"log_every_n_steps": 50},
        {"log_every_n_steps": 3, "val_check_interval": 2},
    ],
)
@pytest.mark.parametrize("make", [m.LogsDict, Everywhere])
def test_loggers_hear_what_lightnings_loggers_hear(make: Any, options: dict[str, Any]) -> None:
    """The same metrics with the same x, every log_every_n_steps steps, after validations and at epoch ends."""
    from pytorch_lightning.loggers.logger import Logger

    class Theirs(Heard, Logger):
        name, version = "heard", 0

        def log_hyperparams(self, *_: Any, **__: Any) -> None:
            pass

    ours, theirs = Heard(), Theirs()
    case = Case(make, m.labelled, five, {"max_epochs": 2})
    fast_fit(case, logger=ours, **options)
    lightning_fit(case, logger=theirs, **options)
    merge = lambda rows: [(s, r) for s, r in rows if r.keys() - {"epoch"}]  # noqa: E731
    assert merge(ours.rows) == merge(theirs.rows)


def test_files_hold_every_nth_step(tmp_path: Path) -> None:
    """metrics.jsonl and metrics.csv: one line every log_every_n_steps steps, one per validation, readable as they are."""
    module = m.LogsDict()
    trainer = compile_fit(
        module,
        max_epochs=2,
        log_every_n_steps=2,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        capture="eager",
    )
    trainer.fit(m.labelled(), five())
    folder = tmp_path / "fasttrain_logs" / "version_0"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "train/loss_step" in line["metrics"]]
    assert steps == [1, 3, 5, 7, 9, 11]
    assert sum("val/loss" in line["metrics"] for line in lines) == 2
    assert not any("quiet" in line["metrics"] for line in lines)
    with open(folder / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [int(r["step"]) for r in table if r["train/loss_step"]] == steps


class Reads(TorchDispatchMode):
    """Counts host reads of device values."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class CountsReads(m.LogsDict):
    """Host reads so far, noted at every batch start."""

    def build(self) -> None:
        super().build()
        self.at: list[int] = []
        self.reads: Any = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.at.append(self.reads.count)


def test_a_steady_eager_step_reads_nothing_for_its_metrics() -> None:
    """Logging with on_step and on_epoch, a tensor that only the bar hears of: no value comes to the host between two steps."""
    module = CountsReads()
    trainer = compile_fit(
        module, **BARE | {"max_epochs": 1, "capture": "eager", "nonfinite": "ignore", "log_every_n_steps": 1000, "logger": Heard()}
    )
    with Reads() as module.reads:
        trainer.fit(m.labelled(320))
    steady = module.at[3:]
    assert len(steady) > 30
    assert steady[-1] == steady[0]


def test_each_logged_step_reads_once_per_metric() -> None:
    """With log_every_n_steps=n nothing is read in between, and the file has exactly those steps."""
    heard = Heard()
    module = CountsReads()
    trainer = compile_fit(
        module, **BARE | {"max_epochs": 1, "capture": "eager", "nonfinite": "ignore", "log_every_n_steps": 10, "logger": heard}
    )
    with Reads() as module.reads:
        trainer.fit(m.labelled(320))
    jumps = [i for i in range(5, len(module.at)) if module.at[i] > module.at[i - 1]]
    assert jumps == [10, 20, 30]
    assert [s for s, r in heard.rows if "train/loss_step" in r] == [9, 19, 29, 39]


def test_logged_values_are_cut_from_the_graph() -> None:
    """A logged loss keeps no graph alive."""

    class Kept(m.Base):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert not self.trainer.callback_metrics["train_loss"].requires_grad

    fast_fit(Case(Kept))


@pytest.mark.parametrize("capture", ["eager", "compile"])
def test_a_metric_keeps_its_value_after_the_step_that_made_it(capture: str) -> None:
    """A tensor taken from callback_metrics does not change when the next step runs."""

    class Keeps(m.Base):
        def build(self) -> None:
            super().build()
            self.kept: list[tuple[Tensor, float]] = []

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            value = self.trainer.callback_metrics["train_loss"]
            self.kept.append((value, float(value)))

    ours = fast_fit(Case(Keeps), capture=capture)
    assert len({f for _, f in ours.module.kept}) > 5
    assert all(float(t) == f for t, f in ours.module.kept)


def test_the_metrics_of_the_sanity_check_are_thrown_away() -> None:
    """Nothing of it is in callback_metrics at the first batch."""

    class Looks(m.Base):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.global_step == 0:
                assert "val_loss" not in self.trainer.callback_metrics

    fast_fit(Case(Looks, val=five))


def test_bf16_values_are_summed_wide() -> None:
    """300 batches that log 1.0 in bf16 sum to 300, not to the 256 where bf16 stops counting."""

    class Sums(m.Base):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("ones", torch.ones((), dtype=torch.bfloat16), on_step=False, on_epoch=True, reduce_fx="sum")
            return F.cross_entropy(self(batch[0]), batch[1])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert fast_fit(Case(Sums, lambda: m.labelled(600, 2), options={"max_epochs": 1})).metrics["ones"] == 300.0
