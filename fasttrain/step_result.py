"""Result objects: what a step may return instead of its loss, with what it logs and what it keeps for the epoch's end.

After Lightning 0.9. They are plain objects so that a tracer takes them whole; no rung hands one out of a captured
step, only its ``plain`` form, and what somebody reads is ``rebuilt`` from that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fasttrain.errors import ModuleError, reject
from fasttrain.results import as_scalar

KIND = "fasttrain.Result"  # in a plain form: which class it is of
MONITORED = ("early_stop_on", "checkpoint_on")
RESERVED = ("minimize", *MONITORED, "hiddens")
_OURS = frozenset((*RESERVED, "_logged", "_gathered"))


class _Result:
    """What both kinds share: the values they are made with, what was logged, and any attribute the step sets."""

    def __init__(self, minimize: Any, early_stop_on: Any, checkpoint_on: Any, hiddens: Any) -> None:
        self.minimize = minimize
        self.early_stop_on = early_stop_on
        self.checkpoint_on = checkpoint_on
        self.hiddens = hiddens
        self._logged: list[tuple[Any, ...]] = []  # as ``Sink.items``
        self._gathered: dict[str, Any] | None = None  # of an epoch's result: its values as they were handed over

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    def __getitem__(self, name: str) -> Any:
        if name not in self.__dict__:
            raise KeyError(name)
        return self.__dict__[name]

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self, name, value)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and not name.startswith("_") and self.__dict__.get(name) is not None

    def __repr__(self) -> str:
        shown = (f"{k}={v!r}" for k, v in self.__dict__.items() if v is not None and not k.startswith("_"))
        return f"{type(self).__name__}({', '.join(shown)})"

    def _log(
        self, name: str, value: Any, prog_bar: bool, logger: bool, on_step: bool, on_epoch: bool, reduce_fx: Any,
        tbptt_reduce_fx: Any, enable_graph: bool, batch_size: int | None, add_dataloader_idx: bool,
    ) -> None:  # fmt: skip
        """Keep the value for the metrics, and as an attribute under its name."""
        what = f"{type(self).__name__}.log"
        if not isinstance(name, str) or name in _OURS or hasattr(type(self), name):
            raise ModuleError(reject(f"{what}(name)", repr(name), "a name that is not one of its own", "Give the metric another name."))
        if tbptt_reduce_fx not in (torch.mean, "mean", None):
            then = "Values of the splits of a batch are reduced with those of the epoch: use reduce_fx."
            raise ModuleError(reject(f"{what}(tbptt_reduce_fx)", repr(tbptt_reduce_fx), "the mean, which is the default", then))
        value = value if enable_graph else _own(value)
        self._logged.append((name, value, prog_bar, logger, on_step, on_epoch, reduce_fx, batch_size, add_dataloader_idx))
        setattr(self, name, value)


class TrainResult(_Result):
    """What ``training_step`` may return: the loss to minimize, what it logs, and what ``training_epoch_end`` wants to see.

    Any attribute may be set (``result.preds = preds``). They are gathered over the epoch and handed to ``training_epoch_end``
    as one TrainResult - tensors concatenated along dim 0, 0-d ones stacked, anything else as a list - and are kept only if the
    module has that hook, whose own TrainResult, if it returns one, is logged as the epoch's metrics.

    Args:
        minimize: the loss, ``[]``, with a gradient.
        early_stop_on, checkpoint_on: one number each; their means over the epoch are the metrics of these names, which
            EarlyStopping and ModelCheckpoint use when they have no monitor, unless the evaluation's EvalResult sets them.
            ``checkpoint_on=True`` means the loss.
        hiddens: the hidden state for the next split of truncated backpropagation.

    Raises:
        ModuleError: at the first batch, when it is not made of these.

    Example::

        def training_step(self, batch, batch_idx):
            result = fasttrain.TrainResult(minimize=loss)
            result.log("train_loss", loss, prog_bar=True)
            return result
    """

    def __init__(self, minimize: Any = None, early_stop_on: Any = None, checkpoint_on: Any = None, hiddens: Any = None) -> None:
        super().__init__(minimize, early_stop_on, checkpoint_on, hiddens)

    def log(
        self, name: str, value: Any, prog_bar: bool = False, logger: bool = True, on_step: bool = True, on_epoch: bool = False,
        reduce_fx: Any = torch.mean, tbptt_reduce_fx: Any = torch.mean, tbptt_pad_token: int = 0, enable_graph: bool = False,
        sync_dist: bool = False, sync_dist_op: Any = "mean", sync_dist_group: Any = None, batch_size: int | None = None,
        add_dataloader_idx: bool = True,
    ) -> None:  # fmt: skip
        """Log a value, by default at each step. ``reduce_fx``: torch.mean, sum, min, max, or any function of the stacked values."""
        self._log(name, value, prog_bar, logger, on_step, on_epoch, reduce_fx, tbptt_reduce_fx, enable_graph, batch_size,
                  add_dataloader_idx)  # fmt: skip

    def log_dict(
        self, dictionary: Mapping[str, Any], prog_bar: bool = False, logger: bool = True, on_step: bool = False, on_epoch: bool = True,
        reduce_fx: Any = torch.mean, tbptt_reduce_fx: Any = torch.mean, tbptt_pad_token: int = 0, enable_graph: bool = False,
        sync_dist: bool = False, sync_dist_op: Any = "mean", sync_dist_group: Any = None, batch_size: int | None = None,
        add_dataloader_idx: bool = True,
    ) -> None:  # fmt: skip
        """Log each value; as in Lightning 0.9 by default over the epoch, other than ``log``."""
        for name, value in dictionary.items():
            self._log(name, value, prog_bar, logger, on_step, on_epoch, reduce_fx, tbptt_reduce_fx, enable_graph, batch_size,
                      add_dataloader_idx)  # fmt: skip


class EvalResult(_Result):
    """What ``validation_step`` and ``test_step`` may return: TrainResult without a loss, logged over the epoch by default.

    Its ``early_stop_on`` and ``checkpoint_on`` win over the TrainResult's; they are the metrics of these names and of
    ``val_early_stop_on`` and ``val_checkpoint_on``. In ``test_step`` they mean nothing.

    Example::

        def validation_step(self, batch, batch_idx):
            result = fasttrain.EvalResult(checkpoint_on=loss)
            result.log("val_loss", loss)
            result.preds = preds
            return result

        def validation_epoch_end(self, outputs):
            print(outputs.preds.shape)
    """

    def __init__(self, early_stop_on: Any = None, checkpoint_on: Any = None, hiddens: Any = None) -> None:
        super().__init__(None, early_stop_on, checkpoint_on, hiddens)

    def log(
        self, name: str, value: Any, prog_bar: bool = False, logger: bool = True, on_step: bool = False, on_epoch: bool = True,
        reduce_fx: Any = torch.mean, tbptt_reduce_fx: Any = torch.mean, tbptt_pad_token: int = 0, enable_graph: bool = False,
        sync_dist: bool = False, sync_dist_op: Any = "mean", sync_dist_group: Any = None, batch_size: int | None = None,
        add_dataloader_idx: bool = True,
    ) -> None:  # fmt: skip
        """Log a value, by default over the epoch. ``reduce_fx``: torch.mean, sum, min, max, or any function of the stacked values."""
        self._log(name, value, prog_bar, logger, on_step, on_epoch, reduce_fx, tbptt_reduce_fx, enable_graph, batch_size,
                  add_dataloader_idx)  # fmt: skip

    def log_dict(self, dictionary: Mapping[str, Any], *args: Any, **how: Any) -> None:
        """Log each value, with the arguments of ``log``."""
        for name, value in dictionary.items():
            self.log(name, value, *args, **how)


# -- in the step: traced with it --------------------------------------------------------------------------------------
def plain_form(output: Any, stage: str) -> tuple[Any, list[tuple[Any, ...]]]:
    """What a step returned as plain containers, and what a Result logs; anything but a Result is given back as it is.

    Raises ModuleError for a Result of the other kind, one without a loss, and one among other things.
    """
    step = {"train": "training_step", "validate": "validation_step", "test": "test_step"}.get(stage, "predict_step")
    if not isinstance(output, _Result):
        parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
        for part in parts:
            if isinstance(part, _Result):
                came, then = f"a {type(part).__name__} in a {type(output).__name__}", "Set the rest as its attributes."
                raise ModuleError(reject(f"what {step} returned", came, f"the {type(part).__name__} alone", then))
        return output, []
    wanted = "a TrainResult" if stage == "train" else "an EvalResult" if stage in ("validate", "test") else "the prediction itself"
    if not isinstance(output, TrainResult if stage == "train" else EvalResult) or stage == "predict":
        raise ModuleError(reject(f"what {step} returned", f"a {type(output).__name__}", wanted, f"Return {wanted} from {step}."))
    if stage == "train" and output.minimize is None:
        raise ModuleError(reject("TrainResult(minimize)", None, "the loss, a scalar tensor", "Return TrainResult(minimize=loss)."))
    items = list(output._logged)
    how = {item[0]: (item[2], item[3], item[4]) for item in items if item[5]}
    kept = {name: value for name, value in output.__dict__.items() if name not in _OURS}
    plain = {KIND: "train" if stage == "train" else "eval", "loss": output.minimize, "hiddens": output.hiddens, "kept": kept, "how": how}
    for name in MONITORED:
        value = output.__dict__[name]
        value = output.minimize if value is True else None if value is False else value
        if isinstance(value, Tensor) and value.numel() != 1:
            what = f"{type(output).__name__}({name})"
            raise ModuleError(reject(what, f"shape {list(value.shape)}", "one number", "Reduce it, e.g. .mean()."))
        plain[name] = value
        if value is not None and stage != "test":
            prefix = "" if stage == "train" else "val_"
            items.append((prefix + name, _own(value), False, False, False, True, "mean", None, False))
    return plain, items


def _own(value: Any) -> Any:
    """The value as it is now: a weight or a buffer will have moved on when it is read."""
    return value.detach().clone() if isinstance(value, Tensor) else value


# -- outside the step -------------------------------------------------------------------------------------------------
def rebuilt(output: Any) -> Any:
    """The Result that this is the plain form of, or a list of those of several turns; anything else as it is."""
    if isinstance(output, list) and any(_is_plain(o) for o in output):
        return [rebuilt(o) for o in output]
    if not _is_plain(output):
        return output
    made = TrainResult() if output[KIND] == "train" else EvalResult()
    made.__dict__.update(output["kept"], minimize=output["loss"], **{n: output[n] for n in (*MONITORED, "hiddens")})
    return made


def for_epoch_end(returned: Any) -> Any:
    """What is kept of a training step's output for ``training_epoch_end``."""
    if isinstance(returned, list):
        return [for_epoch_end(r) for r in returned]
    if isinstance(returned, Tensor):
        return {"loss": returned}
    return {**returned, "hiddens": None} if _is_plain(returned) else returned


