"""What a module must look like: adapters for the three shapes people bring, live hooks, and where self.log goes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fasttrain.entries import check_entry
from fasttrain.errors import ModuleError, reject
from fasttrain.forms import Form, ended_by, eval_adapter, form_of, named, split_length, train_adapter
from fasttrain.hook_names import MODULE_HOOKS, OLDER_ARGUMENTS
from fasttrain.results import LogKey, reduce_named
from fasttrain.step_result import TrainResult

LIGHTNING = ("lightning.pytorch", "pytorch_lightning")
STAGE_STEPS = {"train": "training_step", "validate": "validation_step", "test": "test_step", "predict": "predict_step"}


class Sink:
    """Receives ``self.log`` calls. Inside a step ``items`` is a fresh list, so a trace sees plain values only."""

    def __init__(self) -> None:
        self.items: list[tuple[Any, ...]] | None = None
        self.outside: Callable[[str, Any, Mapping[str, Any]], None] | None = None
        self.on_step_default, self.on_epoch_default = True, False
        self.off = False  # barebones: nothing is logged
        self.muted = False  # a step is only tried: what it says and keeps on the host is nobody's news
        self.hook = ""  # that is running, outside a step

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: Any = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """``self.log``: same arguments and defaults as Lightning's."""
        if self.off:
            return
        if isinstance(value, Tensor) and not enable_graph:
            value = value.detach().clone()  # a weight or a buffer will have moved on when it is read
        logger = True if logger is None else logger
        if self.items is not None:
            on_step = self.on_step_default if on_step is None else on_step
            on_epoch = self.on_epoch_default if on_epoch is None else on_epoch
            self.items.append((name, value, prog_bar, logger, on_step, on_epoch, reduce_fx, batch_size, add_dataloader_idx))
        elif self.outside is not None:
            self.outside(
                name,
                value,
                dict(
                    prog_bar=prog_bar,
                    logger=logger,
                    on_step=on_step,
                    on_epoch=on_epoch,
                    reduce_fx=reduce_fx,
                    batch_size=batch_size,
                    add_dataloader_idx=add_dataloader_idx,
                ),
            )

    def log_dict(self, dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """``self.log_dict``: ``self.log`` for each entry."""
        for name, value in dictionary.items():
            self.log(name, value, *args, **kwargs)


def log_key(item: tuple[Any, ...], suffix: str = "") -> LogKey:
    """The constant part of one sink item; ``suffix`` names the dataloader when there are several."""
    name, value, prog_bar, logger, on_step, on_epoch, reduce_fx, batch_size, add_idx = item
    check_entry(name, value, add_idx)
    return LogKey(name + (suffix if add_idx else ""), prog_bar, logger, on_step, on_epoch, reduce_named(reduce_fx), batch_size)


class Trainable:
    """A module as the rest of the house sees it: one root ``nn.Module``, its steps, its hooks, its optimizer."""

    def __init__(
        self, module: nn.Module, *, loss: Callable[..., Tensor] | None = None, optimizer: Any = None, lr_scheduler: Any = None,
        turns: Callable[..., Any] | None = None,
    ) -> None:  # fmt: skip
        self.module = module
        self.sink = Sink()
        self.verbs: dict[str, Any] = {}  # what a module calls on itself: optimizers(), manual_backward(), ...
        self._turns = turns
        self.form: Form = form_of(module, turns)
        self.split_length = split_length(module)
        self._loss, self._optimizer, self._scheduler = loss, optimizer, lr_scheduler
        self.hooks = frozenset(h for h in MODULE_HOOKS if overridden(module, h) and _callable_as_older(module, h))
        self._loss_takes_module = loss is not None and _first_argument_is_module(loss)
        self._steps = {stage: self._step_for(stage, name) for stage, name in STAGE_STEPS.items()}

    def has(self, stage: str) -> bool:
        """Can this module run ``stage`` ("train" | "validate" | "test" | "predict")?"""
        return self._steps[stage] is not None

    def step(self, stage: str, *, alone: bool = False) -> Callable[[Any, int, int], Any]:
        """``f(batch, batch_idx, index) -> what the step returns``; traced as it is.

        ``index`` is the optimizer's for "train", else the dataloader's; ``alone``: there is one loader, and a step whose
        ``dataloader_idx`` has a default keeps it.
        """
        step = self._step_for(stage, STAGE_STEPS[stage], alone=True) if alone else self._steps[stage]
        assert step is not None
        return step

    @property
    def takes_turns(self) -> bool:
        """Was ``turns=`` given?"""
        return self._turns is not None

    def beside(self) -> list[Any]:
        """What was given as ``loss=`` and ``turns=``."""
        return [f for f in (self._loss, self._turns) if f is not None]

    def helpers(self) -> list[Any]:
        """Objects behind ``loss=`` and ``turns=`` that may count or keep something."""
        holders = [getattr(f, "__self__", f) for f in self.beside()]
        return [h for h in holders if hasattr(h, "__dict__") and not isinstance(h, (nn.Module, FunctionType, ModuleType))]

    def call_named(self, hook: str, **known: Any) -> Any:
        """Call a module hook with those of ``known`` that it takes, whichever signature of the years it has."""
        before, self.sink.hook = self.sink.hook, hook
        returned = named(getattr(self.module, hook), **known)
        self.sink.hook = before
        return returned

    def call(self, hook: str, *args: Any) -> Any:
        """Call a module hook with as many of ``args`` as it takes; None when nobody overrides it."""
        if hook not in self.hooks:
            return None
        method = getattr(self.module, hook)
        before, self.sink.hook = self.sink.hook, hook
        returned = method(*args[: _positional(method, len(args))])
        self.sink.hook = before
        return returned

    def configure_optimizers(self) -> Any:
        """What ``configure_optimizers`` returned, or the ``optimizer=`` (and ``lr_scheduler=``) that was given."""
        if self._optimizer is None:
            return self.module.configure_optimizers()  # type: ignore[operator]
        made = self._optimizer
        if callable(made) and not isinstance(made, torch.optim.Optimizer):
            made = made(self.module.parameters())
        scheduler = self._scheduler
        if callable(scheduler) and not hasattr(scheduler, "step"):
            scheduler = scheduler(made)
        return made if scheduler is None else {"optimizer": made, "lr_scheduler": scheduler}

    def check(self) -> None:
        """Raise ModuleError, before anything runs, when there is no loss or no optimizer to train with."""
        m = type(self.module).__name__
        if not isinstance(self.module, nn.Module):
            raise ModuleError(reject("module", m, "a torch.nn.Module", "Give the module itself, not its class or its path."))
        if self._optimizer is None and (
            not hasattr(self.module, "configure_optimizers") or _is_lightnings(self.module, "configure_optimizers")
        ):
            raise ModuleError(
                f"{m} has no configure_optimizers: define it on the module, "
                "or give compile_fit(..., optimizer=torch.optim.AdamW(module.parameters()))."
            )
        if self._scheduler is not None and self._optimizer is None:
            raise ModuleError(
                f"lr_scheduler: got one without optimizer=, so {m}.configure_optimizers decides. Return the scheduler there, or give both."
            )
        if self._turns is not None and self.split_length:
            raise ModuleError(f"turns: got one for {m}, whose truncated_bptt_steps is {self.split_length}. Split the batch in turns, "
                              "or yield from training_step(self, batch, batch_idx, hiddens).")  # fmt: skip
        if self._loss is not None and overridden(self.module, "training_step"):
            raise ModuleError(f"loss: got one for {m}, whose training_step returns its own loss. Leave loss out, or training_step.")
        if not self.has("train"):
            raise ModuleError(
                f"{m} has no training_step: define training_step(self, batch, batch_idx) on the module, "
                "or give compile_fit(..., loss=fn) with fn(output, target)."
            )

    def _step_for(self, stage: str, name: str, *, alone: bool = False) -> Callable[[Any, int, int], Any] | None:
        method = getattr(self.module, name, None)
        if stage == "train" and self._turns is not None:
            turns, module = self._turns, self.module
            return lambda batch, batch_idx, _: turns(module, batch, batch_idx)
        if callable(method) and not _is_lightnings(self.module, name):
            step = train_adapter(method, carries=self.split_length > 0) if stage == "train" else eval_adapter(method, alone=alone)
            if f"{name}_end" in self.hooks:
                return ended_by(getattr(self.module, f"{name}_end"), step, self.form if stage == "train" else "single")
            return step
        if stage == "predict":
            return self._predict
        if not overridden(self.module, "training_step") and (self._loss is not None or _is_huggingface(self.module)):
            return self._plain(stage)
        return None

    def _plain(self, stage: str) -> Callable[[Any, int, int], Any]:
        module, loss, takes_module, sink = self.module, self._loss, self._loss_takes_module, self.sink
        name = {"train": "train_loss", "validate": "val_loss", "test": "test_loss"}[stage]

        def plain_step(batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
            if loss is None:
                value = (module(**batch) if isinstance(batch, Mapping) else module(*batch)).loss
                if value is None:
                    came = f"keys {sorted(batch)}" if isinstance(batch, Mapping) else f"{len(batch)} parts"
                    raise ModuleError(reject(f"the output of {type(module).__name__}", f"no loss from a batch with {came}",
                                             "an output whose .loss is set", "Put 'labels' into the batch, or give loss=fn."))  # fmt: skip
            elif takes_module:
                value = loss(module, batch)
            else:
                inputs, target = batch
                value = loss(module(inputs), target)
            sink.log(name, value, prog_bar=stage != "train")
            return value

        return plain_step

    def _predict(self, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        if isinstance(batch, Mapping):
            return self.module(**batch)
        if isinstance(batch, (tuple, list)) and self._loss is not None:
            return self.module(batch[0])
        return self.module(batch)


@contextmanager
def attached(trainable: Trainable, trainer: Any) -> Any:
    """Within: the module's ``self.log``, ``self.trainer`` and what hangs on them are ours; after, as they were."""
    module, sink = trainable.module, trainable.sink
    ours: dict[str, Any] = {"log": sink.log, "log_dict": sink.log_dict}
    if trainable.form == "manual" or not is_lightning(module):
        ours |= {k: v for k, v in trainable.verbs.items() if not overridden(module, k)}
    if is_lightning(module):
        ours["_trainer"] = trainer
    else:
        ours |= {k: v for k, v in {"trainer": trainer, "print": print}.items() if not hasattr(type(module), k)}
    before = {k: module.__dict__[k] for k in ours if k in module.__dict__}
    module.__dict__.update(ours)
    try:
        yield
    finally:
        for name in ours:
            module.__dict__.pop(name, None)
        module.__dict__.update(before)
        if is_lightning(module):
            module.__dict__["_trainer"] = trainer  # people read module.trainer after a fit


def loss_of(output: Any) -> Tensor | None:
    """The loss in what a training step returned: a tensor, ``{"loss": ...}``, a TrainResult, an object with ``.loss``, or None."""
    if output is None or isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return output.get("loss")
    return output.minimize if isinstance(output, TrainResult) else getattr(output, "loss", None)


def hiddens_of(output: Any) -> Any:
    """The hidden state that a training step leaves for the next split: of ``{"hiddens": ...}`` or a TrainResult; else None."""
    if isinstance(output, Mapping):
        return output.get("hiddens")
    return output.hiddens if isinstance(output, TrainResult) else None


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors (and what has ``.to``) on ``device``; copies overlap where the memory is pinned."""
    if hasattr(batch, "to") and callable(batch.to):
        return batch.to(device, non_blocking=True) if isinstance(batch, Tensor) else batch.to(device)
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **{f.name: to_device(getattr(batch, f.name), device) for f in fields(batch)})
    return tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), batch)


def overridden(obj: object, name: str) -> bool:
    """Does ``obj`` bring its own ``name``, one that Lightning's empty base class did not define?"""
    return callable(getattr(obj, name, None)) and not _is_lightnings(obj, name) and not hasattr(nn.Module, name)


def _callable_as_older(module: nn.Module, name: str) -> bool:
    """Can a hook of this older name be called with what it used to get? A method that wants more is somebody's own."""
    given = OLDER_ARGUMENTS.get(name)
    if given is None:
        return True
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(getattr(module, name)).parameters.values()
    return sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters) <= given


def is_lightning(module: object) -> bool:
    """Is it a LightningModule of either package? Nothing is imported to find out."""
    return any(c.__name__ == "LightningModule" and c.__module__.startswith(LIGHTNING) for c in type(module).__mro__)


def _is_lightnings(obj: object, name: str) -> bool:
    if name in getattr(obj, "__dict__", {}):
        return False
    for cls in type(obj).__mro__:
        if name in cls.__dict__:
            return cls.__module__.startswith(LIGHTNING) and ".core." in cls.__module__
    return False


def _is_huggingface(module: object) -> bool:
    return any(c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers") for c in type(module).__mro__)


def _first_argument_is_module(loss: Callable[..., Any]) -> bool:
    try:
        parameters = [p.name for p in inspect.signature(loss).parameters.values()]
    except (TypeError, ValueError):
        return False
    return bool(parameters) and parameters[0] in ("module", "model", "net") and len(parameters) >= 2


def _positional(method: Callable[..., Any], most: int) -> int:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(method).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        return most
    return min(most, sum(p.kind in kinds for p in parameters))
