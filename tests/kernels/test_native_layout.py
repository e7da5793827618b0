"""Memory order, and what a tail refuses: every message names the culprit, and nothing is written."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop

from fasttrain.errors import KernelError
from fasttrain.kernels.layout import in_order_of, is_dense, overlapping, same_order
from fasttrain.kernels.native_tail import NativeTail
from tests.kernels.pairs import assert_near, bits, make_grads, make_params, needs_native, stock_step, tail_of

LAST = torch.channels_last


@needs_native
@pytest.mark.parametrize("param_format", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("grad_format", [torch.contiguous_format, LAST, "expanded", "gaps"])
def test_gradients_in_another_order(param_format, grad_format):
    """Whatever the strides of weights and gradients, the elements that meet are those that torch lets meet."""

    def build():
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(4, 3, 5, 2, generator=generator).contiguous(memory_format=param_format)
        return [nn.Parameter(weight), nn.Parameter(torch.randn(6, generator=generator))]

    def shaped(grad):
        if grad_format == "expanded":
            return grad[:1].expand(grad.shape)
        if grad_format == "gaps":
            return torch.stack([grad, grad], dim=-1)[..., 0]
        return grad.contiguous(memory_format=grad_format)

    wanted, params = build(), build()
    stock, optimizer = AdamW(wanted), AdamW(params)
    tail = NativeTail(optimizer, params)
    for step in range(3):
        weight, bias = make_grads(params, step)
        stock_step(stock, wanted, [shaped(weight), bias], max_norm=1.0)
        tail.step([shaped(weight), bias], max_norm=1.0)
    assert_near(params, wanted, slack=4)
    state = optimizer.state[params[0]]["exp_avg"]
    assert state.stride() == params[0].stride()
    assert_near([state], [stock.state[wanted[0]]["exp_avg"]], slack=4)


@needs_native
def test_loaded_state_in_another_order():
    """State saved from contiguous weights is laid out anew for channels_last ones."""
    wanted = [nn.Parameter(torch.arange(24.0).reshape(2, 3, 2, 2))]
    stock = AdamW(wanted)
    stock_step(stock, wanted, make_grads(wanted, 0), None)
    params = [nn.Parameter(wanted[0].detach().contiguous(memory_format=LAST))]
    optimizer = AdamW(params)
    optimizer.load_state_dict(stock.state_dict())
    optimizer.state[params[0]]["step"] = optimizer.state[params[0]]["step"].clone()  # torch shares it with the source
    tail = NativeTail(optimizer, params)
    stock_step(stock, wanted, make_grads(wanted, 1), None)
    tail.step(make_grads(wanted, 1))
    assert_near(params, wanted, slack=4)


def test_dense_and_same_order():
    """Dense means every element of one block, once; order is compared where it matters."""
    base = torch.zeros(4, 6)
    assert is_dense(base.t())
    assert not is_dense(base[:, ::2])
    assert not is_dense(base[:1].expand(4, 6))
    assert is_dense(torch.zeros(0, 3).t())
    assert same_order(base[:, :1].contiguous(), torch.zeros(1, 4).t())
    assert not same_order(torch.zeros(4, 4), torch.zeros(4, 4).t())
    assert torch.equal(in_order_of(base + 1, torch.zeros(6, 4).t()), base + 1)
    assert overlapping([base[:2], base[2:]]) is None
    assert overlapping([base[2:], base[:3]]) == (1, 0)


class OwnStep(AdamW):
    def step(self, closure=None):
        return super().step(closure)


class OnlyDefaults(AdamW):
    def __init__(self, params):
        super().__init__(params, lr=0.5)


def _hooked():
    optimizer = AdamW(make_params())
    optimizer.register_step_pre_hook(lambda *_: None)
    return optimizer


OBSTACLES = [
    (lambda: RMSprop(make_params()), "RMSprop is not"),
    (lambda: OwnStep(make_params()), "OwnStep is not"),
    (_hooked, "step hooks"),
    (lambda: Adam(make_params(), differentiable=True), "differentiable"),
    (lambda: Adam(make_params(), capturable=True), "capturable"),
    (lambda: SGD([torch.zeros(2, dtype=torch.complex64, requires_grad=True)]), "parameter 0 of group 0 has dtype"),
    (lambda: SGD([torch.zeros(2, device="meta", requires_grad=True)]), "is on meta"),
    (lambda: SGD([torch.zeros(4, 4)[:, ::2].requires_grad_()]), "view with gaps"),
    (lambda: SGD([nn.Parameter(b) for b in torch.zeros(3).expand(2, 3)]), "share memory"),
]


@needs_native
@pytest.mark.parametrize(("make", "reason"), OBSTACLES)
def test_obstacles(make, reason):
    """What cannot be had says why in one sentence, and building it anyway raises that sentence."""
    optimizer = make()
    assert reason in str(NativeTail.obstacle(optimizer))
    with pytest.raises(KernelError, match=reason):
        NativeTail(optimizer, optimizer.param_groups[0]["params"])


@needs_native
def test_no_obstacle_for_a_subclass_that_steps_as_torch_does():
    """A subclass is taken when neither its step nor its state differs."""
    assert NativeTail.obstacle(OnlyDefaults(make_params())) is None


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda grads: grads.pop(), "6 of them"),
        (lambda grads: grads.__setitem__(2, torch.zeros(3, 7)), "gradient of parameter 2"),
        (lambda grads: grads.__setitem__(4, grads[4].double()), "gradient of parameter 4.*float64"),
        (lambda grads: grads.__setitem__(5, grads[5].to_sparse()), "gradient of parameter 5"),
        (lambda grads: grads.__setitem__(0, grads[0].to("meta")), "gradient of parameter 0.*meta"),
    ],
)
def test_gradients_that_do_not_fit(change, message):
    """A gradient of another count, shape, dtype, layout or device is refused before anything is written."""
    params, optimizer, tail = tail_of(AdamW, {})
    before = bits(params)
    grads = make_grads(params, 0)
    change(grads)
    with pytest.raises(KernelError, match=message):
        tail.step(grads)
    assert bits(params) == before
    assert not optimizer.state


@needs_native
@pytest.mark.parametrize(
    "options",
    [{"max_norm": -1.0}, {"max_norm": math.nan}, {"clip_value": -0.1}, {"max_norm": 1.0, "clip_value": 1.0}],
    ids=str,
)
def test_bad_options(options):
    """A limit below zero, a NaN limit, and two limits at once are refused."""
    params, optimizer, tail = tail_of(AdamW, {})
    before = bits(params)
    for _ in range(2):
        with pytest.raises(KernelError, match=r"Use None|Leave the other"):
            tail.step(make_grads(params, 0), **options)
    assert bits(params) == before
    assert not optimizer.state


@needs_native
def test_foreign_parameters_and_losses():
    """A parameter of another optimizer and a loss that is no float are refused."""
    params, optimizer, tail = tail_of(AdamW, {})
    with pytest.raises(KernelError, match="parameter 1, unknown"):
        NativeTail(optimizer, [params[0], nn.Parameter(torch.zeros(2))])
    with pytest.raises(KernelError, match="loss"):
        tail.step(make_grads(params, 0), check=True, loss=torch.tensor(1))
    with pytest.raises(KernelError, match="norm_type"):
        NativeTail(optimizer, params, norm_type=1.0)
