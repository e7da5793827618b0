"""A step that branches on data: its compiled stretches with ordinary Python and ordinary autograd between them.

The tracer ends a graph where it must (a value read on the host, a call it does not know) and begins another behind it;
the backward pass is autograd's, over the compiled backward of each stretch; the fused update comes behind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch

from fasttrain.graphs.program import StepSpec
from fasttrain.graphs.tracer import DYNAMO, compiled, unvalidated
from fasttrain.results import Build

# Counters become symbols; a stretch that cannot be compiled, or keeps changing, runs as it is.
CUT = DYNAMO | {"trace_autograd_ops": False, "suppress_errors": True, "capture_scalar_outputs": False, "recompile_limit": 8}


LEAST_OPS = 8  # operations from which a stretch is compiled; what is smaller loses more around its kernels than it gains in them
MORE = 32  # stretches that may still be compiled once the step is settled (other sizes, other branches)


class CutFunction:
    """``f(batch, batch_idx, index)`` in compiled stretches; same results, same Python effects, same autograd graph."""

    def __init__(self, function: Callable[[Any, int, int], Any], spec: StepSpec, build: Build) -> None:
        self._spec = spec
        self._patches: dict[str, Any] = {"fallback_random": True, "cpp.threads": build.kernel_threads}
        self.least = LEAST_OPS
        self.ran = 0  # compiled stretches run so far
        self.compiled = 0
        self._most = math.inf  # to be compiled in all
        self._call = compiled(function, self._backend, CUT, whole=False)

    def __call__(self, *args: Any) -> Any:
        # A step whose Python makes new code all the time would be compiled for ever: what is there is used, the rest runs as it is.
        settled = self.compiled >= self._most
        with unvalidated(), torch.compiler.set_stance("eager_on_recompile") if settled else nullcontext():
            return self._call(*args)

    def settle(self) -> None:
        """It has been tried: from now on little is compiled."""
        self._most = self.compiled + MORE

    def _backend(self, graph: torch.fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        self.compiled += 1
        if sum(node.op.startswith("call") for node in graph.graph.nodes) < self.least:
            return graph.forward
        run = cast(Callable[..., Any], compile_fx(graph, examples, config_patches=self._patches))

        def counted(*args: Any) -> Any:
            self.ran += 1
            return run(*args)

        return counted
