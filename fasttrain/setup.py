"""Before the first batch: the run, its loaders, its optimizer, its folders - and after the last, putting things away."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler

from fasttrain import resume
from fasttrain.callbacks.adopt import adopt
from fasttrain.callbacks.hooks import CallbackList
from fasttrain.callbacks.model_checkpoint import ModelCheckpoint
from fasttrain.data import Source, as_sources
from fasttrain.display import Display
from fasttrain.errors import DataError, FasttrainWarning, OptionError, reject
from fasttrain.facade import TrainerFacade
from fasttrain.graphs.capture import StepMaker
from fasttrain.graphs.program import TRUE_DTYPES, StepSpec
from fasttrain.graphs.tail import LossScale
from fasttrain.loggers.choice import make_loggers
from fasttrain.module import IN_STEP_HOOKS, Trainable, overridden
from fasttrain.options import Options
from fasttrain.progress import make_progress
from fasttrain.results import Ledger
from fasttrain.run import Run
from fasttrain.schedules import check_parameters, parse_optimizers


def make_run(trainable: Trainable, options: Options, fn: str) -> Run:
    """A run with its callbacks, its facade and its display, before anything of the user's was called."""
    device = device_of(options)
    facade = TrainerFacade(options, trainable, device)
    facade.state.fn = fn
    own = trainable.call("configure_callbacks") or []
    given = [*options.callbacks, *(own if isinstance(own, (list, tuple)) else [own])]
    callbacks = [c for c in map(adopt, given) if c is not None]
    if fn == "fit" and options.enable_checkpointing and not any(hasattr(c, "best_model_path") for c in callbacks):
        callbacks.append(ModelCheckpoint())
    if options.fast_dev_run:
        callbacks = [c for c in callbacks if not hasattr(c, "best_model_path") and type(c).__name__ != "EarlyStopping"]
    listed = CallbackList(callbacks)
    facade.callbacks = list(listed)
    keep = bool(listed.calls("on_train_batch_end")) and any(
        c.__module__.split(".")[0] != "fasttrain" for c in map(_owner, listed.calls("on_train_batch_end"))
    )
    keep = keep or bool(trainable.hooks & {"on_train_batch_end", "on_batch_end", "training_step_end", "training_epoch_end"})
    trainable.sink.outside = facade.log_outside
    return Run(
        trainable=trainable,
        options=options,
        facade=facade,
        callbacks=listed,
        ledger=Ledger(),
        spec=StepSpec(precision=options.precision, device=device, keep_outputs=keep),
        display=Display(make_progress(options.enable_progress_bar)),
    )


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
    if fn == "fit":
        _open_loggers(run)
    if hasattr(datamodule, "prepare_data"):
        datamodule.prepare_data()
    run.trainable.call("prepare_data")
    if hasattr(datamodule, "setup"):
        datamodule.setup(fn)
    run.fire("setup", fn)
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
    """Loaders, optimizer and schedulers, checked; a checkpoint put back. Nothing has been compiled."""
    facade, options, trainable = run.facade, run.options, run.trainable
    run.train = _train_source(run, _loader(run, "train_dataloader", train, datamodule))
    val = _loader(run, "val_dataloader", val, datamodule, optional=True)
    if val is not None and not trainable.has("validate"):
        warnings.warn(
            f"a validation loader was given, but {type(trainable.module).__name__} has no validation_step: nothing is validated. "
            "Define validation_step(self, batch, batch_idx).",
            FasttrainWarning,
            stacklevel=3,
        )
        val = None
    run.val = as_sources(val, name="val_dataloaders", limit=options.limit_val_batches, limit_name="limit_val_batches")
    facade.train_dataloader, facade.val_dataloaders = run.train.loader, val
    facade.num_training_batches, facade.num_val_batches = run.train.batches, [s.batches for s in run.val]
    run.fire("on_pretrain_routine_start")
    saved = resume.find(run, ckpt_path) if ckpt_path is not None else None
    if saved is not None:
        resume.load_module(run, saved)
    optimizer, run.schedulers = parse_optimizers(trainable.configure_optimizers())
    check_parameters(optimizer, trainable.module)
    facade.set_optimizers([optimizer])
    facade.lr_scheduler_configs = run.schedulers
    run.maker = make_maker(run, optimizer)
    facade.write_checkpoint = lambda path, weights_only: resume.save(run, path, weights_only)
    if saved is not None:
        resume.load_training(run, saved)
    if not options.epochs_were_set:
        warnings.warn(
            "neither max_epochs, max_steps nor max_time was given: training runs for 1000 epochs. Give max_epochs=n (-1: no limit).",
            FasttrainWarning,
            stacklevel=3,
        )
    _log_hyperparams(run)
    run.fire("on_pretrain_routine_end")


