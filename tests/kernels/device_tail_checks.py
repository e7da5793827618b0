"""What the tail of a GPU's step must do, on whatever `device` the importing module names: the interpreter's CPU, or a GPU."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam, AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from fasttrain.errors import NonFiniteError
from fasttrain.graphs.device_tail import DeviceTail
from fasttrain.graphs.norms import GradientNorms
from fasttrain.graphs.pending import ASK_EVERY, Pending
from fasttrain.graphs.scale import LossScale
from fasttrain.graphs.tail import StockTail
from fasttrain.options import make_options
from tests.kernels.pairs import assert_near, assert_same_state
from tests.kernels.triton_checks import SMALL, bits_of, grads_on, params_on


def tails(
    device: str, kind: Any = AdamW, given: Any = None, *, scale: bool = False, alone: bool = True, norms: Any = None, **options: Any
) -> Any:
    """Ours and torch's own over the same weights, each with its loss scale."""
    made = []
    checked = make_options(options)
    pending = Pending(lambda: 7, raises=checked.nonfinite == "raise" and not scale)
    for ours in (True, False):
        params = params_on(device, SMALL)
        optimizer = kind(params, **(given or {"lr": 0.01}))
        scaler = LossScale(torch.device(device), alone=alone and ours) if scale else None
        tail = DeviceTail(optimizer, params, checked, scaler, norms, pending) if ours else StockTail(optimizer, params, checked, scaler)
        tail.kept = optimizer  # which a tail holds weakly
        made.append((params, optimizer, scaler, tail))
    return *made, pending


@pytest.mark.parametrize(
    "options", [{}, {"gradient_clip_val": 0.5}, {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}], ids=str
)
@pytest.mark.parametrize(("kind", "given"), [(AdamW, {"lr": 0.01}), (Adam, {"lr": 0.01}), (SGD, {"lr": 0.1, "momentum": 0.9})], ids=str)
def test_the_device_tail_is_torchs(kind, given, options, device):
    """Clipping of both kinds, a window cut short (`rescale`), and an lr that moves."""
    (params, optimizer, _, tail), (wanted, stock, _, truth), _ = tails(device, kind, given, **options)
    for step, rescale in enumerate((1.0, 1.0, 1.5, 1.0)):
        for group in (optimizer.param_groups[0], stock.param_groups[0]):
            group["lr"] = given["lr"] / (step + 1)
        grads = grads_on(device, params, step)
        assert tail.step(grads, rescale, torch.tensor(0.3, device=device))
        truth.step([g.clone() for g in grads], rescale, torch.tensor(0.3, device=device))
    assert_near(params, wanted, slack=4)
    assert_same_state(optimizer, stock, slack=4)


def test_the_loss_scale_lives_on_the_device(device):
    """Overflows halve it and are counted, clean steps are counted, and a checkpoint reads what the host's rule would have."""
    (params, _, scaler, tail), (wanted, _, plain, truth), pending = tails(device, scale=True, precision="16-mixed")
    for step in range(6):
        grads = [g * 65536.0 for g in grads_on(device, params, step)]
        if step in (1, 4):
            grads[0].fill_(math.inf)
        tail.step(grads, 1.0, torch.tensor(0.3, device=device))
        truth.step([g.clone() for g in grads], 1.0, torch.tensor(0.3, device=device))
    assert scaler.state_dict() == plain.state_dict()
    assert pending.settle() == 2
    assert pending.settle() == 0
    assert_near(params, wanted, slack=4)
    scaler.load_state_dict({"scale": 8.0, "clean_steps": 3})
    tail.step([g * 8.0 for g in grads_on(device, params, 9)], 1.0, None)
    assert scaler.state_dict() == {"scale": 8.0, "clean_steps": 4}


def test_a_shared_scale_is_the_hosts(device):
    """Several optimizers move one scale once: each is judged at once, and the graph does not hold it."""
    (params, _, scaler, tail), _, _ = tails(device, scale=True, alone=False, precision="16-mixed")
    assert not tail.captures
    grads = grads_on(device, params, 0)
    scaler.gather()
    assert tail.step(grads, 1.0, None)
    assert not tail.step([torch.full_like(g, math.nan) for g in grads], 1.0, None)
    scaler.settle()
    assert scaler.state_dict() == {"scale": 32768.0, "clean_steps": 0}


def test_a_refused_step_is_heard_of_late(device):
    """nonfinite="raise": the weights stay what they were before the bad step, and the error comes within two looks."""
    (params, optimizer, _, tail), _, pending = tails(device)
    loss = torch.tensor(1.0, device=device)
    tail.step(grads_on(device, params, 0), 1.0, loss)
    before = bits_of(params, optimizer)
    tail.step(grads_on(device, params, 1), 1.0, loss * math.nan)

    def some_more() -> None:
        for step in range(2 * ASK_EVERY + 1):
            tail.step(grads_on(device, params, step), 1.0, loss)
            if device != "cpu":
                torch.cuda.synchronize()

    with pytest.raises(NonFiniteError, match="refused every update"):
        some_more()
    assert bits_of(params, optimizer) == before
    tail.step(grads_on(device, params, 0), 1.0, loss)  # whoever goes on after it may
    assert bits_of(params, optimizer) != before
    tail.step(grads_on(device, params, 0), 1.0, loss * math.nan)
    with pytest.raises(NonFiniteError, match="1 optimizer step"):
        pending.settle()


def test_what_was_only_tried_is_forgotten(device):
    """A trial's refused steps are neither counted nor raised."""
    (params, _, _, tail), _, pending = tails(device)
    tail.step(grads_on(device, params, 0), 1.0, torch.tensor(math.nan, device=device))
    pending.forget()
    assert pending.settle() == 0


@pytest.mark.parametrize("missing", [False, True])
def test_norms_come_from_the_same_pass(missing, device):
    """track_grad_norm: torch's norms, unscaled and unclipped, by name; none for a parameter without a gradient."""
    told: list[Any] = []
    names = {}
    norms = GradientNorms(2.0, lambda: names, lambda keys, values: told.append(dict(zip(keys, values, strict=True))))
    (params, _, _, tail), _, _ = tails(device, norms=norms, gradient_clip_val=0.1)
    names.update({id(p): f"p{i}" for i, p in enumerate(params)})
    grads = grads_on(device, params, 0)
    given = [None, *grads[1:]] if missing else grads
    tail.step(given, 0.5, torch.tensor(1.0, device=device))
    wanted = {f"grad_2.0_norm/p{i}": g.norm() * 0.5 for i, g in enumerate(given) if g is not None}
    assert set(told[0]) == {*wanted, "grad_2.0_norm_total"}
    assert_near([told[0][n] for n in wanted], list(wanted.values()))


def test_no_step_reads(device, monkeypatch):
    """Scale, clip, moving lr and a look at the verdict: no tensor becomes a number but the one that has arrived."""
    (params, optimizer, _, tail), _, _ = tails(device, scale=True, precision="16-mixed", gradient_clip_val=1.0)
    grads = copy.deepcopy(grads_on(device, params, 0))
    tail.step(grads, 1.0, None)
    reads: list[str] = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "_local_scalar_dense" in function.name() or "is_nonzero" in function.name():
                reads.append(function.name())
            return function(*args, **(kwargs or {}))

    if device == "cpu":  # the interpreter itself reads everything
        monkeypatch.setattr(tail._triton, "_launch", lambda *a: None)
    with Reads():
        for step in range(ASK_EVERY - 2):
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            tail.step(grads, 1.0, None)
    assert reads == []
