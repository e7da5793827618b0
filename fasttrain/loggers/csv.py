"""CsvLogger: one row for each call in a table whose columns may grow."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO
from weakref import finalize

from fasttrain.loggers.run_directory import DEFAULT_NAME, FileLogger


class CsvLogger(FileLogger):
    """Appends to `metrics.csv`: `step`, then a column per metric, empty where a call did not log it.

    A metric seen for the first time rewrites the file with its column, whole or not at all; every other row is
    appended and handed to the system at once.
    """

    def __init__(self, save_dir: str | Path, name: str = DEFAULT_NAME, version: int | str | None = None) -> None:
        super().__init__(save_dir, name, version)
        self._file: TextIO | None = None
        self._columns: list[str] = []

    @property
    def path(self) -> str:
        return os.path.join(self.log_dir, "metrics.csv")

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row: dict[str, object] = {name: float(value) for name, value in metrics.items() if name != "step"}
        row["step"] = step
        if self._file is None:
            self._columns = _columns_of(self.path)
        new = [name for name in ("step", *row) if name not in self._columns]
        if new:
            self._grow(list(dict.fromkeys(new)))
        if self._file is None:
            self._file = open(self.path, "a", encoding="utf-8", newline="")  # noqa: SIM115 - open until finalize
            finalize(self, self._file.close)  # a logger that is dropped leaves nothing open
        csv.writer(self._file).writerow([row.get(name, "") for name in self._columns])
        self._file.flush()

    def save(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())

    def finalize(self, status: str) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _grow(self, names: list[str]) -> None:
        self.finalize("success")
        os.makedirs(self.log_dir, exist_ok=True)
        self._columns = [*self._columns, *names]
        fresh = f"{self.path}.new"
        with open(fresh, "w", encoding="utf-8", newline="") as out:
            table = csv.DictWriter(out, self._columns, restval="", extrasaction="ignore")
            table.writeheader()
            if os.path.exists(self.path):
                with open(self.path, encoding="utf-8", newline="") as old:
                    table.writerows(csv.DictReader(old, restval=""))
        os.replace(fresh, self.path)


def _columns_of(path: str) -> list[str]:
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return next(csv.reader(file), [])
