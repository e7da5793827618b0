"""Before the first batch: the run, its loaders, its optimizer, its folders - and after the last, putting things away."""

from __future__ import annotations

import os
import tempfile
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrain import resume
from fasttrain.callbacks.adopt import adopt
from fasttrain.callbacks.hooks import CallbackList, is_callback, is_checkpoint
from fasttrain.callbacks.model_checkpoint import ModelCheckpoint
from fasttrain.display import Display
from fasttrain.errors import DataError, FasttrainWarning, ModuleError, OptionError, reject
from fasttrain.facade import TrainerFacade
from fasttrain.graphs.device import CudaDevice, Device
from fasttrain.graphs.hooks import InStepHooks
from fasttrain.graphs.launches import Launches
from fasttrain.graphs.maker import StepMaker
from fasttrain.graphs.manual import Verbs
from fasttrain.graphs.norms import GradientNorms
from fasttrain.graphs.pending import Pending
from fasttrain.graphs.program import TRUE_DTYPES, StepSpec
from fasttrain.graphs.scale import LossScale
from fasttrain.graphs.staging import Staging
from fasttrain.hook_names import IN_STEP_HOOKS
from fasttrain.loaders import open_loaders, restore
from fasttrain.loggers.choice import make_loggers
from fasttrain.module import Sink, Trainable
from fasttrain.options import Options
from fasttrain.progress import make_progress
from fasttrain.results import Ledger, LogKey
from fasttrain.run import OUR_CALLBACKS, Run
from fasttrain.schedules import check_parameters, parse_optimizers


def make_run(trainable: Trainable, options: Options, fn: str) -> Run:
    """A run with its callbacks, its facade and its display, before anything of the user's was called."""
    device = device_of(options)
    facade = TrainerFacade(options, trainable, device)
    facade.state.fn = fn
    trainable.sink.hook = ""
    listed = CallbackList(_callbacks(trainable, options, fn))
    facade.callbacks = list(listed)
    _lend_log(trainable.sink, facade.callbacks)
    keep = bool(listed.calls("on_train_batch_end")) and any(
        c.__module__.split(".")[0] != "fasttrain" for c in map(_owner, listed.calls("on_train_batch_end"))
    )
    keep = keep or bool(trainable.hooks & {"on_train_batch_end", "training_epoch_end"})
    keep = keep or trainable.split_length > 0  # the next split wants its hidden state
    trainable.sink.outside, trainable.sink.off = facade.log_outside, options.barebones
    verbs = Verbs()
    trainable.verbs = verbs.named()
    return Run(
        trainable=trainable,
        verbs=verbs,
        options=options,
        facade=facade,
        callbacks=listed,
        ledger=Ledger(),
        spec=StepSpec(precision=options.precision, device=device, keep_outputs=keep),
        display=Display(make_progress(options.enable_progress_bar)),
    )


def _callbacks(trainable: Trainable, options: Options, fn: str) -> list[Any]:
    """Those that were given, the module's own in the place of others of their kind, and one that saves where checkpoints are
    wanted and nobody brings any."""
    own = trainable.call("configure_callbacks") or []
    of_module = [(type(c), adopt(c)) for c in (own if isinstance(own, (list, tuple)) else [own])]
    given = [(type(c), adopt(c)) for c in options.callbacks]
    of_options = [c for _, c in given if c is not None]
    kept = [c for kind, c in given if c is not None and not any(issubclass(k, kind) or issubclass(type(o), type(c)) for k, o in of_module)]
    callbacks = [*kept, *(c for _, c in of_module if c is not None)]
    saves = next((c for c in (callbacks if options.barebones else of_options) if is_checkpoint(c)), None)
    if saves is not None and not options.enable_checkpointing and not options.fast_dev_run:
        off = "barebones=True" if options.barebones else "enable_checkpointing=False"
        raise OptionError(reject("callbacks", type(saves).__name__, f"none that saves, because {off}", "Leave one of the two out."))
    if fn == "fit" and options.enable_checkpointing and not any(map(is_checkpoint, callbacks)):
        callbacks.append(ModelCheckpoint())
    if options.fast_dev_run:
        callbacks = [c for c in callbacks if not hasattr(c, "best_model_path") and type(c).__name__ != "EarlyStopping"]
    return callbacks


def _lend_log(sink: Sink, callbacks: list[Any]) -> None:
    """``self.log`` and ``self.log_dict`` of the user's callbacks are the module's, but where a callback has its own."""
    lent = {"log": sink.log, "log_dict": sink.log_dict}
    for callback in callbacks:
        if is_callback(callback) and not type(callback).__module__.startswith(OUR_CALLBACKS):
            vars(callback).update({name: ours for name, ours in lent.items() if not hasattr(type(callback), name)})


