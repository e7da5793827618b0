"""One optimizer step in two calls: what every rung offers, and what the loop knows of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from fasttrain.graphs.program import StepOutput
from fasttrain.graphs.traced import TracedCall
from fasttrain.results import Obstacle


class Step(Protocol):
    """``micro_step`` for every batch of a window, then ``update_step``.

    ``first``: gradients begin anew; ``opened``: batches in the window, this one among them (a batch may be several micro-steps).

    With ``takes_closure`` the last micro-step of a window also updates, and ``update_step`` says what came of it.
    """

    @property
    def rung(self) -> str: ...

    @property
    def takes_closure(self) -> bool: ...

    epoch: int

    @property
    def moved(self) -> Sequence[int]:
        """Steps each optimizer took in the last update."""

    @property
    def calls(self) -> Sequence[TracedCall]:
        """What of it was captured."""

    @property
    def obstacles(self) -> Sequence[Obstacle]:
        """Met while it ran."""

    def micro_step(self, batch: Any, batch_idx: int, *, first: bool, last: bool, divisor: int, opened: int) -> StepOutput: ...

    def update_step(self, rescale: float) -> int:
        """Steps taken; REFUSED when something was not finite."""

    def refresh(self) -> None: ...

    def gradients(self) -> dict[str, Tensor]: ...

    def load_gradients(self, gradients: dict[str, Tensor]) -> None:
        """The other way; the next micro-step goes on with them."""
