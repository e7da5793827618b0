"""What a device has decided and the host has not heard of yet: heard late, or where a run stops anyway, never waited for in a step."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakSet

import torch
from torch import Tensor

from fasttrain.errors import NonFiniteError

ASK_EVERY = 16  # updates between two looks: a look is a copy of 4 bytes and an event, in nobody's way


class Verdicts:
    """The refused steps of one tail: ``skips`` counts them on the device, ``noted`` is what the host has heard."""

    def __init__(self, skips: Tensor, heard: Callable[[int], None]) -> None:
        self.skips, self.noted, self._heard = skips, 0, heard
        self._updates = 0
        self._copy: Tensor | None = None  # on its way to the host
        self._there: torch.cuda.Event | None = None

    def updated(self) -> None:
        """An update was launched. Now and then the count starts its way to the host; once it is there it is read, no sooner."""
        self._updates += 1
        if self._copy is not None:
            if self._there is None or self._there.query():  # type: ignore[no-untyped-call]
                count, self._copy = int(self._copy), None
                self.hear(count)
        elif self._updates % ASK_EVERY == 0:
            self._copy = torch.empty((), dtype=self.skips.dtype, pin_memory=self.skips.is_cuda)
            self._copy.copy_(self.skips, non_blocking=True)
            if self.skips.is_cuda:
                self._there = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._there.record()

    def hear(self, count: int) -> None:
        new, self.noted = count - self.noted, count
        if new:
            self._heard(new)

    def forget(self) -> None:
        self.noted, self._copy = 0, None
        self.skips.zero_()


class Pending:
    """Everything of one run that the host is told later. ``raises``: a refused step ends the run.

    ``seen()`` counts the batches of the fit.
    """

    def __init__(self, seen: Callable[[], int], *, raises: bool) -> None:
        self._seen, self.raises = seen, raises
        self._tails: WeakSet[Verdicts] = WeakSet()
        self._launches: list[Callable[[], None]] = []
        self._skipped = 0  # heard, and not yet told on

    def watch(self, skips: Tensor) -> Verdicts:
        verdicts = Verdicts(skips, self._hear)
        self._tails.add(verdicts)
        return verdicts

    def settle(self) -> int:
        """Steps that were refused since this was last asked. Host read: where a run stops anyway. Raises NonFiniteError."""
        for verdicts in list(self._tails):
            verdicts.hear(int(verdicts.skips))
        skipped, self._skipped = self._skipped, 0
        return skipped

    def forget(self) -> None:
        """Steps were only tried: what came of them is nobody's business."""
        for verdicts in list(self._tails):
            verdicts.forget()
        self._skipped = 0

    def _hear(self, new: int) -> None:
        self._skipped += new
        if self.raises:
            self.forget()
            raise NonFiniteError(
                f"the loss or a gradient is not finite: seen {new} optimizer step(s) ago, heard of at batch {self._seen()} of this fit. "
                "A device is never waited for; from that step on it has refused every update, so the weights are as they were before it. "
                "Look at these batches and at the learning rate, clip with gradient_clip_val=1.0, or set nonfinite='skip'."
            )