def gathered(outputs: Sequence[Any], hook: str, *, splits: bool = False) -> Any:
    """An epoch's outputs as ``hook`` gets them: one Result whose attributes are the gathered values, or the list as it came.

    Lists of Results are of the optimizers, each of which gets its own, or (``splits``) of the splits of a batch, which are
    gathered with the rest. Raises ModuleError when only some of the steps returned a Result.
    """
    lists = [o for o in outputs if isinstance(o, list)]
    if splits and lists:
        flat = [part for o in outputs for part in (o if isinstance(o, list) else [o]) if part is not None]
        together = gathered(flat, hook)
        return outputs if together is flat else together
    if lists and len(lists) == len(outputs) and any(_is_plain(part) for o in lists for part in o):
        turns = zip_longest(*lists)
        return [gathered([part for part in turn if part is not None], hook) for turn in turns]
    kinds = [o[KIND] if _is_plain(o) else None for o in outputs]
    if not any(kinds):
        return outputs
    if not all(kinds):
        other = next(type(o).__name__ for o, kind in zip(outputs, kinds, strict=True) if kind is None)
        came = f"Results for {sum(k is not None for k in kinds)} of {len(kinds)} batches and a {other} for another"
        raise ModuleError(reject(f"the outputs for {hook}", came, "a Result for all or for none", "Return one kind from every step."))
    made: _Result = TrainResult() if kinds[0] == "train" else EvalResult()
    own = (("minimize", "loss"), *((m, m) for m in MONITORED))
    rows = [o["kept"] | {name: o[key] for name, key in own if o[key] is not None} for o in outputs]
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if name in row]
        if name in MONITORED and kinds[0] == "eval":
            made[name] = torch.stack([as_scalar(v).float() for v in values]).mean()
        else:
            made[name] = collated(values)
    made._gathered = {"how": {n: h for o in outputs for n, h in o["how"].items()}, "values": dict(made.__dict__)}
    return made


