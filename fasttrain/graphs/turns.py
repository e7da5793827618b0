"""Several optimizers, one turn each: ``training_step(batch, batch_idx, optimizer_idx)`` once an optimizer, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fasttrain.graphs.program import REFUSED, StepOutput, mean_of
from fasttrain.graphs.scale import LossScale
from fasttrain.graphs.step import Step
from fasttrain.graphs.traced import TracedCall
from fasttrain.results import Obstacle


class OwnGradients:
    """``p.grad`` of parameters that several optimizers hold: over a window, each optimizer's own in its turn."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        held = [{id(p): p for g in o.param_groups for p in g["params"]} for o in optimizers]
        self._shared = [[p for k, p in mine.items() if sum(k in other for other in held) > 1] for mine in held]
        self.any = any(self._shared)
        self._kept: list[dict[nn.Parameter, Tensor]] = [{} for _ in held]  # empty where every window is one batch

    def enter(self, i: int) -> None:
        if any(self._kept):
            for p in self._shared[i]:
                p.grad = self._kept[i].get(p)

    def leave(self, i: int, *, open: bool) -> None:
        """``open``: the next batch adds to these gradients."""
        self._kept[i] = {p: p.grad for p in self._shared[i] if p.grad is not None} if open else {}


class Turns:
    """One step of every optimizer whose turn it is; each of them is a step of its own, on its own rung.

    ``frequencies``: optimizer i owns ``frequencies[i]`` batches in a row; None: every optimizer has every batch.
    ``seen()`` tells how many batches of the fit came before this one.
    """

    takes_closure = True  # a micro-step that ends a window also updates: the next optimizer's turn sees it

    def __init__(
        self, steps: Sequence[Step], optimizers: Sequence[torch.optim.Optimizer], frequencies: Sequence[int] | None,
        seen: Callable[[], int], scaler: LossScale | None,
    ) -> None:  # fmt: skip
        self.steps, self._optimizers, self._frequencies, self._seen, self._scaler = steps, optimizers, frequencies, seen, scaler
        self.everyone = False  # while it is traced and timed
        self.moved = [0] * len(steps)  # steps taken by each optimizer in the last update
        self._holds = [False] * len(steps)  # gradients of this window
        self._batches = [0] * len(steps)  # of this window that each optimizer has had
        self._newest = [0] * len(steps)  # the last of them, counted within the window
        self._result = 0
        self._others: list[list[torch.Tensor]] | None = None  # parameters of everybody but each optimizer
        self._own = OwnGradients(optimizers)

    @property
    def rung(self) -> str:
        return next((s.rung for s in self.steps if s.rung == "eager"), self.steps[0].rung)

    @property
    def epoch(self) -> int:
        return self.steps[0].epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        for step in self.steps:
            step.epoch = value

    @property
    def calls(self) -> Sequence[TracedCall]:
        return [c for s in self.steps for c in s.calls]

    @property
    def obstacles(self) -> Sequence[Obstacle]:
        return [o for s in self.steps for o in s.obstacles]

    def micro_step(self, batch: Any, batch_idx: int, *, first: bool, last: bool, divisor: int, opened: int) -> StepOutput:
        """Everybody's turn on this batch; the outputs of all but the last are in ``earlier``."""
        outputs: list[StepOutput] = []
        self.moved, self._result = [0] * len(self.steps), 0
        if opened == 1:
            self._batches, self._newest = [0] * len(self.steps), [0] * len(self.steps)
        if self._scaler is not None:
            self._scaler.gather()
        for i in self._whose_turn():
            step = self.steps[i]
            self._batches[i] += self._newest[i] != opened
            self._newest[i] = opened
            with self.toggled(i):
                out = step.micro_step(batch, batch_idx, first=not self._holds[i], last=last, divisor=divisor, opened=self._batches[i])
                self._holds[i] = True
                if last:
                    self._update(i, divisor / self._batches[i])
            outputs.append(out)
        for i in self._left_over() if last else ():  # whose turn was earlier in this window
            with self.toggled(i):
                self._update(i, divisor / self._batches[i])
        if self._scaler is not None:
            self._scaler.settle()
        *earlier, out = outputs
        if earlier:
            returned = [o.returned for o in outputs] if any(o.returned is not None for o in outputs) else None
            out = out._replace(loss=mean_of([o.loss for o in outputs]), returned=returned, earlier=earlier)
        return out

    def update_step(self, rescale: float) -> int:
        """What the micro-step's updates came to; a window that a stop has cut short is closed here."""
        left = self._left_over()
        if left and self._scaler is not None:
            self._scaler.gather()
        for i in left:
            with self.toggled(i):
                self._update(i, rescale * (max(self._newest) / self._batches[i]))
        if left and self._scaler is not None:
            self._scaler.settle()
        return self._result or max(self.moved)

    def refresh(self) -> None:
        self._others = None
        for step in self.steps:
            step.refresh()

    def gradients(self) -> dict[str, Tensor]:
        """By "optimizer:name", and how many batches each optimizer has gathered by "optimizer:"."""
        held: dict[str, Tensor] = {}
        for i in self._left_over():
            self._own.enter(i)
            held |= {f"{i}:{n}": g for n, g in self.steps[i].gradients().items()}
        return held | {f"{i}:": torch.tensor(n) for i, n in enumerate(self._batches) if self._holds[i]}

    def load_gradients(self, gradients: dict[str, Tensor]) -> None:
        for i, step in enumerate(self.steps):
            mine = {n.split(":", 1)[1]: g for n, g in gradients.items() if n.startswith(f"{i}:")}
            if mine:
                self._holds[i], self._batches[i] = True, int(mine.pop(""))
                step.load_gradients(mine)
                self._own.leave(i, open=True)
        opened = max(self._batches) if self._frequencies is None else sum(self._batches)
        self._newest = [opened] * len(self.steps)

    def _left_over(self) -> list[int]:
        return [i for i, holds in enumerate(self._holds) if holds]

    def _update(self, i: int, rescale: float) -> None:
        stepped = self.steps[i].update_step(rescale)
        self._holds[i] = False
        if stepped == REFUSED:
            self._result = REFUSED
        else:
            self.moved[i] += stepped

    def _whose_turn(self) -> Sequence[int]:
        if self._frequencies is None or self.everyone:
            return range(len(self.steps))
        place = self._seen() % sum(self._frequencies)
        for i, n in enumerate(self._frequencies):
            if place < n:
                return (i,)
            place -= n
        raise AssertionError("a place beyond the sum of the frequencies")

    @contextmanager
    def toggled(self, i: int) -> Iterator[None]:
        """Only this optimizer's parameters require a gradient within, and ``p.grad`` is its own."""
        if self._others is None:
            held = [{id(p): p for g in o.param_groups for p in g["params"]} for o in self._optimizers]
            everybody = {k: p for mine in held for k, p in mine.items()}
            self._others = [[p for k, p in everybody.items() if k not in mine] for mine in held]
        others = [p for p in self._others[i] if p.requires_grad]
        for p in others:
            p.requires_grad_(False)
        if self._own.any:
            self._own.enter(i)
        try:
            yield
        finally:
            if self._own.any:
                self._own.leave(i, open=self._holds[i])
            for p in others:
                p.requires_grad_(True)
