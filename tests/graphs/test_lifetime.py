"""A fit that is over keeps nothing: neither its module nor its optimizer stays behind in the tracer's caches."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

import fasttrain
from tests.graphs.test_obstacles import QUIET, Net, batches


class Plain(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss


class Between(Plain):
    """In pieces: a hook stands between the forward and the backward pass."""

    def on_before_backward(self, loss: Any) -> None:
        self.seen = float(loss.detach())


@pytest.mark.parametrize("make", [Plain, Between])
@pytest.mark.parametrize("rung", ["eager", "compile"])
def test_a_module_dies_with_its_fit(make: Any, rung: str) -> None:
    def one() -> Any:
        module = make()
        result = fasttrain.compile_fit(module, capture=rung, **QUIET).fit(batches(3))
        assert result.capture.rung == rung
        return weakref.ref(module)

    refs = [one() for _ in range(3)]
    gc.collect()
    assert [r() for r in refs] == [None] * 3
