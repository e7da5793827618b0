"""What the kernel tests share: the same parameters twice, the same gradients, and how far two results may lie apart."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from fasttrain.kernels import library, reference
from fasttrain.kernels.native_tail import NativeTail

needs_native = pytest.mark.skipif(not library.available(), reason=f"{library.obstacle()}")

no_sanitizer = pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer watches the native library only")

SHAPES = [(1,), (0,), (7, 3), (64,), (5, 13, 2), (8193,), (200, 211)]  # odd tails, a chunk and one more, two threads

# The gap a float32 result may have: a handful of roundings a step, relative to the largest value in the tensor.
RATIO = {torch.float32: 2e-6, torch.float64: 4e-15, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def make_params(shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)) for shape in shapes]


def make_grads(params: Sequence[Tensor], step: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [(torch.randn(p.shape, generator=generator, dtype=torch.float32) * scale).to(p.dtype) for p in params]


def give(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else grad.clone()


def stock_step(
    optimizer: Optimizer, params: Sequence[Tensor], grads: Sequence[Tensor | None], max_norm: float | None
) -> Tensor:
    """torch's own clip and step; gives back the norm."""
    give(params, grads)
    norm = torch.nn.utils.clip_grad_norm_(params, float("inf") if max_norm is None else max_norm)
    optimizer.step()
    return norm


def assert_near(got: Sequence[Tensor], wanted: Sequence[Tensor], slack: float = 1.0) -> None:
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        if b.numel():
            gap, size = (a.double() - b.double()).abs().max(), b.double().abs().max()
            assert gap <= slack * RATIO[b.dtype] * size, f"tensor {i}: off by {gap:.3g}, its largest is {size:.3g}"


def assert_same_state(got: Optimizer, wanted: Optimizer, slack: float = 1.0) -> None:
    """The same keys with near values, parameter by parameter."""
    a, b = got.state_dict()["state"], wanted.state_dict()["state"]
    assert a.keys() == b.keys()
    for i in b:
        assert a[i].keys() == b[i].keys(), i
        for name, value in b[i].items():
            assert a[i][name].dtype == value.dtype
            assert_near([a[i][name]], [value], slack)


def bits(tensors: Sequence[Tensor]) -> list[bytes]:
    return [t.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() for t in tensors]


def all_bits(params: Sequence[Tensor], optimizer: Optimizer) -> list[bytes]:
    """Every bit of the parameters and of the optimizer's state."""
    state = [value for slots in optimizer.state.values() for value in slots.values() if isinstance(value, Tensor)]
    return bits([*params, *(value.reshape(1) if value.dim() == 0 else value for value in state)])


def _sgd_options() -> list[dict[str, Any]]:
    plain = [{}, {"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.3}, {"momentum": 0.9, "nesterov": True}]
    decays = [0.0, 0.1]
    return [{"lr": 0.1, "weight_decay": d, "maximize": m, **p} for p in plain for d in decays for m in (False, True)]


def _adam_options() -> list[dict[str, Any]]:
    flags = (False, True)
    return [  # eps is large enough that a gradient which cancels the decay does not turn a rounding into a whole step
        {"lr": 0.01, "eps": 1e-4, "betas": (0.8, 0.95), "weight_decay": d, "amsgrad": a, "maximize": m}
        for d in (0.0, 0.1)
        for a in flags
        for m in flags
    ]


CASES: list[tuple[type[Optimizer], dict[str, Any]]] = [(SGD, o) for o in _sgd_options()]
CASES += [(kind, o) for kind in (Adam, AdamW) for o in _adam_options()]
FEW = [CASES[0], CASES[9], CASES[13], (Adam, _adam_options()[6]), (AdamW, _adam_options()[4])]


def name_of(value: Any) -> str | None:
    """A readable test id."""
    if isinstance(value, type):
        return value.__name__
    return "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None


class Truth:
    """The same optimizer composed from `reference`, over parameters of its own."""

    def __init__(self, kind: type[Optimizer], options: dict[str, Any], params: Sequence[Tensor]) -> None:
        self.kind, self.options, self.params = kind, dict(options), params
        self.maximize = self.options.pop("maximize")
        amsgrad = self.options.pop("amsgrad", False)
        self.buffers: list[Tensor | None] = [None for _ in params]
        self.first, self.second, most = ([torch.zeros_like(p) for p in params] for _ in range(3))
        self.most = most if amsgrad else []
        self.steps = [torch.tensor(0.0) for _ in params]

    def step(self, raw: Sequence[Tensor], max_norm: float) -> Tensor:
        norm = reference.grad_norm(raw)
        factor = reference.clip_factor(norm, max_norm)
        grads = [reference.scaled(g, factor, maximize=self.maximize) for g in raw]
        if self.kind is SGD:
            reference.sgd_(self.params, grads, self.buffers, **self.options)
        else:
            moments = self.first, self.second, self.most, self.steps
            reference.adam_(self.params, grads, *moments, decoupled=self.kind is AdamW, **self.options)
        return norm


def tail_of(
    kind: type[Optimizer], options: dict[str, Any], **more: Any
) -> tuple[list[nn.Parameter], Optimizer, NativeTail]:
    params = make_params(**more)
    optimizer = kind(params, **options)
    return params, optimizer, NativeTail(optimizer, params)
