"""The end of a window on a GPU: the Triton kernels, judged on the device; no host waits for it, and a CUDA graph can hold it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fasttrain.graphs.norms import GradientNorms
from fasttrain.graphs.pending import Pending
from fasttrain.graphs.scale import LossScale
from fasttrain.kernels.triton_plan import FLOATS
from fasttrain.kernels.triton_tail import TritonTail
from fasttrain.options import Options


class Moved(NamedTuple):
    """One update within a graph."""

    there: Sequence[int]  # the parameters that have a gradient
    tables: object  # that its kernels walk: they must live as long as the graph


class DeviceTail:
    """SGD, Adam, AdamW or Lion. lr, decay, 1/window and loss scale are device values.

    ``step`` always says that the weights moved: whether they did is on the device, and ``pending`` hears of it later. Under
    ``nonfinite="raise"`` a refused step refuses all that follow, so that what it found is still there then.

    In a graph: ``launch`` within the capture, behind at least one real ``step``; ``before_replay`` and ``after`` around each replay.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter], options: Options, scaler: LossScale | None,
        norms: GradientNorms | None, pending: Pending,
    ) -> None:  # fmt: skip
        self._params, self._norms, self._scaler = params, norms, scaler
        by_norm = options.gradient_clip_algorithm == "norm"
        self._max_norm = options.gradient_clip_val if by_norm else None
        self._clip_value = None if by_norm else options.gradient_clip_val
        if self._max_norm is None and (scaler is not None or options.nonfinite == "skip"):
            self._max_norm = math.inf  # measured, not clipped
        self._check = scaler is not None or options.nonfinite != "ignore"
        # Several optimizers move one scale together, and that the host does.
        scale = scaler.lend() if scaler is not None and scaler.alone else None
        self._by_host = scaler is not None and scale is None
        kind = self._norm_kind()
        self._triton = TritonTail(optimizer, params, norm_type=kind or 2.0, scale=scale)
        device = self._triton.device
        self._each = torch.zeros(len(params), device=device) if kind else None
        self._rescale, self._sent = torch.ones((), device=device), 1.0
        self._sticky = scaler is None and options.nonfinite == "raise"
        self._verdicts = None if self._by_host else pending.watch(self._triton.skips)

    @staticmethod
    def obstacle(optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter]) -> str | None:
        """Why this optimizer cannot have one, in a sentence; None when it can."""
        return TritonTail.obstacle(optimizer) if params else "no parameter of it trains"

    @property
    def captures(self) -> bool:
        """May a graph hold it? Not where the host decides, or measures norms in a pass of its own."""
        return not self._by_host and (self._norms is None or self._each is not None)

    def _norm_kind(self) -> float | None:
        """The norm that is wanted of each gradient, where the kernels' one pass can measure it without refusing what only it finds."""
        kind = None if self._norms is None else self._norms.type
        fits = kind == 2.0 or (kind == math.inf and self._max_norm in (None, math.inf))
        return kind if fits and not (self._max_norm is None and self._check) else None

    def step(self, grads: Sequence[Tensor | None], rescale: float, loss: Tensor | None) -> bool:
        """One update, launched."""
        self._set_rescale(rescale)
        if self._norms is not None and self._each is None:
            self._measure(grads, rescale)
        return self.after(self.launch(grads, loss))

    def launch(self, grads: Sequence[Tensor | None], loss: Tensor | None) -> Moved:
        """The kernels alone: what a graph records. What comes back is for ``after``, and lives as long as the graph."""
        if loss is not None and loss.dtype not in FLOATS:
            loss = loss.float()
        # The loss scale goes by the gradients alone, as torch's does.
        tables = self._triton.step(
            grads, max_norm=self._max_norm, clip_value=self._clip_value, grad_scale=self._rescale,
            loss=loss if self._scaler is None else None, check=self._check, norms_out=self._each, sticky=self._sticky,
            transient=True,
        )  # fmt: skip
        return Moved([i for i, g in enumerate(grads) if g is not None], tables)

    def prepare(self, n: int) -> None:
        """So many updates will be recorded before the next replay."""
        self._triton.sync(captures=n)

    def before_replay(self, rescale: float) -> None:
        """Writes what has changed on the host since the last one: hyperparameters, tables of a new capture."""
        self._set_rescale(rescale)
        self._triton.sync()

    def after(self, moved: Moved) -> bool:
        """An update was launched or replayed."""
        if self._verdicts is None:
            return self._judged(moved.there)
        if self._each is not None:
            self._tell_norms(self._each, moved.there)
        self._verdicts.updated()
        return True

    def refresh(self) -> None:
        if self._triton.stale():
            self._triton.refresh()

    def _set_rescale(self, rescale: float) -> None:
        if self._by_host:
            assert self._scaler is not None
            rescale = rescale / self._scaler.value
        if rescale != self._sent:
            self._rescale.fill_(rescale)
            self._sent = rescale

    def _measure(self, grads: Sequence[Tensor | None], rescale: float) -> None:
        """Norms that the kernels' one pass does not give. Host read, of a loss scale."""
        assert self._norms is not None
        if self._scaler is not None:
            self._scaler.read()
        self._norms(self._params, grads, rescale if self._scaler is None else rescale / self._scaler.value)

    def _judged(self, there: Sequence[int]) -> bool:
        """Host read: several optimizers share one loss scale, which moves once for all of them."""
        assert self._scaler is not None
        skipped = bool(int(self._triton.skipped))
        if self._each is not None and not skipped:
            self._tell_norms(self._each, there)
        self._scaler.update(found_inf=skipped)
        return not skipped

    def _tell_norms(self, each: Tensor, there: Sequence[int]) -> None:
        assert self._norms is not None
        norms, total = each.clone().unbind(), self._triton.grad_norm.clone()
        if there:
            self._norms.measured(self._norms.names([self._params[i] for i in there]), [norms[i] for i in there], total)
