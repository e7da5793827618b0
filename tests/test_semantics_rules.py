"""The rules of the training loop, one small test each, where no other file proves them; docs/semantics.md is their table."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as by
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

import fasttrain.setup
from fasttrain import EarlyStopping, FasttrainWarning, ModelCheckpoint, ModuleError, OptionError, compile_fit
from fasttrain.progress import Snapshot
from tests.parity import modules as m
from tests.parity.harness import BARE, Case, Outcome, assert_same, assert_same_weights, fast_fit, lightning_fit
from tests.parity.test_cadence import Traced, ten, two

CAPTURES = ["eager", "compile"]


def both(make: Callable[[], Any] = Traced, train: Callable[[], Any] = ten, val: Any = two, **options: Any) -> tuple[Outcome, Outcome]:
    case = Case(make, train, val, {"max_epochs": 2} | options)
    return fast_fit(case), lightning_fit(case)


# -- order of one fit -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-true", torch.bfloat16), ("64-true", torch.float64)])
def test_optimizers_are_made_over_the_module_in_place(precision: str, dtype: torch.dtype) -> None:
    """configure_optimizers sees parameters on their device and in their precision."""

    class Looks(m.Base):
        def configure_optimizers(self) -> Any:
            self.seen = {(p.dtype, p.device.type) for p in self.parameters()}
            return super().configure_optimizers()

    ours, theirs = both(Looks, m.labelled, None, precision=precision, max_epochs=1)
    assert ours.module.seen == theirs.module.seen == {(dtype, "cpu")}


class Weighs(m.Classifier):
    """Notes the loss and the norm of the gradients at each hook inside the step."""

    def build(self) -> None:
        super().build()
        self.loss: list[float] = []
        self.norms: dict[str, list[float]] = {}

    def weigh(self, where: str) -> None:
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters()])
        self.norms.setdefault(where, []).append(float(norm))

    def on_before_backward(self, loss: Tensor) -> None:
        self.loss.append(float(loss.detach()))

    def on_after_backward(self) -> None:
        self.weigh("after backward")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.weigh("before the step")

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None) -> None:
        self.weigh("clipping")
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.weigh("end")


def test_a_loss_scale_is_on_until_the_hooks_before_the_step() -> None:
    """fp16: loss and gradients are scaled through on_after_backward, and unscaled, unclipped from on_before_optimizer_step on."""
    seen = fast_fit(Case(Weighs, options={"precision": "16-mixed", "gradient_clip_val": 0.1, "max_epochs": 1})).module
    assert all(loss > 6e4 for loss in seen.loss)
    for scaled, plain, clipped, end in zip(*(seen.norms[k] for k in ("after backward", "before the step", "clipping", "end")), strict=True):
        assert scaled == pytest.approx(plain * 65536, rel=1e-4)
        assert clipped == plain > 0.2
        assert end == pytest.approx(0.1, rel=1e-4)


AROUND_THE_PIECE = (
    "on_before_zero_grad",
    "on_after_backward",
    "on_before_optimizer_step",
    "configure_gradient_clipping",
    "optimizer_step",
    "optimizer_zero_grad",
)
IN_THE_PIECE = ("on_before_backward", "backward")


def hooked(hook: str) -> tuple[type[m.Base], Any]:
    """A module that counts the calls of a hook inside the step, and goes on to what Lightning does; and its trainer."""

    class Hooked(m.Base):
        calls = 0

    def override(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return getattr(m.Base, hook)(self, *args, **kwargs)

    setattr(Hooked, hook, override)
    torch.manual_seed(0)
    trainer = compile_fit(Hooked(), **BARE | {"max_epochs": 2, "deterministic": True})
    torch.manual_seed(7)
    trainer.fit(m.labelled())
    return Hooked, trainer


@pytest.mark.parametrize("hook", [*AROUND_THE_PIECE, *IN_THE_PIECE])
def test_a_hook_inside_the_step_is_honoured(hook: str) -> None:
    """capture="auto" calls it at every step, on whatever rung that leaves, and the weights are Lightning's."""
    make, trainer = hooked(hook)
    assert trainer.module.calls == 12
    ours = {k: v.detach() for k, v in trainer.module.state_dict().items()}
    assert_same_weights(ours, lightning_fit(Case(make, options={"max_epochs": 2})).weights, 2e-5)


@pytest.mark.parametrize("hook", IN_THE_PIECE)
def test_a_hook_that_decides_the_rung_is_named(hook: str) -> None:
    """explain() says which one it was."""
    _, trainer = hooked(hook)
    assert trainer.result.capture.rung == "eager"
    assert hook in trainer.explain()


@pytest.mark.parametrize("hook", AROUND_THE_PIECE)
def test_a_hook_around_the_captured_piece_is_named(hook: str) -> None:
    """explain() says which hooks cut the step into pieces."""
    assert hook in hooked(hook)[1].explain()


@pytest.mark.parametrize("hook", ["on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step"])
def test_a_callbacks_hook_inside_the_step_is_honoured(hook: str) -> None:
    """The same for callbacks."""
    calls = []
    watcher = type("Watcher", (), {hook: lambda self, *args: calls.append(hook)})()
    fast_fit(Case(m.Base, options={"max_epochs": 2}), capture="auto", deterministic=True, callbacks=[watcher])
    assert len(calls) == 12


class Old(Traced):
    """Every older hook that modules still carry."""

    def build(self) -> None:
        super().build()
        for name in ("on_pretrain_routine_start", "on_pretrain_routine_end", "on_epoch_start", "on_epoch_end"):
            setattr(self, name, partial(self.note, name))
        self.on_batch_start = lambda batch, batch_idx: self.note("on_batch_start")
        self.on_batch_end = partial(self.note, "on_batch_end")
        for name in ("training_step_end", "validation_step_end"):
            setattr(self, name, partial(self.passed, name))
        for name in ("training_epoch_end", "validation_epoch_end"):
            setattr(self, name, lambda outputs, name=name: self.note(name, len(outputs)))

    def passed(self, name: str, output: Any) -> Any:
        self.note(name)
        return output

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.note("on_train_batch_start")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.note("on_train_batch_end")

    def on_train_epoch_start(self) -> None:
        self.note("on_train_epoch_start")

    def on_validation_epoch_end(self) -> None:
        self.note("on_validation_epoch_end")

    def on_fit_start(self) -> None:
        self.note("on_fit_start")


