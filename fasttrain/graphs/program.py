"""The step as plain functions of tensors: the truth every rung computes, runnable eagerly as it stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fasttrain.errors import ModuleError, reject
from fasttrain.module import Sink, Trainable, log_key, loss_of
from fasttrain.options import Precision
from fasttrain.results import LogKey
from fasttrain.step_result import plain_form

TRUE_DTYPES = {"bf16-true": torch.bfloat16, "64-true": torch.float64}
MIXED_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """What is fixed for a whole run and read inside the step."""

    precision: Precision
    device: torch.device
    keep_outputs: bool  # somebody reads what training_step returned
    norms: Any = None  # what hears of gradient norms (norms.GradientNorms), under track_grad_norm
    pending: Any = None  # what a device decides and the host hears later (pending.Pending); None where the host decides

    def autocast(self) -> AbstractContextManager[Any]:
        """The forward's context under this precision; casts are not cached, as in Lightning, and cannot be in a capture."""
        if self.precision in MIXED_DTYPES:
            return torch.autocast(self.device.type, dtype=MIXED_DTYPES[self.precision], cache_enabled=False)
        return nullcontext()

    def default_dtype(self) -> AbstractContextManager[Any]:
        """Within: tensors a step makes from nothing have the run's dtype."""
        return _default_dtype(TRUE_DTYPES[self.precision]) if self.precision in TRUE_DTYPES else nullcontext()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


REFUSED = -1  # what ``update_step`` gives for a step that was not taken because something is not finite


class StepOutput(NamedTuple):
    """One micro-step: the undivided loss ``[]``, what was logged, and what the step returned if anybody reads it."""

    loss: Tensor | None
    keys: tuple[LogKey, ...]
    values: Sequence[Any]
    returned: Any
    grads: Sequence[Tensor | None] | None  # of the divided, scaled loss; None where autograd filled ``p.grad``
    batch_size: int = 0  # 0: not known yet
    earlier: Sequence[StepOutput] = ()  # of this batch: the turns of other optimizers, the splits before the last


class Raw(NamedTuple):
    """What a traced step gives back: tensors and constants only."""

    loss: Tensor | None
    grads: tuple[Tensor | None, ...]
    items: list[tuple[Any, ...]]
    returned: Any


def forward(
    trainable: Trainable, spec: StepSpec, stage: str, batch: Any, batch_idx: int, index: int = 0,
    function: Callable[[Any, int, int], Any] | None = None,
) -> tuple[Any, list[tuple[Any, ...]]]:  # fmt: skip
    """Run one step of ``stage`` (``function`` in its place) and collect what it logged. Nothing is read on the host."""
    sink = trainable.sink
    sink.items = []
    try:
        if spec.precision in TRUE_DTYPES:
            batch = cast_floats(batch, TRUE_DTYPES[spec.precision])
        with spec.autocast(), spec.default_dtype():
            output = unwrapped((function or trainable.step(stage))(batch, batch_idx, index), sink, stage)
        return output, sink.items
    finally:
        sink.items = None


def make_micro_step(trainable: Trainable, spec: StepSpec, params: Sequence[nn.Parameter], index: int = 0) -> Callable[..., Raw]:
    """The forward and scaled backward of one batch as a pure function, in the form a tracer takes whole.

    ``params``: those that train, and behind them frozen ones, which have no gradient. ``index``: the optimizer whose turn it is.

    ``f(batch, batch_idx, divisor, scale)`` where ``divisor`` (batches in the window) and ``scale`` (loss scale)
    are 0-d tensors or None; gradients come back as values, ``p.grad`` is not touched.
    """
    sink, step, params = trainable.sink, trainable.step("train"), tuple(params)
    leaves = sum(p.requires_grad for p in params)
    true_dtype = TRUE_DTYPES.get(spec.precision)
    keep = spec.keep_outputs

    def micro_step(batch: Any, batch_idx: int, divisor: Tensor | None, scale: Tensor | None) -> Raw:
        sink.items = []
        if true_dtype is not None:
            batch = cast_floats(batch, true_dtype)
        with spec.autocast():
            output = unwrapped(step(batch, batch_idx, index), sink, "train")
        loss = loss_of(output)
        if loss is None:  # a batch the module passes over: no gradient, and what it logged
            items, sink.items = sink.items, None
            return Raw(None, (None,) * len(params), items, detached(output) if keep else None)
        scaled = loss if divisor is None else loss / divisor
        scaled = scaled if scale is None else scaled * scale
        grads = gradients_of(scaled, params, leaves)
        items = sink.items
        sink.items = None
        return Raw(loss.detach(), grads, items, detached(output) if keep else None)

    return micro_step


def make_forward(trainable: Trainable, spec: StepSpec, index: int = 0) -> Callable[..., Raw]:
    """The forward pass and the loss of one batch, as ``make_micro_step`` has them; ``grads`` holds the divided, scaled loss itself,
    of which somebody takes the gradients."""
    sink, step = trainable.sink, trainable.step("train")
    true_dtype, keep = TRUE_DTYPES.get(spec.precision), spec.keep_outputs

    def forward_step(batch: Any, batch_idx: int, divisor: Tensor | None, scale: Tensor | None) -> Raw:
        sink.items = []
        if true_dtype is not None:
            batch = cast_floats(batch, true_dtype)
        with spec.autocast():
            output = unwrapped(step(batch, batch_idx, index), sink, "train")
        loss = loss_of(output)
        items, sink.items = sink.items, None
        if loss is None:
            return Raw(None, (None,), items, detached(output) if keep else None)
        scaled = loss if divisor is None else loss / divisor
        scaled = scaled if scale is None else scaled * scale
        return Raw(loss.detach(), (scaled,), items, detached(output) if keep else None)

    return forward_step


