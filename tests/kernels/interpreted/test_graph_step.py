"""The graph rung with the Triton update behind it, on the CPU: the device stands in, the kernels are interpreted."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

import fasttrain
from fasttrain.errors import KernelError
from fasttrain.graphs.device_tail import DeviceTail
from fasttrain.graphs.pending import Pending
from tests.graphs.fake_device import FakeDevice, device  # noqa: F401
from tests.graphs.test_graph_plan import QUIET, Steady, batches, same, train
from tests.kernels.triton_checks import SMALL, tail_on

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


def test_a_captures_tables_live_as_long_as_its_graph(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """`transient`: whoever keeps the graph keeps them; and several steps may be captured in one graph, if that is said before."""
    params, _optimizer, tail = tail_on("cpu", torch.optim.AdamW, {"lr": 0.05}, SMALL)
    grads = [torch.ones_like(p) for p in params]
    tail.step(grads, max_norm=1.0)
    tail.sync(captures=3)
    monkeypatch.setattr(tail, "_capturing", lambda: True)
    monkeypatch.setattr(tail, "_launch", lambda *a: None)
    kept = [tail.step(grads, max_norm=1.0, transient=True) for _ in range(3)]
    assert len({id(binding.rows) for binding in kept}) == 3
    with pytest.raises(KernelError, match="sync"):
        tail.step(grads, max_norm=1.0, transient=True)
    assert len(tail._captured()) == 3
    assert all(g is not t for binding in kept for t in binding.held for g in grads)
    kept.pop()
    gc.collect()
    assert len(tail._captured()) == 2
    tail.sync()
    assert not any(binding.pending for binding in kept)


def test_several_steps_in_a_launch() -> None:
    """The kernels' update in each of them."""
    ends = []
    for n in (1, 3):
        PENDING.clear()
        torch.manual_seed(1)
        module = Steady()
        torch.manual_seed(2)
        fasttrain.compile_fit(module, capture="graph", max_epochs=2, steps_per_launch=n, **QUIET).fit(batches([8] * 8))
        ends.append(module.state_dict())
    assert all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())
