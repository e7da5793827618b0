"""The state is torch's own: it loads into stock optimizers and back in mid-training, and a tail notices what moved."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from fasttrain.errors import KernelError
from fasttrain.kernels.native_tail import NativeTail
from tests.kernels.pairs import (
    FEW,
    all_bits,
    assert_near,
    assert_same_state,
    bits,
    make_grads,
    make_params,
    name_of,
    needs_native,
    stock_step,
    tail_of,
)

pytestmark = needs_native
ROADS = [{"fused": True}, {"foreach": True}, {"foreach": False}]


@pytest.mark.parametrize("road", ROADS, ids=str)
@pytest.mark.parametrize(("kind", "options"), FEW, ids=name_of)
def test_state_goes_to_torch_and_back(kind, options, road):
    """Two native steps, two of torch's own, two native: where six of torch's land."""
    wanted = make_params()
    stock = kind(wanted, **options, **road)
    params, optimizer, tail = tail_of(kind, options)
    middle = kind(params, **options, **road)
    for step in range(6):
        grads = make_grads(params, step)
        stock_step(stock, wanted, grads, max_norm=2.0)
        if step == 2:
            middle.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if step == 4:
            optimizer.load_state_dict(copy.deepcopy(middle.state_dict()))
        if step in (2, 3):
            stock_step(middle, params, grads, max_norm=2.0)
        else:
            tail.step(grads, max_norm=2.0)
    assert_near(params, wanted, slack=4)
    assert_same_state(optimizer, stock, slack=4)


@pytest.mark.parametrize(("kind", "options"), FEW, ids=name_of)
def test_resume_is_bitwise(kind, options):
    """k steps, save, load, n - k steps give the bits of n steps."""
    params, optimizer, tail = tail_of(kind, options)
    for step in range(2):
        tail.step(make_grads(params, step), max_norm=1.0)
    saved = copy.deepcopy(([p.detach() for p in params], optimizer.state_dict()))
    other, resumed, tail2 = tail_of(kind, options)
    with torch.no_grad():
        for p, value in zip(other, saved[0], strict=True):
            p.copy_(value)
    resumed.load_state_dict(saved[1])
    for step in range(2, 4):
        tail.step(make_grads(params, step), max_norm=1.0)
        tail2.step(make_grads(params, step), max_norm=1.0)
    assert all_bits(params, optimizer) == all_bits(other, resumed)


def test_double_step_counts():
    """Under a float64 default torch counts steps in float64, and so does the tail."""
    torch.set_default_dtype(torch.float64)
    try:
        params, optimizer, tail = tail_of(AdamW, {"foreach": False})
        tail.step(make_grads(params, 0))
        tail.step(make_grads(params, 1))
    finally:
        torch.set_default_dtype(torch.float32)
    counts = [state["step"] for state in optimizer.state.values()]
    assert all(count.dtype == torch.float64 and count == 2 for count in counts)
    wanted = make_params()
    stock = AdamW(wanted, foreach=False)
    for step in range(2):
        stock_step(stock, wanted, make_grads(wanted, step), None)
    assert_near(params, wanted, slack=4)


def test_step_counts_of_their_own():
    """Parameters whose counts differ get bias corrections of their own."""
    wanted = make_params()
    stock = AdamW(wanted, foreach=False)
    params, optimizer, tail = tail_of(AdamW, {})
    for step in range(6):
        grads = [g if step % (i + 1) == 0 else None for i, g in enumerate(make_grads(params, step))]
        stock_step(stock, wanted, grads, None)
        tail.step(grads)
    assert_near(params, wanted, slack=4)
    assert_same_state(optimizer, stock, slack=4)


def test_a_moved_parameter_is_stale():
    """`stale` sees new memory behind a parameter or its state, and `refresh` follows it."""
    params, optimizer, tail = tail_of(AdamW, {})
    tail.step(make_grads(params, 0))
    assert not tail.stale()
    params[2].data = params[2].data.clone()
    assert tail.stale()
    assert tail.moved(params)
    tail.refresh()
    assert not tail.stale()
    assert not tail.moved(params)
    state = optimizer.state[params[2]]
    state["exp_avg"] = state["exp_avg"].clone()
    assert tail.stale()
    tail.refresh()
    before = bits([params[2], state["exp_avg"]])
    tail.step(make_grads(params, 1))
    after = bits([params[2], state["exp_avg"]])
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_a_cleared_state_starts_anew():
    """Clearing optimizer.state is noticed without being told."""
    params, optimizer, tail = tail_of(AdamW, {})
    for step in range(3):
        tail.step(make_grads(params, step))
    optimizer.state.clear()
    tail.step(make_grads(params, 3))
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}


def test_schedulers_see_the_step():
    """torch's schedulers neither warn nor block a tail, and their lr and momentum are followed."""
    wanted = make_params()
    stock = SGD(wanted, lr=0.1, momentum=0.9)
    params, optimizer, _ = tail_of(SGD, {"lr": 0.1, "momentum": 0.9})
    schedules = [OneCycleLR(o, max_lr=0.5, total_steps=8) for o in (stock, optimizer)]
    tail = NativeTail(optimizer, params)
    for step in range(6):
        stock_step(stock, wanted, make_grads(params, step), None)
        tail.step(make_grads(params, step))
        for schedule in schedules:
            schedule.step()
    assert_near(params, wanted, slack=4)


def test_versions_are_bumped_on_request():
    """bump_versions makes autograd refuse a backward through weights that a step has overwritten."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = SGD([weight], lr=0.1)
    loss = (weight * weight).sum()
    NativeTail(optimizer, [weight]).step([torch.ones(3)])
    loss.backward(retain_graph=True)
    NativeTail(optimizer, [weight], bump_versions=True).step([torch.ones(3)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_tail_does_not_keep_its_optimizer():
    """The optimizer goes when its owner lets it go."""
    params, optimizer, tail = tail_of(AdamW, {})
    tail.step(make_grads(params, 0))
    alive = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert alive() is None
    assert tail.stale()
    with pytest.raises(KernelError, match="no longer exists"):
        tail.step(make_grads(params, 1))


def test_amsgrad_switched_on_without_its_state():
    """State that torch itself could not go on from is refused by name, and nothing is written."""
    params, optimizer, tail = tail_of(AdamW, {})
    tail.step(make_grads(params, 0))
    before = bits(params)
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(KernelError, match="parameter 0 of group 0 has no max_exp_avg_sq"):
        tail.step(make_grads(params, 1))
    assert bits(params) == before


def test_a_scheduler_alone_is_no_obstacle():
    """A step wrapped by a scheduler is still torch's; one replaced by a user is not."""
    optimizer = AdamW(make_params())
    StepLR(optimizer, 1)
    assert NativeTail.obstacle(optimizer) is None
    optimizer.step = lambda closure=None: None
    assert "replaced" in str(NativeTail.obstacle(optimizer))