def old_fit() -> list[str]:
    case = Case(Old, partial(m.labelled, 16), two, {"max_epochs": 1, "num_sanity_val_steps": 0})
    return [e[0] for e in fast_fit(case).module.events]


def test_older_hooks_come_at_their_old_place() -> None:
    """Around the restore, before and after the batch, after the step, after the epoch."""
    batch = ["on_batch_start", "on_train_batch_start", "train", "training_step_end", "on_train_batch_end", "on_batch_end"]
    validation = ["val", "validation_step_end"] * 2 + ["validation_epoch_end", "on_validation_epoch_end"]
    got = [e for e in old_fit() if e not in ("on_epoch_start", "on_train_epoch_start")]
    start = ["on_pretrain_routine_start", "on_pretrain_routine_end", "on_fit_start"]
    assert got == [*start, *batch, *batch, *validation, "training_epoch_end", "epoch end", "on_epoch_end"]


def test_the_older_start_of_an_epoch_comes_first() -> None:
    """As on_batch_start does."""
    got = old_fit()
    assert got.index("on_epoch_start") < got.index("on_train_epoch_start")


def test_an_older_hook_is_named_with_the_present_one() -> None:
    """One line for each."""
    with pytest.warns(FasttrainWarning, match="on_epoch_end.*on_train_epoch_end"):
        compile_fit(Old(), **BARE | {"max_epochs": 1, "capture": "eager"}).fit(m.labelled(), two())


def test_what_the_step_returned_reaches_the_end_of_the_batch() -> None:
    """[ours] A tensor undivided, a dict with all that is in it; None when the step returned nothing."""
    seen: list[Any] = []

    class Returns(m.Base):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return [loss, {"loss": loss, "more": [batch_idx]}, None][batch_idx % 3]

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert not (isinstance(outputs, Tensor) and outputs.requires_grad)
            seen.append(outputs["more"] if isinstance(outputs, dict) else type(outputs))

    fast_fit(Case(Returns, options={"max_epochs": 1, "accumulate_grad_batches": 2}))
    assert seen == [Tensor, [1], type(None), Tensor, [4], type(None)]


class Hears:
    """A logger that notes what it is told, metrics aside."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.calls.append(step)

    def log_hyperparams(self, params: Any) -> None:
        self.calls.append(dict(params))

    def save(self) -> None:
        self.calls.append("save")

    def finalize(self, status: str) -> None:
        self.calls.append(status)


class Hyper(m.Base):
    """Has hyperparameters; breaks at step 3 when told to."""

    def __init__(self, width: int = 7, breaks: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.hparams.breaks and self.global_step == 3:
            raise ArithmeticError
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("breaks", [False, True])
def test_loggers_are_finalized_whatever_happens(breaks: bool) -> None:
    """Hyperparameters first, then metrics, saved and finalized at the end with how it went."""
    ours = Hears()
    case = Case(partial(Hyper, breaks=breaks), options={"max_epochs": 1, "log_every_n_steps": 2, "logger": ours})
    if breaks:
        with pytest.raises(ArithmeticError):
            fast_fit(case)
    else:
        fast_fit(case)
    steps = [1] if breaks else [1, 3, 5]
    assert ours.calls == [{"width": 7, "breaks": breaks}, *steps, "save", "failed" if breaks else "success"]


def test_the_running_loss_is_the_mean_of_the_last_twenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """At every batch, and over what there is while there are fewer."""
    shown: list[Snapshot] = []

    class Shows:
        interval = 0.0
        start = stop = line = staticmethod(lambda *_: None)
        update = staticmethod(shown.append)

    class Losses(m.Base):
        def build(self) -> None:
            super().build()
            self.losses: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.losses.append(float(loss.detach()))
            return loss

    monkeypatch.setattr(fasttrain.setup, "make_progress", lambda enabled: Shows())
    losses = fast_fit(Case(Losses, partial(m.labelled, 64, 2), options={"max_epochs": 1})).module.losses
    for s in shown:
        if s.stage == "train" and s.batch:
            assert s.loss == pytest.approx(np.mean(losses[max(0, s.batch - 20) : s.batch]), rel=1e-5)
    assert {s.batch for s in shown} >= set(range(1, 33))


class Sets(Sampler):
    """An order of its own for each epoch, once it is told which."""

    def __init__(self, n: int) -> None:
        self.n, self.epoch = n, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        return iter(torch.randperm(self.n, generator=torch.Generator().manual_seed(self.epoch)).tolist())

    def __len__(self) -> int:
        return self.n


@pytest.mark.parametrize("workers", [0, 1])
def test_samplers_hear_which_epoch_it_is(workers: int) -> None:
    """The batches of three epochs are Lightning's."""
    ours, theirs = both(train=lambda: DataLoader(TensorDataset(*m.rows(20)), 4, sampler=Sets(20), num_workers=workers), max_epochs=3)
    assert ours.module.events == theirs.module.events


# -- randomness and order ---------------------------------------------------------------------------------------------
class Draws(Traced):
    """Draws from every stream in training and in validation, and notes what it drew."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.note("drew", random.random(), float(np.random.rand()), float(torch.rand(())))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.note("drew", random.random(), float(np.random.rand()), float(torch.rand(())))
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 3, "num_sanity_val_steps": -1}, {"accumulate_grad_batches": 5}], ids=str)
def test_every_stream_is_consumed_as_by_lightning(options: dict[str, Any]) -> None:
    """python, numpy and torch: the same numbers in every step, and the streams end at the same place."""
    ends = []
    for fit in (fast_fit, lightning_fit):
        random.seed(3)
        np.random.seed(3)
        end = fit(Case(Draws, ten, two, {"max_epochs": 2} | options))
        ends.append((end.module.events, random.random(), float(np.random.rand()), end.rng.tolist()))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("how", [{"capture": "compile"}, {"capture": "compile", "verify": 2}, {"capture": "auto"}], ids=str)
def test_what_runs_besides_puts_every_stream_back(how: dict[str, Any]) -> None:
    """Looking, sanity check, compiling, verifying, measuring: the streams end where Lightning's end, the batches are its batches."""
    ends = []
    for fit, more in ((fast_fit, how), (lightning_fit, {})):
        random.seed(3)
        np.random.seed(3)
        end = fit(Case(m.Classifier, m.labelled, two), **more)
        ends.append((random.random(), float(np.random.rand()), end.rng.tolist(), end.weights))
    assert ends[0][:3] == ends[1][:3]
    assert_same_weights(ends[0][3], ends[1][3], 2e-5)