def _is_plain(output: Any) -> bool:
    return isinstance(output, dict) and KIND in output


def collated(values: list[Any]) -> Any:
    """The values of an epoch: tensors as one tensor, dicts entry by entry, anything else as a list."""
    first = values[0]
    if all(isinstance(v, Tensor) for v in values):
        if all(v.dim() == 0 for v in values):
            return torch.stack(values)
        if all(v.dim() > 0 and v.shape[1:] == first.shape[1:] for v in values):
            return torch.cat(values)
    if all(isinstance(v, dict) and v.keys() == first.keys() for v in values):
        return {k: collated([v[k] for v in values]) for k in first}
    return values


def epoch_values(returned: Any, hook: str) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """``(name, value, arguments of log)`` of what an ``*_epoch_end`` hook returned: a Result, or the dict of before 0.9.

    Raises ModuleError for a Result of the other kind.
    """
    if isinstance(returned, (list, tuple)) and any(isinstance(r, (_Result, Mapping)) for r in returned):
        for part in returned:
            yield from epoch_values(part, hook)
    elif isinstance(returned, _Result):
        wanted = TrainResult if hook == "training_epoch_end" else EvalResult
        if not isinstance(returned, wanted):
            then = f"Return a {wanted.__name__}, or nothing."
            raise ModuleError(reject(f"what {hook} returned", f"a {type(returned).__name__}", f"a {wanted.__name__}", then))
        yield from _of_result(returned, hook)
    elif isinstance(returned, Mapping):
        yield from _of_dict(returned)


