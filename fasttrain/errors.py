"""The exception tree: what a user can cause, and what to do about it.

    FasttrainError
    ├── OptionError        (ValueError)    a knob: unknown, retired, out of range, contradictory
    ├── ModuleError        (TypeError)     the module, its loss or its optimizer cannot be trained as given
    ├── DataError          (ValueError)    a loader, a datamodule or a batch
    ├── CaptureError       (RuntimeError)  a named rung that cannot be had, with the reasons
    ├── NonFiniteError     (ArithmeticError)  a loss or gradient that is inf or NaN, with the step
    ├── CheckpointError    (RuntimeError)  a checkpoint that is missing, damaged or of another model
    └── KernelError        (ValueError)    tensors a kernel cannot take

Every message says which argument, what came, what was wanted and what to do next.
"""

from __future__ import annotations


class FasttrainError(Exception):
    """Root of every error fasttrain raises on purpose."""


class OptionError(FasttrainError, ValueError):
    """An option is unknown, retired, out of range or contradicts another."""


class ModuleError(FasttrainError, TypeError):
    """The module, its loss or its optimizer cannot be trained as given."""


class DataError(FasttrainError, ValueError):
    """A loader, a datamodule or a batch is not what the module needs."""


class CaptureError(FasttrainError, RuntimeError):
    """The rung asked for by name cannot be had; the message lists why."""


class NonFiniteError(FasttrainError, ArithmeticError):
    """A loss or a gradient became inf or NaN; the message names the step."""


class CheckpointError(FasttrainError, RuntimeError):
    """A checkpoint is missing, damaged or belongs to another model."""


class KernelError(FasttrainError, ValueError):
    """Tensors that a kernel cannot take; nothing was written."""


class FasttrainWarning(UserWarning):
    """Something the user can act on; each is said once."""


def reject(what: str, got: object, wanted: str, then: str) -> str:
    """One sentence a person can act on: which argument, what came, what was wanted, what to do."""
    return f"{what}: got {got}; wanted {wanted}. {then}"