class Augmented(Dataset):
    """Rows with noise from all three streams, drawn where the row is made."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(m.WIDTH) + random.random() + np.random.rand()
        return (torch.full((m.WIDTH,), i / 24) + 0.1 * noise).float(), torch.tensor(i % m.CLASSES)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_seed_reaches_loader_workers(workers: int) -> None:
    """Noise that workers draw from torch, random and numpy is the same in two runs from one seed, and another from another."""

    def weights(seed: int) -> Tensor:
        torch.manual_seed(0)
        module = m.Base()
        loader = DataLoader(Augmented(), 8, shuffle=True, num_workers=workers)
        compile_fit(module, **BARE | {"seed": seed, "max_epochs": 1, "capture": "eager"}).fit(loader)
        return module.net[0].weight.detach().clone()

    first = weights(1)
    torch.rand(5)
    random.random()
    np.random.rand()
    assert torch.equal(weights(1), first)
    assert not torch.equal(weights(2), first)


# -- counting ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("window", [1, 3])
def test_the_step_is_counted_after_it_is_done(window: int) -> None:
    """training_step sees the old count, the batch's end the new one, and only a window's last batch raises it."""

    class Counts(m.Base):
        def build(self) -> None:
            super().build()
            self.seen: list[tuple[int, int]] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.before = self.global_step
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.seen.append((self.before, self.global_step))

    ours, theirs = both(Counts, m.labelled, None, accumulate_grad_batches=window)
    assert ours.module.seen == theirs.module.seen
    assert ours.module.seen[:3] == ([(0, 1), (1, 2), (2, 3)] if window == 1 else [(0, 0), (0, 0), (0, 1)])


class Overflows(m.Base):
    """Its third loss is infinite; one scheduler by step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (float("inf") if batch_idx == 2 else 1.0)

    def configure_optimizers(self) -> Any:
        opt = torch.optim.SGD(self.parameters(), lr=0.1)
        self.rule = by.ExponentialLR(opt, 0.9)
        return [opt], [{"scheduler": self.rule, "interval": "step"}]


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("window", [1, 2])
def test_a_skipped_step_is_not_counted_and_moves_no_scheduler(window: int, capture: str) -> None:
    """[ours] Of 6 steps (3 with windows of two) one is skipped."""
    ours = fast_fit(Case(Overflows, options={"nonfinite": "skip", "max_epochs": 1, "accumulate_grad_batches": window}), capture=capture)
    assert (ours.steps, ours.module.rule.last_epoch, ours.result.ledger.skipped_steps) == (6 // window - 1, 6 // window - 1, 1)
    assert all(bool(torch.isfinite(w).all()) for w in ours.weights.values())


@pytest.mark.parametrize("capture", CAPTURES)
def test_a_window_beyond_the_epoch_is_the_epoch(capture: str) -> None:
    """[ours] One step an epoch, of the mean over its batches, which is a batch of all rows where they are of one size."""
    case = Case(m.Base, partial(m.labelled, 48, shuffle=False), options={"accumulate_grad_batches": 9})
    ours = fast_fit(case, capture=capture)
    whole = fast_fit(Case(m.Base, partial(m.labelled, 48, 48, shuffle=False)))
    assert ours.steps == whole.steps == 3
    assert_same_weights(ours.weights, whole.weights, 2e-5)


class Stops(m.Base):
    """Asks to stop at the end of its second epoch."""

    def on_train_epoch_end(self) -> None:
        self.trainer.should_stop = self.current_epoch == 1


def test_a_run_without_bounds_is_a_thousand_epochs_with_a_warning() -> None:
    """The bound is there to read; a run bounded by steps or time has none, and no warning."""
    module = Stops()
    with pytest.warns(FasttrainWarning, match="1000 epochs"):
        compile_fit(module, **BARE | {"capture": "eager"}).fit(m.labelled())
    assert module.trainer.max_epochs == 1000
    assert module.trainer.current_epoch == 2
    for bound in ({"max_steps": 3}, {"max_time": "00:00:10:00"}, {"max_epochs": -1}):
        with warnings.catch_warnings():
            warnings.simplefilter("error", FasttrainWarning)
            compile_fit(module := Stops(), **BARE | {"capture": "eager"} | bound).fit(m.labelled())
        assert module.trainer.max_epochs == -1


@pytest.mark.parametrize("name", ["limit_train_batches", "limit_val_batches"])
def test_a_share_that_is_no_batch_is_an_error(name: str) -> None:
    """As in Lightning; 0.0 asks for none and is none."""
    with pytest.raises(OptionError, match=f"{name}.*no batch"):
        fast_fit(Case(Traced, ten, two, {name: 0.05}))
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException):
        lightning_fit(Case(Traced, ten, two, {name: 0.05}))
    ours, theirs = both(**{name: 0.0})
    assert ours.module.events == theirs.module.events


@pytest.mark.parametrize("stage", ["test", "predict"])
@pytest.mark.parametrize(("limit", "batches"), [(1, 1), (1.0, 4), (0.5, 2), (9, 4), (0, 0)])
def test_one_is_a_batch_and_one_point_nought_all(stage: str, limit: int | float, batches: int) -> None:
    """limit_test_batches and limit_predict_batches too."""
    seen = []

    class Module(m.Base):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            seen.append(batch_idx)

        def predict_step(self, batch: Any, batch_idx: int) -> None:
            seen.append(batch_idx)

    trainer = compile_fit(Module(), **BARE | {f"limit_{stage}_batches": limit})
    getattr(trainer, stage)(m.labelled(20, 5))
    assert seen == list(range(batches))


@pytest.mark.parametrize("overfit", [2, 0.5])
def test_overfitting_turns_shuffling_off(overfit: int | float) -> None:
    """The same few batches in every epoch."""
    module = Traced()
    with pytest.warns(FasttrainWarning, match="shuffling"):
        compile_fit(module, **BARE | {"overfit_batches": overfit, "max_epochs": 3, "capture": "eager"}).fit(ten())
    sums = [e[2] for e in module.events if e[0] == "train"]
    each = len(sums) // 3
    assert sums[:each] == sums[each : 2 * each] == sums[2 * each :]


