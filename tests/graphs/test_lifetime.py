"""A fit and its process: what is over keeps nothing alive, trials are not heard, and one runs at a time."""

from __future__ import annotations

import gc
import logging
import threading
import warnings
import weakref
from typing import Any

import pytest

import fasttrain
from tests.graphs.test_obstacles import QUIET, Branches, Net, batches


class Plain(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss


class Between(Plain):
    """In pieces: a hook stands between the forward and the backward pass."""

    def on_before_backward(self, loss: Any) -> None:
        self.seen = float(loss.detach())


@pytest.mark.parametrize("make", [Plain, Between, Branches])
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


class Talks(Branches):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logging.getLogger("tests.lifetime").warning("batch %d", batch_idx)
        warnings.warn("mind the step", RuntimeWarning, stacklevel=2)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("rung", ["eager", "compile"])
def test_trials_are_not_heard(rung: str, caplog: pytest.LogCaptureFixture) -> None:
    """Each batch speaks once, and the first once more in the look before the run, however often a cut step is tried."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fasttrain.compile_fit(Talks(), capture=rung, **QUIET).fit(batches(4))
    assert [r.getMessage() for r in caplog.records if r.name == "tests.lifetime"] == [f"batch {i}" for i in (0, 0, 1, 2, 3)]
    assert sum("mind the step" in str(w.message) for w in said) == 5


def test_one_thread_trains_at_a_time() -> None:
    refused: list[str] = []

    class Another(fasttrain.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            def train() -> None:
                with pytest.raises(fasttrain.FasttrainError, match="one after the other") as error:
                    fasttrain.compile_fit(Plain(), **QUIET).fit(batches(2))
                refused.append(str(error.value))

            thread = threading.Thread(target=train)
            thread.start()
            thread.join()
            fasttrain.compile_fit(Plain(), **QUIET).fit(batches(2))  # within one's own is fine

    result = fasttrain.compile_fit(Plain(), callbacks=[Another()], **QUIET).fit(batches(3))
    assert result.steps == 3
    assert len(refused) == 1
