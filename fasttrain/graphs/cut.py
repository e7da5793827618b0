"""A step that branches on data: its compiled stretches with ordinary Python and ordinary autograd between them.

The tracer ends a graph where it must (a value read on the host, a call it does not know) and begins another behind it;
the backward pass is autograd's, over the compiled backward of each stretch; the fused update comes behind.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor

from fasttrain.errors import CaptureError
from fasttrain.graphs.explain import obstacle_of
from fasttrain.graphs.frozen import frozen_float
from fasttrain.graphs.lookups import looked_up
from fasttrain.graphs.numbers import never_decided
from fasttrain.graphs.products import product_patches
from fasttrain.graphs.program import StepSpec
from fasttrain.graphs.recurrent import layers_apart
from fasttrain.graphs.tracer import DYNAMO, chance_apart, compiled, faithful, optimizers_alone, transformers, unvalidated
from fasttrain.results import Build, Obstacle

# Counters become symbols; a stretch that cannot be compiled, or keeps changing, runs as it is.
CUT = DYNAMO | {"trace_autograd_ops": False, "capture_scalar_outputs": False}
CUT |= {"suppress_errors": True, "recompile_limit": 8}


CUT_THERE = "it runs as it is between compiled stretches"
LEAST_OPS = 8  # operations from which a stretch is compiled; what is smaller loses more around its kernels than it gains in them
MORE = 32  # stretches that may still be compiled once the step is settled (other sizes, other branches)


class CutFunction:
    """``f(batch, batch_idx, index)`` in compiled stretches; same results, same Python effects, same autograd graph."""

    def __init__(self, function: Callable[[Any, int, int], Any], spec: StepSpec, build: Build) -> None:
        self._spec = spec
        self._patches: dict[str, Any] = {"fallback_random": True, "cpp.threads": build.kernel_threads} | product_patches(build)
        self.least = LEAST_OPS
        self.ran = 0  # compiled stretches run so far
        self.compiled = 0
        self._most = math.inf  # to be compiled in all
        self._clock: list[tuple[Obstacle | None, float, float]] | None = None  # stretches that ran: what ended each, from when to when
        self._call = compiled(function, self._backend, CUT, whole=False, around=_around)

    def __call__(self, *args: Any) -> Any:
        # A step whose Python makes new code all the time would be compiled for ever: what is there is used, the rest runs as it is.
        stance = torch.compiler.set_stance("eager_on_recompile") if self.compiled >= self._most else nullcontext()
        with layers_apart(), transformers(), first_gradients(), unvalidated(), stance:
            return self._call(*args)

    def costs(self, run: Callable[[], object]) -> list[Obstacle]:
        """What ended each stretch that ``run`` runs, with the time until the next one began: the least of three runs."""
        least: list[dict[Obstacle, float]] = []
        for _ in range(3):
            self._clock = []
            run()
            stretches, self._clock = self._clock, None
            spent: dict[Obstacle, float] = {}
            for (why, _, ended), (_, begun, _) in pairwise(stretches):
                if why is not None:
                    spent[why] = spent.get(why, 0.0) + (begun - ended) * 1e6
            least.append(spent)
        return [replace(o, cost_us=min(s[o] for s in least if o in s)) for o in dict.fromkeys(o for s in least for o in s)]

    def settle(self) -> None:
        """It has been tried: from now on little is compiled."""
        self._most = self.compiled + MORE

    def _backend(self, graph: torch.fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        self.compiled += 1
        small = sum(node.op.startswith("call") for node in graph.graph.nodes) < self.least or frozen_float(graph)
        run = graph.forward if small else cast(Callable[..., Any], compile_fx(graph, examples, config_patches=self._patches))
        why, counter = _ended(graph), ref(self)  # Dynamo keeps what follows for as long as the module's code

        def counted(*args: Any) -> Any:
            self = counter()
            if self is None or self._clock is None:
                if self is not None:
                    self.ran += not small
                return run(*args)
            begun = time.perf_counter()
            outs = run(*args)
            self._clock.append((why, begun, time.perf_counter()))
            return outs

        return counted


def _ended(graph: torch.fx.GraphModule) -> Obstacle | None:
    """What the tracer could not go beyond at the end of this stretch; None where the function ends too."""
    why: Any = getattr(graph, "compile_subgraph_reason", None)
    if why is None or not why.graph_break:
        return None
    return obstacle_of(why.reason, [(f.filename, f.lineno or 0) for f in why.user_stack], CUT_THERE)


@contextmanager
def _around() -> Iterator[None]:
    with never_decided(), optimizers_alone(), faithful(), looked_up(numbers=False), chance_apart():
        yield


@contextmanager
def first_gradients() -> Iterator[None]:
    """Within: a gradient that is to have one of its own is refused where a compiled stretch lies on its way. A stretch has only
    the first, and torch 2.11 takes zero for the second in silence."""
    engine: Any = torch.autograd
    before = engine._engine_run_backward

    def run(outputs: Sequence[Tensor], grads: Any, keep: bool, create: bool, *args: Any, **kwargs: Any) -> Any:
        if create and any("CompiledFunction" in node.name() for node in graph_of(outputs)):
            raise CaptureError("a gradient of a gradient through a compiled stretch, which has none")
        return before(outputs, grads, keep, create, *args, **kwargs)

    engine._engine_run_backward = run
    try:
        yield
    finally:
        engine._engine_run_backward = before


def graph_of(outputs: Sequence[Tensor]) -> Iterator[Any]:
    """Every node of autograd's graph behind these."""
    stack: list[Any] = [t.grad_fn for t in outputs]
    seen = {None}
    while stack:
        if (node := stack.pop()) not in seen:
            seen.add(node)
            yield node
            stack += [n for n, _ in node.next_functions]
