"""Compiles the Triton kernels for GPUs that are not there, and says what came out: one line of JSON a kernel.

    python tests/kernels/offline.py few|all 80 90 100

Run in a process of its own: kernels that were imported in the interpreter cannot be compiled.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fasttrain.kernels import triton_kernels as kernels
from fasttrain.kernels.triton_plan import (
    ADAM,
    AMSGRAD,
    BLOCK,
    CHUNK,
    JUDGE_BLOCK,
    JUDGE_ROWS,
    JUDGE_WARPS,
    LION,
    NESTEROV,
    NORMS_BLOCK,
    SGD,
    SGD_MOMENTUM,
    WARPS,
)

FP32, BF16, FP16 = range(3)
MODES = (SGD, SGD_MOMENTUM, NESTEROV, ADAM, AMSGRAD, LION)
POINTERS = {
    "p_rows": "*i64", "p_chunks": "*i64", "p_partial": "*fp64", "p_table": "*fp64", "p_record": "*fp32", "p_verdict": "*fp32",
    "p_norm": "*fp32", "p_skipped": "*i32", "p_skips": "*i32", "p_scale": "*fp32", "p_tracker": "*i32", "p_loss": "*fp32",
    "p_rescale": "*fp32", "p_span": "*i64", "p_out": "*fp32", "first": "i32", "last": "i32", "n_partial": "i32", "n_rows": "i32",
}  # fmt: skip


def _update(p: int, g: int, s: int, mode: int, mastered: bool, zero: bool, align: int) -> tuple[str, dict[str, Any]]:
    types = {"P": kernels.TYPES[p], "G": kernels.TYPES[g], "S": kernels.TYPES[s]}
    return "update_chunks", {**types, "MODE": mode, "MASTERED": mastered, "ZERO": zero, "ALIGN": align, "CHUNK": CHUNK, "BLOCK": BLOCK}


def variants(every: bool) -> list[tuple[str, dict[str, Any]]]:
    """Every kernel a plan can launch, or those few that differ in what the compiler has to do."""
    flags = (False, True)
    found: list[tuple[str, dict[str, Any]]] = []
    for g, inf, align in itertools.product(range(3), flags, (16, 1)):
        found.append(("norm_chunks", {"G": kernels.TYPES[g], "INF": inf, "ALIGN": align, "CHUNK": CHUNK, "BLOCK": BLOCK}))
    for scaled, rescaled, inf in itertools.product(flags, flags, flags):
        found.append(("row_norms", {"INF": inf, "SCALED": scaled, "RESCALED": rescaled, "BLOCK": NORMS_BLOCK}))
    for rule, full in itertools.product(range(3), flags):
        switches = dict.fromkeys(("MEASURE", "CHECK", "SCALED", "LOSS", "RESCALED", "STICKY"), full)
        found.append(("judge", {**switches, "INF": False, "RULE": rule, "BLOCK": JUDGE_BLOCK, "ROWS": JUDGE_ROWS}))
    if every:
        for p, g, mode, zero, align in itertools.product(range(3), range(3), MODES, flags, (16, 1)):
            found.append(_update(p, g, p, mode, False, zero, align))
            if p != FP32:
                found.append(_update(p, g, FP32, mode, True, zero, align))
        return found
    found += [_update(FP32, FP32, FP32, mode, False, True, 16) for mode in MODES]
    found += [_update(p, g, p, ADAM, False, False, 16) for p in range(3) for g in range(3)]
    found += [_update(p, g, FP32, mode, True, False, 16) for p, g in ((BF16, BF16), (FP16, FP32)) for mode in (AMSGRAD, NESTEROV, LION)]
    return [*found, _update(FP32, FP32, FP32, ADAM, False, False, 1), _update(BF16, BF16, FP32, ADAM, True, True, 1)]


def _assembled(ptx: str) -> str:
    """What the assembler says of registers and spills; triton brings two, of which the older may not know the newer PTX."""
    brought = Path(triton.__file__).parent / "backends/nvidia/bin"
    target = re.search(r"\.target\s+(\w+)", ptx)
    assert target is not None
    said = ""
    for assembler in ("ptxas-blackwell", "ptxas"):
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
            source.write(ptx)
            source.flush()
            command = [str(brought / assembler), "-v", f"--gpu-name={target[1]}", source.name, "-o", "/dev/null"]
            made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode == 0:
            return made.stdout + made.stderr
        said += made.stdout + made.stderr
    raise RuntimeError(said)


def compiled(name: str, constants: dict[str, Any], arch: int) -> dict[str, Any]:
    """Compiles one kernel; counts its 128-bit accesses and what the assembler spilled."""
    function = getattr(kernels, name)
    signature = {a: "constexpr" if a in constants else POINTERS[a] for a in function.arg_names}
    places = {(function.arg_names.index(a),): value for a, value in constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(function.arg_names) if signature[a].startswith("*")}
    warps = JUDGE_WARPS if name == "judge" else WARPS
    source = ASTSource(fn=function, signature=signature, constexprs=places, attrs=aligned)
    target = GPUTarget("cuda", arch, 32)
    made = triton.compile(source, target=target, options={"num_warps": warps, "enable_fp_fusion": True})
    ptx = made.asm["ptx"]
    said = _assembled(ptx)
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", said)]
    registers = re.search(r"Used (\d+) registers", said)
    wide = r"\.global[\w.:]*\.(?:v4\.[bfus]32|v2\.[bfus]64|b128|v8\.[bfus]16)"
    return {
        "kernel": name, "constants": {k: str(v) for k, v in constants.items()}, "arch": arch, "cubin": len(made.asm["cubin"]),
        "wide_loads": len(re.findall("ld" + wide, ptx)), "wide_stores": len(re.findall("st" + wide, ptx)),
        "spills": sum(spills), "spills_said": len(spills), "local": ptx.count("ld.local") + ptx.count("st.local"),
        "registers": int(registers[1]) if registers else -1,
    }  # fmt: skip


if __name__ == "__main__":
    for arch in map(int, sys.argv[2:]):
        for name, constants in variants(sys.argv[1] == "all"):
            print(json.dumps(compiled(name, constants, arch)), flush=True)