def with_gradients(raw: Raw, params: Sequence[nn.Parameter]) -> Raw:
    """What ``make_forward``'s function gave, as ``make_micro_step``'s gives it."""
    if raw.loss is None:
        return raw._replace(grads=(None,) * len(params))
    (scaled,), leaves = raw.grads, sum(p.requires_grad for p in params)
    assert scaled is not None
    return raw._replace(grads=gradients_of(scaled, tuple(params), leaves))


def gradients_of(
    loss: Tensor, params: tuple[Tensor, ...], leaves: int, gradient: Tensor | None = None, *, retain: bool | None = None
) -> tuple[Tensor | None, ...]:
    """The gradient of each of ``params``; None for the frozen ones behind the first ``leaves``."""
    found = torch.autograd.grad(loss, params[:leaves], gradient, retain_graph=retain, allow_unused=True)
    return (*found, *(None,) * (len(params) - leaves))


def make_eval_step(trainable: Trainable, spec: StepSpec, stage: str, *, keep: bool, alone: bool) -> Callable[..., Raw]:
    """One evaluation step as a pure function ``f(batch, batch_idx, dataloader_idx)``, in the form a tracer takes whole.

    ``alone``: the only loader of its stage.
    """
    sink, step, true_dtype = trainable.sink, trainable.step(stage, alone=alone), TRUE_DTYPES.get(spec.precision)

    def eval_step(batch: Any, batch_idx: int, dataloader_idx: int) -> Raw:
        sink.items = []
        if true_dtype is not None:
            batch = cast_floats(batch, true_dtype)
        with spec.autocast():
            output = unwrapped(step(batch, batch_idx, dataloader_idx), sink, stage)
        items = sink.items
        sink.items = None
        return Raw(None, (), items, output if keep else None)

    return eval_step


def unwrapped(output: Any, sink: Sink, stage: str) -> Any:
    """What one step returned (or one turn yielded) in plain containers; what a Result among it logs goes to the sink."""
    plain, items = plain_form(output, stage)
    if items and sink.items is not None and not sink.off:
        sink.items.extend(items)
    return plain


def keys_and_values(items: Sequence[tuple[Any, ...]], suffix: str = "") -> tuple[tuple[LogKey, ...], list[Any]]:
    """Split the sink's items into their constant part and their values, in order; one key may come several times.

    Raises ModuleError for a key that comes again with other arguments.
    """
    keys = tuple(log_key(item, suffix) for item in items)
    named = {key.name: key for key in keys}
    if len(named) < len(keys):
        for key in keys:
            key.check_same(named[key.name])
    return keys, [item[1] for item in items]


def check_loss(output: Any, module_name: str, *, finite: bool, leaf: str = "a trainable parameter") -> Tensor:
    """The loss, which depends on a ``leaf``, or a ModuleError that says what came instead. Host read: only the dry look calls this."""
    loss: Any = output if isinstance(output, (int, float)) else loss_of(output)
    what = f"the loss of {module_name}.training_step"
    if loss is None:
        got = f"a dict with keys {sorted(map(str, output))}" if isinstance(output, dict) else type(output).__name__
        raise ModuleError(reject(what, got, "a scalar tensor, or a dict with 'loss'", "Return the loss from training_step."))
    if not isinstance(loss, Tensor):
        raise ModuleError(
            reject(what, f"{type(loss).__name__} {loss!r}", "a scalar tensor that requires grad", "Do not call .item() on it.")
        )
    if loss.numel() != 1:
        raise ModuleError(reject(what, f"shape {list(loss.shape)}", "one number", "Reduce it, e.g. loss.mean()."))
    if not loss.requires_grad:
        raise ModuleError(reject(what, "a tensor without a gradient", f"one that depends on {leaf}",
                                 "Look for .detach(), .item(), torch.no_grad() or argmax on the way to the loss."))  # fmt: skip
    if finite and not bool(torch.isfinite(loss.detach())):
        raise ModuleError(reject(what, f"{float(loss.detach())} on the first batch", "a finite number",
                                 "Look at the data for nan/inf and at the learning rate, or set nonfinite='ignore'."))  # fmt: skip
    return loss


def mean_of(losses: Sequence[Tensor | None]) -> Tensor | None:
    """One number for the progress bar out of several optimizers' losses."""
    present = [x for x in losses if x is not None]
    return sum(present[1:], present[0]) / len(present) if present else None


def cast_floats(batch: Any, dtype: torch.dtype) -> Any:
    """The batch with its floating-point tensors in ``dtype``."""
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **{f.name: cast_floats(getattr(batch, f.name), dtype) for f in fields(batch) if f.init})
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, batch)


def detached(output: Any) -> Any:
    """What a step returned, cut from its graph."""
    if isinstance(output, Tensor):
        return output.detach()
    return tree_map_only(Tensor, lambda t: t.detach(), output)
