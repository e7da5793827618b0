"""What the Triton tail must do, on whatever `device` the importing module names: the interpreter's CPU, or a GPU.

Every value is compared with torch.optim and clip_grad_norm_, or with `reference` where torch has no such mix of dtypes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from fasttrain.errors import KernelError
from fasttrain.kernels import reference, triton_launch
from fasttrain.kernels.device_scale import DeviceScale
from fasttrain.kernels.triton_tail import TritonTail
from fasttrain.kernels.wide_state import MASTER
from tests.kernels.lions import Lion
from tests.kernels.pairs import CASES, FEW, Truth, assert_near, assert_same_state, give, make_grads, make_params, name_of, stock_step

SHAPES = [(1,), (0,), (7, 3), (8193,), (70, 121)]  # one element, none, an odd tail, a chunk and one more, a tail of 278
SMALL = [(5,), (3, 7)]
HALVES = [torch.bfloat16, torch.float16]
FLOATS = [torch.float32, *HALVES]
LIONS = [(Lion, {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": d}) for d in (0.0, 0.3)]


def params_on(device: str, shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().to(device)) for p in make_params(shapes, dtype)]


def grads_on(device: str, params: Sequence[Tensor], step: int, scale: float = 1.0) -> list[Tensor]:
    return [g.to(device) for g in make_grads(params, step, scale)]


def tail_on(
    device: str, kind: type[Optimizer], options: dict[str, Any], shapes: Any = SHAPES, dtype: Any = torch.float32, **more: Any
) -> Any:
    params = params_on(device, shapes, dtype)
    optimizer = kind(params, **options)
    return params, optimizer, TritonTail(optimizer, params, **more)


def bits_of(params: Sequence[Tensor], optimizer: Optimizer) -> list[bytes]:
    state = [v for slots in optimizer.state.values() for v in slots.values() if isinstance(v, Tensor)]
    return [t.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() for t in (*params, *state)]


def poison(tail: TritonTail) -> None:
    """NaN into everything that a step must write before it reads."""
    for scratch in (tail._shared.verdict, tail._shared.record, tail.grad_norm, *([] if tail._binding is None else [tail._binding.partial])):
        scratch.fill_(math.nan)


# -- the update is torch's ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "options"), CASES + LIONS, ids=name_of)
def test_every_option_equals_torch(kind, options, device):
    """Clipped steps out of poisoned scratch, a gradient that comes and goes and an lr that changes, land where torch's do."""
    wanted = params_on(device)
    stock = kind(wanted, **options, **({} if kind is Lion else {"foreach": False}))
    params, optimizer, tail = tail_on(device, kind, options)
    for step in range(4):
        grads = grads_on(device, params, step)
        if step in (0, 2):
            grads[2] = None
        for group in (stock.param_groups[0], optimizer.param_groups[0]):
            group["lr"] = options["lr"] * (1.0 if step < 2 else 0.25)
        norm = stock_step(stock, wanted, grads, max_norm=3.0)
        poison(tail)
        tail.step(grads, max_norm=3.0, check=True)
        assert_near([tail.grad_norm], [norm])
        assert not tail.skipped
        assert tail.launches == 3
    assert_near(params, wanted, slack=4)
    assert_same_state(optimizer, stock, slack=4)


