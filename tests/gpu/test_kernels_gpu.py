"""The Triton tail on a GPU: every law of the interpreter again, and what only a GPU can show. Not yet run on one."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from fasttrain.errors import KernelError
from fasttrain.kernels import clip_and_step_
from fasttrain.kernels.device_scale import DeviceScale
from fasttrain.kernels.triton_tail import TritonTail
from tests.kernels.device_tail_checks import *  # noqa: F403
from tests.kernels.triton_checks import *  # noqa: F403
from tests.kernels.triton_checks import SHAPES, assert_near, assert_same_state, bits_of, grads_on, params_on, stock_step, tail_on

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")]


@pytest.fixture
def device() -> str:
    return "cuda:0"


def test_the_hosts_and_the_devices_steps_agree(device):
    """The face on a GPU: clip_grad_norm_ and step, for an optimizer with a tail."""
    wanted, params = params_on(device), params_on(device)
    stock, optimizer = AdamW(wanted, lr=0.01), AdamW(params, lr=0.01)
    for step in range(4):
        grads = grads_on(device, params, step)
        norm = stock_step(stock, wanted, grads, 1.0)
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        assert_near([clip_and_step_(optimizer, max_norm=1.0, zero_grad=True)], [norm])
    assert_near(params, wanted, slack=4)


def test_no_host_waits(device):
    """torch's sync debug mode finds no step that waits for the device."""
    params, optimizer, tail = tail_on(device, AdamW, {}, scale=DeviceScale(device))
    grads, loss = grads_on(device, params, 0), torch.tensor(1.0, device=device)
    tail.step(grads, max_norm=1.0, check=True, loss=loss)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3):
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            tail.step(grads, max_norm=1.0, check=True, loss=loss, zero_grads=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(tail: TritonTail, static: list[torch.Tensor]) -> torch.cuda.CUDAGraph:
    """A real step on a side stream, then the same call recorded."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        tail.step(static, max_norm=1.0, check=True)
    return graph


def test_in_a_cuda_graph(device):
    """Replays are eager steps: other gradients, an lr that moves, a bad step, state that was loaded."""
    params, optimizer, tail = tail_on(device, AdamW, {"lr": 0.05})
    wanted = params_on(device)
    stock = AdamW(wanted, lr=0.05)
    static = [torch.zeros_like(p) for p in params]
    grads = grads_on(device, params, 0)
    stock_step(stock, wanted, grads, 1.0)
    tail.step(grads, max_norm=1.0, check=True)
    graph = captured(tail, static)
    for step in range(1, 7):
        if step == 5:
            optimizer.load_state_dict(copy.deepcopy(stock.state_dict()))
        stock.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] = 0.05 / step
        grads = grads_on(device, params, step)
        if step == 3:
            grads[0].fill_(math.nan)
        else:
            stock_step(stock, wanted, grads, 1.0)
        for s, g in zip(static, grads, strict=True):
            s.copy_(g)
        tail.sync()
        graph.replay()
    assert int(tail.skips) == 1
    assert_near(params, wanted, slack=8)
    assert_same_state(optimizer, stock, slack=8)


@pytest.mark.parametrize("replays", [200, pytest.param(100_000, marks=pytest.mark.slow)])
def test_replays_are_bitwise_equal_under_contention(device, replays):
    """The norm of the same gradients has the same bits at every replay, whatever else the device does."""
    params, _optimizer, tail = tail_on(device, AdamW, {"lr": 0.0, "weight_decay": 0.0}, [*SHAPES, (1000, 1000)])
    static = grads_on(device, params, 0)
    tail.step(static, max_norm=1.0, check=True)
    graph = captured(tail, static)
    tail.sync()
    side, busy = torch.cuda.Stream(), torch.randn(512, 512, device=device)
    differs = torch.zeros((), device=device)
    graph.replay()
    first = tail.grad_norm.clone()
    for i in range(replays):
        if i % 3 == 0:
            with torch.cuda.stream(side):
                busy = (busy @ busy).clamp(-1, 1)
        graph.replay()
        differs += (tail.grad_norm != first).float()
    assert int(differs) == 0


def test_runs_are_bitwise_equal_captured_or_not(device):
    """Ten eager steps and ten replays give the same bits."""
    runs = []
    for replay in (False, True):
        params, optimizer, tail = tail_on(device, AdamW, {"lr": 0.05})
        static = grads_on(device, params, 0)
        tail.step(static, max_norm=1.0, check=True)
        graph = captured(tail, static) if replay else None
        for step in range(1, 10):
            for s, g in zip(static, grads_on(device, params, step), strict=True):
                s.copy_(g)
            if graph is None:
                tail.step(static, max_norm=1.0, check=True)
            else:
                tail.sync()
                graph.replay()
        runs.append(bits_of(params, optimizer))
    assert runs[0] == runs[1]


def test_twenty_thousand_tensors(device):
    """Three launches."""
    params = params_on(device, [(17,)] * 20_000)
    optimizer = AdamW(params)
    tail = TritonTail(optimizer, params)
    grads = [torch.ones_like(p) for p in params]
    tail.step(grads, max_norm=1.0, check=True)
    assert tail.launches == 3
    assert_near([tail.grad_norm], [torch.tensor(math.sqrt(17 * 20_000), device=device)])


@pytest.mark.slow
def test_more_elements_than_an_int32(device):
    """Offsets beyond 2**31, in bfloat16: 13 GB of weights, gradients and momentum."""
    n = 2**31 + 12_345
    param = nn.Parameter(torch.ones(n, dtype=torch.bfloat16, device=device))
    optimizer = torch.optim.SGD([param], lr=0.5)
    tail = TritonTail(optimizer, [param])
    grad = torch.zeros(n, dtype=torch.bfloat16, device=device)
    grad[-1] = 1.0
    tail.step([grad], max_norm=math.inf, check=True)
    assert float(tail.grad_norm) == 1.0
    assert float(param[-1]) == 0.5
    assert float(param[:1000].sum()) == 1000.0


def test_other_devices(device):
    """Parameters on the host, or on two devices, are refused by name."""
    with pytest.raises(KernelError, match="parameter 1 of group 0 is on cpu"):
        TritonTail(AdamW([*params_on(device, [(3,)]), *params_on("cpu", [(3,)])]), params_on(device, [(3,)]))
