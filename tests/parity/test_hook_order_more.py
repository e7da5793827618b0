"""Hooks in Lightning's order where a run is resumed, cut short, broken off or evaluates several loaders; with their arguments."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from fasttrain import EarlyStopping, FasttrainWarning, ModelCheckpoint, compile_fit
from fasttrain.callbacks.callback import HOOKS, Checkpoint
from tests.parity import modules as m
from tests.parity.harness import BARE
from tests.parity.test_hook_order import AROUND, MOMENTS, WRAPPERS, Scheduled

EVERYTHING = tuple(n for n in dict.fromkeys((*MOMENTS, *AROUND, *WRAPPERS)) if hasattr(pl.LightningModule, n))
IN_STEP = (
    "on_before_zero_grad",
    "optimizer_zero_grad",
    "on_before_backward",
    "backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "configure_gradient_clipping",
    "optimizer_step",
)
Trouble = Callable[[Any, str, tuple[Any, ...]], None]  # (module or trainer, hook, its arguments)


# -- the recorder -----------------------------------------------------------------------------------------------------
def noted(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The call with its counts. The index of an only loader, which some hand over and some do not, is left off."""
    counts = [str(a) for a in (*args, *kwargs.values()) if type(a) is int]
    if re.fullmatch(r"(cb\.)?on_(validation|test|predict)_batch_(start|end)", name) and counts[1:] == ["0"]:
        counts.pop()
    return f"{name}({', '.join(counts)})" if counts else name


def module_that_notes(calls: list[str], names: tuple[str, ...], base: type, trouble: Trouble | None) -> pl.LightningModule:
    def override(name: str) -> Any:
        def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(noted(name, args, kwargs))
            if trouble is not None:
                trouble(self, name, args)
            return getattr(super(cls, self), name)(*args, **kwargs)

        return hook

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        calls.append(f"training_step({batch_idx})")
        if trouble is not None:
            trouble(self, "training_step", (batch, batch_idx))
        return base.training_step(self, batch, batch_idx)

    def evaluation(name: str) -> Any:
        def step(self: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            calls.append(f"{name}({batch_idx}, {dataloader_idx})")
            return getattr(base, name)(self, batch, batch_idx) if hasattr(base, name) and name != "test_step" else None

        return step

    body = {n: override(n) for n in names} | {n: evaluation(n) for n in ("validation_step", "test_step", "predict_step")}
    cls = type("Notes", (base,), body | {"training_step": training_step})
    return cls()


def callback_that_notes(calls: list[str], fast: bool, trouble: Trouble | None) -> Any:
    def note(name: str) -> Any:
        def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(noted(f"cb.{name}", args, kwargs))
            if trouble is not None:
                trouble(args[0] if args else None, f"cb.{name}", args)
            return {"kept": 1} if name == "state_dict" else None

        return hook

    base = object if fast else pl.Callback
    return type("Notes", (base,), {n: note(n) for n in HOOKS if hasattr(pl.Callback, n) and n != "state_key"})()


def loaders(val: Any = None) -> dict[str, Any]:
    return {"train_dataloaders": m.labelled(15, 5, shuffle=False), "val_dataloaders": val or m.labelled(10, 5, shuffle=False)}


def several() -> list[Any]:
    return [m.labelled(10, 5, shuffle=False), m.labelled(9, 4, shuffle=False)]


def run(
    fast: bool,
    stage: str = "fit",
    *,
    data: Callable[[], dict[str, Any]] = loaders,
    names: tuple[str, ...] = EVERYTHING,
    base: type = Scheduled,
    trouble: Trouble | None = None,
    also: Callable[[bool, list[str]], list[Any]] = lambda fast, calls: [],
    raises: type[BaseException] | None = None,
    **options: Any,
) -> list[str]:
    """The calls of one run."""
    calls: list[str] = []
    torch.manual_seed(0)
    module = module_that_notes(calls, names, base, trouble)
    callbacks = [callback_that_notes(calls, fast, trouble), *also(fast, calls)]
    settings = BARE | {"max_epochs": 2, "callbacks": callbacks} | options
    with warnings.catch_warnings():
        warnings.simplefilter("default" if fast else "ignore")
        warnings.simplefilter("ignore", FasttrainWarning)
        warnings.simplefilter("ignore", UserWarning)
        trainer = compile_fit(module, **settings, capture="eager") if fast else pl.Trainer(**settings)
        call = getattr(trainer, stage)
        given = data() if fast else {"model": module} | data()
        if raises is None:
            call(**given)
        else:
            with pytest.raises(raises):
                call(**given)
    return calls


def both(stage: str = "fit", **more: Any) -> tuple[list[str], list[str]]:
    return run(True, stage, **more), run(False, stage, **more)


def without(calls: list[str], *names: str) -> list[str]:
    return [c for c in calls if c.removeprefix("cb.").partition("(")[0] not in names]


def at_batch(n: int, do: Callable[[Any], None]) -> Trouble:
    """``do(trainer)`` in the module's end of batch ``n`` of the first epoch."""

    def trouble(thing: Any, name: str, args: tuple[Any, ...]) -> None:
        if name == "on_train_batch_end" and args[2] == n and thing.current_epoch == 0:
            do(thing.trainer)

    return trouble


def ask_to_stop(trainer: Any) -> None:
    trainer.should_stop = True


# -- everything at once -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0},
        {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 2, "val_check_interval": 1},
        {"accumulate_grad_batches": 7},
        {"max_steps": 2},
        {"max_steps": 4, "val_check_interval": 2},
        {"max_steps": 1, "accumulate_grad_batches": 2},
        {"fast_dev_run": 2},
        {"num_sanity_val_steps": -1, "check_val_every_n_epoch": 2},
        {"val_check_interval": 2, "check_val_every_n_epoch": None},
        {"precision": "bf16-mixed"},
        {"precision": "64-true"},
    ],
    ids=str,
)
def test_every_hook_of_module_and_callback_with_its_counts(options: dict[str, Any]) -> None:
    """All hooks overridden in both, optimizer_step around its closure included: the same calls with the same numbers."""
    ours, theirs = both(**options)
    assert ours == theirs


