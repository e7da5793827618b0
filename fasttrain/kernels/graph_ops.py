"""The two kernels as operations of a graph: opaque, with what they write declared, so that a compiler copies nothing.

    fasttrain_kernels::grad_norm(Tensor[] tensors, float norm_type) -> Tensor
    fasttrain_kernels::clip_and_step_(int optimizer, Tensor(a!)[] params, Tensor?[] grads, float? max_norm, float grad_scale) -> Tensor

Registered when this file is imported, which the public face does when it is traced. The optimizer travels as its `id`, on which
Dynamo guards; its state is no argument, since a graph has no other way to it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from fasttrain.errors import KernelError, reject
from fasttrain.kernels import steps

LIBRARY = torch.library.Library("fasttrain_kernels", "DEF")  # type: ignore[no-untyped-call]
_optimizers: WeakValueDictionary[int, Optimizer] = WeakValueDictionary()


def _optimizer(number: int) -> Optimizer:
    """The optimizer of this id: looked for once among all live objects, for nothing that runs while tracing may note it down."""
    found = _optimizers.get(number)
    if found is None:
        found = next((o for o in gc.get_objects() if id(o) == number and isinstance(o, Optimizer)), None)
        if found is None:
            raise KernelError(reject("optimizer", "one that no longer exists", "a live one", "Keep a reference to it."))
        _optimizers[number] = found
    return found


@torch.no_grad()
def _clip_and_step_(
    optimizer: int, params: Sequence[Tensor], grads: Sequence[Tensor | None], max_norm: float | None, grad_scale: float
) -> Tensor:
    found = _optimizer(optimizer)
    own = steps.params_of(found)
    norm = steps.step(found, own, grads, max_norm, grad_scale, own_grads=False)
    if [p.data_ptr() for p in params] != [p.data_ptr() for p in own]:  # a compiler that handed copies over
        torch._foreach_copy_(list(params), own)
    return norm


def _no_step(optimizer: int, params: Sequence[Tensor], grads: Sequence[Tensor | None], max_norm: float | None, grad_scale: float) -> Tensor:
    return params[0].new_empty((), dtype=torch.float32)


def _grad_norm(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    return steps.norm_of(tensors, norm_type).to(torch.float32)


def _no_norm(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    return tensors[0].new_empty((), dtype=torch.float32) if tensors else torch.empty(())


def _register(schema: str, run: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    name = schema.partition("(")[0]
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"fasttrain_kernels::{name}", fake, lib=LIBRARY)


_register("grad_norm(Tensor[] tensors, float norm_type) -> Tensor", _grad_norm, _no_norm)
_register(
    "clip_and_step_(int optimizer, Tensor(a!)[] params, Tensor?[] grads, float? max_norm, float grad_scale) -> Tensor",
    _clip_and_step_,
    _no_step,
)
OPS = torch.ops.fasttrain_kernels
