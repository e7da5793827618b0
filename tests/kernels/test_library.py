"""The native library: loaded late, after torch, into torch's own OpenMP runtime, and missed only once aloud."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.optim import AdamW

import fasttrain
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


WRONG = {
    "an older interface": ("int fasttrain_interface(void) { return 1; }", "is of interface 1, this fasttrain of 2"),
    "a newer interface": ("int fasttrain_interface(void) { return 3; }", "is of interface 3, this fasttrain of 2"),
    "none": ("int another(void) { return 2; }", "cannot be loaded"),
    "no functions": ("int fasttrain_interface(void) { return 2; }", "cannot be loaded"),
}

FIT = """
import sys, warnings, torch
from pathlib import Path
from fasttrain import FasttrainWarning, compile_fit
from fasttrain.kernels import library
library.PATH = Path(sys.argv[1])
model = torch.nn.Linear(3, 1)
options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=1, capture="compile")
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always", FasttrainWarning)
    for _ in range(2):
        trainer = compile_fit(model, loss=torch.nn.functional.mse_loss, optimizer=torch.optim.AdamW(model.parameters()), **options)
        result = trainer.fit([(torch.ones(4, 3), torch.ones(4, 1))] * 3)
said = [str(w.message) for w in heard if w.category is FasttrainWarning and "plain torch update" in str(w.message)]
assert len(said) == 1 and sys.argv[2] in said[0], [str(w.message) for w in heard]
assert result.steps == 3 and result.capture.rung == "compile" and sys.argv[2] in result.capture.tail, result.capture
"""


def built(source, folder):
    (folder / "wrong.c").write_text(source)
    path = folder / "libfasttrain_native.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(path), str(folder / "wrong.c")], check=True, timeout=60)
    return path


@pytest.fixture
def placed(monkeypatch):
    """Puts a file in the library's place for one test."""

    def place(path):
        monkeypatch.delenv("FASTTRAIN_NATIVE", raising=False)
        monkeypatch.setattr(library, "PATH", path)
        library._load.cache_clear()
        library._say_once.cache_clear()

    yield place
    library._load.cache_clear()
    library._say_once.cache_clear()


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize("wrong", WRONG)
def test_a_library_of_another_interface_is_refused(wrong, tmp_path, placed):
    """By its number, before anything else of it is called; said once."""
    source, words = WRONG[wrong]
    placed(built(source, tmp_path))
    assert words in str(library.obstacle())
    with pytest.warns(FasttrainWarning, match=words):
        assert library.load() is None
    assert library.load() is None
    assert words in str(NativeTail.obstacle(AdamW(make_params())))


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_fit_beside_a_library_of_another_interface(tmp_path):
    """It says so once and trains with torch's own update."""
    source, words = WRONG["a newer interface"]
    here = os.environ | {"PYTHONPATH": str(Path(fasttrain.__file__).parents[1])}
    here.pop("FASTTRAIN_NATIVE", None)
    subprocess.run([sys.executable, "-c", FIT, str(built(source, tmp_path)), words], check=True, timeout=300, env=here)


def test_a_file_that_is_no_library_is_refused(tmp_path, placed):
    """Half a download, say."""
    (tmp_path / "libfasttrain_native.so").write_bytes(b"\x7fELF and no more")
    placed(tmp_path / "libfasttrain_native.so")
    assert "cannot be loaded" in str(library.obstacle())
