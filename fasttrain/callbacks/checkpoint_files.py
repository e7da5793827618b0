"""Where checkpoint directories lie on disk: their default place, a link to the newest, the removal of an old one."""

from __future__ import annotations

import os
import shutil

from fasttrain.callbacks.trainer_view import TrainerView
from fasttrain.errors import CheckpointError, reject


def default_dir(trainer: TrainerView) -> str:
    """`checkpoints` beside the first logger's files, else in the run's root (absolute)."""
    root = trainer.default_root_dir
    if trainer.loggers:
        logger = trainer.loggers[0]
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        root = os.path.join(getattr(logger, "save_dir", None) or root, str(logger.name), version)
    return os.path.abspath(os.path.join(root, "checkpoints"))


def link(target: str, path: str, *, replace_directory: bool) -> None:
    """A relative symbolic link at `path`, put there in one move; a copy where links are not allowed.

    Raises:
        CheckpointError: something that is no link is at `path` and `replace_directory` is not set.
    """
    if os.path.lexists(path) and not os.path.islink(path):
        if not replace_directory:
            then = "Move it away, or leave enable_version_counter=True."
            raise CheckpointError(reject('save_last="link"', f"{path}, which is no link", "a free name", then))
        remove(path)
    fresh = f"{path}.new"
    if os.path.lexists(fresh):
        os.unlink(fresh)
    try:
        os.symlink(os.path.relpath(target, os.path.dirname(path)), fresh, target_is_directory=True)
    except OSError:
        shutil.copytree(target, path)
    else:
        os.replace(fresh, path)


def remove(path: str) -> None:
    """Removes a checkpoint directory, or only the link if it is one; nothing there is fine."""
    if os.path.islink(path):
        os.unlink(path)
    elif os.path.isdir(path):
        shutil.rmtree(path)
