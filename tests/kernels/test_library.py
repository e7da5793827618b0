"""The native library: loaded late, after torch, into torch's own OpenMP runtime, and missed only once aloud."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import warnings

import pytest
import torch
from torch.optim import AdamW

from fasttrain.errors import FasttrainWarning, KernelError
from fasttrain.kernels import clip_and_step_, grad_norm, library
from fasttrain.kernels.native_lists import NativeSum
from fasttrain.kernels.native_tail import NativeTail
from tests.kernels.pairs import give, make_grads, make_params, needs_native

PROBE = """
import re, torch
import fasttrain.kernels
from fasttrain.kernels import library
def mapped(pattern): return {line.split()[-1] for line in open('/proc/self/maps') if re.search(pattern, line)}
assert not mapped('fasttrain_native'), 'loaded by an import'
before = mapped(r'lib(gomp|omp|iomp5)[^/]*$')
fasttrain.kernels.grad_norm([torch.ones(200_000)])
assert mapped('fasttrain_native')
assert mapped(r'lib(gomp|omp|iomp5)[^/]*$') == before, 'a second OpenMP runtime'
assert len(before) == 1, before
for count in (1, 2):
    torch.set_num_threads(count)
    assert library.load().fasttrain_threads() == count
"""


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_loaded_late_into_torchs_openmp():
    """Importing loads nothing; using it maps no second OpenMP runtime and obeys torch.set_num_threads."""
    subprocess.run([sys.executable, "-W", "error", "-c", PROBE], check=True, timeout=60)


@needs_native
def test_structs_have_the_native_sizes():
    """The ctypes mirrors are laid out without surprises."""
    sizes = [ctypes.sizeof(struct) for struct in (library.Row, library.Group, library.Call)]
    assert sizes == [72, 72, 88]


@needs_native
def test_instruction_sets():
    """Any level below the machine's best can be forced, and the best comes back."""
    best = library.instruction_set()
    assert best in library.INSTRUCTION_SETS
    assert library.force_instruction_set("baseline") == "baseline"
    assert library.force_instruction_set("avx512") == best
    assert library.force_instruction_set(None) == best


def test_turned_off(monkeypatch):
    """FASTTRAIN_NATIVE=0 turns it off without a word."""
    monkeypatch.setenv("FASTTRAIN_NATIVE", "0")
    assert not library.available()
    assert library.load() is None
    assert library.instruction_set() is None
    assert library.force_instruction_set("avx2") is None
    assert "FASTTRAIN_NATIVE" in str(NativeTail.obstacle(AdamW(make_params())))
    with pytest.raises(KernelError, match="FASTTRAIN_NATIVE"):
        NativeSum([torch.zeros(2)])


def test_missing_is_said_once(monkeypatch):
    """Without the library everything works, and the first use alone warns."""
    monkeypatch.delenv("FASTTRAIN_NATIVE", raising=False)
    monkeypatch.setattr(library, "_load", lambda: "it was not built")
    library._say_once.cache_clear()
    params = make_params()
    optimizer = AdamW(params)
    give(params, make_grads(params, 0))
    with pytest.warns(FasttrainWarning, match="it was not built"):
        clip_and_step_(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip_and_step_(optimizer)
        grad_norm([torch.ones(3)])
    library._say_once.cache_clear()