@pytest.mark.parametrize("grad_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("kind", "options"), [FEW[2], FEW[4], LIONS[1]], ids=name_of)
def test_every_mix_of_dtypes(kind, options, dtype, grad_dtype, device):
    """Parameters of one dtype, gradients of another: widened for the arithmetic, rounded (interpreter: cut) once a step."""
    wanted, steps = params_on("cpu", dtype=dtype), 3
    truth = Truth(kind, options, wanted) if kind is not Lion else None
    moments = [torch.zeros_like(p) for p in wanted]
    params, optimizer, tail = tail_on(device, kind, options, dtype=dtype)
    for step in range(steps):
        grads = [g.to(grad_dtype) for g in make_grads(params_on("cpu"), step)]
        if truth is not None:
            truth.step(grads, 3.0)
        else:
            factor = reference.clip_factor(reference.grad_norm(grads), 3.0)
            reference.lion_(wanted, [reference.scaled(g, factor) for g in grads], moments, **options)
        tail.step([g.to(device) for g in grads], max_norm=3.0)
    slack = 4 if dtype == torch.float32 else steps  # a last place a step
    if kind is Lion and dtype in HALVES:  # a moment cut to its dtype may turn a sign: its weights are two steps of lr off
        slack = steps + 2 * options["lr"] * steps / 2**-7
    assert_near([p.cpu() for p in params], wanted, slack=slack)
    assert {s.dtype for slots in optimizer.state.values() for k, s in slots.items() if k != "step"} <= {dtype}


@pytest.mark.parametrize("grad_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("kind", "options"), [(SGD, {"lr": 0.1}), FEW[1], (AdamW, {"lr": 0.01, "amsgrad": True}), LIONS[1]], ids=name_of)
def test_master_weights(kind, options, dtype, grad_dtype, device):
    """With float32 masters the run is the float32 run, to float32 roundings, and the parameters are its rounding."""
    params, optimizer, tail = tail_on(device, kind, options, dtype=dtype, master_weights=True)
    wanted = [nn.Parameter(p.detach().float()) for p in params]
    stock = kind(wanted, **options)
    for step in range(4):
        grads = [g.to(grad_dtype or dtype) for g in grads_on(device, wanted, step)]
        stock_step(stock, wanted, [g.float() for g in grads], max_norm=2.0)
        tail.step(grads, max_norm=2.0, check=True)
    masters = [optimizer.state[p][MASTER] for p in params]
    assert_near(masters, wanted, slack=4)
    for param, master in zip(params, masters, strict=True):
        gap = (param.float() - master).abs()
        assert (gap <= master.abs() * torch.finfo(dtype).eps + 1e-7).all()
    for slots, own in zip(optimizer.state.values(), stock.state.values(), strict=bool(stock.state)):
        for name, value in own.items():
            assert slots[name].dtype == torch.float32
            assert_near([slots[name]], [value], slack=4)


def test_masters_survive_loading(device):
    """torch rounds loaded state to its parameter's dtype; masters and their moments come back bit for bit."""
    params, optimizer, tail = tail_on(device, AdamW, {}, shapes=SMALL, dtype=torch.bfloat16, master_weights=True)
    for step in range(2):
        tail.step(grads_on(device, params, step))
    saved, weights = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    other, resumed, tail2 = tail_on(device, AdamW, {}, shapes=SMALL, dtype=torch.bfloat16, master_weights=True)
    with torch.no_grad():
        for p, value in zip(other, weights, strict=True):
            p.copy_(value)
    resumed.load_state_dict(saved)
    for t, ps in ((tail, params), (tail2, other)):
        t.step(grads_on(device, ps, 2))
    assert bits_of(params, optimizer) == bits_of(other, resumed)
    plain = AdamW(params_on(device, SMALL, torch.bfloat16))
    plain.load_state_dict(saved)  # and a stock optimizer takes the same state
    give(plain.param_groups[0]["params"], grads_on(device, params, 3))
    plain.step()


def test_groups_and_dtypes_in_one_plan(device):
    """Groups with hyperparameters of their own, three dtypes, two modes: one plan, one launch a kind."""

    def build() -> tuple[list[nn.Parameter], Optimizer]:
        params = params_on(device)
        params[4] = nn.Parameter(params[4].detach().bfloat16())
        first = {"params": params[:3], "lr": 0.1, "betas": (0.5, 0.9), "amsgrad": True}
        return params, AdamW([first, {"params": params[3:], "weight_decay": 0.3, "maximize": True}], fused=False)

    (wanted, stock), (params, optimizer) = build(), build()
    tail = TritonTail(optimizer, params)
    for step in range(3):
        grads = grads_on(device, params, step)
        stock_step(stock, wanted, grads, None)
        tail.step(grads)
    assert tail.launches == 1 + 3
    assert_near(params, wanted, slack=4)


def test_hyperparameters_may_change_every_step(device):
    """Momentum, dampening and decay are taken over at each step, and momentum may be switched on and off."""
    wanted = params_on(device, SMALL)
    stock = SGD(wanted, lr=0.1, foreach=False)
    params, optimizer, tail = tail_on(device, SGD, {"lr": 0.1}, SMALL)
    for step, momentum in enumerate((0.0, 0.9, 0.5, 0.0, 0.9)):
        for group in (stock.param_groups[0], optimizer.param_groups[0]):
            group["momentum"], group["weight_decay"], group["dampening"] = momentum, 0.01 * step, 0.1 * step
        grads = grads_on(device, params, step)
        stock_step(stock, wanted, grads, max_norm=1.0)
        tail.step(grads, max_norm=1.0)
    assert_near(params, wanted, slack=4)


def test_lr_may_be_a_tensor(device):
    """A 0-d tensor is read anew at each step."""
    lr = torch.tensor(0.125, device=device)
    params, _, tail = tail_on(device, SGD, {"lr": lr}, SMALL)
    wanted = [p.detach().clone() for p in params]
    for step, value in enumerate((0.125, 0.5, 0.25)):
        lr.fill_(value)
        grads = grads_on(device, params, step)
        tail.step(grads)
        wanted = [w - value * g for w, g in zip(wanted, grads, strict=True)]
    assert_near(params, wanted)


def test_many_tensors(device):
    """A hundred tensors of three elements, on a GPU three thousand, in three launches."""
    shapes = [(3,)] * (100 if device == "cpu" else 3000)
    wanted = params_on(device, shapes)
    stock = AdamW(wanted)
    params, _, tail = tail_on(device, AdamW, {}, shapes)
    for step in range(2):
        grads = grads_on(device, params, step)
        stock_step(stock, wanted, grads, max_norm=1.0)
        tail.step(grads, max_norm=1.0)
    assert tail.launches == 3
    assert_near([torch.cat([p.detach() for p in params])], [torch.cat([p.detach() for p in wanted])], slack=4)


def test_step_counts_of_their_own(device):
    """Parameters whose counts differ get bias corrections of their own; far counts stay exact."""
    wanted = params_on(device, SMALL)
    stock = AdamW(wanted, foreach=False)
    params, optimizer, tail = tail_on(device, AdamW, {}, SMALL)
    for step in range(4):
        grads = [g if step % (i + 1) == 0 else None for i, g in enumerate(grads_on(device, params, step))]
        if step == 3:
            for o in (stock, optimizer):
                next(iter(o.state.values()))["step"].fill_(100_000.0)
        stock_step(stock, wanted, grads, None)
        tail.step(grads)
    assert_near(params, wanted, slack=4)
    assert_same_state(optimizer, stock, slack=4)


def test_more_than_a_block_of_everything(device, monkeypatch):
    """Partial sums and rows beyond what the verdict, and a row's norm, take in one turn."""
    for name in ("JUDGE_BLOCK", "JUDGE_ROWS", "NORMS_BLOCK"):
        monkeypatch.setattr(triton_launch, name, 2)
    shapes = [(3,), (5 * 8192 + 1,), (7,), (11,), (2,)]
    wanted = params_on(device, shapes)
    stock = AdamW(wanted, lr=0.05)
    params, _optimizer, tail = tail_on(device, AdamW, {"lr": 0.05}, shapes)
    norms = torch.full((5,), math.nan, device=device)
    for step in range(2):
        grads = grads_on(device, params, step)
        norm = stock_step(stock, wanted, grads, max_norm=1.0)
        tail.step(grads, max_norm=1.0, norms_out=norms)
        assert_near([tail.grad_norm], [norm])
        torch.testing.assert_close(norms, torch.stack([g.norm() for g in grads]), rtol=1e-6, atol=0)
    assert_near(params, wanted, slack=4)


def test_lion_stands_still_at_zero(device):
    """A gradient and a moment of zero have no sign."""
    params, _optimizer, tail = tail_on(device, Lion, {"lr": 0.1}, SMALL)
    before = [p.detach().clone() for p in params]
    tail.step([torch.zeros_like(p) for p in params])
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


# -- scale, clip, norm ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["number", "tensor"])
def test_norm_and_clip_see_scaled_gradients(how, device):
    """The norm is that of the gradients after grad_scale, and so is the limit; by value, they are scaled and then clamped."""
    factor = 1 / 1024 if how == "number" else torch.tensor(1 / 1024, device=device)
    for limits in ({"max_norm": 0.5}, {"clip_value": 0.5}, {"max_norm": 1e9}):
        params, _, tail = tail_on(device, SGD, {"lr": 1.0})
        wanted = params_on(device)
        grads = grads_on(device, params, 0, scale=1024.0)
        give(wanted, [g / 1024 for g in grads])
        norm = torch.nn.utils.clip_grad_norm_(wanted, limits.get("max_norm", math.inf))
        torch.nn.utils.clip_grad_value_(wanted, limits.get("clip_value", math.inf))
        SGD(wanted, lr=1.0).step()
        tail.step(grads, grad_scale=factor, **limits)
        if "max_norm" in limits:
            assert_near([tail.grad_norm], [norm])
        assert_near(params, wanted, slack=2)


def test_unscaled_moments(device):
    """Moments are those of the unscaled gradient: Adam's own step would hide a scale."""
    params, optimizer, tail = tail_on(device, AdamW, {}, SMALL, scale=DeviceScale(device, value=4096.0))
    grads = grads_on(device, params, 0)
    tail.step([g * 4096 for g in grads], grad_scale=0.5)
    for p, g in zip(params, grads, strict=True):
        assert_near([optimizer.state[p]["exp_avg"]], [0.1 * 0.5 * g], slack=2)
        assert_near([optimizer.state[p]["exp_avg_sq"]], [0.001 * 0.25 * g * g], slack=2)


@pytest.mark.parametrize(("size", "max_norm"), [(1e-3, 1e9), (1e-9, 1e-6), (0.0, 1.0), (1.0, 0.0)])
def test_limits_at_their_ends(size, max_norm, device):
    """Far below its limit a gradient is left as it is; near zero the 1e-6 of clip_grad_norm_ counts; 0 stops all."""
    wanted = params_on(device)
    params, _, tail = tail_on(device, SGD, {"lr": 1.0})
    with torch.no_grad():
        for p in (*wanted, *params):
            p.zero_()
    grads = grads_on(device, params, 0, scale=size)
    stock_step(SGD(wanted, lr=1.0), wanted, grads, max_norm)
    tail.step(grads, max_norm=max_norm)
    assert_near(params, wanted)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_norms(norm_type, dtype, device):
    """The norm of all, and each parameter's own from the same pass, scaled; 0 where there is no gradient."""
    params, _, tail = tail_on(device, SGD, {"lr": 0.0}, norm_type=norm_type, scale=DeviceScale(device, value=8.0))
    grads = [g.to(dtype) for g in grads_on(device, params, 0)]
    grads[2] = None
    norms = torch.full((len(params),), math.nan, device=device)
    tail.step(grads, max_norm=math.inf, norms_out=norms, grad_scale=2.0)
    wanted = [reference.grad_norm([] if g is None else [g.cpu()], norm_type) / 4 for g in grads]
    torch.testing.assert_close(norms.cpu(), torch.stack(wanted), rtol=3e-7, atol=0)
    whole = reference.grad_norm([g.cpu() for g in grads if g is not None], norm_type) / 4
    torch.testing.assert_close(tail.grad_norm.cpu(), whole, rtol=3e-7, atol=0)


@pytest.mark.parametrize("size", [1e-30, 1e-25, 1e-19, 1e18, 1e25, 1e36])
def test_norm_neither_over_nor_underflows(size, device):
    """Squares leave the range of float32 long before the norm does."""
    _params, _optimizer, tail = tail_on(device, SGD, {"lr": 0.0}, [(8200,)])
    grad = torch.full((8200,), size, device=device)
    tail.step([grad], max_norm=math.inf, check=True)
    wanted = size * math.sqrt(8200)
    assert abs(float(tail.grad_norm) - wanted) <= 1e-6 * wanted
    assert not tail.skipped


# -- steps that must not be made ------------------------------------------------------------------------------------
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("kind", "options"), [FEW[2], FEW[4], LIONS[0]], ids=name_of)
def test_a_bad_gradient_changes_no_bit(kind, options, bad, norm_type, device):
    """One bad element anywhere: parameters, moments and counts keep every bit, gradients are cleared, the next step goes on."""
    params, optimizer, tail = tail_on(device, kind, options, norm_type=norm_type)
    tail.step(grads_on(device, params, 0), max_norm=1.0, check=True)
    before = bits_of(params, optimizer)
    for n, i in enumerate((0, 3, 4)):
        grads = grads_on(device, params, 1)
        grads[i].view(-1)[-1] = bad
        poison(tail)
        tail.step(grads, max_norm=1.0, check=True, zero_grads=True)
        assert tail.skipped == 1
        assert tail.skips == n + 1
        assert not math.isfinite(tail.grad_norm)
        assert bits_of(params, optimizer) == before
        assert all((g == 0).all() for g in grads)
    tail.step(grads_on(device, params, 1), max_norm=1.0, check=True)
    assert tail.skipped == 0
    assert bits_of(params, optimizer) != before


DAMPED = (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5})