def test_lbfgs_calls_the_hooks_of_a_step_at_each_evaluation() -> None:
    """zero_grad, backward and clipping come as often as the closure is asked."""

    class Second(Scheduled):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    ours, theirs = both(base=Second, max_epochs=1)
    assert ours == theirs
    assert ours.count("backward") > 3


@pytest.mark.parametrize("options", [{}, pytest.param({"accumulate_grad_batches": 2}, marks=pytest.mark.slow)], ids=str)
def test_a_captured_step_leaves_the_hooks_around_it_in_place(options: dict[str, Any]) -> None:
    """With nothing overridden inside the step it is compiled, and every other hook comes where Lightning calls it."""
    runs = []
    for fast in (True, False):
        calls: list[str] = []
        torch.manual_seed(0)
        names = tuple(n for n in EVERYTHING if n not in IN_STEP and n != "configure_callbacks")
        module = module_that_notes(calls, names, Scheduled, None)
        for step in ("training_step", "validation_step"):  # as it stands: a step that notes cannot be captured
            setattr(type(module), step, getattr(m.Base, step))
        callback = callback_that_notes(calls, fast, None)
        for name in IN_STEP:
            if name in vars(type(callback)):
                delattr(type(callback), name)
        settings = BARE | {"max_epochs": 2, "callbacks": [callback]} | options
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if fast:
                assert compile_fit(module, **settings, capture="compile").fit(**loaders()).capture.rung == "compile"
            else:
                pl.Trainer(**settings).fit(module, **loaders())
        runs.append(without(calls, "configure_callbacks"))
    assert runs[0] == runs[1]


# -- several loaders --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_an_evaluation_over_several_loaders(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One after the other, each batch with the index of its loader."""
    ours, theirs = both(stage, data=lambda: {"dataloaders": several()})
    assert ours == theirs
    assert any("(2, 1)" in c for c in ours)


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 2, "limit_val_batches": 1}], ids=str)
def test_a_fit_with_several_validation_loaders(options: dict[str, Any]) -> None:
    """In the sanity check and in each validation."""
    ours, theirs = both(data=lambda: loaders(several()), **options)
    assert ours == theirs


