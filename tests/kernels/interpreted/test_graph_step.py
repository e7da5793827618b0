"""The graph rung with the Triton update behind it, on the CPU: the device stands in, the kernels are interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fasttrain.graphs.device_tail import DeviceTail
from fasttrain.graphs.pending import Pending
from tests.graphs.fake_device import FakeDevice, device  # noqa: F401
from tests.graphs.test_graph_plan import batches, same, train

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def _triton(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    def make(optimizer: Any, params: Any, options: Any, scaler: Any, norms: Any, pending: Any) -> DeviceTail:
        raises = options.nonfinite == "raise" and scaler is None
        return DeviceTail(optimizer, params, options, scaler, norms, PENDING.setdefault("it", Pending(lambda: 0, raises=raises)))

    PENDING.clear()
    monkeypatch.setattr("fasttrain.graphs.cuda.make_tail", make)


PENDING: dict[str, Pending] = {}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_graph_is_eager(accumulate: int) -> None:
    """Window, clip, schedule and norms: what torch's own update makes of it."""
    same(batches([8] * 11), accumulate_grad_batches=accumulate, gradient_clip_val=0.5, track_grad_norm=2)


def test_verified() -> None:
    """Optimizer state that a comparison puts back and makes anew is followed."""
    assert "3 steps verified" in same(batches([8] * 9), accumulate_grad_batches=2, verify=3).capture.why


def test_a_bad_step_is_skipped() -> None:
    """nonfinite="skip": a NaN batch moves nothing, and is counted where the run stops."""
    data = batches([8] * 8)
    data[5][0].fill_(torch.nan)

    same(data[:5] + data[6:], max_epochs=1, nonfinite="skip")  # the trial and the laws of the fixture hold
    PENDING.clear()
    train("graph", data, max_epochs=1, nonfinite="skip")
    assert PENDING["it"].settle() == 1