@pytest.mark.parametrize(("kind", "options"), [FEW[2], DAMPED, FEW[4], LIONS[0]], ids=name_of)
def test_a_bad_first_step_is_none(kind, options, device):
    """After a skipped very first step, the next is a first step: a new momentum buffer is not damped."""
    params, optimizer, tail = tail_on(device, kind, options, SMALL)
    tail.step([torch.full_like(p, math.nan) for p in params], max_norm=math.inf, check=True)
    tail.refresh()
    tail.step(grads_on(device, params, 0))
    fresh, other, tail2 = tail_on(device, kind, options, SMALL)
    tail2.step(grads_on(device, fresh, 0))
    assert bits_of(params, optimizer) == bits_of(fresh, other)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_loss_skips(bad, dtype, device):
    """The loss joins the test when it is given, measured or not."""
    params, optimizer, tail = tail_on(device, AdamW, {}, SMALL)
    before = [p.detach().clone() for p in params]
    for limit in (None, 1.0):
        tail.step(grads_on(device, params, 0), check=True, max_norm=limit, loss=torch.tensor(bad, dtype=dtype, device=device))
        assert tail.skipped
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    tail.step(grads_on(device, params, 0), check=True, loss=torch.tensor(0.3, dtype=dtype, device=device))
    tail.step(grads_on(device, params, 0), loss=torch.tensor(bad, dtype=dtype, device=device))  # unchecked
    assert not tail.skipped
    worse = [torch.full_like(p, bad) for p in params]
    tail.step(worse, check=True, max_norm=1.0, loss=torch.tensor(0.3, dtype=dtype, device=device))  # a good loss excuses nothing
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}
    assert tail.skips == 3


