"""TensorBoardLogger: the same calls, written as TensorBoard events."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fasttrain.errors import OptionError, reject
from fasttrain.loggers.run_directory import DEFAULT_NAME, FileLogger


class TensorBoardLogger(FileLogger):
    """A thin cover of `torch.utils.tensorboard.SummaryWriter`, which is `experiment`.

    Raises:
        OptionError: tensorboard is not installed.
    """

    def __init__(self, save_dir: str | Path, name: str = DEFAULT_NAME, version: int | str | None = None) -> None:
        if find_spec("tensorboard") is None:
            then = "Run: pip install 'fasttrain[tensorboard]'"
            raise OptionError(reject("TensorBoardLogger", "no tensorboard package", "the tensorboard extra", then))
        super().__init__(save_dir, name, version)
        self._writer: Any = None

    @property
    def experiment(self) -> Any:
        """The SummaryWriter, opened when first asked for."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and an extra

            self._writer = SummaryWriter(log_dir=self.log_dir)
        return self._writer

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.experiment.add_scalar(name, float(value), step)

    def save(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def finalize(self, status: str) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
