"""TrainResult and EvalResult: what they log, what they gather for the epoch's end, what callbacks watch, what is refused."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fasttrain import (
    EarlyStopping,
    EvalResult,
    FasttrainWarning,
    ModelCheckpoint,
    ModuleError,
    OptionError,
    TrainResult,
    compile_fit,
)
from fasttrain.module import hiddens_of, loss_of
from tests.parity import modules as m
from tests.parity.harness import BARE, Case, assert_same_metrics, assert_same_weights, fast_fit, lightning_fit

RUNGS = pytest.mark.parametrize("capture", ["eager", "compile"])


def five() -> DataLoader:
    """Batches of 2, 2 and 1 rows."""
    return DataLoader(TensorDataset(*m.rows(5)), batch_size=2)


def largest(values: Tensor) -> Tensor:
    return values.max()


class Says(m.Base):
    """Everything logged with self.log."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        out = self(x)
        loss = F.cross_entropy(out, y)
        self.log("train_loss", loss, prog_bar=True)
        self.log("both", loss * 2, on_step=True, on_epoch=True)
        self.log("top", out.max(), on_step=False, on_epoch=True, reduce_fx="max")
        self.log("own", loss, on_step=False, on_epoch=True, reduce_fx=largest)
        self.log("here", out.mean(), on_step=False, on_epoch=True, reduce_fx=lambda values: values.sum() + len(values))
        self.log("number", 3.0)
        self.log_dict({"a/b": loss, "c": out.min()}, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("val_loss", loss, prog_bar=True)
        self.log_dict({"val_max": loss, "val_quiet": loss * 2}, reduce_fx=torch.max, logger=False)


class Returns(m.Base):
    """The same in Result objects."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        out = self(x)
        loss = F.cross_entropy(out, y)
        result = TrainResult(minimize=loss)
        result.log("train_loss", loss, prog_bar=True)
        result.log("both", loss * 2, on_epoch=True)
        result.log("top", out.max(), on_step=False, on_epoch=True, reduce_fx=torch.max)
        result.log("own", loss, on_step=False, on_epoch=True, reduce_fx=largest)
        result.log("here", out.mean(), on_step=False, on_epoch=True, reduce_fx=lambda values: values.sum() + len(values))
        if self.kw.get("numbers", True):
            result.log("number", 3.0)
        result.log_dict({"a/b": loss, "c": out.min()})
        result.out = out
        return result

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        result = EvalResult()
        result.log("val_loss", loss, prog_bar=True)
        result.log_dict({"val_max": loss, "val_quiet": loss * 2}, reduce_fx=torch.max, logger=False)
        result.kept = loss
        return result


# -- logging ----------------------------------------------------------------------------------------------------------
@RUNGS
def test_a_result_is_self_log(capture: str) -> None:
    """The same weights, bit for bit, and the same metrics as with self.log, in training and in validation, on either rung."""
    result, said = (fast_fit(Case(make, val=five), capture=capture) for make in (Returns, Says))
    assert result.rung == said.rung == capture
    assert_same_weights(result.weights, said.weights)
    assert_same_metrics(result.metrics, said.metrics, 0.0)


def test_the_captured_step_of_a_result_is_called_past_its_guards() -> None:
    """A TrainResult costs a steady step nothing: the graph is called directly where nobody reads what it keeps."""
    ours = fast_fit(Case(lambda: Returns(numbers=False), lambda: m.labelled(48)), capture="compile")
    assert ours.result.capture.direct, ours.result.capture.why_guarded


def test_loggers_and_the_bar_hear_what_they_are_told(tmp_path: Path) -> None:
    """logger=False and prog_bar=True of each call reach the loggers and the bar."""

    class Heard:
        def __init__(self) -> None:
            self.rows: list[tuple[int | None, set[str]]] = []

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.rows.append((step, set(metrics) - {"epoch"}))

    class Bar(Returns):
        def on_train_end(self) -> None:
            self.bar = set(self.trainer.progress_bar_metrics)

    heard = Heard()
    ours = fast_fit(Case(Bar, five, five, {"max_epochs": 1, "num_sanity_val_steps": 0}), logger=heard, log_every_n_steps=1)
    assert heard.rows == [
        *((step, {"train_loss", "both_step", "number"}) for step in range(3)),
        (2, {"val_loss"}),
        (2, {"both_epoch", "top", "own", "here", "a/b", "c"}),
    ]
    assert ours.module.bar == {"train_loss", "val_loss"}


def test_a_logged_value_can_be_read_and_a_name_of_its_own_is_refused() -> None:
    """``result.name`` and ``result["name"]``, as in 0.9; the Result's own names are not metrics."""
    result = EvalResult(checkpoint_on=torch.tensor(1.0))
    result.log("val_loss", torch.tensor(2.0, requires_grad=True))
    result["preds"] = [1, 2]
    assert result.val_loss == 2.0 == result["val_loss"]
    assert not result.val_loss.requires_grad
    assert "preds" in result
    assert "hiddens" not in result
    assert "checkpoint_on=" in repr(result)
    for name in ("minimize", "log", "_logged", 3):
        with pytest.raises(ModuleError, match="another name"):
            result.log(name, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ModuleError, match=r"tbptt_reduce_fx.*use reduce_fx"):
        result.log("x", 1.0, tbptt_reduce_fx=torch.sum)


# -- free attributes --------------------------------------------------------------------------------------------------
class Gathers(m.Base):
    """Keeps something of every kind and looks at it when the epoch ends."""

    def build(self) -> None:
        super().build()
        self.seen: list[tuple[str, Any]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out = self(batch[0])
        result = TrainResult(F.cross_entropy(out, batch[1]))
        result.log("train_loss", result.minimize)
        return self._fill(result, out, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        result = EvalResult(checkpoint_on=torch.tensor(float(batch_idx)))
        result.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))
        return self._fill(result, self(batch[0]), batch_idx)

    def _fill(self, result: Any, out: Tensor, batch_idx: int) -> Any:
        result.preds = out
        result["mean"] = out.mean()
        result.shapes = out.flatten()[: 1 + len(out) % 2].reshape(1, -1)
        result.label = f"rows {len(out)}"
        result.both = {"max": out.max(), "ids": [len(out)]}
        return result

    test_step = validation_step

    def training_epoch_end(self, outputs: Any) -> None:
        self.seen.append(("training", outputs))

    def validation_epoch_end(self, outputs: Any) -> None:
        self.seen.append(("validation", outputs))

    def test_epoch_end(self, outputs: Any) -> None:
        self.seen.append(("test", outputs))


def check_gathered(got: Any, kind: type, count: int) -> None:
    """Batches of 2, 2 and 1 rows, gathered."""
    assert type(got) is kind
    assert got.preds.shape == (5, m.CLASSES)
    assert not got.preds.requires_grad
    assert got.mean.shape == (count,)
    assert [s.shape for s in got.shapes] == [(1, 1), (1, 1), (1, 2)]
    assert got.label == ["rows 2", "rows 2", "rows 1"]
    assert got.both["max"].shape == (count,)
    assert got.both["ids"] == [[2], [2], [1]]
    assert "_logged" not in got
    assert got.hiddens is None


@RUNGS
def test_attributes_are_gathered_over_the_epoch(capture: str) -> None:
    """One object of the same class: rows concatenated, numbers stacked, other shapes and other things listed; also what was logged."""
    ours = fast_fit(Case(Gathers, five, five, {"max_epochs": 2, "num_sanity_val_steps": 0}), capture=capture)
    assert ours.rung == capture
    assert [name for name, _ in ours.module.seen] == ["validation", "training"] * 2
    for name, got in ours.module.seen:
        check_gathered(got, TrainResult if name == "training" else EvalResult, 3)
        assert got["train_loss" if name == "training" else "val_loss"].shape == (3,)
        if name == "training":
            assert torch.equal(got.minimize, got.train_loss)
        else:
            assert float(got.checkpoint_on) == 1.0


@pytest.mark.filterwarnings("ignore:.*hooks of older names:fasttrain.FasttrainWarning")
def test_several_loaders_give_a_list_and_tests_gather_too() -> None:
    """A Result for each loader, in validation and in trainer.test()."""
    module = Gathers()
    trainer = compile_fit(module, **BARE | {"max_epochs": 1, "num_sanity_val_steps": 0})
    trainer.validate([five(), five()])
    metrics = trainer.test(five())
    (_, pair), (_, tested) = module.seen
    assert [type(r) for r in pair] == [EvalResult] * 2
    for got in (*pair, tested):
        check_gathered(got, EvalResult, 3)
    assert metrics.keys() == {"val_loss"}  # what callbacks watch means nothing in a test


def test_what_the_hooks_after_a_step_get_is_the_result() -> None:
    """on_train_batch_end and on_validation_batch_end see the object, detached."""

    class Sees(Gathers):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert type(outputs) is TrainResult
            assert not outputs.minimize.requires_grad
            self.seen.append(("train batch", outputs.label))

        def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            assert type(outputs) is EvalResult
            self.seen.append(("val batch", outputs.label))

    for capture in ("eager", "compile"):
        seen = fast_fit(Case(Sees, five, five, {"max_epochs": 1, "num_sanity_val_steps": 0}), capture=capture).module.seen
        assert [s for s in seen if s[0] == "train batch"] == [("train batch", f"rows {n}") for n in (2, 2, 1)]
        assert [s for s in seen if s[0] == "val batch"] == [("val batch", f"rows {n}") for n in (2, 2, 1)]


def test_plain_steps_give_lists_as_before() -> None:
    """``[{"loss": tensor}, ...]`` in training, what was returned in evaluation, a list of lists for several loaders."""
    told: list[Any] = []

    class Old(m.Base):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:  # type: ignore[override]
            return {"rows": len(batch[0])}

        def training_epoch_end(self, outputs: Any) -> None:
            told.append([set(o) for o in outputs])

        def validation_epoch_end(self, outputs: Any) -> None:
            told.append(outputs)

    fast_fit(Case(Old, five, lambda: [five(), five()], {"max_epochs": 1, "num_sanity_val_steps": 0}))
    assert told == [[[{"rows": 2}, {"rows": 2}, {"rows": 1}]] * 2, [{"loss"}] * 3]


# -- what an *_epoch_end hook returns -----------------------------------------------------------------------------------
class Ends(Returns):
    """Returns from its epoch-end hooks what it was told to."""

    def training_epoch_end(self, outputs: Any) -> Any:
        return self.kw["train"](outputs)

    def validation_epoch_end(self, outputs: Any) -> Any:
        return self.kw["val"](outputs)


def fresh(kind: type) -> Any:
    def make(outputs: Any) -> Any:
        result = kind(checkpoint_on=torch.tensor(4.0), early_stop_on=torch.tensor(5.0))
        result.log("made", (outputs.out if kind is TrainResult else outputs.kept).sum() * 0 + 2)
        result.log("hidden", 3, logger=False, prog_bar=True)
        return result

    return make


def test_a_returned_result_is_logged_for_the_epoch() -> None:
    """Whatever its on_step and on_epoch say, and what callbacks watch with it; the evaluation's win."""
    ours = fast_fit(Case(lambda: Ends(train=fresh(TrainResult), val=lambda o: None), five, None, {"max_epochs": 1}))
    assert {k: ours.metrics[k] for k in ("made", "hidden", "checkpoint_on", "early_stop_on")} == {
        "made": 2.0,
        "hidden": 3.0,
        "checkpoint_on": 4.0,
        "early_stop_on": 5.0,
    }
    ours = fast_fit(Case(lambda: Ends(train=lambda o: None, val=fresh(EvalResult)), five, five, {"max_epochs": 1}))
    assert ours.metrics["made"] == 2.0
    assert ours.metrics["val_checkpoint_on"] == ours.metrics["checkpoint_on"] == 4.0


def test_a_gathered_result_that_is_given_back_keeps_what_its_hook_reduced() -> None:
    """What the hook put in the place of the gathered values wins over the reduction; what it left alone is reduced as logged."""

    def train(outputs: Any) -> Any:
        outputs.own, outputs.both = outputs.own.prod(), torch.tensor(7.0)
        outputs.log("more", 1)
        return outputs

    def val(outputs: Any) -> Any:
        outputs.val_max = 11.0
        outputs.checkpoint_on = outputs.val_loss.max()
        return [outputs]

    plain = fast_fit(Case(Returns, five, five, {"max_epochs": 1}))
    ours = fast_fit(Case(lambda: Ends(train=train, val=val), five, five, {"max_epochs": 1}))
    changed = {"more": 1.0, "both": 7.0, "both_epoch": 7.0, "val_max": 11.0}
    assert ours.metrics.items() >= changed.items()
    assert ours.metrics["checkpoint_on"] >= ours.metrics["val_loss"]
    for name in plain.metrics.keys() - changed.keys() - {"own"}:
        assert ours.metrics[name] == plain.metrics[name], name
    assert ours.metrics["own"] != plain.metrics["own"]


def test_the_dicts_of_before_results_are_logged() -> None:
    """'log' to the loggers, 'progress_bar' to the bar, every number to the callbacks; the rest is nobody's."""

    class Heard:
        def __init__(self) -> None:
            self.rows: list[dict[str, float]] = []

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.rows.append(metrics)

    class Before(m.Base):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": F.cross_entropy(self(batch[0]), batch[1])}

        def training_epoch_end(self, outputs: Any) -> Any:
            return {"log": {"train/mean": torch.stack([o["loss"] for o in outputs]).mean()}, "note": "text"}

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return {"val_loss": F.cross_entropy(self(batch[0]), batch[1])}

        def validation_epoch_end(self, outputs: Any) -> Any:
            mean = torch.stack([o["val_loss"] for o in outputs]).mean()
            return {"val_loss": mean, "log": {"val/a": mean, "val/b": 1}, "progress_bar": {"val/b": 1, "val/c": 2}}

        def on_train_end(self) -> None:
            self.bar = set(self.trainer.progress_bar_metrics)

    heard = Heard()
    stops = EarlyStopping("val_loss", patience=5)
    ours = fast_fit(Case(Before, five, five, {"max_epochs": 2}), logger=heard, callbacks=[stops])
    assert ours.metrics.keys() == {"train/mean", "val_loss", "val/a", "val/b", "val/c"}
    assert ours.module.bar == {"val/b", "val/c"}
    assert [set(r) - {"epoch"} for r in heard.rows] == [{"val/a", "val/b"}, {"train/mean"}] * 2
    assert float(stops.best_score) == pytest.approx(ours.metrics["val_loss"])


# -- what callbacks watch ---------------------------------------------------------------------------------------------
class Watched(m.Base):
    """Says what to stop and to save by, from lists of one value an epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        return TrainResult(loss, **self._given("train_"))

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return EvalResult(**self._given("val_"))

    def _given(self, which: str) -> dict[str, Tensor]:
        given = {k.removeprefix(which): v for k, v in self.kw.items() if k.startswith(which)}
        return {k: torch.tensor(v[self.current_epoch]) if isinstance(v, list) else v for k, v in given.items()}


def watched(tmp_path: Path, *callbacks: Any, val: Any = five, **kw: Any) -> Any:
    options = {"max_epochs": 5, "num_sanity_val_steps": 0, "enable_checkpointing": True, "default_root_dir": tmp_path}
    return fast_fit(Case(lambda: Watched(**kw), five, val, options), callbacks=list(callbacks)).result


def test_checkpoints_are_ranked_by_what_the_result_says(tmp_path: Path) -> None:
    """No monitor: the best by checkpoint_on; the evaluation's wins over the training step's, and is enough alone."""
    up, down = [1.0, 2.0, 3.0, 4.0, 5.0], [5.0, 4.0, 3.0, 4.0, 5.0]
    for kw, val, steps in (  # three steps an epoch
        ({"train_checkpoint_on": up}, None, 3),
        ({"train_checkpoint_on": up, "val_checkpoint_on": down}, five, 9),
        ({"val_checkpoint_on": down}, five, 9),
        ({"train_checkpoint_on": down}, five, 9),
        ({}, five, 15),
    ):
        saver = ModelCheckpoint(dirpath=tmp_path / f"{'-'.join(kw)}.{steps}")
        result = watched(tmp_path, saver, val=val, **kw)
        assert result.best_checkpoint == saver.best_model_path
        assert f"step={steps}" in Path(saver.best_model_path).name
        assert len(list(Path(saver.dirpath).iterdir())) == 1
        assert (saver.best_model_score is None) == (not kw)


def test_the_named_metrics_rank_too(tmp_path: Path) -> None:
    """monitor="checkpoint_on" is the evaluation's where it has one; save_top_k may then be more than one."""
    saver = ModelCheckpoint(dirpath=tmp_path / "a", monitor="checkpoint_on", save_top_k=2, filename="{epoch}-{checkpoint_on:.1f}")
    watched(tmp_path, saver, train_checkpoint_on=[1.0] * 5, val_checkpoint_on=[5.0, 1.0, 3.0, 0.5, 7.0])
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["epoch=1-checkpoint_on=1.0", "epoch=3-checkpoint_on=0.5"]
    assert sorted(saver.metric_steps.values()) == [6, 12]
    with pytest.raises(OptionError, match="checkpoint_on"):
        ModelCheckpoint(save_top_k=2)


def test_a_checkpoint_saved_before_there_was_a_score_gives_way(tmp_path: Path) -> None:
    """Saves in mid-epoch, before the first epoch's checkpoint_on is known, are the newest; ranking begins with the first score."""
    saver = ModelCheckpoint(dirpath=tmp_path / "a", every_n_train_steps=1)
    watched(tmp_path, saver, val=None, train_checkpoint_on=[1.0, 2.0, 3.0, 4.0, 5.0])
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["epoch=1-step=4"]


def test_true_and_false_say_whether_the_loss_ranks(tmp_path: Path) -> None:
    """checkpoint_on=True is the loss; False, and nothing, is none."""
    assert "checkpoint_on" in watched(tmp_path, val=None, train_checkpoint_on=True).metrics
    assert watched(tmp_path, val=None, train_checkpoint_on=False).metrics == {}
    assert watched(tmp_path, val=None).metrics == {}


def test_the_mean_over_the_epoch_is_watched() -> None:
    """Weighted by batch size, as everything that is logged: 0, 1, 2 over batches of 2, 2 and 1 is 0.8."""

    class Index(m.Base):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return TrainResult(F.cross_entropy(self(batch[0]), batch[1]), early_stop_on=float(batch_idx))

    assert fast_fit(Case(Index, five, options={"max_epochs": 1})).metrics == {"early_stop_on": pytest.approx(0.8)}


@pytest.mark.parametrize(
    ("kw", "val", "options", "epochs"),
    [
        ({"train_early_stop_on": [3.0, 2.0, 2.5, 1.0, 0.5]}, None, {}, 3),
        ({"train_early_stop_on": [5.0, 4.0, 3.0, 2.0, 1.0], "val_early_stop_on": [1.0, 2.0, 1.0, 1.0, 1.0]}, five, {}, 2),
        ({"val_early_stop_on": [3.0, 2.0, 2.5, 1.0, 0.5]}, five, {}, 3),
        ({"val_early_stop_on": [3.0, 2.0, 1.0, 2.5, 0.5]}, five, {"check_val_every_n_epoch": 2}, 4),
        ({"val_early_stop_on": [3.0, 2.0, 1.0, 2.5, 0.5]}, five, {"check_val_every_n_epoch": 3}, 5),
        ({"train_early_stop_on": [3.0, 2.0, 2.5, 1.0, 0.5]}, five, {"val_check_interval": 2}, 3),
        ({"train_early_stop_on": [3.0, 2.0, 2.5, 1.0, 0.5]}, five, {"check_val_every_n_epoch": 4}, 3),
    ],
)
def test_early_stopping_without_a_monitor(kw: Any, val: Any, options: Any, epochs: int) -> None:
    """It watches early_stop_on, the evaluation's first, and the training step's when the epoch ends."""
    stopping = EarlyStopping(patience=1)
    case = Case(lambda: Watched(**kw), five, val, {"max_epochs": 5, "num_sanity_val_steps": 1} | options)
    ours = fast_fit(case, callbacks=[stopping])
    assert ours.epochs == epochs
    assert ours.result.stopped_by == ("early_stopping" if epochs < 5 else "max_epochs")


class Scheduled(Watched):
    """A plateau on a metric."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        rule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": rule, "monitor": self.kw["plateau"]}


def test_a_plateau_may_watch_them_too() -> None:
    """The learning rate halves whenever the evaluation's checkpoint_on did not fall."""
    kw = {"plateau": "checkpoint_on", "val_checkpoint_on": [1.0, 2.0, 0.5, 0.6, 0.4], "train_checkpoint_on": [1.0] * 5}
    ours = fast_fit(Case(lambda: Scheduled(**kw), five, five, {"max_epochs": 5}))
    assert ours.optimizer.param_groups[0]["lr"] == 0.1 / 4


@pytest.mark.parametrize("val", [None, five])
def test_a_monitor_that_does_not_exist_is_named_with_those_that_do(tmp_path: Path, val: Any) -> None:
    """EarlyStopping, ModelCheckpoint and the plateau say what they were given and list the metrics."""
    kw = {"train_checkpoint_on": [1.0] * 5, "val_checkpoint_on": [1.0] * 5}
    there = ("'?checkpoint_on'?" if val is None else "'?checkpoint_on'?, '?val_checkpoint_on'?") + r"(\.|,|;)"
    with pytest.raises(OptionError, match=rf"EarlyStopping\(monitor\): got 'nope'; wanted .*{there}"):
        watched(tmp_path, EarlyStopping("nope"), val=val, **kw)
    with pytest.raises(OptionError, match=rf"EarlyStopping\(monitor\): got None; wanted .*{there}.*early_stop_on"):
        watched(tmp_path, EarlyStopping(), val=val, **kw)
    with pytest.raises(ModuleError, match=rf"'nope'.*{there}"):
        fast_fit(Case(lambda: Scheduled(plateau="nope", **kw), five, val, {"max_epochs": 1}))
    saver = ModelCheckpoint(dirpath=tmp_path / "x", monitor="nope")
    wanted = rf"ModelCheckpoint\(monitor\): got 'nope'; wanted .*{there}"
    if val is None:  # it may still come: a warning, once
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            module = Watched(**kw)
            trainer = compile_fit(
                module, **BARE | {"max_epochs": 1, "default_root_dir": tmp_path, "enable_checkpointing": True, "callbacks": [saver]}
            )
            trainer.fit(five())
        assert any(re.search(wanted, str(w.message)) for w in said if w.category is FasttrainWarning)
    else:
        with pytest.raises(OptionError, match=wanted):
            watched(tmp_path, saver, val=val, **kw)


def test_hiddens_and_the_loss_are_found() -> None:
    """For truncated backpropagation: of a TrainResult or a dict."""
    state, loss = torch.zeros(2), torch.ones(())
    for output in (TrainResult(loss, hiddens=state), {"loss": loss, "hiddens": state}):
        assert hiddens_of(output) is state
        assert loss_of(output) is loss
    assert hiddens_of(loss) is hiddens_of(None) is None


# -- older hooks ------------------------------------------------------------------------------------------------------
@RUNGS
def test_step_end_hooks_may_take_and_make_results(capture: str) -> None:
    """training_step_end and validation_step_end get what the step returned; what they return counts, and they may log."""

    class Old(m.Base):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            result = TrainResult(F.cross_entropy(self(batch[0]), batch[1]))
            result.log("inner", result.minimize)
            return result

        def training_step_end(self, outputs: Any) -> Any:
            outputs.minimize = outputs.minimize * 2
            outputs.log("outer", outputs.minimize)
            self.log("third", outputs.inner)
            return outputs

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self(batch[0]), batch[1])

        def validation_step_end(self, outputs: Any) -> Any:
            result = EvalResult()
            result.log("val_loss", outputs)
            return result

        def validation_epoch_end(self, outputs: Any) -> None:
            assert outputs.val_loss.shape == (3,)

    class Plain(m.Base):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.log_dict({"inner": loss, "outer": loss * 2, "third": loss})
            return loss * 2

    old, plain = (fast_fit(Case(make, val=five, options={"num_sanity_val_steps": 0}), capture=capture) for make in (Old, Plain))
    assert old.rung == capture
    assert_same_weights(old.weights, plain.weights)
    assert_same_metrics(old.metrics, plain.metrics, 0.0)