def test_a_refused_step_refuses_those_behind_it(device):
    """`sticky`: what a late host finds is what the bad step found, until it sets `skips` to 0."""
    params, optimizer, tail = tail_on(device, AdamW, {}, SMALL)
    loss = torch.tensor(1.0, device=device)
    tail.step(grads_on(device, params, 0), loss=loss, check=True, sticky=True)
    tail.step(grads_on(device, params, 1), loss=loss + math.nan, check=True, sticky=True)
    before = bits_of(params, optimizer)
    tail.step(grads_on(device, params, 2), loss=loss, check=True, sticky=True)
    assert bits_of(params, optimizer) == before
    assert tail.skips == 2
    tail.skips.zero_()
    tail.step(grads_on(device, params, 3), loss=loss, check=True, sticky=True)
    assert bits_of(params, optimizer) != before
    assert tail.skips == 0


def test_unchecked_steps_are_torchs(device):
    """Without check a NaN goes where it goes in torch."""
    params, _, tail = tail_on(device, SGD, {"lr": 0.1})
    grads = grads_on(device, params, 0)
    grads[2][0, 0] = math.nan
    tail.step(grads)
    assert params[2].isnan().sum() == 1
    tail.step(grads, clip_value=1.0)
    assert params[2].isnan().sum() == 1
    tail.step(grads, max_norm=1.0)  # a NaN norm makes every gradient NaN, as in clip_grad_norm_
    assert all(p.isnan().all() for p in params if p.numel())


