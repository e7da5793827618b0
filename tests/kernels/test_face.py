"""clip_and_step_ stands for clip_grad_norm_ and step, natively and without the native library."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim import SGD, AdamW, RMSprop

from fasttrain.errors import KernelError
from fasttrain.kernels import clip_and_step_
from tests.kernels.pairs import all_bits, assert_near, give, make_grads, make_params, needs_native, stock_step


@pytest.fixture(params=[pytest.param("native", marks=needs_native), "plain"])
def road(request, monkeypatch):
    """With the native library, and with it turned off."""
    if request.param == "plain":
        monkeypatch.setenv("FASTTRAIN_NATIVE", "0")
    return request.param


@pytest.mark.parametrize("kind", [SGD, AdamW, RMSprop])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_equals_clip_and_step(kind, max_norm, road):
    """Several steps of any optimizer, scaled, with a parameter that has no gradient and one that moves."""
    wanted, params = make_params(), make_params()
    stock, optimizer = kind(wanted, lr=0.01), kind(params, lr=0.01)
    for step in range(4):
        grads = [*make_grads(params, step)[:-1], None]
        norm = stock_step(stock, wanted, grads, max_norm)
        give(params, [None if g is None else g * 8 for g in grads])
        got = clip_and_step_(optimizer, max_norm=max_norm, grad_scale=1 / 8, zero_grad=step == 2)
        assert_near([got], [norm])
        assert all((p.grad is None) == (step == 2 or g is None) for p, g in zip(params, grads, strict=True))
        params[2].data = params[2].data.clone()
    assert_near(params, wanted, slack=4)


def test_bad_gradients_skip(road):
    """Neither road writes anything when the norm is not finite, and the norm says so."""
    params = make_params()
    optimizer = AdamW(params)
    give(params, make_grads(params, 0))
    clip_and_step_(optimizer, max_norm=1.0)
    before = all_bits(params, optimizer)
    give(params, [torch.full_like(p, math.inf) for p in params])
    assert not math.isfinite(clip_and_step_(optimizer, max_norm=1.0, zero_grad=True))
    assert all_bits(params, optimizer) == before
    assert all(p.grad is None for p in params)


def test_what_comes_back_is_kept(road):
    """The norm of one step does not change at the next."""
    params = make_params()
    optimizer = SGD(params, lr=0.1)
    give(params, make_grads(params, 0))
    first = clip_and_step_(optimizer)
    value = float(first)
    give(params, make_grads(params, 1, scale=3.0))
    clip_and_step_(optimizer)
    assert float(first) == value


def test_groups_may_be_added(road):
    """A parameter group added later is stepped from then on."""
    params = make_params()
    optimizer = SGD(params[:3], lr=0.1)
    give(params, make_grads(params, 0))
    clip_and_step_(optimizer)
    optimizer.add_param_group({"params": params[3:], "lr": 0.2})
    before = params[6].detach().clone()
    clip_and_step_(optimizer)
    assert not torch.equal(params[6], before)


@pytest.mark.parametrize("max_norm", [-1.0, math.nan])
def test_a_bad_limit_is_refused(max_norm, road):
    """A negative or NaN max_norm raises before anything is written."""
    params = make_params()
    give(params, make_grads(params, 0))
    before = [p.detach().clone() for p in params]
    with pytest.raises(KernelError, match="max_norm"):
        clip_and_step_(SGD(params, lr=0.1), max_norm=max_norm)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: (torch.zeros(4, 2), torch.ones(4, 2).to_sparse()), "gradient of parameter 1.*sparse"),
        (lambda: (torch.zeros(2, dtype=torch.complex64), torch.ones(2, dtype=torch.complex64)), "gradient of parameter 1.*complex64"),
        (lambda: (torch.zeros(2, device="meta"), torch.ones(2, device="meta")), "gradient of parameter 1.*on meta"),
    ],
)
def test_what_no_road_takes(make, message, road):
    """A sparse or complex gradient, and one on another device, are refused by name; nothing is written."""
    value, grad = make()
    params = [*make_params([(3,)]), torch.nn.Parameter(value)]
    params[0].grad, params[1].grad = torch.ones(3), grad
    before = params[0].detach().clone()
    with pytest.raises(KernelError, match=message):
        clip_and_step_(SGD(params, lr=0.1), max_norm=1.0)
    assert torch.equal(params[0], before)
