"""What `logger=` means: the default files, none, or the user's own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fasttrain.errors import OptionError, reject
from fasttrain.loggers.csv import CsvLogger
from fasttrain.loggers.jsonl import JsonlLogger
from fasttrain.loggers.run_directory import DEFAULT_NAME, next_version


def make_loggers(option: object, root: str | Path) -> list[Any]:
    """The loggers: JSONL and CSV in one new version under `root` for True or None, none for False, else as given.

    Raises:
        OptionError: something without `log_metrics(metrics, step)`.
    """
    if option is None or option is True:
        version = next_version(os.path.join(root, DEFAULT_NAME))
        return [JsonlLogger(root, version=version), CsvLogger(root, version=version)]
    if option is False:
        return []
    loggers = list(option) if isinstance(option, list | tuple) else [option]
    for logger in loggers:
        if isinstance(logger, type) or not callable(getattr(logger, "log_metrics", None)):
            got = f"the class {logger.__name__}" if isinstance(logger, type) else repr(logger)
            wanted = "True, False, a logger or a list of loggers (anything with log_metrics(metrics, step))"
            raise OptionError(reject("logger", got, wanted, "Give an object with that method."))
    return loggers
