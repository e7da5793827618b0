"""Which hooks are live: who overrides what, found once, so that a hook nobody overrides costs nothing.

Works on our callbacks, on Lightning's (which is never imported here) and on any object with such methods.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any

from fasttrain.callbacks.callback import HOOKS, Checkpoint
from fasttrain.callbacks.early_stopping import EarlyStopping
from fasttrain.errors import FasttrainWarning, OptionError, reject

_PEERS = ("lightning", "pytorch_lightning")
_RENAMED = {
    "on_batch_start": "on_train_batch_start",
    "on_batch_end": "on_train_batch_end",
    "on_epoch_start": "on_train_epoch_start",
    "on_epoch_end": "on_train_epoch_end",
    "on_init_start": "setup",
    "on_init_end": "setup",
    "on_pretrain_routine_start": "on_fit_start",
    "on_pretrain_routine_end": "on_fit_start",
    "on_keyboard_interrupt": "on_exception",
}


def live_hooks(callback: object) -> frozenset[str]:
    """The names in `HOOKS` that this object really overrides, on its class or on itself.

    A callback whose settings leave a hook with nothing to do names it in `idle_hooks`; it is not called then.
    """
    idle: frozenset[str] = getattr(callback, "idle_hooks", frozenset())
    return frozenset(name for name in HOOKS if name not in idle and _overrides(callback, name))


def _overrides(callback: object, name: str) -> bool:
    own = getattr(callback, "__dict__", {})
    if name in own:
        return callable(own[name])
    for cls in type(callback).__mro__:
        if name in vars(cls):
            return not _is_blank(cls) and callable(getattr(callback, name))
    return False


def _is_blank(cls: type) -> bool:
    """Whether the class is a base whose hooks do nothing: ours, or Lightning's under either of its names."""
    module = cls.__module__
    return module.split(".")[0] in ("fasttrain", *_PEERS) and module.endswith(".callbacks.callback")


def _descends_from(callback: object, name: str) -> bool:
    return any(cls.__name__ == name and cls.__module__.split(".")[0] in _PEERS for cls in type(callback).__mro__)


def is_callback(callback: object) -> bool:
    """Is it a Callback, ours or Lightning's, and not just any object with such methods?"""
    return any(_is_blank(cls) for cls in type(callback).__mro__)


def is_checkpoint(callback: object) -> bool:
    """Does it write checkpoints: a Checkpoint of ours or Lightning's, or an object with the best one's path?"""
    return isinstance(callback, Checkpoint) or _descends_from(callback, "Checkpoint") or hasattr(callback, "best_model_path")


def _is_monitoring(callback: object) -> bool:
    """Runs at the end of an epoch after the module's own hook: early stopping and checkpoints."""
    return is_checkpoint(callback) or isinstance(callback, EarlyStopping) or _descends_from(callback, "EarlyStopping")


def _state_key(callback: object) -> str:
    return str(getattr(callback, "state_key", type(callback).__qualname__))


class CallbackList:
    """The callbacks of one run in the order they are called: as given, those that write checkpoints last.

    Raises:
        OptionError: two callbacks with state share a `state_key`, or something in the list has no hook at all.

    Example::

        for call in callbacks.calls("on_train_start"):
            call(trainer, module)
    """

    def __init__(self, callbacks: Iterable[object] = ()) -> None:
        self._callbacks = tuple(sorted(callbacks, key=is_checkpoint))
        live = [(callback, live_hooks(callback)) for callback in self._callbacks]
        for callback, hooks in live:
            _check_is_callback(callback, hooks)
        self._live = {hook: tuple(callback for callback, hooks in live if hook in hooks) for hook in HOOKS}
        self._calls: dict[str, tuple[Callable[..., Any], ...]] = {
            hook: tuple(getattr(callback, hook) for callback in alive) for hook, alive in self._live.items()
        }
        _check_state_keys(self._live["state_dict"])

    def __iter__(self) -> Iterator[object]:
        return iter(self._callbacks)

    def __len__(self) -> int:
        return len(self._callbacks)

    def calls(self, hook: str) -> tuple[Callable[..., Any], ...]:
        """The bound methods to call for this hook, in order; empty when nobody overrides it."""
        return self._calls[hook]

    def split(self, hook: str) -> tuple[tuple[Callable[..., Any], ...], tuple[Callable[..., Any], ...]]:
        """`calls(hook)` in two: ordinary callbacks, then early stopping and checkpoints. The module goes between."""
        both = list(zip(self._live[hook], self._calls[hook], strict=True))
        first = tuple(call for callback, call in both if not _is_monitoring(callback))
        then = tuple(call for callback, call in both if _is_monitoring(callback))
        return first, then

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """The state of every callback that has any, under its `state_key`."""
        states = {_state_key(callback): getattr(callback, "state_dict")() for callback in self._live["state_dict"]}  # noqa: B009
        return {key: state for key, state in states.items() if state}

    def load_state_dict(self, states: Mapping[str, dict[str, Any]]) -> None:
        """Hands every callback its state; warns about states that no callback here takes."""
        orphans = sorted(set(states) - {_state_key(callback) for callback in self._callbacks})
        if orphans:
            warnings.warn(
                f"The checkpoint holds the state of callbacks that this run does not have: {', '.join(orphans)}. "
                "Give the same callbacks to continue them.",
                FasttrainWarning,
                stacklevel=2,
            )
        for callback, load in zip(self._live["load_state_dict"], self._calls["load_state_dict"], strict=True):
            state = states.get(_state_key(callback))
            if state:
                load(deepcopy(state))


def _check_is_callback(callback: object, hooks: frozenset[str]) -> None:
    if isinstance(callback, type):
        raise OptionError(reject("callbacks", f"the class {callback.__name__}", "an instance", "Call it first."))
    old = [name for name in _RENAMED if _RENAMED[name] not in hooks and callable(getattr(type(callback), name, None))]
    if old:
        now = ", ".join(f"{name} is now {_RENAMED[name]}" for name in old)
        message = f"{type(callback).__name__} has hooks that are no longer called: {now}. Rename them."
        warnings.warn(message, FasttrainWarning, stacklevel=4)
    elif not hooks and not is_callback(callback):
        then = "Subclass fasttrain.Callback or give it a method such as on_train_epoch_end(trainer, module)."
        raise OptionError(reject("callbacks", f"a {type(callback).__name__}", "an object with at least one hook", then))


def _check_state_keys(stateful: Iterable[object]) -> None:
    seen: set[str] = set()
    for callback in stateful:
        key = _state_key(callback)
        if key in seen:
            then = "Override the `state_key` property so that each has its own, or give only one of them."
            raise OptionError(reject("callbacks", f"two with the state_key {key!r}", "one state_key each", then))
        seen.add(key)