def test_the_loss_scale_is_grad_scalers(device):
    """Over good and bad steps, to overflow and back: the scale, its count and the weights are GradScaler's."""
    scale = DeviceScale(device, value=2.0**126, interval=2)
    params, _, tail = tail_on(device, SGD, {"lr": 0.1}, SMALL, scale=scale)
    wanted = params_on(device, SMALL)
    stock = SGD(wanted, lr=0.1)
    value, tracker = torch.tensor(2.0**126), torch.tensor(0, dtype=torch.int32)
    for step, bad in enumerate((False, False, False, False, True, False, True, True, False, False, False)):
        grads = grads_on(device, params, step, scale=2.0**-130)
        before = float(scale.value)
        assert before == float(value)
        if not bad:
            stock_step(stock, wanted, grads, None)
        scaled = [torch.full_like(g, math.inf) if bad else g * before for g in grads]
        tail.step(scaled, max_norm=math.inf, check=True, zero_grads=True)
        torch._amp_update_scale_(value, tracker, torch.tensor(float(bad)), 2.0, 0.5, 2)
        assert (float(scale.value), int(scale.clean_steps)) == (float(value), int(tracker))
        assert int(tail.skipped) == bad
        assert all((g == 0).all() for g in scaled)
    assert_near(params, wanted, slack=4)
    other = DeviceScale(device)
    other.load_state_dict(scale.state_dict())
    assert other.state_dict() == scale.state_dict()


@pytest.mark.parametrize("bad", [False, True])
def test_zeroed_gradients(bad, device):
    """zero_grads clears every gradient, skipped step or not, wherever it lies in memory; without it none is written."""
    params, _, tail = tail_on(device, AdamW, {})
    grads = grads_on(device, params, 0)
    grads[2] = grads[2].t().contiguous().t()
    grads[4][-1, -1] = math.inf if bad else 1.0
    before = [g.clone() for g in grads]
    tail.step(grads, max_norm=math.inf, check=True)
    assert all(torch.equal(a, b) for a, b in zip(grads, before, strict=True))
    tail.step(grads, max_norm=math.inf, check=True, zero_grads=True)
    assert all((g == 0).all() for g in grads)


# -- memory ---------------------------------------------------------------------------------------------------------
def test_misaligned_views(device):
    """Weights and gradients at any address: views off by one element are updated in place, and nothing beside them."""
    base = torch.randn(3, 8400, generator=torch.Generator().manual_seed(0)).to(device)
    wanted = [nn.Parameter(base[i, 1 : 8200 + i].clone()) for i in range(3)]
    before = base.clone()
    params = [nn.Parameter(base[i, 1 : 8200 + i]) for i in range(3)]
    stock, optimizer = AdamW(wanted), AdamW(params)
    tail = TritonTail(optimizer, params)
    for step in range(3):
        grads = grads_on(device, params, step)
        shifted = [torch.cat([g.new_zeros(step), g])[step:] for g in grads]
        stock_step(stock, wanted, grads, max_norm=1.0)
        tail.step(shifted, max_norm=1.0)
    assert_near(params, wanted, slack=4)
    assert {run.kind.align for run in tail._binding.update_launches} == {1}
    mask = torch.ones_like(base, dtype=torch.bool)
    for i in range(3):
        mask[i, 1 : 8200 + i] = False
    assert torch.equal(base[mask], before[mask])