def test_overfitting_turns_shuffling_of_validation_off() -> None:
    """As in Lightning."""
    ours, theirs = both(val=partial(m.labelled, 20, 5), overfit_batches=2)
    assert_same(ours, theirs)


def test_a_fast_dev_run_leaves_nothing_behind(tmp_path: Path) -> None:
    """No logger is told, no checkpoint written, no early stop asked, no sanity check made."""
    hears = Hears()
    options = {"fast_dev_run": 2, "logger": hears, "enable_checkpointing": True, "default_root_dir": tmp_path}
    callbacks = [ModelCheckpoint(tmp_path / "here", every_n_train_steps=1), EarlyStopping("there is no such metric")]
    ours = fast_fit(Case(Traced, ten, two, options | {"callbacks": callbacks}))
    assert (ours.steps, ours.epochs) == (2, 1)
    assert not any(e[0].startswith("sanity") for e in ours.module.events)
    assert (hears.calls, list(tmp_path.rglob("*.json"))) == ([], [])


class Cut(Traced):
    """A run that ends in the middle of a window, in the way it is told."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.kw.get("ends") == batch_idx else None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.kw.get("stops") == batch_idx:
            self.trainer.should_stop = True


class CutByHand(Cut):
    """The same with an optimizer_step of its own that does what everybody's does."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


@pytest.mark.parametrize("how", [{"stops": 0}, {"stops": 2}, {"ends": 3}], ids=str)
def test_an_open_window_is_closed_through_optimizer_step(how: dict[str, int]) -> None:
    """[ours] A stop, or an epoch that a hook ends, closes the window with a real step whoever takes it."""
    plain, own = (
        fast_fit(Case(lambda make=make: make(**how), ten, None, {"accumulate_grad_batches": 2, "max_epochs": 1}))
        for make in (Cut, CutByHand)
    )
    assert plain.steps == own.steps
    assert_same_weights(own.weights, plain.weights)


# -- validation -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "validated"),
    [
        ({"val_check_interval": 4, "accumulate_grad_batches": 3}, [1, 2]),
        ({"val_check_interval": 0.25}, [2, 4, 6, 8, 10]),
        ({"val_check_interval": 0.4}, [4, 8]),
        ({"val_check_interval": 1}, list(range(1, 11))),
        ({"val_check_interval": 1.0}, [10]),
        ({"val_check_interval": 4, "check_val_every_n_epoch": None, "max_epochs": 2}, [4, 8, 12, 16, 20]),
        ({"check_val_every_n_epoch": 2, "max_epochs": 5}, [20, 40]),
    ],
    ids=str,
)
def test_validations_of_ten_batches(options: dict[str, Any], validated: list[int]) -> None:
    """The steps at which they come, as written down."""
    case = Case(Traced, ten, two, {"max_epochs": 1} | options)
    assert fast_fit(case).validated == validated
    assert lightning_fit(case).validated == validated


def test_an_interval_beyond_the_epoch_is_an_error() -> None:
    """The message says how to count across epochs."""
    with pytest.raises(OptionError, match=r"val_check_interval: got 11.*check_val_every_n_epoch=None"):
        fast_fit(Case(Traced, ten, two, {"val_check_interval": 11}))


class Modes(Traced):
    """One part is in eval mode for good; every hook notes who is in which mode, and which gradient mode it is."""

    def build(self) -> None:
        super().build()
        self.still = nn.Dropout(0.9).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.still(x))

    def modes(self, where: str) -> None:
        grad = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        self.note(where, self.training, self.net.training, self.still.training, *grad)

    def on_validation_start(self) -> None:
        self.modes("validation start")

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.modes("validation")
        super().validation_step(batch, batch_idx)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.modes("batch")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.modes("test")


def test_modes_are_put_back_one_by_one() -> None:
    """All in eval for a validation, then each as it was; no gradients inside a fit, and no inference mode."""
    ours, theirs = both(Modes, val_check_interval=4)
    assert ours.module.events == theirs.module.events
    assert {e[1:6] for e in ours.module.events if e[0] == "batch"} == {(True, True, False, True, False)}
    assert {e[1:6] for e in ours.module.events if e[0] == "validation"} == {(False, False, False, False, False)}


@pytest.mark.parametrize("inference", [True, False])
def test_an_evaluation_alone_is_in_inference_mode(inference: bool) -> None:
    """Unless inference_mode=False, which leaves no_grad."""
    torch.manual_seed(0)
    module = Modes()
    compile_fit(module, **BARE | {"inference_mode": inference}).test(two())
    assert {e[4:6] for e in module.events} == {(False, inference)}
    assert module.training
    assert not module.still.training


def test_a_sanity_check_shows_its_metrics_to_its_own_hooks() -> None:
    """on_validation_epoch_end may read what validation_step logged, in the sanity check as in every other validation."""

    class Reads(m.Base):
        def on_validation_epoch_end(self) -> None:
            assert float(self.trainer.callback_metrics["val_loss"]) > 0

    lightning_fit(Case(Reads, ten, two))
    fast_fit(Case(Reads, ten, two))


def test_each_loader_has_its_name_and_limit() -> None:
    """Keys end in /dataloader_idx_i in validate and in test, unless the index is left out."""

    class Module(m.SeveralVal):
        def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
            self.log("t", float(dataloader_idx + 10 * batch_idx), batch_size=1)

    def loaders() -> list[DataLoader]:
        return [m.labelled(20, 5, shuffle=False), m.labelled(9, 4, shuffle=False)]

    torch.manual_seed(0)
    trainer = compile_fit(Module(), **BARE | {"limit_val_batches": 0.5, "limit_test_batches": 2})
    assert trainer.validate(loaders()).keys() == {"val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1", "plain_0", "plain_1"}
    assert trainer.test(loaders()) == {"t/dataloader_idx_0": 5.0, "t/dataloader_idx_1": 6.0}


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_an_evaluation_from_a_checkpoint(stage: str, tmp_path: Path) -> None:
    """A fresh module with the path of a checkpoint gives what the trained one gives."""

    class Module(m.Classifier):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0]).sum()

    trained = compile_fit(Module(), **BARE | {"max_epochs": 1, "capture": "eager"})
    trained.fit(m.labelled())
    path = trained.module.trainer.save_checkpoint(tmp_path / "saved")
    fresh = compile_fit(Module(), **BARE)
    assert getattr(fresh, stage)(two(), ckpt_path=path) == getattr(trained, stage)(two())