def _of_result(returned: _Result, hook: str) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    gathered_as = returned._gathered or {"how": {}, "values": {}}
    before = gathered_as["values"]
    for name, (prog_bar, logger, both) in gathered_as["how"].items():  # logged by the steps and reduced by the hook itself
        value = returned.__dict__.get(name)
        if value is not before.get(name) and _is_number(value):
            yield name, value, _how(prog_bar, logger and not both)
            if both:
                yield f"{name}_epoch", value, _how(prog_bar, logger)
    for name, value, prog_bar, logger, *_ in returned._logged:
        yield name, value, _how(prog_bar, logger)
    for name in MONITORED if hook != "test_epoch_end" else ():
        value = returned.__dict__[name]
        if value is not before.get(name) and not isinstance(value, bool) and value is not None:
            yield ("" if hook == "training_epoch_end" else "val_") + name, value, _how(False, False)


def _of_dict(returned: Mapping[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """'log' goes to the loggers, 'progress_bar' to the bar, and every number is a metric for callbacks."""
    log, bar = (dict(part) if isinstance(part := returned.get(k), Mapping) else {} for k in ("log", "progress_bar"))
    rest = {k: v for k, v in returned.items() if k not in ("log", "progress_bar", "hiddens") and _is_number(v)}
    for name, value in (rest | bar | log).items():
        yield name, value, _how(name in bar, name in log)


def _how(prog_bar: bool, logger: bool) -> dict[str, Any]:
    return dict(prog_bar=prog_bar, logger=logger, on_step=False, on_epoch=True, reduce_fx="mean", batch_size=None, add_dataloader_idx=False)


def _is_number(value: Any) -> bool:
    if isinstance(value, (bool, str)):
        return False
    try:
        as_scalar(value)
    except ModuleError:
        return False
    return True


def evaluation_wins(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """``early_stop_on`` and ``checkpoint_on``: the evaluation's where it has set them."""
    for name in MONITORED:
        if f"val_{name}" in metrics:
            metrics[name] = metrics[f"val_{name}"]
    return metrics