def test_only_what_is_aligned_is_loaded_wide(device):
    """128-bit loads are for rows of which weights, state and gradient all begin at a multiple of 16 bytes."""
    params, _optimizer, tail = tail_on(device, AdamW, {}, [(64,), (65,), (66,)])
    grads = grads_on(device, params, 0)
    grads[1] = torch.zeros(66, device=device)[1:]
    tail.step(grads, max_norm=1.0)
    assert [(run.kind.align, run.count) for run in tail._binding.update_launches] == [(1, 1), (16, 2)]
    assert [(run.kind.align, run.count) for run in tail._binding.norm_launches] == [(1, 1), (16, 2)]
    tail.step(grads_on(device, params, 0), max_norm=1.0)
    assert [(run.kind.align, run.count) for run in tail._binding.update_launches] == [(16, 3)]


@pytest.mark.parametrize("grad_format", [torch.contiguous_format, torch.channels_last, "expanded", "gaps"])
@pytest.mark.parametrize("param_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_in_another_order(param_format, grad_format, device):
    """Whatever the strides of weights and gradients, the elements that meet are those that torch lets meet."""

    def build() -> list[nn.Parameter]:
        weight = make_params([(4, 3, 5, 2)])[0].detach().to(device).contiguous(memory_format=param_format)
        return [nn.Parameter(weight), nn.Parameter(torch.ones(6, device=device))]

    def shaped(grad: Tensor) -> Tensor:
        if grad_format == "expanded":
            return grad[:1].expand(grad.shape)
        return torch.stack([grad, grad], dim=-1)[..., 0] if grad_format == "gaps" else grad.contiguous(memory_format=grad_format)

    wanted, params = build(), build()
    stock, optimizer = AdamW(wanted), AdamW(params)
    tail = TritonTail(optimizer, params)
    for step in range(3):
        weight, bias = grads_on(device, params, step)
        stock_step(stock, wanted, [shaped(weight), bias], max_norm=1.0)
        tail.step([shaped(weight), bias], max_norm=1.0)
    assert_near(params, wanted, slack=4)
    assert_near([optimizer.state[params[0]]["exp_avg"]], [stock.state[wanted[0]]["exp_avg"]], slack=4)
    assert len(tail._fresh) <= 1  # what was laid out anew is let go


def test_nothing_beyond_a_tensor_is_touched(device):
    """NaN around every tensor: none is read, none is overwritten."""
    sizes = (1, 3, 1023, 8191, 8192, 8193)

    def padded(n: int, value: float) -> tuple[Tensor, Tensor]:
        memory = torch.full((n + 64,), math.nan, device=device)
        memory[32 : 32 + n] = value
        return memory, memory[32 : 32 + n]

    weights, grads = [padded(n, 1.0) for n in sizes], [padded(n, 0.5) for n in sizes]
    params = [nn.Parameter(view) for _, view in weights]
    optimizer = SGD(params, lr=1.0)
    tail = TritonTail(optimizer, params)
    tail.step([view for _, view in grads], max_norm=math.inf, check=True, zero_grads=True)
    assert not tail.skipped
    assert_near([tail.grad_norm], [torch.tensor(0.5 * math.sqrt(sum(sizes)), device=device)])
    for (memory, view), value in (*((w, 0.5) for w in weights), *((g, 0.0) for g in grads)):
        assert (view == value).all()
        assert memory.isnan().sum() == 64


@pytest.mark.parametrize(("kind", "options"), [FEW[2], FEW[4], LIONS[0]], ids=name_of)
def test_two_runs_are_bitwise_equal(kind, options, device):
    """And so is a run that was saved and loaded in the middle."""
    runs = []
    for resume in (False, False, True):
        params, optimizer, tail = tail_on(device, kind, options)
        for step in range(4):
            if resume and step == 2:
                weights, saved = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())
                params, optimizer, tail = tail_on(device, kind, options)
                with torch.no_grad():
                    for p, value in zip(params, weights, strict=True):
                        p.copy_(value)
                optimizer.load_state_dict(saved)
            tail.step(grads_on(device, params, step), max_norm=1.0, check=True)
        runs.append(bits_of(params, optimizer))
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize("road", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize(("kind", "options"), FEW, ids=name_of)
def test_state_goes_to_torch_and_back(kind, options, road, device):
    """Two steps here, two of torch's own, two here: where six of torch's land."""
    wanted = params_on(device, SMALL)
    stock = kind(wanted, **options, **road)
    params, optimizer, tail = tail_on(device, kind, options, SMALL)
    middle = kind(params, **options, **road)
    for step in range(6):
        grads = grads_on(device, params, step)
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


def test_what_moved_is_noticed(device):
    """`stale` sees new memory behind a parameter or its state, and `refresh` follows it; gradients may lie elsewhere each time."""
    params, optimizer, tail = tail_on(device, AdamW, {}, SMALL)
    tail.step(grads_on(device, params, 0))
    assert not tail.stale()
    params[1].data = params[1].data.clone()
    assert tail.stale()
    assert tail.moved(params)
    tail.refresh()
    assert not tail.moved(params)
    state = optimizer.state[params[1]]
    state["exp_avg"] = state["exp_avg"].clone()
    assert tail.stale()
    tail.refresh()
    before = params[1].detach().clone(), state["exp_avg"].clone()
    tail.step(grads_on(device, params, 1))
    assert not torch.equal(before[0], params[1])
    assert not torch.equal(before[1], state["exp_avg"])
    optimizer.state.clear()
    tail.step(grads_on(device, params, 3))
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}