# -- optimizers and schedulers ----------------------------------------------------------------------------------------
def _sgd(module: Any) -> Any:
    return torch.optim.SGD(module.parameters(), lr=0.2)


def _with(form: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    """``form(optimizer, scheduler)`` as configure_optimizers."""

    def configure(module: Any) -> Any:
        opt = _sgd(module)
        return form(opt, by.ExponentialLR(opt, 0.8))

    return configure


def _plateau(form: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    def configure(module: Any) -> Any:
        opt = _sgd(module)
        return form(opt, by.ReduceLROnPlateau(opt, patience=0, threshold=0.9))

    return configure


FORMS: dict[str, Callable[[Any], Any]] = {
    "optimizer": _sgd,
    "[optimizer]": lambda module: [_sgd(module)],
    "(optimizer,)": lambda module: (_sgd(module),),
    "[optimizer], []": lambda module: ([_sgd(module)], []),
    "[optimizer], [scheduler]": _with(lambda o, s: ([o], [s])),
    "[[optimizer], [scheduler]]": _with(lambda o, s: [[o], [s]]),
    "[optimizer], [dict]": _with(lambda o, s: ([o], [{"scheduler": s, "interval": "step"}])),
    "{optimizer}": lambda module: {"optimizer": _sgd(module)},
    "{optimizer, scheduler}": _with(lambda o, s: {"optimizer": o, "lr_scheduler": s}),
    "{optimizer, dict}": _with(lambda o, s: {"optimizer": o, "lr_scheduler": {"scheduler": s, "interval": "step", "frequency": 2}}),
    "[{optimizer, scheduler}]": _with(lambda o, s: [{"optimizer": o, "lr_scheduler": s}]),
    "({optimizer, dict},)": _with(lambda o, s: ({"optimizer": o, "lr_scheduler": {"scheduler": s}},)),
    "{optimizer, plateau, monitor}": _plateau(lambda o, s: {"optimizer": o, "lr_scheduler": s, "monitor": "val_loss"}),
    "{optimizer, dict of plateau}": _plateau(lambda o, s: {"optimizer": o, "lr_scheduler": {"scheduler": s, "monitor": "val_loss"}}),
    "[optimizer], [dict of plateau]": _plateau(lambda o, s: ([o], [{"scheduler": s, "monitor": "val_loss", "strict": True}])),
}  # fmt: skip
BARE_FORMS: dict[str, Callable[[Any], Any]] = {
    "[optimizer], scheduler": _with(lambda o, s: ([o], s)),
    "[optimizer], dict": _with(lambda o, s: ([o], {"scheduler": s, "interval": "step"})),
}


def formed(configure: Callable[[Any], Any]) -> Case:
    return Case(lambda: type("Formed", (m.Base,), {"configure_optimizers": configure})(), m.labelled, two, {"max_epochs": 4})


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_one_optimizer(form: str) -> None:
    """What configure_optimizers may return trains as it does in Lightning."""
    ours, theirs = fast_fit(formed(FORMS[form])), lightning_fit(formed(FORMS[form]))
    assert_same(ours, theirs)


@pytest.mark.parametrize("form", BARE_FORMS)
def test_one_scheduler_need_not_be_in_a_list(form: str) -> None:
    """As in Lightning."""
    ours, theirs = fast_fit(formed(BARE_FORMS[form])), lightning_fit(formed(BARE_FORMS[form]))
    assert_same(ours, theirs)


def test_a_module_may_have_no_optimizer() -> None:
    """None: the steps run, nothing is updated, and somebody is told."""
    case = Case(lambda: type("None_", (Traced,), {"configure_optimizers": lambda self: None})(), ten, two, {"max_epochs": 1})
    ours = fast_fit(case)
    assert [e[0] for e in ours.module.events].count("train") == 10


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_plateau_whose_metric_is_missing_names_those_that_exist(interval: str) -> None:
    """strict, which is the default."""

    class Module(m.Base):
        def configure_optimizers(self) -> Any:
            opt = torch.optim.SGD(self.parameters(), lr=0.1)
            return {"optimizer": opt, "lr_scheduler": {"scheduler": by.ReduceLROnPlateau(opt), "monitor": "val_acc", "interval": interval}}

    with pytest.raises(ModuleError, match=r"'val_acc'.*train_loss"):
        fast_fit(Case(Module, m.labelled, two))


CLIPS = [{"gradient_clip_val": 0.1}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}]


@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true", "16-mixed"])
def test_a_fused_optimizer_is_clipped_in_every_precision(precision: str, clip: dict[str, Any]) -> None:
    """What the plain one computes, to its dtype's rounding (bf16: 4e-3 a step); Lightning refuses it under mixed precision."""

    def module(fused: bool) -> Case:
        configure = lambda self: torch.optim.AdamW(self.parameters(), lr=1e-2, fused=fused)  # noqa: E731
        made = lambda: type("Module", (m.Base,), {"configure_optimizers": configure})()  # noqa: E731
        return Case(made, options={"precision": precision} | clip)

    ours, plain = fast_fit(module(True)), fast_fit(module(False))
    assert_same_weights(ours.weights, plain.weights, 2e-2 if precision == "bf16-true" else 2e-6)
    unclipped = fast_fit(module(True), gradient_clip_val=None)
    assert any(not torch.equal(ours.weights[k], v) for k, v in unclipped.weights.items())


class Ranked(m.Base):
    """Notes which process it is, as modules ask for it, and whether there is a process group."""

    def on_train_start(self) -> None:
        names = ("global_rank", "local_rank", "node_rank", "world_size", "num_devices", "num_nodes", "is_global_zero")
        self.noted = {n: getattr(self.trainer, n) for n in names}
        self.noted |= {"module's": (self.global_rank, self.local_rank), "group": torch.distributed.is_initialized()}


def test_one_process_is_the_first_of_one() -> None:
    """Ranks and sizes are Lightning's, no process group is made, and a decision is this process's own."""
    noted = []
    for fit in (fast_fit, lightning_fit):
        modules: list[Ranked] = []
        fit(Case(lambda modules=modules: modules.append(Ranked()) or modules[-1], options={"max_epochs": 1}))
        noted.append(modules[-1].noted)
    assert noted[0] == noted[1]
    assert noted[0]["world_size"] == 1
    assert not noted[0]["group"]
    assert not torch.distributed.is_initialized()


def test_a_profiler_is_torchs_around_the_fit() -> None:
    """profiler= is refused with the words that say so, and what they say works: the steps' operations are seen."""
    with pytest.raises(OptionError, match=r"profiler.*torch\.profiler\.profile"):
        compile_fit(m.Base(), profiler="simple")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fast_fit(Case(m.Base, options={"max_epochs": 1}))
    counts = {e.key: e.count for e in profile.key_averages()}
    assert counts["aten::addmm"] >= 4


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("norm", [1, 2.0, "inf"])
def test_gradient_norms_are_tracked(norm: Any, capture: str) -> None:
    """track_grad_norm=p: the last step's p-norm of each parameter's gradient and of all of them, before they are clipped."""
    case = Case(m.Base, partial(m.labelled, 8, shuffle=False), options={"max_epochs": 1, "gradient_clip_val": 1e-3})
    ours = fast_fit(case, capture=capture, track_grad_norm=norm)
    torch.manual_seed(0)
    plain = m.Base()
    for x, y in m.labelled(8, shuffle=False):
        F.cross_entropy(plain(x), y).backward()
    key = f"grad_{float(norm)}_norm"
    expected = {f"{key}/{name}": float(p.grad.norm(float(norm))) for name, p in plain.named_parameters()}
    expected[f"{key}_total"] = float(torch.cat([p.grad.flatten() for p in plain.parameters()]).norm(float(norm)))
    assert {k: v for k, v in ours.metrics.items() if "norm" in k} == pytest.approx(expected, rel=1e-5)


def test_a_closure_in_a_window_sees_the_whole_window() -> None:
    """At the same weights the second evaluation has the first one's gradients: those of both batches of the window."""

    class Twice(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for _ in range(2):
                with torch.enable_grad():
                    closure()
                seen.append(torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]]))
            return super().step()

    class Module(m.Base):
        def configure_optimizers(self) -> Any:
            return Twice(self.parameters(), lr=0.1)

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.step(closure=optimizer_closure)

    seen: list[Tensor] = []
    fast_fit(Case(Module, options={"accumulate_grad_batches": 2, "max_steps": 1}))
    torch.testing.assert_close(seen[1], seen[0])


