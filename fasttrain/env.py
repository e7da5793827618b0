"""What a bug report needs: versions, machine, native library, compiler, rungs - told as it is found."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fasttrain import __version__

PACKAGES = ("triton", "numpy", "safetensors", "rich", "lightning", "pytorch-lightning", "torchmetrics", "transformers", "tensorboard")


def facts() -> Iterator[tuple[str, Any]]:
    """``(name, value)`` pairs that JSON can hold; what needs torch comes after what does not. Starts no CUDA context."""
    yield "fasttrain", __version__
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "os", platform.platform()
    yield "cpu", _cpu_model()
    yield "cores", {"usable": _usable_cores(), "in the machine": os.cpu_count()}
    yield "memory", _memory()
    yield "packages", {name: found for name in PACKAGES if (found := _installed(name))}
    yield "C++ compiler", _compiler()
    import torch

    yield "torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'}, CPU {torch.backends.cpu.get_cpu_capability()})"
    yield "threads", torch.get_num_threads()
    yield "CUDA devices", _devices()
    yield "native library", _native()
    yield "fp32 products", _products()
    yield "rungs", _rungs()
    yield "compile cache", _cache()
    yield "settings", {k: v for k, v in sorted(os.environ.items()) if k.startswith(("FASTTRAIN_", "TORCHINDUCTOR_", "OMP_", "MKL_"))}


def line(name: str, value: Any) -> str:
    """One fact as text."""
    if isinstance(value, dict):
        value = ", ".join(f"{k} {v}" for k, v in value.items())
    elif isinstance(value, list):
        value = ", ".join(map(str, value))
    return f"{name + ':':<16} {'none' if value in (None, '') else value}"


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(text.split(":", 1)[1].strip() for text in lines if text.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str | None:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    return f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB of it unused"


def _compiler() -> str | None:
    """The compiler that torch.compile would call on the CPU."""
    named = os.environ.get("CXX")
    for name in (named,) if named else ("g++", "clang++", "c++"):
        if name and (found := shutil.which(name)):
            return found
    return None


def _devices() -> list[str]:
    """Host read of the driver's list; nothing is allocated on a device."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(f"{p.name} (sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB)")
    return found


def _native() -> str:
    from fasttrain.kernels import library

    why_not = library.obstacle()
    return f"{library.instruction_set()} instructions" if why_not is None else f"not used: {why_not}"


def _products() -> str:
    from fasttrain.graphs.products import onednn_is_quicker

    return "captured on the CPU, large ones by oneDNN" if onednn_is_quicker() else "torch's"


def _rungs() -> dict[str, str]:
    """Each rung, and what keeps it from being taken here."""
    import torch

    cuda = torch.cuda.is_available()
    no_compiler = None if cuda or _compiler() else "no (torch.compile needs a C++ compiler on the CPU; install g++)"
    return {
        "eager": "yes",
        "compile": no_compiler or "yes",
        "graph": "yes" if cuda else "no (it needs a CUDA device)",
    }


def _cache() -> str:
    """Torch's compile cache: a second start takes its graphs, and what was measured, from there."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = Path(cache_dir())
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    return f"{folder} ({size / 2**20:.0f} MiB)"
