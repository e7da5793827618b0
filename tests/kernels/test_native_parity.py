"""The native update is torch's: every option, several groups, changing hyperparameters, every dtype."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adam, AdamW

from fasttrain.kernels.native_tail import NativeTail
from tests.kernels.pairs import (
    CASES,
    FEW,
    SHAPES,
    Truth,
    assert_near,
    assert_same_state,
    give,
    make_grads,
    make_params,
    name_of,
    needs_native,
    stock_step,
    tail_of,
)

pytestmark = needs_native


@pytest.mark.parametrize(("kind", "options"), CASES, ids=name_of)
def test_every_option_equals_torch(kind, options):
    """Six clipped steps, with a gradient that comes and goes and an lr that changes, land where torch's do."""
    wanted = make_params()
    stock = kind(wanted, **options, foreach=False)
    params, optimizer, tail = tail_of(kind, options)
    for step in range(6):
        grads = make_grads(params, step)
        if step in (0, 3):
            grads[3] = None
        for group in (stock.param_groups[0], optimizer.param_groups[0]):
            group["lr"] = options["lr"] * (1.0 if step < 3 else 0.25)
        norm = stock_step(stock, wanted, grads, max_norm=3.0)
        assert tail.step(grads, max_norm=3.0, check=True) == 0
        assert_near([tail.grad_norm], [norm])
    assert_near(params, wanted, slack=4)
    assert_same_state(optimizer, stock, slack=4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "options"), FEW, ids=name_of)
def test_every_dtype_equals_the_reference(kind, options, dtype):
    """Half precision is widened for the arithmetic and rounded once: no more than a last bit apart."""
    wanted = make_params(dtype=dtype)
    truth = Truth(kind, options, wanted)
    params, _, tail = tail_of(kind, options, dtype=dtype)
    for step in range(4):
        grads = make_grads(params, step)
        limit = 3.0 if dtype.itemsize == 2 else math.inf  # the truth's clip factor is float32
        truth.step(grads, limit)
        assert tail.step(grads, max_norm=limit) == 0
    assert_near(params, wanted)


FUSED = [(kind, options, torch.float64) for kind, options in FEW]
FUSED += [(kind, options, half) for kind, options in FEW[3:] for half in (torch.bfloat16, torch.float16)]


@pytest.mark.parametrize(("kind", "options", "dtype"), FUSED, ids=name_of)
def test_every_dtype_equals_the_fused_update(kind, options, dtype):
    """And so do torch's fused updates, but for SGD's in half precision: up to 2.13 they skip weights (#191763)."""
    wanted = make_params(dtype=dtype)
    stock = kind(wanted, **options, fused=True)
    params, optimizer, tail = tail_of(kind, options, dtype=dtype)
    for step in range(4):
        grads = make_grads(params, step)
        give(wanted, grads)
        stock.step()
        assert tail.step(grads) == 0
    assert_near(params, wanted, slack=2)
    assert_same_state(optimizer, stock, slack=2)


def test_groups_and_dtypes_mix():
    """Groups with hyperparameters of their own, and three dtypes, go through one plan."""

    def build():
        params = make_params()
        params[2], params[5] = nn.Parameter(params[2].detach().double()), nn.Parameter(params[5].detach().bfloat16())
        first = {"params": params[:3], "lr": 0.1, "betas": (0.5, 0.9)}
        return params, AdamW([first, {"params": params[3:], "weight_decay": 0.3, "maximize": True}], fused=True)

    wanted, stock = build()
    params, optimizer = build()
    tail = NativeTail(optimizer, params)
    for step in range(4):
        grads = make_grads(params, step)
        give(wanted, grads)
        stock.step()
        tail.step(grads, max_norm=math.inf)
    assert_near(params, wanted, slack=4)
    assert_same_state(optimizer, stock, slack=4)


def test_hyperparameters_may_change_every_step():
    """Momentum, betas and decay are read at each step, and momentum may be switched on and off."""
    wanted = make_params()
    stock = SGD(wanted, lr=0.1, foreach=False)
    params, optimizer, tail = tail_of(SGD, {"lr": 0.1})
    for step, momentum in enumerate((0.0, 0.9, 0.5, 0.0, 0.9)):
        for group in (stock.param_groups[0], optimizer.param_groups[0]):
            group["momentum"], group["weight_decay"] = momentum, 0.01 * step
        grads = make_grads(params, step)
        stock_step(stock, wanted, grads, max_norm=1.0)
        tail.step(grads, max_norm=1.0)
    assert_near(params, wanted, slack=4)
    assert_same_state(optimizer, stock, slack=4)


@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_lr_may_be_a_tensor(lr_dtype):
    """A 0-d CPU tensor is read anew at each step, also when it is another tensor of the same value."""
    lr = torch.tensor(0.125, dtype=lr_dtype)
    params, optimizer, tail = tail_of(SGD, {"lr": lr})
    wanted = [p.detach().clone() for p in params]
    for step, value in enumerate((0.125, 0.5, 0.25)):
        optimizer.param_groups[0]["lr"].fill_(value)
        grads = make_grads(params, step)
        tail.step(grads)
        wanted = [w - value * g for w, g in zip(wanted, grads, strict=True)]
    other = torch.tensor(0.25, dtype=lr_dtype)
    optimizer.param_groups[0]["lr"] = other
    tail.step(make_grads(params, 3))
    other.fill_(0.0)
    assert_near(params, [w - 0.25 * g for w, g in zip(wanted, make_grads(params, 3), strict=True)])
    before = [p.detach().clone() for p in params]
    tail.step(make_grads(params, 4))
    assert_near(params, before, slack=0)


