"""Everything one fit works on, and the one way hooks are called."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fasttrain.callbacks.callback import HOOKS
from fasttrain.callbacks.hooks import CallbackList
from fasttrain.data import Source
from fasttrain.display import Display
from fasttrain.facade import SchedulerConfig, TrainerFacade
from fasttrain.graphs.evalstep import EvalStep
from fasttrain.graphs.maker import StepMaker
from fasttrain.graphs.manual import Verbs
from fasttrain.graphs.program import StepSpec
from fasttrain.graphs.staging import Staging
from fasttrain.graphs.step import Step
from fasttrain.module import Trainable, overridden, to_device
from fasttrain.options import Options
from fasttrain.reach import reaches
from fasttrain.results import CaptureReport, Ledger

OUR_CALLBACKS = "fasttrain.callbacks."
TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


@dataclass(kw_only=True)
class Run:
    """One fit, validate, test or predict in progress."""

    trainable: Trainable
    options: Options
    facade: TrainerFacade
    callbacks: CallbackList
    verbs: Verbs
    spec: StepSpec
    display: Display
    ledger: Ledger
    schedulers: list[SchedulerConfig] = field(default_factory=list)
    maker: StepMaker | None = None
    train: Source | None = None
    val: list[Source] = field(default_factory=list)
    given: tuple[Any, Any, Any] = (None, None, None)  # to fit: training loaders, validation loaders, datamodule
    asked: dict[str, dict[str, Any]] = field(default_factory=dict)  # in which epoch "train" and "val" were, and the streams before it
    report: CaptureReport = field(default_factory=CaptureReport)
    step: Step | None = None
    eval_steps: dict[tuple[str, int], EvalStep] = field(default_factory=dict)  # by stage and loader
    interrupted: bool = False
    stopped_by: str = ""
    outputs: list[Any] = field(default_factory=list)  # of this epoch, for training_epoch_end alone
    started: float = field(default_factory=time.perf_counter)
    validated_at: float = field(default_factory=time.perf_counter)
    epoch_complete: bool = False  # every batch of the epoch was given
    epoch_rng: dict[str, Any] | None = None  # the random streams as this epoch's pass over the loader began
    resume: dict[str, Any] | None = None  # what the first epoch after a resume still has to put back
    open_gradients: dict[str, Tensor] | None = None  # of a window that was open when the checkpoint was written

    def fire(self, hook: str, *args: Any) -> Any:
        """Callbacks first, then the module; returns what the module's hook returned."""
        sink = self.trainable.sink
        before, sink.hook = sink.hook, hook
        for call in self.calls(hook):
            call(self.facade, self.trainable.module, *args)
        returned = self.trainable.call(hook, *args)
        sink.hook = before
        return returned

    def batch_hook(self, hook: str, *, several: bool) -> Callable[..., None] | None:
        """Calls a hook of an evaluation's batches, whose last argument is the loader's index; None when nobody overrides it.

        Where there are not several loaders, only who cannot do without the index is given it.
        """
        before_index, own, sink = 3 if hook.endswith("_end") else 2, hook in self.trainable.hooks, self.trainable.sink
        calls = [(call, _takes_index(call, before_index + 2, several)) for call in self.calls(hook)]
        own_takes = own and _takes_index(getattr(self.trainable.module, hook), before_index, several)

        def fire(*args: Any) -> None:
            before, sink.hook = sink.hook, hook
            for call, takes in calls:
                call(self.facade, self.trainable.module, *(args if takes else args[:-1]))
            self.trainable.call(hook, *(args if own_takes else args[:-1]))
            sink.hook = before

        return fire if calls or own else None

    def fire_in_step(self, hook: str, *args: Any) -> None:
        """A hook inside the step: callbacks get what they have always got; a module's hook of the years of several
        optimizers may take the optimizer's index too."""
        self.trainable.sink.hook = hook
        for call in self.calls(hook):
            call(self.facade, self.trainable.module, *args[:1])
        if len(args) < 2:
            self.trainable.call(hook, *args)
        elif hook in self.trainable.hooks:
            self.trainable.call_named(hook, optimizer=args[0], optimizer_idx=args[1])

    def calls(self, hook: str) -> tuple[Callable[..., Any], ...]:
        """The callbacks' methods for a hook; none for the older names that only modules have."""
        return self.callbacks.calls(hook) if hook in HOOKS else ()

    def live(self, *hooks: str) -> bool:
        """Does anybody override one of these?"""
        return any(self.calls(h) or h in self.trainable.hooks for h in hooks)

    def foreign(self, *hooks: str) -> bool:
        """Does code that is not ours run at one of these? It may change the module."""
        calls = (c for h in hooks for c in self.calls(h))
        theirs = any(not type(getattr(c, "__self__", c)).__module__.startswith(OUR_CALLBACKS) for c in calls)
        return theirs or any(h in self.trainable.hooks for h in hooks)

    def reached_between_steps(self, source: Source | None) -> bool:
        """Can this loader's or a scheduler's own code get at what is trained?"""
        module, optimizers = self.trainable.module, self.facade.optimizers
        targets = [*module.modules(), *module.parameters(), *module.buffers(), *optimizers, self.facade]
        schedulers = [c.scheduler for c in self.schedulers if c.interval == "step"]
        if any(not type(s).__module__.startswith("torch.optim.") for s in schedulers):
            return True
        lambdas = [getattr(s, "lr_lambdas", None) for s in schedulers]
        loaders = [p.loader for p in source.parts if p.road != "tensors"] if source is not None else []
        return reaches([*loaders, lambdas], targets)

    def optimizers_swapped(self) -> bool:
        """Is there another optimizer in ``trainer.optimizers`` than the step moves?"""
        return self.maker is not None and [*map(id, self.facade.optimizers)] != [*map(id, self.maker.optimizers)]

    def flush(self) -> None:
        """Before anybody looks: steps that wait for others of their launch run now, and what they logged is there."""
        launches = self.maker.launches if self.maker is not None else None
        for out in launches.flush() if launches is not None else ():
            self.facade.train_store.append(out.keys, out.values, out.batch_size)

    def settle(self) -> None:
        """Where the run stops anyway: what a device has decided and nobody has waited for. Raises NonFiniteError."""
        self.flush()
        if self.spec.pending is not None:
            self.ledger.skipped_steps += self.spec.pending.settle()

    def brings_itself(self) -> bool:
        """Does somebody's own code bring batches to the device? It may change the module."""
        return any(self._transfer_hook(h) is not None for h in TRANSFER_HOOKS)

    def transfer(self, dataloader_idx: int = 0, staging: Staging | None = None) -> Callable[[Any], Any] | None:
        """What brings a batch to the device, the datamodule's own way before the module's; None when nobody has one and none is needed.

        ``staging``: what brings it where nobody has a way of his own."""
        sink, device = self.trainable.sink, self.spec.device
        before, to, after = (self._transfer_hook(h) for h in TRANSFER_HOOKS)
        if not (before or to or after):
            return staging or (None if device.type == "cpu" else lambda batch: to_device(batch, device))

        def transfer(batch: Any) -> Any:
            was = sink.hook
            if before is not None:
                sink.hook = TRANSFER_HOOKS[0]
                batch = before(batch, dataloader_idx)
            sink.hook = TRANSFER_HOOKS[1]
            batch = to_device(batch, device) if to is None else to(batch, device, dataloader_idx)
            if after is not None:
                sink.hook = TRANSFER_HOOKS[2]
                batch = after(batch, dataloader_idx)
            sink.hook = was
            return batch

        return transfer

    def _transfer_hook(self, name: str) -> Callable[..., Any] | None:
        whose = self.facade.datamodule if overridden(self.facade.datamodule, name) else self.trainable.module
        hook: Callable[..., Any] | None = getattr(whose, name, None)
        return hook if whose is not self.trainable.module or name in self.trainable.hooks else None


def _takes_index(call: Callable[..., Any], before: int, several: bool) -> bool:
    """Is the loader's index, which follows ``before`` arguments, handed to this hook?"""
    parameters = inspect.signature(call).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) <= before:
        return several and any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return several or positional[before].default is inspect.Parameter.empty