class Listed:
    """Batches as a list."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def drawn(*lengths: int, seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, m.WIDTH, generator=g) for n in lengths]


class TakesPacked(m.Base):
    """Batches are PackedSequences."""

    def build(self) -> None:
        super().build()
        self.rnn = nn.GRU(m.WIDTH, m.WIDTH)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        _, last = self.rnn(batch[0])
        loss = F.cross_entropy(self(last[-1]), batch[1])
        self.log("train_loss", loss, on_epoch=True)
        return loss


class TakesLists(m.Base):
    """Batches are lists of tensors of their own lengths."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(torch.stack([self(x).mean(0) for x in batch[0]]), batch[1])
        self.log("train_loss", loss, on_epoch=True)
        return loss


LENGTHS = ((3, 5, 2, 4), (1, 2, 4), (2, 2), (7,))


def packed() -> Listed:
    pack = partial(nn.utils.rnn.pack_sequence, enforce_sorted=False)
    return Listed([(pack(drawn(*lengths, seed=i)), torch.arange(len(lengths)) % m.CLASSES) for i, lengths in enumerate(LENGTHS)])


def lists() -> Listed:
    return Listed([(drawn(*lengths, seed=i), torch.arange(len(lengths)) % m.CLASSES) for i, lengths in enumerate(LENGTHS)])


@pytest.mark.parametrize("capture", ["eager", "auto"])
@pytest.mark.parametrize(("make", "train"), [(TakesPacked, packed), (TakesLists, lists)], ids=["packed", "lists"])
def test_batches_of_sequences(make: Any, train: Any, capture: str) -> None:
    """PackedSequence and lists of variable length; the mean over the epoch weighs batches as Lightning does."""
    case = Case(make, train)
    ours, theirs = fast_fit(case, capture=capture), lightning_fit(case)
    assert_same(ours, theirs, weights=0.0 if capture == "eager" else 2e-5)


def test_a_batch_that_is_none_trains_nothing() -> None:
    """It is passed over, and counted as a batch: windows and validations come where its place says."""
    batches = list(m.labelled(40, shuffle=False))
    gaps = fast_fit(Case(Traced, lambda: Listed([batches[0], None, *batches[1:], None]), two, {"max_epochs": 1}))
    plain = fast_fit(Case(Traced, lambda: Listed(batches), two, {"max_epochs": 1}))
    assert [e[1] for e in gaps.module.events if e[0] == "train"] == [0, 2, 3, 4, 5][:5]
    assert gaps.steps == plain.steps == 5
    assert_same_weights(gaps.weights, plain.weights)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_a_dataclass_is_in_the_runs_precision(precision: str) -> None:
    """As tensors, tuples, dicts and lists are."""
    ours, theirs = both(m.TakesDataclass, m.pairs, m.pairs, precision=precision)
    assert_same(ours, theirs, metrics=1e-2)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize(("make", "data"), [(m.TakesDict, m.dicts), (m.TakesTuple, m.tuples)], ids=["dict", "tuple"])
def test_containers_are_in_the_runs_precision(make: Any, data: Any, precision: str) -> None:
    """Floats are cast wherever they sit in the batch, labels are not."""
    ours, theirs = both(make, data, data, precision=precision)
    assert_same(ours, theirs, metrics=1e-2 if precision == "bf16-true" else 1e-6)


def test_a_weight_used_twice_under_autocast() -> None:
    """bf16-mixed on the eager rung is torch.autocast as it stands."""
    ours, theirs = both(m.Tied, m.labelled, None, precision="bf16-mixed")
    assert_same(ours, theirs)


class Third(m.Base):
    """Steps with a third argument of their own."""

    def training_step(self, batch: Any, batch_idx: int, factor: float = 2.0) -> Tensor:
        return super().training_step(batch, batch_idx) * factor

    def validation_step(self, batch: Any, batch_idx: int, factor: float = 2.0) -> None:
        self.log("factor", factor)


def test_a_default_of_the_users_own_stays() -> None:
    """Nobody hands over what was not asked for: with one loader there is no index."""
    ours, theirs = both(Third, m.labelled, two)
    assert_same(ours, theirs)