# -- several optimizers, truncated backpropagation ----------------------------------------------------------------------
class Two(m.Base):
    """One TrainResult for each of two optimizers."""

    def build(self) -> None:
        super().build()
        self.seen: list[Any] = []

    def turn(self, batch: Any, i: int) -> Any:
        out = self(batch[0])
        result = TrainResult(F.cross_entropy(out, batch[1]) * (i + 1))
        result.log("loss", result.minimize, on_epoch=True)
        result.log(f"loss_{i}", result.minimize)
        result.preds = out
        return result

    def training_epoch_end(self, outputs: Any) -> None:
        self.seen.append(outputs)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 2)]


class Indexed(Two):
    """By index."""

    def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:  # type: ignore[override]
        return self.turn(batch, optimizer_idx)


class Yields(Two):
    """By yields."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        yield self.turn(batch, 0)
        yield self.turn(batch, 1)


@RUNGS
@pytest.mark.parametrize("make", [Indexed, Yields])
def test_every_optimizer_has_a_result_of_its_own(make: Any, capture: str) -> None:
    """training_epoch_end gets a list of them; a key that both log is one metric, over both."""
    ours = fast_fit(Case(make, five, options={"max_epochs": 2}), capture=capture)
    assert ours.rung == capture
    for pair in ours.module.seen:
        assert [type(r) for r in pair] == [TrainResult] * 2
        assert [r.preds.shape for r in pair] == [(5, m.CLASSES)] * 2
        assert [set(vars(r)) & {"loss_0", "loss_1"} for r in pair] == [{"loss_0"}, {"loss_1"}]
    sizes = torch.tensor([2.0, 2.0, 1.0])
    mean = sum(float((r.loss * sizes).sum()) for r in ours.module.seen[-1]) / 10
    assert ours.metrics["loss_epoch"] == pytest.approx(mean, rel=1e-6)
    assert ours.metrics["loss_step"] == ours.metrics["loss_1"]


class Recurrent(m.Base):
    """A recurrence by hand that hands on its state."""

    truncated_bptt_steps = 2

    def build(self) -> None:
        self.net, self.head = torch.nn.Linear(m.WIDTH + 4, 4), torch.nn.Linear(4, m.CLASSES)
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int, hiddens: Any) -> Any:  # type: ignore[override]
        x, y = batch
        state = x.new_zeros(len(x), 4) if hiddens is None else hiddens
        for t in range(x.shape[1]):
            state = torch.tanh(self.net(torch.cat([x[:, t], state], 1)))
        loss = F.cross_entropy(self.head(state), y)
        if not self.kw["results"]:
            self.log("loss", loss)
            return {"loss": loss, "hiddens": state}
        result = TrainResult(loss, hiddens=state)
        result.log("loss", loss)
        result.state = state
        return result


class RecurrentSees(Recurrent):
    """And looks at its epochs."""

    def training_epoch_end(self, outputs: Any) -> None:
        assert outputs.hiddens is None
        self.seen.append(outputs.state.shape)


@RUNGS
def test_hiddens_of_a_result_are_handed_to_the_next_split(capture: str) -> None:
    """As those of a dict; what the splits keep is gathered into one Result."""
    result, said = (
        fast_fit(Case(lambda r=r: Recurrent(results=r), m.sequences, options={"max_epochs": 1}), capture=capture) for r in (True, False)
    )
    assert result.rung == capture
    assert result.steps == said.steps == 15
    assert_same_weights(result.weights, said.weights)
    assert_same_metrics(result.metrics, said.metrics, 0.0)
    sees = fast_fit(Case(lambda: RecurrentSees(results=True), m.sequences, options={"max_epochs": 1}), capture=capture)
    assert sees.module.seen == [(40 * 3, 4)]


# -- what is refused --------------------------------------------------------------------------------------------------
BAD_TRAIN = {
    "no loss": (lambda loss: TrainResult(), r"TrainResult\(minimize\): got None; wanted the loss"),
    "a number": (lambda loss: TrainResult(1.0), "got float 1.0; wanted a scalar tensor"),
    "a vector": (lambda loss: TrainResult(loss.repeat(3)), r"got shape \[3\]; wanted one number"),
    "no gradient": (lambda loss: TrainResult(loss.detach()), "without a gradient"),
    "EvalResult": (lambda loss: EvalResult(), "training_step returned: got a EvalResult; wanted a TrainResult"),
    "a tuple": (lambda loss: (TrainResult(loss), 3), "got a TrainResult in a tuple; wanted the TrainResult alone"),
    "a dict": (lambda loss: {"loss": loss, "more": TrainResult(loss)}, "got a TrainResult in a dict; wanted the TrainResult alone"),
    "a vector to save by": (lambda loss: TrainResult(loss, checkpoint_on=loss.repeat(2)), r"TrainResult\(checkpoint_on\): got shape \[2\]"),
}


@RUNGS
@pytest.mark.parametrize("what", BAD_TRAIN)
def test_a_wrong_result_of_training_step_is_refused_at_the_first_batch(what: str, capture: str) -> None:
    """Before anything is compiled or trained, with what came and what was wanted."""
    make, words = BAD_TRAIN[what]

    class Bad(m.Base):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert batch_idx == 0
            return make(F.cross_entropy(self(batch[0]), batch[1]))

    with pytest.raises(ModuleError, match=words):
        fast_fit(Case(Bad), capture=capture)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TrainResult(torch.ones(())), "validation_step returned: got a TrainResult; wanted an EvalResult"),
        (lambda: [EvalResult()], "got a EvalResult in a list"),
        (lambda: EvalResult(early_stop_on=torch.ones(2)), r"EvalResult\(early_stop_on\): got shape \[2\]"),
    ],
)
def test_a_wrong_result_of_validation_step_is_refused(make: Any, words: str) -> None:
    """At its first batch, which is in the sanity check."""

    class Bad(m.Base):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return make()

    with pytest.raises(ModuleError, match=words):
        fast_fit(Case(Bad, val=five))


def test_wrong_results_elsewhere_are_refused() -> None:
    """From predict_step, from an epoch's end, and from some steps only."""

    class Predicts(m.Base):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return EvalResult()

    with pytest.raises(ModuleError, match="predict_step returned: got a EvalResult; wanted the prediction itself"):
        compile_fit(Predicts(), **BARE).predict(five())
    with pytest.raises(ModuleError, match="training_epoch_end returned: got a EvalResult; wanted a TrainResult"):
        fast_fit(Case(lambda: Ends(train=lambda o: EvalResult()), five))

    class Some(m.Base):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            return loss if batch_idx == 1 else TrainResult(loss)

        def training_epoch_end(self, outputs: Any) -> None:
            raise AssertionError

    with pytest.raises(ModuleError, match="training_epoch_end: got Results for 2 of 3 batches and a dict for another"):
        fast_fit(Case(Some, five))