# -- what is refused ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda grads: grads.pop(), "1 of them"),
        (lambda grads: grads.__setitem__(1, torch.zeros(3, 8)), "gradient of parameter 1"),
        (lambda grads: grads.__setitem__(0, grads[0].double()), "gradient of parameter 0.*float64"),
        (lambda grads: grads.__setitem__(1, grads[1].to_sparse()), "gradient of parameter 1"),
        (lambda grads: grads.__setitem__(0, grads[0].to("meta")), "gradient of parameter 0.*meta"),
        (lambda grads: grads.__setitem__(0, grads[0].to(torch.complex64)), "gradient of parameter 0.*complex64"),
        (lambda grads: grads.__setitem__(0, grads[0].to(torch.int32)), "gradient of parameter 0.*int32"),
    ],
)
def test_gradients_that_do_not_fit(change, message, device):
    """Refused by name, and nothing is written."""
    params, optimizer, tail = tail_on(device, AdamW, {}, SMALL)
    before = bits_of(params, optimizer)
    grads = grads_on(device, params, 0)
    change(grads)
    with pytest.raises(KernelError, match=message):
        tail.step(grads)
    assert bits_of(params, optimizer) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_norm": -1.0}, "max_norm"), ({"max_norm": math.nan}, "max_norm"), ({"clip_value": -0.1}, "clip_value"),
        ({"max_norm": 1.0, "clip_value": 1.0}, "both"), ({"loss": torch.tensor(1), "check": True}, "loss"),
        ({"grad_scale": torch.ones(2)}, "grad_scale"), ({"norms_out": torch.zeros(3)}, "norms_out"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_options(options, message, device):
    """A limit below zero, a NaN limit, two limits at once, a scalar that is none: refused, and nothing is written."""
    params, optimizer, tail = tail_on(device, AdamW, {}, SMALL)
    before = bits_of(params, optimizer)
    with pytest.raises(KernelError, match=message):
        tail.step(grads_on(device, params, 0), **options)
    assert bits_of(params, optimizer) == before


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda d: torch.optim.RMSprop(params_on(d, SMALL)), "RMSprop is not"),
        (lambda d: Adam(params_on(d, SMALL), differentiable=True), "differentiable"),
        (lambda d: SGD([torch.zeros(2, dtype=torch.complex64, device=d, requires_grad=True)]), "parameter 0 of group 0 has dtype"),
        (lambda d: SGD([torch.zeros(2, dtype=torch.float64, device=d, requires_grad=True)]), "parameter 0 of group 0 has dtype"),
        (lambda d: SGD([*params_on(d, SMALL), torch.zeros(2, device="meta", requires_grad=True)]), "parameter 2 of group 0 is on meta"),
        (lambda d: SGD([torch.zeros(4, 4, device=d)[:, ::2].requires_grad_()]), "view with gaps"),
        (lambda d: SGD([nn.Parameter(b) for b in torch.zeros(3, device=d).expand(2, 3)]), "share memory"),
    ],
)
def test_obstacles(make, reason, device):
    """What cannot be had says why in one sentence, and building it anyway raises that sentence."""
    optimizer = make(device)
    assert reason in str(TritonTail.obstacle(optimizer))
    with pytest.raises(KernelError, match=reason):
        TritonTail(optimizer, optimizer.param_groups[0]["params"])


# -- in a graph, and never on the host ------------------------------------------------------------------------------
def test_nothing_is_read_on_the_host(device, monkeypatch):
    """Between gradients and launches no tensor becomes a number: a dispatch mode sees no read."""
    params, _optimizer, tail = tail_on(device, AdamW, {}, SMALL, scale=DeviceScale(device))
    tail.step(grads_on(device, params, 0), max_norm=1.0, check=True)
    reads: list[str] = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = function.name()
            if "_local_scalar_dense" in name or "is_nonzero" in name or (name == "aten::_to_copy" and "cpu" in str(kwargs)):
                reads.append(name)
            return function(*args, **(kwargs or {}))

    if device == "cpu":  # the interpreter itself reads everything
        monkeypatch.setattr(tail, "_launch", lambda *a: None)
    grads = grads_on(device, params, 1)
    rescale, loss = torch.tensor(0.5, device=device), torch.tensor(0.1, device=device)
    with Reads():
        for lr in (0.1, 0.2):
            tail._group_list[0]["lr"] = lr
            tail.step(grads, max_norm=1.0, check=True, grad_scale=rescale, loss=loss, zero_grads=True)
    assert reads == []


