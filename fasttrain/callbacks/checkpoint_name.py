"""The name of a checkpoint: a template such as `{epoch:02d}-{val_loss:.2f}` filled with what the run knows."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from fasttrain.errors import OptionError, reject

DEFAULT = "{epoch}-{step}"
_FIELD = re.compile(r"\{([^{}:]+)(?::([^{}]*))?\}")


def checkpoint_name(template: str | None, values: Mapping[str, Tensor | float], *, insert_name: bool = True) -> str:
    """The template filled; a missing metric counts as 0, and `insert_name` writes `name=` before each value.

    Raises:
        OptionError: a format that its value cannot take.

    Example::

        checkpoint_name("{epoch:02d}-{val_loss:.2f}", {"epoch": 3, "val_loss": 0.1234})  # 'epoch=03-val_loss=0.12'
    """

    def fill(match: re.Match[str]) -> str:
        name, spec = match[1], match[2] or ""
        value = values.get(name, 0)
        number = value.item() if isinstance(value, Tensor) else value  # host read: only of what the name shows
        try:
            text = format(number, spec)
        except ValueError as error:
            wanted = f"a format that {number!r} can take ({error})"
            raise OptionError(reject("filename", match[0], wanted, "Metrics are floats: use e.g. `.2f`.")) from None
        return f"{name}={text}" if insert_name else text

    return _FIELD.sub(fill, template or DEFAULT)