# -- logging ----------------------------------------------------------------------------------------------------------
class Bar:
    """Notes what the progress bar is given, wherever it may be read."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def _note(self, trainer: Any, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.seen.append({k: round(float(v), 5) for k, v in sorted(trainer.progress_bar_metrics.items()) if k != "v_num"})

    on_train_batch_start = on_train_batch_end = on_validation_start = on_validation_end = on_train_epoch_end = on_train_end = _note


class OnBar(m.Base):
    """Every way to get on the bar."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("step", loss, prog_bar=True)
        self.log("both", loss, prog_bar=True, on_epoch=True)
        self.log("epoch", loss, prog_bar=True, on_step=False, on_epoch=True, logger=False)
        self.log("not", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", F.cross_entropy(self(batch[0]), batch[1]), prog_bar=True)

    def on_train_epoch_end(self) -> None:
        self.log("end", 3.0 + self.current_epoch, prog_bar=True)


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 3}, {"accumulate_grad_batches": 5}], ids=str)
def test_the_bar_shows_what_lightnings_shows(options: dict[str, Any]) -> None:
    """progress_bar_metrics at every point: names and values."""
    ours = Bar()
    theirs = type("Theirs", (Bar, pl.Callback), {})()
    case = Case(OnBar, ten, two, {"max_epochs": 2} | options)
    fast_fit(case, callbacks=[ours])
    lightning_fit(case, callbacks=[theirs])
    assert ours.seen == theirs.seen


def test_loggers_hear_of_every_fiftieth_step() -> None:
    """Which is the default: steps 49 and 99 of 120, and the end of the epoch."""
    ours = Hears()
    fast_fit(Case(m.Base, partial(m.labelled, 120, 1), options={"max_epochs": 1, "logger": ours}))
    assert [c for c in ours.calls if isinstance(c, int)] == [49, 99]


class LogsIn(m.Base):
    """Logs in one hook, with the arguments it is given."""

    def build(self) -> None:
        super().build()
        setattr(self, self.kw.pop("hook"), lambda *args, **kwargs: self.log("x", 1.5, **self.kw))


@pytest.mark.parametrize("hook", ["on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step"])
@pytest.mark.parametrize("how", [{}, {"on_step": True, "on_epoch": True}, {"on_step": False, "on_epoch": True}], ids=str)
def test_hooks_inside_the_step_log_as_the_step_does(hook: str, how: dict[str, Any]) -> None:
    """By step unless they say otherwise."""
    ours, theirs = both(partial(LogsIn, hook=hook, **how), m.labelled, None)
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    ("hook", "how"),
    [
        ("on_train_epoch_end", {"on_step": True}),
        ("on_train_epoch_start", {"on_step": True}),
        ("on_validation_epoch_end", {"on_step": True}),
        ("on_fit_start", {}),
        ("on_train_end", {}),
        ("on_fit_end", {}),
        ("on_validation_end", {}),
    ],
)
def test_what_nobody_would_hear_cannot_be_logged(hook: str, how: dict[str, Any]) -> None:
    """A step's value in an epoch's hook, anything in a hook that belongs to no epoch: an error, as in Lightning."""
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException):
        lightning_fit(Case(partial(LogsIn, hook=hook, **how), m.labelled, two))
    with pytest.raises(ModuleError):
        fast_fit(Case(partial(LogsIn, hook=hook, **how), m.labelled, two))


def test_a_name_logged_twice_in_a_step_counts_twice() -> None:
    """The mean over the epoch is over both values."""

    class Twice(m.Base):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("x", float(batch_idx), on_epoch=True)
            self.log("x", float(batch_idx + 10), on_epoch=True)
            return loss

    ours, theirs = both(Twice, ten, None)
    assert theirs.metrics["x_epoch"] == 9.5
    assert_same(ours, theirs)


# -- stopping and saving ----------------------------------------------------------------------------------------------
SAVES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as it comes": ({}, {}),
    "every 4 steps": ({"every_n_train_steps": 4, "save_top_k": -1}, {}),
    "every 2 steps, windows of 3": ({"every_n_train_steps": 2, "save_top_k": -1}, {"accumulate_grad_batches": 5}),
    "every second epoch, and the last": ({"every_n_epochs": 2, "save_last": True}, {"max_epochs": 3}),
    "best two in mid-epoch": ({"monitor": "val_loss", "save_top_k": 2}, {"val_check_interval": 3}),
    "named": ({"monitor": "train_loss", "filename": "{epoch:02d}-{train_loss:.3f}", "save_top_k": 3}, {}),
    "largest": ({"monitor": "val_loss", "mode": "max", "save_top_k": 1}, {}),
    "the last of a run cut short": ({"save_last": True}, {"max_steps": 7}),
}


@pytest.mark.parametrize("name", SAVES)
def test_a_fit_leaves_the_checkpoints_that_lightning_leaves(name: str, tmp_path: Path) -> None:
    """The same names in the same fit."""
    arguments, options = SAVES[name]
    case = Case(Traced, ten, two, {"max_epochs": 2, "enable_checkpointing": True} | options)
    fast_fit(case, callbacks=[ModelCheckpoint(tmp_path / "ours", **arguments)], default_root_dir=tmp_path)
    lightning_fit(case, callbacks=[pl.callbacks.ModelCheckpoint(tmp_path / "theirs", **arguments)], default_root_dir=tmp_path)
    theirs = {p.stem if p.suffix == ".ckpt" else p.name for p in (tmp_path / "theirs").iterdir()}
    assert {p.name for p in (tmp_path / "ours").iterdir()} == theirs


def test_a_save_by_steps_says_of_which_step_its_value_is(tmp_path: Path) -> None:
    """[ours] Validation at 4 and 8, a save every 3: the first waits for its value, the others take the newest there is."""
    save = ModelCheckpoint(tmp_path, monitor="val_loss", every_n_train_steps=3, save_top_k=-1)
    fast_fit(Case(Traced, ten, two, {"max_epochs": 1, "val_check_interval": 4, "enable_checkpointing": True, "callbacks": [save]}))
    stamps = {Path(path).name: step for path, step in save.metric_steps.items()}
    assert stamps == {"epoch=0-step=4": 4, "epoch=0-step=6": 4, "epoch=0-step=9": 8}


