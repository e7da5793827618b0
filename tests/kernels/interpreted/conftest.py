"""These tests run the Triton kernels in Triton's interpreter: only where triton was imported with TRITON_INTERPRET=1.

A plain run does not collect them; `tests/kernels/test_triton.py` starts a process of its own that does.
"""

from __future__ import annotations

import os

import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture
def device() -> str:
    return "cpu"
