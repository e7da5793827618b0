"""Lion natively, bfloat16 gradients of float32 weights, and each parameter's own norm from the pass that is made anyway."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from fasttrain.errors import KernelError
from fasttrain.kernels import library, reference
from fasttrain.kernels.native_tail import NativeTail
from tests.kernels.lions import Lion
from tests.kernels.pairs import (
    FEW,
    all_bits,
    assert_near,
    assert_same_state,
    bits,
    give,
    make_grads,
    make_params,
    name_of,
    needs_native,
    stock_step,
    tail_of,
)

pytestmark = needs_native
OPTIONS = [{"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": d} for d in (0.0, 0.3)]


@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
def test_lion_equals_lion(options):
    """Clipped steps with a gradient that comes and goes and an lr that changes land where lion-pytorch's do."""
    wanted = make_params()
    stock = Lion(wanted, **options)
    params, optimizer, tail = tail_of(Lion, options)
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
def test_lion_in_every_dtype(dtype):
    """Widened for the arithmetic, rounded to the nearest once: the reference's bits but for a last place."""
    wanted = make_params(dtype=dtype)
    moments = [torch.zeros_like(p) for p in wanted]
    params, _optimizer, tail = tail_of(Lion, OPTIONS[1], dtype=dtype)
    for step in range(4):
        grads = make_grads(params, step)
        reference.lion_(wanted, grads, moments, **OPTIONS[1])
        tail.step(grads)
    assert_near(params, wanted, slack=4)


def test_lion_maximizes_and_skips():
    """maximize turns the gradient round; a bad step changes no bit; zero has no sign."""
    params, optimizer, tail = tail_of(Lion, {"lr": 0.1})
    other, _, tail2 = tail_of(Lion, {"lr": 0.1})
    optimizer.param_groups[0]["maximize"] = True
    grads = make_grads(params, 0)
    tail.step([-g for g in grads])
    tail2.step(grads)
    assert bits(params) == bits(other)
    before = all_bits(params, optimizer)
    assert tail.step([torch.full_like(p, math.nan) for p in params], max_norm=1.0, check=True) == 1
    assert all_bits(params, optimizer) == before
    still, _, tail3 = tail_of(Lion, {"lr": 0.1})
    tail3.step([torch.zeros_like(p) for p in still])
    assert bits(still) == bits(make_params())


def test_lion_state_goes_round():
    """State is lion-pytorch's: it loads there, and theirs here, in mid-training."""
    wanted = make_params()
    stock = Lion(wanted, **OPTIONS[1])
    params, optimizer, tail = tail_of(Lion, OPTIONS[1])
    middle = Lion(params, **OPTIONS[1])
    for step in range(6):
        grads = make_grads(params, step)
        stock_step(stock, wanted, grads, None)
        if step == 2:
            middle.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if step == 4:
            optimizer.load_state_dict(copy.deepcopy(middle.state_dict()))
        if step in (2, 3):
            stock_step(middle, params, grads, None)
        else:
            tail.step(grads)
    assert_near(params, wanted, slack=4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda o: setattr(o, "decoupled_wd", True), "decoupled_wd"),
        (lambda o: o.param_groups[0].update(cautious_factor=0.5), "cautious_factor=0.5"),
        (lambda o: o.param_groups[0].pop("betas"), "has no betas"),
    ],
)
def test_another_lion_is_refused(change, reason):
    """A Lion with something more switched on is not ours, and says why."""
    optimizer = Lion(make_params())
    change(optimizer)
    assert reason in str(NativeTail.obstacle(optimizer))


@pytest.mark.parametrize("level", library.INSTRUCTION_SETS)
def test_lion_has_the_same_bits_everywhere(level):
    """On every instruction set and any number of threads."""
    found = []
    for name, threads in (("baseline", 1), (level, 2)):
        library.force_instruction_set(name)
        torch.set_num_threads(threads)
        params, optimizer, tail = tail_of(Lion, OPTIONS[1])
        for step in range(3):
            tail.step(make_grads(params, step), max_norm=1.0)
        found.append(all_bits(params, optimizer))
    library.force_instruction_set(None)
    assert found[0] == found[1]


@pytest.mark.parametrize(("kind", "options"), [*FEW, (Lion, OPTIONS[1])], ids=name_of)
def test_bfloat16_gradients_of_float32_weights(kind, options):
    """Widened exactly: the bits of a step from the same gradients in float32, zeroed and skipped like them."""
    runs = []
    for dtype in (torch.float32, torch.bfloat16):
        params, optimizer, tail = tail_of(kind, options)
        for step in range(3):
            grads = [g.bfloat16().to(dtype) for g in make_grads(params, step)]
            tail.step(grads, max_norm=1.0, check=True, zero_grads=step == 2)
            assert step != 2 or all((g == 0).all() for g in grads)
        assert tail.step([torch.full_like(p, math.inf, dtype=dtype) for p in params], max_norm=1.0, check=True) == 1
        runs.append(all_bits(params, optimizer))
    assert runs[0] == runs[1]


def test_mixed_gradients_in_another_order():
    """A bfloat16 gradient is laid out anew in its own dtype."""
    params = [nn.Parameter(torch.arange(12.0).reshape(3, 4))]
    grad = torch.arange(12.0).reshape(4, 3).bfloat16().t()
    optimizer = SGD(params, lr=1.0)
    NativeTail(optimizer, params).step([grad])
    assert torch.equal(params[0].detach(), torch.arange(12.0).reshape(3, 4) - grad.float())


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_norms_of_every_parameter(norm_type):
    """norms_out holds each scaled gradient's own norm, whether the step is clipped, skipped or neither; 0 without a gradient."""
    params = make_params()
    optimizer = AdamW(params)
    tail = NativeTail(optimizer, params, norm_type=norm_type)
    norms = torch.full((len(params),), math.nan)
    for limit in (None, 1.0):
        grads = [*make_grads(params, 0)[:-1], None]
        tail.step(grads, max_norm=limit, grad_scale=-0.5, norms_out=norms)
        wanted = [reference.grad_norm([] if g is None else [g * 0.5], norm_type) for g in grads]
        torch.testing.assert_close(norms, torch.stack(wanted), rtol=3e-7, atol=0)
    grads[2][0, 0] = math.nan
    assert tail.step(grads, check=True, norms_out=norms) == 1
    assert norms.isnan().tolist() == [i == 2 for i in range(len(params))]
    norms.fill_(7.0)
    tail.step(make_grads(params, 1), max_norm=1.0)
    assert (norms == 7.0).all()  # not asked for, not written
    for bad in (torch.zeros(3), torch.zeros(len(params), dtype=torch.float64)):
        with pytest.raises(KernelError, match="norms_out"):
            tail.step(grads, norms_out=bad)


def test_norms_do_not_change_the_step():
    """The same bits with and without them."""
    runs = []
    for norms in (None, torch.zeros(7)):
        params, optimizer, tail = tail_of(AdamW, {})
        give(params, make_grads(params, 0))
        tail.step([p.grad for p in params], max_norm=1.0, norms_out=norms)
        runs.append(all_bits(params, optimizer))
    assert runs[0] == runs[1]
