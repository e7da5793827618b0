"""Laws of the hooks: which are live, in which order they are called, and whose state is kept."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import pytorch_lightning as pl

from fasttrain.callbacks import HOOKS, Callback, CallbackList, EarlyStopping, ModelCheckpoint, live_hooks
from fasttrain.errors import FasttrainWarning, OptionError


class Counter(Callback):
    def __init__(self, name: str = "") -> None:
        self.name, self.count = name, 0

    @property
    def state_key(self) -> str:
        return f"Counter{self.name}"

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count} if self.count else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


def test_every_hook_of_lightning_is_there_with_the_same_arguments() -> None:
    """Our Callback has each public method of Lightning's, with the same argument names and defaults."""
    for name, theirs in inspect.getmembers(pl.Callback, inspect.isfunction):
        if not name.startswith("_"):
            ours = inspect.signature(getattr(Callback, name)).parameters.values()
            wanted = inspect.signature(theirs).parameters.values()
            assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in wanted], name
            assert name in HOOKS


def test_a_hook_is_live_only_where_it_is_overridden() -> None:
    """On our callbacks, on Lightning's and on plain objects; through parents and on the instance."""

    class Theirs(pl.Callback):
        def on_fit_end(self, trainer: Any, pl_module: Any) -> None: ...

    class Child(Theirs):
        on_train_end = None

    class Plain:
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None: ...

    assert live_hooks(Callback()) == live_hooks(pl.Callback()) == live_hooks(object()) == frozenset()
    assert live_hooks(Counter()) == {"on_train_start", "state_dict", "load_state_dict"}
    assert live_hooks(Theirs()) == live_hooks(Child()) == {"on_fit_end"}
    assert live_hooks(Plain()) == {"on_train_epoch_end"}
    assert live_hooks(pl.callbacks.LambdaCallback(on_train_start=lambda *_: None)) == {"on_train_start"}


def test_hooks_that_nobody_overrides_have_no_calls() -> None:
    """Only the overridden hook has calls, and they are the bound methods in list order."""
    first, second = Counter("1"), Counter("2")
    calls = CallbackList([first, Callback(), second])
    assert calls.calls("on_train_start") == (first.on_train_start, second.on_train_start)
    assert all(calls.calls(hook) == () for hook in HOOKS if hook not in live_hooks(first))


def test_checkpoints_come_last_and_early_stopping_after_the_ordinary_ones() -> None:
    """The list keeps its order but for checkpoints; `split` leaves room for the module's own hook."""

    class Ordinary(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None: ...

    save, stop, own, theirs = (
        ModelCheckpoint(),
        EarlyStopping("x"),
        Ordinary(),
        pl.callbacks.ModelCheckpoint(monitor="x"),
    )
    calls = CallbackList([save, theirs, stop, own])
    assert list(calls) == [stop, own, save, theirs]
    first, then = calls.split("on_train_epoch_end")
    assert first == (own.on_train_epoch_end,)
    assert then == (stop.on_train_epoch_end, save.on_train_epoch_end, theirs.on_train_epoch_end)


def test_state_goes_out_and_comes_back_by_key() -> None:
    """A callback gets its own state; an empty one is not written; one without an owner is mentioned."""
    a, b = Counter("a"), Counter("b")
    a.count = 3
    states = CallbackList([a, b]).state_dict()
    assert states == {"Countera": {"count": 3}}
    again = Counter("a")
    CallbackList([again]).load_state_dict(states)
    assert again.count == 3
    with pytest.warns(FasttrainWarning, match="Countera"):
        CallbackList([Counter("z")]).load_state_dict(states)


def test_two_callbacks_with_state_need_two_keys() -> None:
    """Equal keys are refused when the list is made."""
    with pytest.raises(OptionError, match="state_key"):
        CallbackList([Counter("same"), Counter("same")])
    with pytest.raises(OptionError, match="state_key"):
        CallbackList([EarlyStopping("x"), EarlyStopping("x", patience=9)])
    CallbackList([EarlyStopping("x"), EarlyStopping("y")])


def test_what_is_no_callback_is_refused() -> None:
    """A class, an object without hooks; a retired hook name is mentioned with the present one."""
    with pytest.raises(OptionError, match="instance"):
        CallbackList([Counter])
    with pytest.raises(OptionError, match="at least one hook"):
        CallbackList([object()])

    class Old(Callback):
        def on_epoch_end(self, trainer: Any, pl_module: Any) -> None: ...

    with pytest.warns(FasttrainWarning, match="on_epoch_end is now on_train_epoch_end"):
        CallbackList([Old()])
