"""The Triton kernels without a GPU: every law in the interpreter, and every kernel compiled for three GPUs.

Both run in a process of their own, for a kernel is interpreted or compiled once and for all when triton is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import fasttrain
from tests.kernels.pairs import make_params, no_sanitizer

HERE = Path(__file__).parent
ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
SLOTS = {"0": 0, "1": 1, "2": 1, "3": 2, "4": 3, "5": 1}  # by mode: SGD, momentum, Nesterov, Adam, amsgrad, Lion
THREAD = 8  # elements that a thread handles in one turn of the loop

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def run(command: list[str], interpret: bool) -> subprocess.CompletedProcess[str]:
    root = str(Path(fasttrain.__file__).parent.parent)
    found = [str(HERE.parent.parent), root, os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0", "PYTHONPATH": os.pathsep.join(p for p in found if p)}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, cwd=HERE.parent.parent)


@needs_triton
@no_sanitizer
@pytest.mark.timeout(1800)
def test_every_law_in_the_interpreter():
    """tests/kernels/interpreted in its own process: the numbers are torch's."""
    done = run(["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/kernels/interpreted"], interpret=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def expected(kernel: dict) -> tuple[int, int]:
    """128-bit loads and stores of one turn of the hot loop, when every address is aligned."""
    c = kernel["constants"]
    if kernel["kernel"] == "norm_chunks":
        return THREAD * ITEMSIZE[c["G"]] // 16, 0
    size = {name: THREAD * ITEMSIZE[c[name]] // 16 for name in "PGS"}
    state = SLOTS[c["MODE"]] * size["S"]
    weights = THREAD * 4 // 16 if c["MASTERED"] == "True" else size["P"]
    stores = state + size["P"] + (weights if c["MASTERED"] == "True" else 0) + (size["G"] if c["ZERO"] == "True" else 0)
    return size["G"] + weights + state, stores


def check(which: str, *archs: int) -> int:
    done = run([str(HERE / "offline.py"), which, *map(str, archs)], interpret=False)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    for kernel in kernels:
        assert kernel["cubin"] > 0
        assert kernel["spills_said"] == 2, "the assembler said nothing of spills"
        assert kernel["spills"] == 0, kernel
        assert kernel["local"] == 0, kernel
        if "ALIGN" in kernel["constants"]:
            wide = (kernel["wide_loads"], kernel["wide_stores"])
            if kernel["constants"]["ALIGN"] == "16":  # a loop may be unrolled: whole multiples
                for got, wanted in zip(wide, expected(kernel), strict=True):
                    assert got >= wanted, kernel
                    assert got == wanted == 0 or got % wanted == 0, kernel
            else:
                assert wide == (0, 0), kernel
    return len(kernels)


@needs_triton
@no_sanitizer
@pytest.mark.timeout(900)
def test_kernels_compile_for_gpus():
    """Those that differ, for sm_80, sm_90 and sm_100: 128-bit loads and stores in the hot loop, no spills, no local memory."""
    assert check("few", 80, 90, 100) >= 3 * 45


@needs_triton
@no_sanitizer
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_variant_compiles():
    """Every kernel that a plan can launch, for the three GPUs."""
    assert check("all", 80, 90, 100) >= 3 * 380


def test_nothing_imports_the_kernels():
    """The package, a native step and the question whether a Triton tail can be had leave the one file that needs triton alone."""
    code = """
import sys, torch
from fasttrain.kernels import clip_and_step_
from fasttrain.kernels.triton_tail import TritonTail
assert not [m for m in sys.modules if m.split(".")[0] == "triton"]
weight = torch.nn.Parameter(torch.ones(3))
optimizer = torch.optim.AdamW([weight])  # torch's own Dynamo may import triton from here on
weight.grad = torch.ones(3)
clip_and_step_(optimizer)
reason = TritonTail.obstacle(optimizer)
assert "is on cpu" in reason or "not installed" in reason, reason
assert "fasttrain.kernels.triton_kernels" not in sys.modules
"""
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=env)


def test_without_triton(monkeypatch):
    """Where triton is missing the obstacle says so, and a tail is refused with it."""
    from torch.optim import AdamW

    from fasttrain.errors import KernelError
    from fasttrain.kernels import triton_rules
    from fasttrain.kernels.triton_tail import TritonTail

    monkeypatch.setattr(triton_rules, "find_spec", lambda name: None)
    params = make_params()
    assert TritonTail.obstacle(AdamW(params)) == "triton is not installed"
    with pytest.raises(KernelError, match="triton is not installed"):
        TritonTail(AdamW(params), params)
