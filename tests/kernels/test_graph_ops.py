"""The face inside torch.compile(fullgraph=True): one opaque operation, no copies, the eager step's numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.optim import SGD, AdamW, RMSprop

from fasttrain.errors import KernelError
from fasttrain.kernels import clip_and_step_, grad_norm, graph_ops, reference
from tests.kernels.pairs import assert_near, make_grads, make_params, no_sanitizer

pytestmark = no_sanitizer


@pytest.fixture(autouse=True)
def _traced(monkeypatch):
    """torch's flag for tracing backward, and caches of this test's own."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        yield
    torch.compiler.reset()


def build(kind, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    return model, kind(model.parameters(), lr=0.05, **options)


def train(model, optimizer, x):
    """A whole step: backward, clip, update, and the loss that the new weights give."""
    loss = model(x).square().mean()
    loss.backward()
    norm = clip_and_step_(optimizer, max_norm=0.2, grad_scale=0.5, zero_grad=True)
    with torch.no_grad():
        return norm, model(x).square().mean()


@pytest.mark.parametrize(("kind", "options"), [(SGD, {"momentum": 0.9}), (AdamW, {}), (RMSprop, {})])
def test_a_compiled_step_is_the_eager_one(kind, options):
    """Whole in one graph, compiled once: norm, weights, and what is computed from the new weights."""
    eager, compiled = build(kind, **options), build(kind, **options)
    step = torch.compile(train, fullgraph=True)
    for i in range(4):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(i))
        for wanted, got in zip(train(*eager, x), step(*compiled, x), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)  # Inductor's own sums add in another order
        assert all(p.grad is None for p in compiled[0].parameters())
    for p, q in zip(eager[0].parameters(), compiled[0].parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-7)


def test_nothing_is_copied():
    """The generated code hands the parameters themselves to the operation: no clone and no copy of them."""
    model, optimizer = build(AdamW)
    _, (code,) = run_and_get_code(torch.compile(train, fullgraph=True), model, optimizer, torch.randn(5, 8))
    calls = [line for line in code.splitlines() if "fasttrain_kernels.clip_and_step_.default(" in line]
    assert len(calls) == 1
    params = calls[0].split("[")[1].split("]")[0].split(", ")
    assert len(params) == 4
    assert all(name.startswith(("arg", "primals")) for name in params), params
    assert "clone" not in code
    assert "copy_" not in code


def test_copies_are_written_back(recwarn):
    """Where a compiler does hand copies over (a later use that needs gradients), they too hold the new weights."""
    eager, compiled = build(SGD), build(SGD)

    def odd(model, optimizer, x):
        loss = model(x).square().mean()
        loss.backward()
        clip_and_step_(optimizer, max_norm=0.2, zero_grad=True)
        return model(x).sum()

    x = torch.randn(5, 8)
    torch.testing.assert_close(torch.compile(odd, fullgraph=True)(*compiled, x), odd(*eager, x), rtol=1e-5, atol=1e-6)
    for p, q in zip(eager[0].parameters(), compiled[0].parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_the_norm_in_a_graph(norm_type):
    """grad_norm of what a graph computes."""
    tensors = make_grads(make_params(), 0)

    @torch.compile(fullgraph=True)
    def norm(ts):
        return grad_norm([t * 2 for t in ts], norm_type) + 1

    assert_near([norm(tensors)], [reference.grad_norm([t * 2 for t in tensors], norm_type) + 1])


def test_fakes_and_schemas():
    """torch's own check of an operation: schema, fake and aliasing agree with what runs."""
    tensors = make_grads(make_params(), 0)
    torch.library.opcheck(graph_ops.OPS.grad_norm.default, (tensors, 2.0), test_utils=("test_schema", "test_faketensor"))
    model, optimizer = build(SGD)
    params = [p.detach() for p in model.parameters()]
    args = (id(optimizer), params, [torch.ones_like(p) for p in params], 1.0, 1.0)
    torch.library.opcheck(graph_ops.OPS.clip_and_step_.default, args, test_utils=("test_faketensor",))


def test_a_gone_optimizer_and_a_bad_limit():
    """An id that is no optimizer's, and a negative limit, are refused."""
    with pytest.raises(KernelError, match="no longer exists"):
        graph_ops.OPS.clip_and_step_(0, [torch.zeros(2)], [torch.ones(2)], None, 1.0)
    model, optimizer = build(SGD)
    params = [p.detach() for p in model.parameters()]
    with pytest.raises(KernelError, match="max_norm"):
        graph_ops.OPS.clip_and_step_(id(optimizer), params, [torch.ones_like(p) for p in params], -1.0, 1.0)
