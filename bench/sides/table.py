"""Which sides there are, and why one is not measured: a peer that is missing, a form it has not, a device that is not here."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.workloads import KERAS, Agreement, Workload

FORMS = ("one", "turns", "splits")
MIXED = ("32-true", "bf16-mixed", "16-mixed")


@dataclass(frozen=True, kw_only=True)
class Side:
    """One way to train; ``imports`` is what its process needs before its clock starts."""

    file: str  # in bench.sides
    function: str
    given: Mapping[str, Any] = field(default_factory=dict)
    imports: tuple[str, ...] = ("torch",)
    package: str = ""  # the peer it needs
    forms: tuple[str, ...] = FORMS
    no_form: str = ""  # why the others are not written
    half_on_cpu: bool = True
    only_cuda: bool = False
    variants: bool = True  # measured on the variants too
    variants_not: str = "measured on the workload itself; the variants ask what a feature costs the sides that differ in it"
    agree: Agreement | None = None  # where it cannot compute quite the same: in place of the workload's


_COMPILER = ("torch", "torch._dynamo", "torch._inductor.compile_fx")
_OURS = (*_COMPILER, "fasttrain", "fasttrain.graphs.capture")

SIDES: dict[str, Side] = {
    "fasttrain": Side(file="trainers", function="fasttrain", imports=_OURS),
    "fasttrain-eager": Side(file="trainers", function="fasttrain", given={"capture": "eager"}, imports=_OURS, variants=False),
    "fasttrain-compile": Side(file="trainers", function="fasttrain", given={"capture": "compile"}, imports=_OURS, variants=False),
    "fasttrain-graph": Side(file="trainers", function="fasttrain", given={"capture": "graph"}, imports=_OURS, only_cuda=True),
    "plain": Side(file="loop", function="plain"),
    "plain-1thread": Side(file="loop", function="plain", given={"threads": 1}, variants=False),
    "plain-fused": Side(file="loop", function="plain", given={"fused": True}),
    "plain-compiled": Side(file="loop", function="plain", given={"fused": True, "compiled": True}, imports=_COMPILER),
    "plain-compiled-threads": Side(file="loop", function="other_threads", imports=_COMPILER, variants=False),
    "captured-by-hand": Side(file="captured", function="captured", imports=_COMPILER, only_cuda=True),
    "lightning": Side(
        file="trainers", function="lightning", imports=("torch", "pytorch_lightning"), package="pytorch_lightning", half_on_cpu=False
    ),
    "lightning-compile": Side(
        file="trainers", function="lightning", given={"compiled": True}, imports=(*_COMPILER, "pytorch_lightning"),
        package="pytorch_lightning", half_on_cpu=False, variants=False,
    ),
    "fabric": Side(file="handed", function="fabric", imports=("torch", "lightning.fabric"), package="lightning", half_on_cpu=False),
    "accelerate": Side(file="handed", function="accelerate", imports=("torch", "accelerate"), package="accelerate", half_on_cpu=False),
    "keras-torch": Side(
        file="keras_torch", function="keras_torch", imports=("torch",), package="keras", forms=("one",),
        no_form="Keras's fit has one loss and one optimizer; its users write this outside of fit, in plain torch", variants=False,
        agree=KERAS,
    ),
    "ignite": Side(file="handed", function="ignite", imports=("torch", "ignite.engine"), package="ignite", variants=False),
}  # fmt: skip


def why_not(w: Workload, name: str, device: str, found: Callable[[str], Any] = importlib.util.find_spec) -> str:
    """A sentence, or nothing when this side can be measured on this workload here."""
    side = SIDES[name]
    if w.cpu is None and device == "cpu":
        return "no CUDA device here, and this workload is too large for a CPU"
    if side.only_cuda and device != "cuda":
        return "no CUDA device here"
    if w.sides and name not in w.sides:
        return "this many copies of it do not fit beside each other on one device"
    if w.variant and not side.variants:
        return side.variants_not
    if w.form not in side.forms:
        return side.no_form
    if w.precision == "16-mixed" and device == "cpu" and not side.half_on_cpu:
        return f"{side.package} does not train in float16 on a CPU"
    if w.precision == "16-mixed" and name == "captured-by-hand":
        return "the hand-captured loop is not written for a scaler"
    if side.package and found(side.package) is None:
        return f"{side.package} is not installed: pip install '.[bench]'"
    return ""
