"""A step that is not finite writes nothing; one that is may zero its gradients; the processor is left as it was."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim import SGD, AdamW

from fasttrain.kernels.native_tail import NativeTail
from tests.kernels.pairs import FEW, all_bits, bits, make_grads, make_params, name_of, needs_native, tail_of

pytestmark = needs_native
BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("kind", "options"), FEW, ids=name_of)
def test_a_bad_gradient_changes_no_bit(kind, options, bad):
    """One bad element anywhere: parameters, moments and step counts keep every bit, and the next step goes on."""
    params, optimizer, tail = tail_of(kind, options)
    tail.step(make_grads(params, 0), max_norm=1.0, check=True)
    before = all_bits(params, optimizer)
    for i in (0, 2, 5, 6):
        grads = make_grads(params, 1)
        grads[i].view(-1)[-1] = bad
        assert tail.step(grads, max_norm=1.0, check=True) == 1
        assert not math.isfinite(tail.grad_norm)
        assert all_bits(params, optimizer) == before
    assert tail.step(make_grads(params, 1), max_norm=1.0, check=True) == 0
    assert all_bits(params, optimizer) != before


@pytest.mark.parametrize(("kind", "options"), FEW, ids=name_of)
def test_a_bad_first_step_leaves_no_state(kind, options):
    """Skipping the very first step makes no state, and the step after it equals a first step."""
    params, optimizer, tail = tail_of(kind, options)
    grads = [torch.full_like(p, math.nan) for p in params]
    assert tail.step(grads, max_norm=math.inf, check=True) == 1
    assert not optimizer.state
    tail.step(make_grads(params, 0))
    fresh, other, tail2 = tail_of(kind, options)
    tail2.step(make_grads(fresh, 0))
    assert all_bits(params, optimizer) == all_bits(fresh, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_loss_skips(bad, dtype):
    """The loss joins the test when it is given, in every float dtype."""
    params, optimizer, tail = tail_of(AdamW, {})
    before = bits(params)
    assert tail.step(make_grads(params, 0), check=True, loss=torch.tensor(bad, dtype=dtype)) == 1
    assert bits(params) == before
    assert tail.step(make_grads(params, 0), check=True, loss=torch.tensor(0.3, dtype=dtype)) == 0
    assert tail.step(make_grads(params, 0), check=True, loss=torch.tensor(-6e-8, dtype=dtype)) == 0
    assert tail.step(make_grads(params, 0), check=True) == 0
    assert {float(state["step"]) for state in optimizer.state.values()} == {3.0}


def test_unchecked_steps_are_torchs():
    """Without check a NaN goes where it goes in torch."""
    params, _, tail = tail_of(SGD, {"lr": 0.1})
    grads = make_grads(params, 0)
    grads[2][0, 0] = math.nan
    assert tail.step(grads) == 0
    assert params[2].isnan().sum() == 1
    assert tail.step(grads, max_norm=1.0) == 0  # a NaN norm makes every gradient NaN, as in clip_grad_norm_
    assert all(p.isnan().all() for p in params if p.numel())


@pytest.mark.parametrize("bad", [False, True])
def test_zeroed_gradients(bad):
    """zero_grads clears every gradient, skipped step or not, wherever it lies in memory."""
    params, _, tail = tail_of(AdamW, {})
    grads = make_grads(params, 0)
    grads[2] = grads[2].t().contiguous().t()
    grads[6][-1, -1] = math.inf if bad else 1.0
    assert tail.step(grads, max_norm=math.inf, check=True, zero_grads=True) == bad
    assert all((g == 0).all() for g in grads)


def test_moments_do_not_decay_into_subnormals():
    """A dead unit's moments end at zero, and neither the caller's thread nor a worker is left flushing."""
    params = make_params([(40_000,)])
    optimizer = AdamW(params, betas=(0.5, 0.5))
    tail = NativeTail(optimizer, params)
    tail.step([torch.full_like(params[0], 1e-18)])
    for _ in range(200):
        tail.step([torch.zeros_like(params[0])])
    state = optimizer.state[params[0]]
    for name in ("exp_avg", "exp_avg_sq"):
        assert not ((state[name] != 0) & (state[name].abs() < torch.finfo(torch.float32).tiny)).any()
    subnormal = torch.full((100_000,), 1e-40)
    assert (subnormal * 1.0 != 0).all()


def test_poisoned_memory():
    """Nothing is read before it is written: new momentum buffers full of NaN change nothing."""
    params, optimizer, tail = tail_of(SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "nesterov": False})
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
    try:
        tail.step(make_grads(params, 0), max_norm=1.0, check=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(p).all() for p in params)
    assert all(torch.isfinite(s["momentum_buffer"]).all() for s in optimizer.state.values())