def test_checkpointing_that_is_off_and_a_callback_that_saves(tmp_path: Path) -> None:
    """An error before anything trains."""
    with pytest.raises(OptionError):
        fast_fit(Case(m.Base, options={"enable_checkpointing": False, "callbacks": [ModelCheckpoint(tmp_path)]}))


def test_a_checkpoint_callback_of_ones_own_is_the_one(tmp_path: Path) -> None:
    """Nothing else saves where the user brought something that does."""

    class Mine(pl.callbacks.Checkpoint):
        pass

    ours = fast_fit(Case(m.Base, options={"enable_checkpointing": True, "callbacks": [Mine()], "default_root_dir": tmp_path}))
    assert ours.result.best_checkpoint is None


class Notes(pl.Callback):
    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.notes.append(self.name)


class MoreNotes(Notes):
    pass


@pytest.mark.parametrize(
    ("given", "own"),
    [(["notes"], ["notes"]), (["notes"], ["more"]), (["more"], ["notes"]), (["notes", "notes"], ["more", "more"])],
)
def test_a_callback_of_the_modules_replaces_those_of_its_kind(given: list[str], own: list[str]) -> None:
    """Of its own class, or of one that its class is made from; else both are heard."""
    kinds = {"notes": Notes, "more": MoreNotes}

    class Brings(m.Base):
        def build(self) -> None:
            super().build()
            self.notes: list[str] = []

        def configure_callbacks(self) -> Any:
            return [kinds[k](f"own {k}") for k in own]

    heard = []
    for fit in (fast_fit, lightning_fit):
        callbacks = [kinds[k](f"given {k}") for k in given]
        heard.append(fit(Case(Brings, m.labelled, None, {"max_epochs": 1, "callbacks": callbacks})).module.notes)
    assert heard[0] == heard[1]


def test_an_adopted_callback_of_the_modules_replaces_ours() -> None:
    """Lightning's EarlyStopping in the module, fasttrain's beside it: the module's patience counts."""

    class Brings(m.Base):
        def configure_callbacks(self) -> Any:
            return pl.callbacks.EarlyStopping("val_loss", patience=3, mode="max", min_delta=9.0)

    given = EarlyStopping("val_loss", patience=1, mode="max", min_delta=9.0)
    ours = fast_fit(Case(Brings, m.labelled, m.labelled, {"max_epochs": 9, "callbacks": [given]}))
    assert ours.epochs == 4


@pytest.mark.parametrize("loaders", [1, 2])
def test_what_a_validation_step_of_any_arguments_gets(loaders: int) -> None:
    """(batch, batch_idx), and the loader's index where there are several."""

    class Any_(m.Base):
        def build(self) -> None:
            super().build()
            self.given: list[Any] = []

        def validation_step(self, batch: Any, *rest: Any) -> None:  # type: ignore[override]
            self.given.append(rest)

    ours, theirs = both(Any_, m.labelled, lambda: [m.labelled() for _ in range(loaders)], max_epochs=1)
    assert ours.module.given == theirs.module.given


class Thaws(pl.callbacks.BaseFinetuning):
    """The first layer joins in the third epoch, in a group of its own."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.01)


class TrainsWhatTrains(m.Base):
    """An optimizer over what requires grad when it is made."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


CALLBACKS: dict[str, tuple[type[m.Base], Callable[[], Any]]] = {
    "finetuning": (TrainsWhatTrains, Thaws),
    "weight averaging": (m.Classifier, pl.callbacks.WeightAveraging),
    "moving average": (m.Classifier, pl.callbacks.EMAWeightAveraging),
    "pruning": (m.Base, lambda: pl.callbacks.ModelPruning("l1_unstructured", amount=0.3)),
    "timer": (m.Base, lambda: pl.callbacks.Timer("00:01:00:00")),
    "early stopping": (m.Base, lambda: pl.callbacks.EarlyStopping("val_loss", min_delta=0.05, patience=1)),
}
UNSUPPORTED: dict[str, tuple[type[m.Base], Callable[[], Any]]] = {
    "stochastic weight averaging": (m.Classifier, lambda: pl.callbacks.StochasticWeightAveraging(1e-2, swa_epoch_start=2)),
    "accumulation schedule": (m.Base, lambda: pl.callbacks.GradientAccumulationScheduler({0: 1, 1: 3})),
}


def _with_callback(entry: tuple[type[m.Base], Callable[[], Any]], fit: Callable[..., Outcome]) -> Outcome:
    make, callback = entry
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fit(Case(make, m.labelled, two, {"max_epochs": 4}), callbacks=[callback()])


@pytest.mark.parametrize("name", CALLBACKS)
def test_lightnings_callbacks_do_what_they_do_there(name: str) -> None:
    """Those that work through hooks, the module and the optimizer."""
    ours, theirs = (_with_callback(CALLBACKS[name], fit) for fit in (fast_fit, lightning_fit))
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_lightnings_callbacks_that_reach_into_the_trainer(name: str) -> None:
    """They work, or are refused with a sentence before anything trains."""
    theirs = _with_callback(UNSUPPORTED[name], lightning_fit)
    try:
        ours = _with_callback(UNSUPPORTED[name], fast_fit)
    except OptionError:
        return
    assert_same(ours, theirs)


def test_a_resumed_run_sees_every_sample_once(tmp_path: Path) -> None:
    """Eight shuffled samples, saved after the third: five follow, none again and none left out."""

    class Numbered(m.Base):
        def build(self) -> None:
            super().build()
            self.seen: list[int] = []

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.seen.append(int(batch[1]))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0]).sum()

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.kw["saves"] and self.global_step == 3:
                self.trainer.save_checkpoint(tmp_path / "saved")

    def loader() -> DataLoader:
        return DataLoader(TensorDataset(m.rows(8)[0], torch.arange(8)), 1, shuffle=True)

    torch.manual_seed(0)
    whole = Numbered(saves=True)
    compile_fit(whole, **BARE | {"max_epochs": 2, "capture": "eager"}).fit(loader())
    resumed = Numbered(saves=False)
    compile_fit(resumed, **BARE | {"max_epochs": 2, "capture": "eager"}).fit(loader(), ckpt_path=tmp_path / "saved")
    assert resumed.seen == whole.seen[3:]
    assert sorted(whole.seen[:3] + resumed.seen[:5]) == list(range(8))
