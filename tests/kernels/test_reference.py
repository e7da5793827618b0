"""The plain-torch truth is torch.optim's, and Lion's is its paper's."""

from __future__ import annotations

import math

import pytest
import torch

from fasttrain.kernels import reference
from tests.kernels.pairs import CASES, Truth, assert_near, make_grads, make_params, name_of, stock_step


@pytest.mark.parametrize(("kind", "options"), CASES, ids=name_of)
def test_reference_equals_torch(kind, options):
    """Norm, clip and update composed from the reference land where clip_grad_norm_ and torch.optim do."""
    wanted, params = make_params(), make_params()
    stock, truth = kind(wanted, **options, foreach=False), Truth(kind, options, params)
    for step in range(4):
        grads = make_grads(params, step)
        assert_near([truth.step(grads, 2.0)], [stock_step(stock, wanted, grads, max_norm=2.0)])
    assert_near(params, wanted, slack=4)


def test_lion_by_hand():
    """One step of Lion on two numbers."""
    weight, moment = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.0])
    reference.lion_([weight], [torch.tensor([-1.0, 3.0])], [moment], lr=0.1, weight_decay=0.5)
    torch.testing.assert_close(weight, torch.tensor([0.95 - 0.1, -1.9 - 0.1]))
    torch.testing.assert_close(moment, torch.tensor([0.485, 0.03]))


def test_finite_test_and_scale():
    """A bad norm or loss is bad; scaling clamps after it multiplies and signs last."""
    good, bad = torch.tensor(1.0), torch.tensor(math.nan)
    assert not reference.is_bad(good, good)
    assert reference.is_bad(bad)
    assert reference.is_bad(good, torch.tensor(math.inf))
    grad = torch.tensor([4.0, -0.5, 1.0], dtype=torch.bfloat16)
    assert reference.scaled(grad, 0.5, 1.0, maximize=True).tolist() == [-1.0, 0.25, -0.5]
    assert reference.grad_norm([]) == 0
    assert reference.grad_norm([torch.zeros(0)]) == 0
