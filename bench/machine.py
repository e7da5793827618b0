"""What a result was measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

PEERS = ("pytorch-lightning", "lightning", "accelerate", "keras", "pytorch-ignite", "triton")


def device() -> str:
    """``cuda`` where torch sees one, asked in a way that leaves the device to this process's children."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def machine(where: str) -> dict[str, Any]:
    """Versions, the processor and the device."""
    import torch

    said: dict[str, Any] = {
        "date": datetime.date.today().isoformat(), "device": where, "cpu": _cpu(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip
    if where == "cuda":
        said["gpu"] = torch.cuda.get_device_name()
    for peer in PEERS:
        try:
            said[peer] = importlib.metadata.version(peer)
        except importlib.metadata.PackageNotFoundError:
            continue
    return said


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