@pytest.mark.parametrize("stage", ["validation", "test", "predict"])
def test_a_callback_without_a_loader_index(stage: str) -> None:
    """With one loader a hook that does not take ``dataloader_idx`` is called without it."""
    seen = []

    class Short:
        def start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch_idx)

        def end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch_idx)

    setattr(Short, f"on_{stage}_batch_start", Short.start)
    setattr(Short, f"on_{stage}_batch_end", Short.end)
    call = {"validation": "validate"}.get(stage, stage)
    run(True, call, data=lambda: {"dataloaders": m.labelled(10, 5, shuffle=False)}, also=lambda fast, calls: [Short()])
    assert seen == [0, 0, 1, 1]


@pytest.mark.parametrize("stage", ["validation", "test", "predict"])
def test_an_index_is_handed_to_who_asks_for_it(stage: str) -> None:
    """A callback or a module that cannot do without it has it, a default of its own stays, with several loaders all have it."""
    seen: list[Any] = []

    class Asks:
        pass

    class Module(Scheduled):
        pass

    def start(self: Any, trainer: Any, module: Any, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        seen.append(("asks", dataloader_idx))

    def end(self: Any, outputs: Any, batch: Any, batch_idx: int, factor: int = 7) -> None:
        seen.append(("default", factor))

    setattr(Asks, f"on_{stage}_batch_start", start)
    setattr(Module, f"on_{stage}_batch_end", end)
    call = {"validation": "validate"}.get(stage, stage)
    for data in (m.labelled(5, 5), [m.labelled(5, 5), m.labelled(5, 5)]):
        seen.clear()
        run(True, call, data=lambda data=data: {"dataloaders": data}, names=(), base=Module, also=lambda fast, calls: [Asks()])
        several = isinstance(data, list)
        assert seen == [("asks", 0), ("default", 0 if several else 7), *([("asks", 1), ("default", 1)] if several else [])]


MODES = ("on_validation_model_eval", "on_validation_model_train", "on_test_model_eval", "on_test_model_train", "on_predict_model_eval")


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_module_sets_its_modes_itself(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In every evaluation, at the same place."""
    ours, theirs = both(stage, data=lambda: {"dataloaders": several()}, names=(*EVERYTHING, *MODES))
    assert ours == theirs
    assert sum(c.endswith(("model_eval", "model_train")) for c in ours) == (1 if stage == "predict" else 2)


# -- cut short --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("batch", "options"),
    [
        (0, {}),
        (1, {}),
        (2, {}),
        (1, {"accumulate_grad_batches": 2}),
        (0, {"min_steps": 2}),
        (0, {"min_epochs": 2}),
        (1, {"val_check_interval": 1}),
        (0, {"limit_val_batches": 0}),
        (0, {"min_steps": 5, "max_epochs": 5}),
    ],
    ids=str,
)
def test_a_stop_request_in_mid_epoch(batch: int, options: dict[str, Any]) -> None:
    """One validation more, the end of the epoch, the end of the fit."""
    ours, theirs = both(trouble=at_batch(batch, ask_to_stop), **options)
    assert ours == theirs


def test_a_stop_request_in_mid_window() -> None:
    """[ours] The open window is closed with a step: the hooks of its end come, and the step scheduler moves."""
    names = tuple(n for n in EVERYTHING if n != "optimizer_step")
    ours, theirs = both(names=names, trouble=at_batch(0, ask_to_stop), accumulate_grad_batches=3, limit_val_batches=0)
    closing = ["cb.on_before_optimizer_step", "on_before_optimizer_step", "configure_gradient_clipping", "lr_scheduler_step"]
    end = theirs.index("cb.on_train_epoch_end")
    assert ours == theirs[:end] + closing + theirs[end:]


def test_the_validation_of_a_stop_request_sees_the_closed_window() -> None:
    """[ours] What is validated last are the weights that the run ends with."""
    names = tuple(n for n in EVERYTHING if n != "optimizer_step")
    ours = run(True, names=names, trouble=at_batch(0, ask_to_stop), accumulate_grad_batches=3, num_sanity_val_steps=0)
    assert ours.index("configure_gradient_clipping") < ours.index("on_validation_start")


def test_a_stop_request_in_mid_window_with_its_own_optimizer_step() -> None:
    """[ours] The closing step goes through the module's optimizer_step."""
    ours = run(True, trouble=at_batch(0, ask_to_stop), accumulate_grad_batches=3, limit_val_batches=0)
    assert sum(c.startswith("optimizer_step") for c in ours) == 1


def test_a_stop_request_at_the_start_of_an_epoch() -> None:
    """Nothing is trained of it."""

    def trouble(thing: Any, name: str, args: tuple[Any, ...]) -> None:
        if name == "on_train_epoch_start" and thing.current_epoch == 1:
            thing.trainer.should_stop = True

    ours, theirs = both(trouble=trouble, max_epochs=3)
    assert ours == theirs


class Ends(Scheduled):
    """Ends each epoch at its second batch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 1 else None


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 1}], ids=str)
def test_minus_one_from_on_train_batch_start(options: dict[str, Any]) -> None:
    """No batch end, no validation; the epoch's scheduler moves. [ours] The step's does not: there was no step."""
    ours, theirs = both(base=Ends, **options)
    skipped = [i for i, c in enumerate(theirs) if c == "on_train_batch_start(1)"]
    assert [theirs[i + 1 : i + 3] for i in skipped] == [["lr_scheduler_step"] * 2] * 2
    assert ours == [c for i, c in enumerate(theirs) if i - 1 not in skipped]


class Gaps:
    """Three batches and a None."""

    def __init__(self, at: int) -> None:
        self.batches = [*m.labelled(15, 5, shuffle=False)]
        self.batches.insert(at, None)

    def __iter__(self) -> Any:
        return iter(self.batches)

    def __len__(self) -> int:
        return 4


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_batch_that_is_none_is_passed_over(at: int) -> None:
    """[ours] No hook hears of it; Lightning transfers it, ends it and moves the step scheduler. The numbers count it."""
    ours, theirs = both(data=lambda: loaders() | {"train_dataloaders": Gaps(at)})
    moved = ("on_before_batch_transfer(0)", "transfer_batch_to_device(0)", "on_after_batch_transfer(0)", "lr_scheduler_step")
    for _ in range(2):  # epochs
        end = theirs.index(f"cb.on_train_batch_end({at})")
        assert tuple(theirs[end - 4 : end]) == moved
        del theirs[end - 4 : end + 2]
    assert ours == theirs


@pytest.mark.parametrize("options", [{"max_epochs": 0}, {"max_steps": 0}, {"limit_train_batches": 0}], ids=str)
def test_a_fit_without_training(options: dict[str, Any]) -> None:
    """The sanity check and the hooks of the fit, none of the training."""
    ours, theirs = both(**options)
    assert ours == theirs


# -- broken off -------------------------------------------------------------------------------------------------------
PLACES = ("setup", "configure_optimizers", "on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start",
          "training_step", "optimizer_step", "backward", "on_after_backward", "configure_gradient_clipping", "on_train_batch_end",
          "on_validation_epoch_end", "on_train_epoch_end", "on_train_end")  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_an_error_in_a_hook(place: str) -> None:
    """on_exception, then teardown of callbacks and module (Lightning leaves teardown out); the error is the user's own."""

    def trouble(thing: Any, name: str, args: tuple[Any, ...]) -> None:
        if (
            name == place
            and (place not in MOMENTS or not thing.trainer.sanity_checking)
            and (place != "training_step" or thing.global_step)
        ):
            raise ArithmeticError(place)

    names = tuple(n for n in EVERYTHING if n != "on_validation_model_train")  # modes are put back, error or not
    ours, theirs = both(names=names, trouble=trouble, raises=ArithmeticError)
    assert theirs[-1] == "cb.on_exception"
    assert ours == [*theirs, "cb.teardown", "teardown"]


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_an_error_in_an_evaluation(stage: str) -> None:
    """The same, outside a fit."""
    place = f"on_{'validation' if stage == 'validate' else stage}_batch_end"

    def trouble(thing: Any, name: str, args: tuple[Any, ...]) -> None:
        if name == place:
            raise ArithmeticError(place)

    names = tuple(n for n in EVERYTHING if n != "on_validation_model_train")
    data = lambda: {"dataloaders": m.labelled(10, 5, shuffle=False)}  # noqa: E731
    ours, theirs = both(stage, data=data, names=names, trouble=trouble, raises=ArithmeticError)
    assert ours == [*theirs, "cb.teardown", "teardown"]


# -- resumed ----------------------------------------------------------------------------------------------------------
class Saving:
    """Saves once, after every other callback, and notes it."""

    def __init__(self, calls: list[str], path: Path | None, where: str, at: int) -> None:
        self.calls, self.path, self.left = calls, path, at
        setattr(self, where, self._here)

    def _here(self, trainer: Any, *_: Any) -> None:
        if trainer.sanity_checking:
            return
        self.left -= 1
        if self.left == 0 and self.path is not None:
            trainer.save_checkpoint(self.path)
            self.calls.append("saved")


class OurSaving(Saving, Checkpoint):
    pass


class TheirSaving(Saving, pl.callbacks.Checkpoint):
    pass


RESUMED = [
    ("on_train_epoch_end", 1, {}),
    ("on_train_epoch_end", 2, {"max_epochs": 3}),
    ("on_train_epoch_end", 1, {"check_val_every_n_epoch": 2}),
    ("on_train_batch_end", 2, {}),
    ("on_train_batch_end", 3, {}),
    ("on_train_batch_end", 5, {}),
    ("on_train_batch_end", 1, {"accumulate_grad_batches": 2}),
    ("on_train_batch_end", 2, {"val_check_interval": 1}),
    ("on_validation_end", 1, {}),
    ("on_validation_end", 2, {"val_check_interval": 1}),
]


def saved_and_resumed(fast: bool, tmp_path: Path, where: str, at: int, **options: Any) -> tuple[list[str], list[str]]:
    """The calls of a run that saves, and those of the run that is resumed from there, each in its own format."""
    path = tmp_path / ("ours" if fast else "theirs.ckpt")
    kind = OurSaving if fast else TheirSaving
    options = options | {"enable_checkpointing": True, "default_root_dir": tmp_path}
    whole = run(fast, also=lambda _, calls: [kind(calls, path, where, at)], **options)
    again = run(fast, also=lambda _, calls: [kind(calls, None, where, at)], data=lambda: loaders() | {"ckpt_path": path}, **options)
    return whole, again


@pytest.mark.parametrize(("where", "at", "options"), RESUMED, ids=str)
def test_a_resumed_fit_goes_on_with_the_hooks_of_the_whole_one(where: str, at: int, options: dict[str, Any], tmp_path: Path) -> None:
    """After on_train_start come the hooks that Lightning's run, never stopped, has after the moment of saving.

    The module's own hook of that moment is over; what follows it is not, whether Lightning resumes there or not.
    """
    ours, resumed = saved_and_resumed(True, tmp_path, where, at, **options)
    theirs, _ = saved_and_resumed(False, tmp_path, where, at, **options)
    assert ours == theirs
    rest = theirs[theirs.index("saved") + 1 :]
    if rest[0].startswith(where):
        rest = rest[1:]
    if rest[0] == "on_validation_model_train":
        rest = rest[1:]
    assert resumed[resumed.index("on_train_start") + 1 :] == rest


@pytest.mark.parametrize("epoch_end", [True, False])
def test_a_resumed_fit_begins_as_lightnings(epoch_end: bool, tmp_path: Path) -> None:
    """The same hooks up to the sanity check, whatever their order."""
    where = "on_train_epoch_end" if epoch_end else "on_train_batch_end"
    (_, ours), (_, theirs) = (saved_and_resumed(fast, tmp_path, where, 1) for fast in (True, False))
    until = lambda calls: sorted(calls[: calls.index("on_fit_start") + 1])  # noqa: E731
    assert until(ours) == until(theirs)


def test_a_resumed_fit_restores_in_lightnings_order(tmp_path: Path) -> None:
    """on_load_checkpoint of the module, of callbacks, load_state_dict of callbacks, configure_optimizers."""
    (_, ours), (_, theirs) = (saved_and_resumed(fast, tmp_path, "on_train_batch_end", 2) for fast in (True, False))
    until = lambda calls: calls[: calls.index("on_fit_start") + 1]  # noqa: E731
    assert until(ours) == until(theirs)


def test_a_resume_in_mid_epoch_skips_the_sanity_check(tmp_path: Path) -> None:
    """As in Lightning; and the start of the epoch is over."""
    (_, ours), (_, theirs) = (saved_and_resumed(fast, tmp_path, "on_train_batch_end", 5) for fast in (True, False))
    for calls in (ours, theirs):
        assert "cb.on_sanity_check_start" not in calls
        assert "on_train_epoch_start" not in calls


def test_a_resume_at_an_epochs_end_has_its_sanity_check(tmp_path: Path) -> None:
    """Only a resume in mid-epoch goes without."""
    (_, ours), (_, theirs) = (saved_and_resumed(fast, tmp_path, "on_train_epoch_end", 1) for fast in (True, False))
    assert "cb.on_sanity_check_start" in theirs
    assert "cb.on_sanity_check_start" in ours


def test_a_datamodule_has_its_state_when_it_is_asked_for_its_loaders(tmp_path: Path) -> None:
    """A resumed one goes on from where it stood."""
    asked: list[int] = []

    class Counts(pl.LightningDataModule):
        passes = 0

        def train_dataloader(self) -> Any:
            asked.append(self.passes)
            return m.labelled(15, 5, shuffle=False)

        def state_dict(self) -> dict[str, Any]:
            return {"passes": self.passes + 1}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.passes = state["passes"]

    def resumed(fast: bool) -> list[int]:
        asked.clear()
        path, kind = tmp_path / ("ours" if fast else "theirs.ckpt"), OurSaving if fast else TheirSaving
        options = {"names": (), "enable_checkpointing": True, "default_root_dir": tmp_path}
        run(fast, data=lambda: {"datamodule": Counts()}, also=lambda _, calls: [kind(calls, path, "on_train_epoch_end", 1)], **options)
        again = {"datamodule": Counts(), "ckpt_path": path}
        run(fast, data=lambda: again, also=lambda _, calls: [kind(calls, None, "on_train_epoch_end", 1)], **options)
        return asked.copy()

    assert resumed(True) == resumed(False) == [0, 1]


# -- whose turn it is -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"val_check_interval": 1}], ids=str)
def test_early_stopping_and_checkpoints_come_after_the_module(options: dict[str, Any], tmp_path: Path) -> None:
    """Wherever they stand in the list: callbacks, module, early stopping, checkpoints at an epoch's end."""

    def also(fast: bool, calls: list[str]) -> list[Any]:
        ours, theirs = (EarlyStopping, ModelCheckpoint), (pl.callbacks.EarlyStopping, pl.callbacks.ModelCheckpoint)
        stop, save = (_noting(kind, calls) for kind in (ours if fast else theirs))
        return [save(tmp_path / str(fast), monitor="val_loss"), stop("val_loss")]

    ours, theirs = (run(fast, also=also, enable_checkpointing=True, default_root_dir=tmp_path, **options) for fast in (True, False))
    assert ours == theirs
    end = [c for c in ours if c.endswith("on_train_epoch_end")]
    assert end[:4] == [
        "cb.on_train_epoch_end",
        "on_train_epoch_end",
        "EarlyStopping.on_train_epoch_end",
        "ModelCheckpoint.on_train_epoch_end",
    ]


def _noting(kind: type, calls: list[str]) -> type:
    """A subclass that notes the hooks in which it looks at metrics."""

    def note(name: str) -> Any:
        def hook(self: Any, trainer: Any, *args: Any) -> None:
            if not trainer.sanity_checking:
                calls.append(f"{kind.__name__}.{name}")
            getattr(kind, name)(self, trainer, *args)

        return hook

    return type(kind.__name__, (kind,), {n: note(n) for n in ("on_validation_end", "on_train_epoch_end")})


def test_gradients_are_dropped_before_a_validation() -> None:
    """A module may say how, where no window is open."""
    ours, theirs = both(names=(*EVERYTHING, "on_validation_model_zero_grad"), accumulate_grad_batches=2, val_check_interval=1)
    assert ours == theirs


# -- datamodules ------------------------------------------------------------------------------------------------------
def datamodule_that_notes(calls: list[str], *names: str) -> pl.LightningDataModule:
    """Overrides ``names`` and its four loaders."""

    class Notes(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            calls.append("dm.train_dataloader")
            return m.labelled(15, 5, shuffle=False)

        def val_dataloader(self) -> Any:
            calls.append("dm.val_dataloader")
            return m.labelled(10, 5, shuffle=False)

        test_dataloader = predict_dataloader = val_dataloader

    def override(name: str) -> Any:
        def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(noted(f"dm.{name}", args, kwargs))
            return getattr(super(Notes, self), name)(*args, **kwargs)

        return hook

    for name in names:
        setattr(Notes, name, override(name))
    return Notes()


TRANSFER = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def both_with_data(stage: str, *names: str, drop: tuple[str, ...] = (), **more: Any) -> tuple[list[str], list[str]]:
    """Both runs with such a datamodule, its calls among the others; ``drop`` are calls left off both."""
    runs = []
    for fast in (True, False):
        own: list[Any] = []

        def data(own: list[Any] = own) -> dict[str, Any]:
            return {"datamodule": own[0]}

        def also(fast: bool, calls: list[str], own: list[Any] = own) -> list[Any]:
            own.append(datamodule_that_notes(calls, *names))
            return []

        calls = run(fast, stage, data=data, also=also, names=tuple(n for n in EVERYTHING if "dataloader" not in n), **more)
        runs.append([c for c in calls if c not in drop])
    return runs[0], runs[1]


LOADERS = ("dm.train_dataloader", "dm.val_dataloader")


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_a_datamodule_prepares_and_sets_up_before_the_module(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    """prepare_data and setup, each once, each before the module's; for an evaluation its loader at the same place."""
    ours, theirs = both_with_data(stage, "prepare_data", "setup", drop=LOADERS if stage == "fit" else ())
    assert ours == theirs


def test_a_datamodule_is_asked_for_its_loaders_before_the_optimizers() -> None:
    """[ours] Both, once, for what is wrong with them is said before anything runs; Lightning asks when it needs them."""
    ours, theirs = both_with_data("fit")
    assert [c for c in ours if c not in LOADERS] == [c for c in theirs if c not in LOADERS]
    assert (ours.count(LOADERS[0]), ours.count(LOADERS[1])) == (theirs.count(LOADERS[0]), theirs.count(LOADERS[1])) == (1, 1)
    first = ours.index(LOADERS[0])
    assert ours[first : first + 3] == [*LOADERS, "configure_optimizers"]
    assert theirs.index(LOADERS[1]) > theirs.index("cb.on_sanity_check_start")


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_a_datamodule_transfers_its_batches(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Where it overrides a transfer hook, its own is called instead of the module's."""
    ours, theirs = both_with_data(stage, *TRANSFER, drop=LOADERS)
    assert ours == theirs


def test_a_datamodule_tears_down_first() -> None:
    """Before callbacks and module."""
    ours, theirs = both_with_data("fit", "teardown", drop=LOADERS)
    assert ours == theirs


def test_a_datamodule_hears_of_an_error() -> None:
    """After the callbacks."""

    def trouble(thing: Any, name: str, args: tuple[Any, ...]) -> None:
        if name == "on_train_batch_end":
            raise ArithmeticError

    ours, theirs = both_with_data("fit", "on_exception", drop=LOADERS, trouble=trouble, raises=ArithmeticError)
    assert "dm.on_exception" in theirs
    assert "dm.on_exception" in ours