def test_tables_of_a_capture_are_written_after_it(device, monkeypatch):
    """A capture copies nothing; `sync` writes its tables, and later takes over a new lr and state that was loaded."""
    if device != "cpu":
        pytest.skip("tests/gpu captures for real")
    params, optimizer, tail = tail_on(device, AdamW, {"lr": 0.05})
    wanted = params_on(device)
    stock = AdamW(wanted, lr=0.05)
    static = [torch.empty_like(p) for p in params]
    recorded: list[Any] = []
    launch = tail._launch

    def both(step: int, replay: bool, lr: float | None = None) -> None:
        for group in (stock.param_groups[0], optimizer.param_groups[0]):
            group["lr"] = lr or group["lr"]
        grads = grads_on(device, params, step)
        stock_step(stock, wanted, grads, 1.0)
        if replay:
            for s, g in zip(static, grads, strict=True):
                s.copy_(g)
            tail.sync()
            launch(*recorded[0])
        else:
            tail.step(grads, max_norm=1.0, check=True)

    with monkeypatch.context() as capture:
        capture.setattr(tail, "_capturing", lambda: True)
        with pytest.raises(KernelError, match="one real step first"):
            tail.step(static, max_norm=1.0, check=True)
    both(0, replay=False)
    with monkeypatch.context() as capture:
        capture.setattr(tail, "_capturing", lambda: True)
        with pytest.raises(KernelError, match="same arguments first"):
            tail.step(static, max_norm=1.0, check=True, zero_grads=True)
        with pytest.raises(KernelError, match="sync"):
            tail.step(static, max_norm=1.0, check=True)
    tail.sync()
    with monkeypatch.context() as capture:
        capture.setattr(tail, "_capturing", lambda: True)
        capture.setattr(tail, "_launch", lambda *a: recorded.append(a))
        tail.step(static, max_norm=1.0, check=True)
    assert recorded[0][0].pending
    both(1, replay=True)
    assert not recorded[0][0].pending
    both(2, replay=True, lr=0.01)
    both(3, replay=False)  # an eager step between, with gradients elsewhere
    optimizer.load_state_dict(copy.deepcopy(stock.state_dict()))
    both(4, replay=True, lr=0.03)  # of a table that only `sync` writes
    assert_near(params, wanted, slack=4)
    assert_same_state(optimizer, stock, slack=4)
    params[2].data = torch.zeros(22)[1:].view(7, 3)  # no longer aligned: another kernel
    tail._where[:] = []
    with pytest.raises(KernelError, match="Capture the step again"):
        tail.refresh()


PARTS = st.lists(
    st.tuples(st.sampled_from([0, 1, 2, 31, 1024, 8191, 8192, 8193]), st.sampled_from(FLOATS), st.sampled_from(FLOATS), st.integers(0, 3)),
    min_size=1, max_size=4,
)  # fmt: skip


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(PARTS, st.sampled_from([FEW[1], FEW[4], LIONS[1]]), st.booleans())
def test_any_list_of_tensors(device, parts, case, holes):
    """Any sizes, dtypes of weights and gradients, offsets from an aligned address, and missing gradients."""
    kind, options = case
    generator = torch.Generator().manual_seed(0)

    def some(n: int, dtype: torch.dtype, offset: int) -> Tensor:
        return torch.randn(n + offset, generator=generator).to(dtype).to(device)[offset:]

    params = [nn.Parameter(some(n, dtype, offset)) for n, dtype, _, offset in parts]
    wanted = [p.detach().cpu().clone() for p in params]
    optimizer = kind(params, **options)
    tail = TritonTail(optimizer, params)
    raw = [some(n, dtype, (offset * 3) % 4) for n, _, dtype, offset in parts]
    grads = [None if holes and i % 2 else g for i, g in enumerate(raw)]
    tail.step(grads, max_norm=2.0, check=True)
    there = [i for i, g in enumerate(grads) if g is not None]
    some_wanted, some_grads = [wanted[i] for i in there], [raw[i].cpu() for i in there]
    if kind is Lion:
        factor = reference.clip_factor(reference.grad_norm(some_grads), 2.0)
        scaled = [reference.scaled(g, factor) for g in some_grads]
        reference.lion_(some_wanted, scaled, [torch.zeros_like(p) for p in some_wanted], **options)
    else:
        Truth(kind, options, some_wanted).step(some_grads, 2.0)
    assert_near([tail.grad_norm.cpu()], [reference.grad_norm(some_grads)])
    assert_near([p.cpu() for p in params], wanted, slack=2)
