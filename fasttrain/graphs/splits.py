"""Truncated backpropagation through time: a batch split along time, a step for each split, hidden state handed on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

from fasttrain.errors import DataError, reject
from fasttrain.forms import Carried
from fasttrain.graphs.contract import describe
from fasttrain.graphs.program import REFUSED, StepOutput
from fasttrain.graphs.step import Step
from fasttrain.graphs.traced import TracedCall
from fasttrain.module import Trainable, hiddens_of
from fasttrain.results import Obstacle


class SplitStep:
    """The step of another rung, once for each split; at the end of a window every split has its own update.

    What ``training_step`` returned as ``hiddens`` comes, detached, as the next split's argument; None for the first.
    """

    takes_closure = True

    def __init__(self, step: Step, split: Callable[[Any], Sequence[Any]]) -> None:
        self.step, self._split = step, split
        self.moved: Sequence[int] = (1,)
        self._taken = 0
        self._left_open = False

    @property
    def rung(self) -> str:
        return self.step.rung

    @property
    def epoch(self) -> int:
        return self.step.epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        self.step.epoch = value

    @property
    def calls(self) -> Sequence[TracedCall]:
        return self.step.calls

    @property
    def obstacles(self) -> Sequence[Obstacle]:
        return self.step.obstacles

    def micro_step(self, batch: Any, batch_idx: int, *, first: bool, last: bool, divisor: int, opened: int) -> StepOutput:
        outputs: list[StepOutput] = []
        hiddens: Any = None
        self._taken, self._left_open = 0, not last
        self.moved = [0] * len(self.step.moved)
        for n, part in enumerate(self._split(batch)):
            begins = first if n == 0 else last
            out = self.step.micro_step(Carried(part, hiddens), batch_idx, first=begins, last=last, divisor=divisor, opened=opened)
            if last:
                self._count(self.step.update_step(divisor / opened))
            hiddens = tree_map_only(Tensor, Tensor.detach, _left_hiddens(out.returned))
            outputs += [*out.earlier, out._replace(earlier=())]
        *earlier, out = outputs
        return out._replace(earlier=earlier, returned=[o.returned for o in outputs])

    def update_step(self, rescale: float) -> int:
        if self._left_open:
            self._left_open = False
            self._count(self.step.update_step(rescale))
        return self._taken

    def refresh(self) -> None:
        self.step.refresh()

    def gradients(self) -> dict[str, Tensor]:
        return self.step.gradients()

    def load_gradients(self, gradients: dict[str, Tensor]) -> None:
        self.step.load_gradients(gradients)

    def _count(self, stepped: int) -> None:
        if stepped == REFUSED or self._taken == REFUSED:
            self._taken = REFUSED
            return
        self._taken += stepped
        one = len(self.moved) == 1
        self.moved = [a + (stepped if one else b) for a, b in zip(self.moved, self.step.moved, strict=True)]


def _left_hiddens(returned: Any) -> Any:
    """Of one step, or of the last turn that left some."""
    if not isinstance(returned, list):
        return hiddens_of(returned)
    return next((h for r in reversed(returned) if (h := hiddens_of(r)) is not None), None)


def splitter(trainable: Trainable) -> Callable[[Any], Sequence[Any]]:
    """How this module's batches are split: its own ``tbptt_split_batch``, or along dim 1."""
    length = trainable.split_length
    if "tbptt_split_batch" in trainable.hooks:
        return lambda batch: trainable.call("tbptt_split_batch", batch, length)
    return lambda batch: split_along_time(batch, length)


def split_along_time(batch: Any, length: int) -> list[Any]:
    """The batch in parts of ``length`` steps along dim 1 (the last may be shorter): every tensor ``[B, T, ...]`` is cut there.

    Sequences in place of tensors (one per sample, or lists of time steps) are cut in each of their elements; what has no
    time dimension goes whole into every part. Raises DataError when the times differ or there is none.
    """
    times = {t for t in (_time(v) for v in _leaves(batch)) if t}
    if len(times) != 1:
        raise DataError(
            reject("a batch under truncated_bptt_steps", f"time lengths {sorted(times) or 'none'} in\n{describe(batch)}\n",
                   "tensors [batch, time, ...] of one length", "Define tbptt_split_batch(self, batch, split_size) on the module.")
        )  # fmt: skip
    total = times.pop()
    return [_cut(batch, start, min(start + length, total)) for start in range(0, total, length)]


def _leaves(node: Any) -> list[Any]:
    if isinstance(node, Mapping):
        return [x for v in node.values() for x in _leaves(v)]
    if isinstance(node, (list, tuple)) and not _is_rows(node):
        return [x for v in node for x in _leaves(v)]
    return [node]


def _is_rows(node: Any) -> bool:
    """A list with one sequence per sample."""
    return isinstance(node, list) and bool(node) and all(isinstance(v, (list, tuple)) and not any(map(_deep, v)) for v in node)


def _deep(value: Any) -> bool:
    return isinstance(value, (Mapping, list, tuple)) or (isinstance(value, Tensor) and value.dim() > 1)


def _time(leaf: Any) -> int:
    if isinstance(leaf, Tensor):
        return leaf.shape[1] if leaf.dim() > 1 else 0
    return len(leaf[0]) if _is_rows(leaf) else 0


def _cut(node: Any, start: int, stop: int) -> Any:
    if isinstance(node, Tensor):
        return node[:, start:stop] if node.dim() > 1 else node
    if isinstance(node, Mapping):
        return {k: _cut(v, start, stop) for k, v in node.items()}
    if _is_rows(node):
        return [v[start:stop] for v in node]
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return type(node)(*(_cut(v, start, stop) for v in node))
    if isinstance(node, (list, tuple)):
        return type(node)(_cut(v, start, stop) for v in node)
    return node