def make_maker(run: Run, optimizer: torch.optim.Optimizer) -> StepMaker:
    """What every rung of this run is made of."""
    live = frozenset(h for h in IN_STEP_HOOKS if h in run.trainable.hooks or run.calls(h))
    scaler = LossScale(run.spec.device) if run.options.precision == "16-mixed" else None
    return StepMaker(
        trainable=run.trainable,
        spec=run.spec,
        optimizer=optimizer,
        options=run.options,
        scaler=scaler,
        fire=run.fire,
        live=live,
        say=run.display.line,
        workers=run.train.workers if run.train else 0,
    )


def evaluation_sources(run: Run, stage: str, loaders: Any, datamodule: Any) -> list[Source]:
    """The loaders of validate, test or predict. Raises DataError when there is none."""
    short = {"validate": "val", "test": "test", "predict": "predict"}[stage]
    loader = _loader(run, f"{short}_dataloader", loaders, datamodule)
    limit = getattr(run.options, f"limit_{short}_batches")
    return as_sources(loader, name=f"{short}_dataloaders", limit=limit, limit_name=f"limit_{short}_batches")


def _loader(run: Run, hook: str, given: Any, datamodule: Any, *, optional: bool = False) -> Any:
    """What was given, else the datamodule's, else the module's own loader."""
    if isinstance(given, torch.nn.Module):
        came = f"a module ({type(given).__name__})"
        raise DataError(reject(hook, came, "a loader", "compile_fit has the module: call fit(train_loader)."))
    if given is not None and hasattr(given, "train_dataloader") and hasattr(given, "setup"):
        raise DataError(reject(hook, type(given).__name__, "a loader", "A datamodule goes in as fit(datamodule=dm)."))
    if given is not None and datamodule is not None:
        raise DataError(f"{hook}: both a loader and a datamodule were given. Give one of them.")
    if given is not None:
        return given
    if datamodule is not None and callable(getattr(datamodule, hook, None)) and _really(datamodule, hook):
        return getattr(datamodule, hook)()
    if hook in run.trainable.hooks:
        return run.trainable.call(hook)
    if optional:
        return None
    raise DataError(reject(hook, "nothing", "a DataLoader", f"Give it to the call, in a datamodule, or define {hook}() on the module."))


def _really(datamodule: Any, hook: str) -> bool:
    """A Lightning datamodule without this loader has one that only raises; ours to pass over."""
    return overridden(datamodule, hook)


def _train_source(run: Run, loader: Any) -> Source:
    if run.options.overfit_batches and isinstance(loader, DataLoader) and isinstance(loader.sampler, RandomSampler):
        loader = DataLoader(
            loader.dataset,
            batch_size=loader.batch_size,
            shuffle=False,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            drop_last=loader.drop_last,
            pin_memory=loader.pin_memory,
            worker_init_fn=loader.worker_init_fn,
            generator=loader.generator,
            multiprocessing_context=loader.multiprocessing_context,
        )
        warnings.warn("overfit_batches turns shuffling of the training loader off.", FasttrainWarning, stacklevel=4)
    if isinstance(loader, (list, tuple)) and loader and all(isinstance(x, DataLoader) for x in loader):
        raise DataError(
            reject("train_dataloaders", f"{len(loader)} loaders", "one loader", "Combine the datasets, e.g. with ConcatDataset.")
        )
    return Source(loader, name="train_dataloaders", limit=run.options.limit_train_batches, limit_name="limit_train_batches")


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
    """Hooks and loggers put away, after success and after failure."""
    run.fire("teardown", fn)
    if hasattr(datamodule, "teardown") and not isinstance(datamodule, type):
        datamodule.teardown(fn)
    for logger in run.facade.loggers:
        for name, arguments in (("save", ()), ("finalize", (status,))):
            if callable(getattr(logger, name, None)):
                getattr(logger, name)(*arguments)
