"""Where the files of one run lie: save_dir/name/version_N, and what every logger that writes files has in common."""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DEFAULT_NAME = "fasttrain_logs"


def next_version(root: str | Path) -> int:
    """One more than the highest `version_N` in `root`; 0 when there is none."""
    if not os.path.isdir(root):
        return 0
    found = (re.fullmatch(r"version_(\d+)", name) for name in os.listdir(root))
    return max((int(match[1]) + 1 for match in found if match), default=0)


class FileLogger(ABC):
    """A logger with a directory of its own; nothing is created before the first thing is logged.

    `version` is an int (directory `version_N`), a str (that directory) or None: the next free number.
    """

    def __init__(self, save_dir: str | Path, name: str = DEFAULT_NAME, version: int | str | None = None) -> None:
        self._save_dir = os.fspath(save_dir)
        self._name = name
        self._version = version

    @property
    def save_dir(self) -> str:
        return self._save_dir

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> int | str:
        if self._version is None:
            self._version = next_version(self.root_dir)
        return self._version

    @property
    def root_dir(self) -> str:
        """The directory that holds every version."""
        return os.path.join(self._save_dir, self._name)

    @property
    def log_dir(self) -> str:
        """The directory of this run."""
        version = self.version
        return os.path.join(self.root_dir, version if isinstance(version, str) else f"version_{version}")

    def log_hyperparams(self, params: object = None) -> None:
        """Writes them to `hparams.json`; what JSON has no form for is written as text."""
        values = _as_mapping(params)
        if values:
            os.makedirs(self.log_dir, exist_ok=True)
            text = json.dumps(values, indent=2, default=str, skipkeys=True)
            Path(self.log_dir, "hparams.json").write_text(text + "\n", encoding="utf-8")

    @abstractmethod
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Writes the values of one step."""

    @abstractmethod
    def save(self) -> None:
        """Sees to it that everything logged so far is in the file."""

    @abstractmethod
    def finalize(self, status: str) -> None:
        """Closes the file; `status` is "success" or "failed". Logging again opens it again."""


def _as_mapping(params: object) -> dict[str, Any]:
    if params is None:
        return {}
    return dict(params) if isinstance(params, Mapping) else dict(vars(params))
