"""The hooks inside a step, and the one switch that keeps them silent while a step is only tried."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fasttrain.module import Trainable


class InStepHooks:
    """``fire`` tells callbacks and the module; ``call`` the module alone, with the arguments its signature names."""

    def __init__(self, trainable: Trainable, fire: Callable[..., None], live: frozenset[str]) -> None:
        self._trainable, self._fire, self.live = trainable, fire, live  # ``live``: what somebody overrides
        self.muted = False

    def fires(self, name: str) -> bool:
        return name in self.live and not self.muted

    def owned(self, name: str) -> bool:
        """Does the module bring its own?"""
        return name in self._trainable.hooks and not self.muted

    def fire(self, name: str, *args: Any) -> None:
        if self.fires(name):
            self._fire(name, *args)

    def call(self, name: str, **known: Any) -> Any:
        return self._trainable.call_named(name, **known)
