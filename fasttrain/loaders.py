"""Where the loaders come from - the call, the datamodule, the module - and when a fit asks for them anew."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from fasttrain.combined import CombinedLoader, as_combined
from fasttrain.data import Source, as_sources, in_order, is_shuffled
from fasttrain.errors import DataError, FasttrainWarning, reject
from fasttrain.module import overridden
from fasttrain.run import Run
from fasttrain.state import rng_state, set_rng_state


def open_loaders(run: Run, train: Any, val: Any, datamodule: Any) -> None:
    """The fit's training and validation loaders, checked."""
    run.given = (train, val, datamodule)
    every = run.options.check_val_every_n_epoch
    run.asked = {"train": {"epoch": 0, "rng": None}, "val": {"epoch": 0 if every in (None, 1) else None, "rng": None}}
    _load_train(run)
    _load_val(run)


def renew(run: Run, which: str) -> None:
    """Ask for the loaders of ``which`` ("train" | "val") anew, where ``reload_dataloaders_every_n_epochs`` says that it is time."""
    every, epoch, last = run.options.reload_dataloaders_every_n_epochs, run.facade.progress.epoch, run.asked[which]["epoch"]
    if every and (last is None or epoch - last >= every):
        run.asked[which] = {"epoch": epoch, "rng": rng_state()}
        _LOAD[which](run)


def restore(run: Run, asked: dict[str, dict[str, Any]]) -> None:
    """After a resume: the loaders the saved run had, asked for in the epoch and with the random streams in which it asked."""
    progress, streams = run.facade.progress, rng_state()
    epoch, run.asked = progress.epoch, asked
    for which, last in asked.items():
        if run.options.reload_dataloaders_every_n_epochs and last["rng"] is not None:
            progress.epoch = last["epoch"]
            set_rng_state(last["rng"])
            _LOAD[which](run)
    progress.epoch = epoch
    set_rng_state(streams)


def evaluation_sources(run: Run, stage: str, loaders: Any, datamodule: Any) -> list[Source]:
    """The loaders of validate, test or predict. Raises DataError when there is none."""
    short = {"validate": "val", "test": "test", "predict": "predict"}[stage]
    found = _find(run, f"{short}_dataloader", loaders, datamodule)
    limit = getattr(run.options, f"limit_{short}_batches")
    sources = as_sources(found, name=f"{short}_dataloaders", limit=limit, limit_name=f"limit_{short}_batches")
    if stage == "predict" and any(isinstance(s.loader, CombinedLoader) for s in sources):
        came = f"CombinedLoader(mode={sources[0].loader.mode!r})"
        raise DataError(reject("predict_dataloaders", came, "mode='sequential'", "A prediction belongs to one loader: give the loaders."))
    return sources


def _load_train(run: Run) -> None:
    facade, limit = run.facade, run.options.limit_train_batches
    train, _, datamodule = run.given
    loader = _as_asked(run, as_combined(_find(run, "train_dataloader", train, datamodule), "max_size_cycle"), "training")
    run.train = Source(loader, name="train_dataloaders", limit=limit, limit_name=_limit_name(run, "limit_train_batches"))
    facade.train_dataloader, facade.num_training_batches = _iterables(loader), run.train.batches


def _load_val(run: Run) -> None:
    facade, trainable, limit = run.facade, run.trainable, run.options.limit_val_batches
    _, val, datamodule = run.given
    loader = _find(run, "val_dataloader", val, datamodule, optional=True)
    if isinstance(loader, (list, tuple, dict)) and not loader:
        loader = None  # nothing to validate on
    if loader is not None and not trainable.has("validate"):
        warnings.warn(
            f"a validation loader was given, but {type(trainable.module).__name__} has no validation_step: nothing is validated. "
            "Define validation_step(self, batch, batch_idx).",
            FasttrainWarning,
            stacklevel=5,
        )
        loader = None
    loader = _as_asked(run, as_combined(loader, "sequential"), "validation")
    sources = as_sources(loader, name="val_dataloaders", limit=limit, limit_name=_limit_name(run, "limit_val_batches"))
    if len(sources) != len(run.val):
        run.eval_steps.clear()  # what is logged has another suffix
    run.val = sources
    facade.val_dataloaders, facade.num_val_batches = _iterables(loader), [p.batches for s in sources for p in s.parts]


_LOAD = {"train": _load_train, "val": _load_val}


def _limit_name(run: Run, name: str) -> str:
    return "overfit_batches" if run.options.overfit_batches else name


def _iterables(loader: Any) -> Any:
    return loader.iterables if isinstance(loader, CombinedLoader) else loader


def _as_asked(run: Run, loader: Any, which: str) -> Any:
    """The loader, in its dataset's order under ``overfit_batches``: the same batches in every epoch."""
    if not run.options.overfit_batches or not is_shuffled(loader):
        return loader
    warnings.warn(f"overfit_batches turns shuffling of the {which} loader off.", FasttrainWarning, stacklevel=6)
    return in_order(loader)


def _find(run: Run, hook: str, given: Any, datamodule: Any, *, optional: bool = False) -> Any:
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
    if datamodule is not None and overridden(datamodule, hook):  # a Lightning datamodule without it has one that only raises
        return getattr(datamodule, hook)()
    if hook in run.trainable.hooks:
        return run.trainable.call(hook)
    if optional:
        return None
    raise DataError(reject(hook, "nothing", "a DataLoader", f"Give it to the call, in a datamodule, or define {hook}() on the module."))