def _owner(call: Any) -> type:
    return type(getattr(call, "__self__", call))


def device_of(options: Options) -> torch.device:
    """Where the run trains. Raises OptionError when a device was named that is not there."""
    if options.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise OptionError(
            reject(
                "accelerator",
                repr(options.accelerator),
                "a CUDA device, and torch sees none",
                "Use accelerator='auto', or install a CUDA build of torch.",
            )
        )
    cuda = options.accelerator in ("gpu", "cuda") or (options.accelerator == "auto" and torch.cuda.is_available())
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def set_up(run: Run, fn: str, datamodule: Any) -> None:
    """Folders, ``prepare_data``, ``setup``, the module on its device and in its precision."""
    if isinstance(datamodule, type):
        raise DataError(reject("datamodule", f"the class {datamodule.__name__}", "a datamodule", f"Give {datamodule.__name__}()."))
    with suppress(AttributeError):  # None, or an object that takes no attribute
        datamodule.trainer = run.facade
    if fn == "fit":
        _open_loggers(run)
    if hasattr(datamodule, "prepare_data"):
        datamodule.prepare_data()
    run.trainable.call("prepare_data")
    if hasattr(datamodule, "setup"):
        datamodule.setup(fn)
    run.fire("setup", fn)
    run.trainable.call("configure_sharded_model")
    run.trainable.call("configure_model")
    place_module(run)


def place_module(run: Run) -> None:
    """The module on its device and in its precision, before the optimizer is made over its parameters."""
    dtype = TRUE_DTYPES.get(run.options.precision)
    module, device = run.trainable.module, run.spec.device
    if device.type != "cpu" or any(p.device.type != "cpu" for p in module.parameters()):
        module.to(device)
    if dtype is not None:
        module.to(dtype)


def prepare_training(run: Run, train: Any, val: Any, datamodule: Any, ckpt_path: Any) -> None:
    """Loaders, optimizer and schedulers, checked; a checkpoint put back around on_fit_start. Nothing has been compiled."""
    facade, options = run.facade, run.options
    run.fire("on_pretrain_routine_start")
    saved = resume.find(run, ckpt_path) if ckpt_path is not None else None
    if saved is not None:
        resume.load_before_optimizers(run, saved)
    open_loaders(run, train, val, datamodule)
    run.maker = make_maker(run)
    facade.write_checkpoint = lambda path, weights_only: resume.save(run, path, weights_only)
    if not options.epochs_were_set:
        warnings.warn(
            "neither max_epochs, max_steps nor max_time was given: training runs for 1000 epochs. Give max_epochs=n (-1: no limit).",
            FasttrainWarning,
            stacklevel=3,
        )
    _log_hyperparams(run)
    run.fire("on_pretrain_routine_end")
    run.fire("on_fit_start")  # it may add what was trained when the checkpoint was written
    if saved is not None:
        resume.load_training(run, saved)
        if "loaders" in saved:
            restore(run, saved["loaders"])


def make_maker(run: Run) -> StepMaker:
    """``configure_optimizers``, checked, and what every rung of this run is made of."""
    trainable, options, facade = run.trainable, run.options, run.facade
    _check_form(run)
    trainable.sink.hook = "configure_optimizers"
    parsed = parse_optimizers(trainable.configure_optimizers(), trainable.form)
    trainable.sink.hook = ""
    for optimizer in parsed.optimizers:
        check_parameters(optimizer, trainable.module, may_wait=trainable.form == "manual" and len(parsed.optimizers) > 1)
    run.schedulers = facade.lr_scheduler_configs = parsed.schedulers
    facade.set_optimizers(parsed.optimizers)
    schedulers = [c.scheduler for c in parsed.schedulers]
    run.verbs.bind(parsed.optimizers, schedulers)
    hooks = InStepHooks(trainable, run.fire_in_step, frozenset(h for h in IN_STEP_HOOKS if h in trainable.hooks or run.calls(h)))
    if options.track_grad_norm is not None:
        run.spec = replace(run.spec, norms=_gradient_norms(run, hooks, options.track_grad_norm))
    scaled, alone = options.precision == "16-mixed", len(parsed.optimizers) == 1 and trainable.form not in ("generator", "manual")
    if run.spec.device.type != "cpu":
        raises = options.nonfinite == "raise" and not scaled
        run.spec = replace(run.spec, pending=Pending(lambda: facade.progress.batches_seen, raises=raises))
    device = make_device(run)
    if device is None and options.steps_per_launch > 1:
        wanted = f"1 on a {run.spec.device.type}, which has no launches to save"
        raise OptionError(reject("steps_per_launch", options.steps_per_launch, wanted, "Leave it out."))
    maker = StepMaker(
        trainable=trainable, spec=run.spec, optimizers=parsed.optimizers, options=options,
        scaler=LossScale(run.spec.device, alone=alone) if scaled else None,
        hooks=hooks,
        say=run.display.line, frequencies=parsed.frequencies, schedulers=schedulers, verbs=run.verbs,
        device=device, staging=None if device is None else Staging(device, run.spec.device),
        launches=None if device is None or options.steps_per_launch == 1 else Launches(options.steps_per_launch),
        seen=lambda: facade.progress.batches_seen, stopped=lambda: run.interrupted, workers=run.train.workers if run.train else 0,
    )  # fmt: skip
    if trainable.form == "manual":
        run.verbs.acts = maker.manual()  # hooks before the first batch may use them
        facade.taken = run.verbs.taken
        run.schedulers = []  # they move when the module moves them
    return maker


