"""The native library: where it is, whether it can be had, and the C structs that Python shares with it.

It is looked for at the first use, never at import, and loaded after torch so that its parallel regions run in torch's
own OpenMP runtime (`torch.set_num_threads` rules both). `FASTTRAIN_NATIVE=0` in the environment turns it off.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from fasttrain.errors import FasttrainWarning

PATH = Path(__file__).parent / "libfasttrain_native.so"
INTERFACE = 2  # fasttrain_interface() of the library this file was written for
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
SGD, ADAM, LION = 0, 1, 2
L2, INF = 0, 1
MEASURE, CHECK, ZERO_GRADS = 1, 2, 4
NESTEROV, AMSGRAD, MAXIMIZE, DECOUPLED = 1, 2, 4, 8
STEPPED, SKIPPED = 0, 1


class Row(ctypes.Structure):
    """One parameter: its address, its optimizer state's, its step count's. Zero where there is none."""

    _fields_ = (
        ("param", ctypes.c_uint64),
        ("slot", ctypes.c_uint64 * 3),
        ("step", ctypes.c_uint64),
        ("numel", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("step_is_double", ctypes.c_int32),
        ("fresh", ctypes.c_int32),
        ("grad_dtype", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )


class Group(ctypes.Structure):
    """The hyperparameters of one parameter group; `lr_address` when lr is a 0-d tensor."""

    _fields_ = (
        ("lr", ctypes.c_double),
        ("beta1", ctypes.c_double),
        ("beta2", ctypes.c_double),
        ("eps", ctypes.c_double),
        ("weight_decay", ctypes.c_double),
        ("momentum", ctypes.c_double),
        ("dampening", ctypes.c_double),
        ("lr_address", ctypes.c_uint64),
        ("lr_dtype", ctypes.c_int32),
        ("flags", ctypes.c_int32),
    )


class Call(ctypes.Structure):
    """What differs from step to step."""

    _fields_ = (
        ("grads", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("groups", ctypes.c_void_p),
        ("loss", ctypes.c_uint64),
        ("norm_out", ctypes.c_uint64),
        ("norms_out", ctypes.c_uint64),
        ("max_norm", ctypes.c_double),
        ("clip_value", ctypes.c_double),
        ("grad_scale", ctypes.c_double),
        ("loss_dtype", ctypes.c_int32),
        ("flags", ctypes.c_int32),
        ("norm_kind", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )


_FUNCTIONS: dict[str, tuple[object, Sequence[object]]] = {
    "fasttrain_isa": (ctypes.c_int32, ()),
    "fasttrain_threads": (ctypes.c_int32, ()),
    "fasttrain_force_isa": (ctypes.c_int32, (ctypes.c_int32,)),
    "fasttrain_plan_make": (ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32)),
    "fasttrain_plan_free": (None, (ctypes.c_void_p,)),
    "fasttrain_step": (ctypes.c_int32, (ctypes.c_void_p, ctypes.c_void_p)),
    "fasttrain_norm": (ctypes.c_double, (ctypes.c_void_p, ctypes.c_void_p)),
    "fasttrain_add": (None, (ctypes.c_void_p, ctypes.c_void_p)),
}


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or one sentence on why there is none."""
    if not PATH.exists():
        return f"{PATH.name} was not built when fasttrain was installed (no C++ compiler?)"
    try:
        library = ctypes.CDLL(str(PATH))
        if (found := library.fasttrain_interface()) != INTERFACE:
            return f"{PATH.name} is of interface {found}, this fasttrain of {INTERFACE}: build it again"
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, tuple(arguments)
    except (OSError, AttributeError) as error:
        return f"{PATH.name} cannot be loaded: {error}"
    return library


def obstacle() -> str | None:
    """Why the native library cannot be used, in one sentence; None when it can."""
    if os.environ.get("FASTTRAIN_NATIVE") == "0":
        return "FASTTRAIN_NATIVE=0 turns the native library off"
    found = _load()
    return found if isinstance(found, str) else None


def available() -> bool:
    """Whether the native library can be used. Never warns."""
    return obstacle() is None


def load() -> ctypes.CDLL | None:
    """The native library, or None; the first None that nobody asked for is said aloud."""
    if (reason := obstacle()) is None:
        torch.get_num_threads()  # has torch tell this thread's OpenMP how many threads it may use
        found = _load()
        return found if isinstance(found, ctypes.CDLL) else None
    if os.environ.get("FASTTRAIN_NATIVE") != "0":
        _say_once(reason)
    return None


@cache
def _say_once(reason: str) -> None:
    advice = "The plain torch update is used instead. To have the fast one, install fasttrain where a C++ compiler is."
    warnings.warn(f"{reason}. {advice}", FasttrainWarning, stacklevel=4)


def instruction_set() -> str | None:
    """What the native kernels run on: "avx512", "avx2" or "baseline"; None without the library."""
    library = load()
    return None if library is None else INSTRUCTION_SETS[library.fasttrain_isa()]


def force_instruction_set(name: str | None) -> str | None:
    """For tests: take this set, or the best below it that the machine has, and say which. None takes the best."""
    library = load()
    if library is None:
        return None
    return INSTRUCTION_SETS[library.fasttrain_force_isa(-1 if name is None else INSTRUCTION_SETS.index(name))]


class Plan:
    """A native chunk table, freed with this object."""

    def __init__(self, numels: Sequence[int], rule: int) -> None:
        library = load()
        assert library is not None, "ask obstacle() first"
        sizes = (ctypes.c_int64 * len(numels))(*numels)
        self.library = library
        self.address = ctypes.c_void_p(library.fasttrain_plan_make(ctypes.addressof(sizes), len(numels), rule))
        if not self.address:
            raise MemoryError(f"no memory for the chunk table of {len(numels)} tensors")

    def __del__(self) -> None:
        if getattr(self, "address", None):
            self.library.fasttrain_plan_free(self.address)
