"""Host lookups in the step - pandas indexes, ``bisect``, hashes of names - are made while it is traced: the step stays whole."""

from __future__ import annotations

import bisect
import zlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fasttrain

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}


class Net(nn.Module):
    """One layer; subclasses look something up."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 1)

    def weight(self, batch: dict[str, Any]) -> Any:
        return 1.0

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return F.mse_loss(self.a(batch["x"]), batch["y"]) * self.weight(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches(n: int = 6, **more: Any) -> list[Any]:
    g = torch.Generator().manual_seed(3)
    return [{"x": torch.randn(8, 4, generator=g), "y": torch.randn(8, 1, generator=g), **more} for _ in range(n)]


def fit(make: Any, capture: str, data: list[Any], **options: Any) -> tuple[Any, nn.Module]:
    torch.manual_seed(0)
    module = make()
    return fasttrain.compile_fit(module, capture=capture, **QUIET | options).fit(data), module


def same(make: Any, data: list[Any], **options: Any) -> Any:
    """The captured run's report; its weights are the eager run's."""
    _, eager = fit(make, "eager", data, **options)
    result, module = fit(make, "compile", data, **options)
    for a, b in zip(module.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert result.capture.whole, result.capture.obstacles
    return result.capture


class Milestones(Net):
    """``bisect`` among epochs, a name's hash: functions of constants that the tracer does not know."""

    def weight(self, batch: dict[str, Any]) -> Any:
        stage = bisect.bisect_right([1, 2], self.trainer.current_epoch)  # type: ignore[union-attr]
        return 1.0 + stage + zlib.crc32(b"name") % 3


def test_functions_of_constants() -> None:
    """Their result is a constant for as long as their arguments stay what they are."""
    assert same(Milestones, batches(3), max_epochs=3).traces == 3


class Columns(Net):
    """Whether, where, how many, which: the usual questions to an index that comes with the batch."""

    def weight(self, batch: dict[str, Any]) -> Any:
        columns = batch["columns"]
        if "weight" not in columns:
            return 1.0 + len(columns)
        rest = columns.delete(columns.get_loc("weight"))
        at = rest.get_indexer(["b", "a"])
        return batch["x"][:, columns.get_loc("weight")].mean() + batch["x"][:, at].sum() + len(rest.tolist())


class Own(Net):
    """A table of the module's own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = pytest.importorskip("pandas").DataFrame({"a": [1.0], "b": [2.0], "c": [3.0]})

    def weight(self, batch: dict[str, Any]) -> Any:
        return batch["x"][:, self.table.columns.get_loc("b")].square().mean() + (1.0 if 0 in self.table.index else 5.0)


@pytest.mark.parametrize("make", [Columns, Own])
def test_pandas_indexes(make: Any) -> None:
    """One graph; an index made anew for every batch is the same one if it holds the same labels."""
    pandas = pytest.importorskip("pandas")
    data = [b | {"columns": pandas.Index(["a", "weight", "b"])} for b in batches()]
    assert same(make, data).traces == 1


def test_an_index_that_changes() -> None:
    """Other labels are another answer: the step is traced again."""
    pandas = pytest.importorskip("pandas")
    labels = [["a", "b"]] * 3 + [["b", "weight", "a"]] * 3
    data = [b | {"columns": pandas.Index(c)} for b, c in zip(batches(), labels, strict=True)]
    assert same(Columns, data).traces == 2


def test_a_table_that_changes() -> None:
    """Columns of a table that is replaced, or gets others, between two epochs."""

    class Moves(Own):
        def on_train_epoch_end(self) -> None:
            self.table = self.table[["c", "a", "b"]] if self.table.columns[0] == "b" else self.table.rename(columns={"a": "b", "b": "a"})

    assert same(Moves, batches(3), max_epochs=3).traces == 3