def make_device(run: Run) -> Device | None:
    """What records graphs, where the run trains on something that has them."""
    if run.spec.device.type != "cuda":
        return None
    module = run.trainable.module
    own = lambda: [v for m in module.modules() for v in vars(m).values() if isinstance(v, torch.Generator)]  # noqa: E731
    return CudaDevice(run.spec.device, own)


def _gradient_norms(run: Run, hooks: InStepHooks, norm_type: float) -> GradientNorms:
    """Norms go where ``self.log(..., on_step=True)`` goes; not while a step is only tried."""
    made: dict[tuple[str, ...], tuple[LogKey, ...]] = {}

    def tell(names: tuple[str, ...], values: list[Tensor]) -> None:
        if not hooks.muted:
            keys = made.setdefault(names, tuple(LogKey(n, False, True, True, False, "mean", None) for n in names))
            run.facade.train_store.append(keys, values, 1)

    return GradientNorms(norm_type, lambda: {id(p): n for n, p in run.trainable.module.named_parameters()}, tell)


def _check_form(run: Run) -> None:
    """What a manual step does by itself must not be asked of the loop too."""
    options, name = run.options, type(run.trainable.module).__name__
    unheard = sorted({"optimizer_step", "backward"} & run.trainable.hooks)
    if run.trainable.form == "generator" and unheard:
        raise ModuleError(f"{unheard[0]}: {name} overrides it, and its optimizers take their turns at a generator's yields, which do not "
                          "call it. Take optimizer_idx instead of yielding, or leave the hook out.")  # fmt: skip
    if run.trainable.form != "manual":
        return
    if max(options.accumulate_grad_batches.values()) > 1:
        raise OptionError(f"accumulate_grad_batches: {name} has automatic_optimization=False and decides itself when to call step(). "
                          "Leave the option out, and step every k batches in training_step.")  # fmt: skip
    if options.gradient_clip_val is not None:
        raise OptionError(f"gradient_clip_val: {name} has automatic_optimization=False. Leave the option out, and call "
                          "self.clip_gradients(optimizer, gradient_clip_val=...) before step().")  # fmt: skip
    if run.trainable.split_length:
        raise ModuleError(f"truncated_bptt_steps: {name} has automatic_optimization=False. Split the batch in training_step.")


def _open_loggers(run: Run) -> None:
    options, facade = run.options, run.facade
    if options.enable_checkpointing or options.logger not in (False, None):
        _check_writable(options.default_root_dir)
    facade.loggers = make_loggers(options.logger, options.default_root_dir)
    facade.log_dir = str(getattr(facade.logger, "log_dir", None) or options.default_root_dir)


def _log_hyperparams(run: Run) -> None:
    """The module's ``hparams``, to every logger that wants them; only once the input is known to be good."""
    params = getattr(run.trainable.module, "hparams", None)
    for logger in run.facade.loggers:
        if params and callable(getattr(logger, "log_hyperparams", None)):
            logger.log_hyperparams(dict(params))


def _check_writable(root: Path) -> None:
    """Raise OptionError, now and not at the first checkpoint, when nothing can be written below ``root``."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".fasttrain-", dir=root)
        os.close(handle)
        os.unlink(name)
    except OSError as error:
        raise OptionError(
            reject(
                "default_root_dir",
                f"{root} ({error.strerror})",
                "a directory that can be written",
                "Give another, or logger=False, enable_checkpointing=False.",
            )
        ) from error


def tear_down(run: Run, fn: str, datamodule: Any, status: str) -> None:
    """Hooks, loggers and graphs put away, after success and after failure."""
    if hasattr(datamodule, "teardown") and not isinstance(datamodule, type):
        datamodule.teardown(fn)
    run.fire("teardown", fn)
    for logger in run.facade.loggers:
        for name, arguments in (("save", ()), ("finalize", (status,))):
            if callable(getattr(logger, name, None)):
                getattr(logger, name)(*arguments)
    if run.maker is not None and run.maker.device is not None:
        run.maker.device.close()