# -- one key twice ----------------------------------------------------------------------------------------------------
@RUNGS
@pytest.mark.parametrize("with_result", [False, True])
def test_a_key_logged_twice_in_a_step_with_other_arguments_is_refused(capture: str, with_result: bool) -> None:
    """At the first batch, in training and in validation: the key and both sets of arguments."""

    class Twice(m.Base):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert batch_idx == 0
            result = TrainResult(F.cross_entropy(self(batch[0]), batch[1]))
            self.log("a", 1.0, on_epoch=True)
            (result if with_result else self).log("a", 2.0, prog_bar=True)
            return result if with_result else result.minimize

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("v", 1.0)
            self.log("v", 1.0, reduce_fx="sum")

    words = r"'a'\): logged twice with other arguments, \(.*on_epoch=True.*on_epoch=False.*another name"
    with pytest.raises(ModuleError, match=words):
        fast_fit(Case(Twice), capture=capture)
    with pytest.raises(ModuleError, match=r"'v'\): logged twice.*reduce_fx='(mean|sum)'.*reduce_fx='(mean|sum)'"):
        fast_fit(Case(Twice, val=five), capture=capture)


class SameTwice(m.Base):
    """One key twice with the same arguments."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("a", loss, on_epoch=True)
        self.log("a", loss * 3, on_epoch=True)
        return loss


class InHooks(m.Base):
    """One key in several hooks, with other arguments and without."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.log("a", 10.0, on_epoch=True)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("a", float(batch_idx), prog_bar=True)
        self.log("b", float(batch_idx), on_step=False, on_epoch=True)
        self.log("c", float(batch_idx), on_epoch=True)
        return F.cross_entropy(self(batch[0]), batch[1])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("b", 10.0 + batch_idx, on_step=False, on_epoch=True)
        self.log("c", 20.0 + batch_idx)

    def on_train_epoch_end(self) -> None:
        self.log("c", 30.0)
        self.log("a", 40.0 + self.current_epoch)


@RUNGS
@pytest.mark.parametrize("make", [SameTwice, InHooks])
def test_one_key_in_one_hook_or_in_several_is_lightnings(make: Any, capture: str) -> None:
    """Twice in a step: the last value is the step's, the epoch takes both. In several hooks: each reduced by itself, the last one heard."""
    from pytorch_lightning.loggers.logger import Logger

    class Ours:
        def __init__(self) -> None:
            self.rows: list[tuple[int | None, dict[str, float]]] = []

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.rows.append((step, {k: round(v, 5) for k, v in metrics.items()}))

    class Theirs(Ours, Logger):
        name, version = "heard", 0

        def log_hyperparams(self, *_: Any, **__: Any) -> None:
            pass

    mine, theirs = Ours(), Theirs()
    case = Case(make, five, None, {"max_epochs": 2, "log_every_n_steps": 1})
    ours, lightning = fast_fit(case, capture=capture, logger=mine), lightning_fit(case, logger=theirs)
    assert_same_metrics(ours.metrics, lightning.metrics, 1e-5)
    if capture == "eager":
        assert mine.rows == theirs.rows
