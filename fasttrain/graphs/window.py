"""A window's gradients, at addresses that never change: its first micro-step overwrites them, the others add."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Present = tuple[bool, ...]  # which parameters have a gradient; () where a window begins


class WindowGradients:
    """``static`` is made when a window first has several batches; one that is a single batch's needs none."""

    def __init__(self, params: Sequence[Tensor], device: torch.device) -> None:
        self._params = params
        self.static: list[Tensor] = []
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
        self.loss = torch.zeros((), device=device, dtype=dtype)  # the window's losses' sum: not finite when one of them is not
        self.present: Present = ()
        self.open = False

    def make(self) -> None:
        """Outside any capture: a graph's pool would be written again by every replay."""
        if not self.static:
            self.static = [torch.zeros_like(p, requires_grad=False) for p in self._params]

    def put(self, grads: Sequence[Tensor | None], loss: Tensor, before: Present) -> Present:
        """Device work alone, so that a graph may record it. Returns what is present after it; ``present`` is the caller's to move."""
        was = before or (False,) * len(self.static)
        three = [(s, g, w) for s, g, w in zip(self.static, grads, was, strict=True) if g is not None]
        fresh, more = [(s, g) for s, g, w in three if not w], [(s, g) for s, g, w in three if w]
        if fresh:
            torch._foreach_copy_([s for s, _ in fresh], [g for _, g in fresh])
        if more:
            torch._foreach_add_([s for s, _ in more], [g for _, g in more])
        if before:
            self.loss.add_(loss)
        else:
            self.loss.copy_(loss)
        return tuple(w or g is not None for w, g in zip(was, grads, strict=True))

    def given(self, present: Present | None = None) -> list[Tensor | None]:
        """The gradients that are there, in parameter order."""
        present = self.present if present is None else present
        if not present:
            return [None] * len(self._params)
        return [s if there else None for s, there in zip(self.static, present, strict=True)]

    def load(self, grads: Sequence[Tensor | None], loss: Tensor | None) -> None:
        """As a checkpoint, or somebody who went another way, left them. In place."""
        self.make()
        self.present, self.open = tuple(g is not None for g in grads), True
        for s, g in zip(self.static, grads, strict=True):
            if g is not None and g is not s:
                s.copy_(g)
        if loss is None:
            self.loss.zero_()
        elif loss is not self.loss:
            self.loss.copy_(loss)

    def close(self) -> None:
        self.present, self.open = (), False
