"""Laws of the demo's text: the same on every start, whole files on one side, its entropy right."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fasttrain.demo.text import order0_entropy, read_standard_library, rows_of, spread
from fasttrain.errors import DataError


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """300 files that name themselves, and files that must not be read."""
    for i in range(300):
        (tmp_path / f"module{i}.py").write_text(f"<{i}>" + "x" * 1000)
    for skipped in ("test", "site-packages/pkg", "__pycache__"):
        (tmp_path / skipped).mkdir(parents=True)
        (tmp_path / skipped / "secret.py").write_text("SECRET")
    return tmp_path


def test_the_split_is_by_file(library: Path) -> None:
    """No file is on both sides, none is lost, tests and installed packages are left out."""
    text = read_standard_library(library)
    train, validation = bytes(text.train.tolist()), bytes(text.validation.tolist())
    assert text.train_files + text.validation_files == 300
    for i in range(300):
        assert (f"<{i}>".encode() in train) != (f"<{i}>".encode() in validation)
    assert b"SECRET" not in train + validation


def test_the_text_is_the_same_every_time(library: Path) -> None:
    """Two readings are equal, and a new file moves no other one to the other side."""
    first = read_standard_library(library)
    assert torch.equal(first.train, read_standard_library(library).train)
    (library / "another.py").write_text("y" * 100)
    second = read_standard_library(library)
    assert second.train.numel() + second.validation.numel() == first.train.numel() + first.validation.numel() + 101


def test_no_source_is_a_sentence(tmp_path: Path) -> None:
    """A library without source files is refused with what was found and where."""
    with pytest.raises(DataError, match=r"found .* in 0 Python files"):
        read_standard_library(tmp_path)


def test_rows_are_the_text() -> None:
    """Rows put one after another are the text, up to a rest shorter than a row."""
    text = torch.arange(23, dtype=torch.uint8)
    rows = rows_of(text, 5)
    assert rows.shape == (4, 5)
    assert torch.equal(rows.reshape(-1), text[:20])
    assert torch.equal(spread(rows, 2), rows[[0, 3]])
    assert torch.equal(spread(rows, 9), rows)


@pytest.mark.parametrize(("counts", "bits"), [([1], 0.0), ([1, 1], 1.0), ([2, 1, 1], 1.5), ([1] * 256, 8.0)])
def test_entropy_of_known_texts(counts: list[int], bits: float) -> None:
    """Shannon's formula on texts whose entropy is known."""
    text = torch.tensor([byte for byte, n in enumerate(counts) for _ in range(n)], dtype=torch.uint8)
    assert math.isclose(order0_entropy(text), bits, abs_tol=1e-12)