def test_scale_then_clip_value():
    """Gradients are multiplied by grad_scale, then clamped."""
    wanted = make_params()
    stock = Adam(wanted, foreach=False)
    params, _, tail = tail_of(Adam, {})
    for step in range(3):
        grads = make_grads(params, step, scale=128.0)
        give(wanted, [g / 128.0 for g in grads])
        torch.nn.utils.clip_grad_value_(wanted, 0.5)
        stock.step()
        tail.step(grads, clip_value=0.5, grad_scale=1 / 128.0)
    assert_near(params, wanted, slack=4)


def test_norm_and_clip_see_scaled_gradients():
    """The norm is that of the gradients after grad_scale, and so is the limit."""
    params, _, tail = tail_of(SGD, {"lr": 1.0})
    wanted = make_params()
    grads = make_grads(params, 0, scale=1024.0)
    norm = stock_step(SGD(wanted, lr=1.0), wanted, [g / 1024 for g in grads], max_norm=0.5)
    tail.step(grads, max_norm=0.5, grad_scale=1 / 1024)
    assert_near([tail.grad_norm], [norm])
    assert_near(params, wanted)


@pytest.mark.parametrize(("size", "max_norm"), [(1e-3, 1e9), (1e-9, 1e-6), (0.0, 1.0), (1.0, 0.0)])
def test_limits_at_their_ends(size, max_norm):
    """Far below its limit a gradient is left as it is; near zero the 1e-6 of clip_grad_norm_ counts; 0 stops all."""
    wanted = make_params()
    params, _optimizer, tail = tail_of(SGD, {"lr": 1.0})
    with torch.no_grad():
        for p in (*wanted, *params):
            p.zero_()
    grads = make_grads(params, 0, scale=size)
    stock_step(SGD(wanted, lr=1.0), wanted, grads, max_norm)
    tail.step(grads, max_norm=max_norm)
    assert_near(params, wanted)


def test_some_parameters_only():
    """A tail over some of the parameters leaves the others, and their state, alone."""
    params = make_params()
    optimizer = AdamW(params)
    before = [p.detach().clone() for p in params]
    chosen = [params[6], params[2]]
    NativeTail(optimizer, chosen).step(make_grads(chosen, 0))
    changed = [not torch.equal(p, b) for p, b in zip(params, before, strict=True)]
    assert changed == [False, False, True, False, False, False, True]
    assert set(optimizer.state) == set(chosen)


def test_many_tensors():
    """Three thousand tensors of three elements, in one call."""
    shapes = [(3,)] * 3000
    wanted = make_params(shapes)
    stock = AdamW(wanted)
    params, _, tail = tail_of(AdamW, {}, shapes=shapes)
    for step in range(2):
        grads = make_grads(params, step)
        stock_step(stock, wanted, grads, max_norm=1.0)
        tail.step(grads, max_norm=1.0)
    assert_near([torch.cat([p.detach() for p in params])], [torch.cat([p.detach() for p in wanted])], slack=4)


PARTS = st.lists(
    st.tuples(st.integers(0, 20_000), st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]), st.booleans()),
    min_size=1, max_size=6,
)  # fmt: skip


@settings(deadline=None, max_examples=60, derandomize=True)
@given(PARTS, st.sampled_from([FEW[1], FEW[3], FEW[4]]), st.booleans())
def test_any_list_of_tensors(parts, case, holes):
    """Any sizes and dtypes, gradients with gaps between their elements, missing ones, bfloat16 ones of float32 weights."""
    kind, options = case
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n, dtype, _ in parts]
    wanted = [p.detach().clone() for p in params]
    grads = []
    for i, (n, dtype, odd) in enumerate(parts):
        grad = torch.randn(2 * n, generator=generator).to(torch.bfloat16 if odd and dtype == torch.float32 else dtype)
        grads.append(None if holes and i % 2 else grad[::2] if odd else grad[:n])
    optimizer = kind(params, **options)
    tail = NativeTail(optimizer, params)
    tail.step(grads, max_norm=2.0, check=True)
    there = [i for i, g in enumerate(grads) if g is not None]
    norm = Truth(kind, options, [wanted[i] for i in there]).step([grads[i] for i in there], 2.0)
    assert_near([tail.grad_norm], [norm])
    for param, value in zip(params, wanted, strict=True):  # the truth's clip factor is float32
        assert_near([param], [value], slack=1e7 if param.dtype == torch.float64 else 2)


def test_shapes_reach_every_road():
    """The shapes of these tests cover a serial call, a parallel one, a partial chunk and an empty tensor."""
    sizes = [math.prod(shape) for shape in SHAPES]
    assert sum(sizes) > 32768
    assert 0 in sizes
    assert any(size > 8192 and size % 8192 for size in sizes)
