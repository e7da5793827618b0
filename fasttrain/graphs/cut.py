"""A step that branches on data: its compiled stretches with ordinary Python and ordinary autograd between them.

The tracer ends a graph where it must (a value read on the host, a call it does not know) and begins another behind it;
the backward pass is autograd's, over the compiled backward of each stretch; the fused update comes behind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from fasttrain.graphs.program import StepSpec
from fasttrain.graphs.tracer import DYNAMO, compiled, unvalidated
from fasttrain.results import Build

# Counters become symbols; a stretch that cannot be compiled, or keeps changing, runs as it is.
CUT = DYNAMO | {"trace_autograd_ops": False, "suppress_errors": True, "capture_scalar_outputs": False, "recompile_limit": 8}


class CutFunction:
    """``f(batch, batch_idx, index)`` in compiled stretches; same results, same Python effects, same autograd graph."""

    def __init__(self, function: Callable[[Any, int, int], Any], spec: StepSpec, build: Build) -> None:
        self._spec = spec
        self._patches: dict[str, Any] = {"fallback_random": True, "cpp.threads": build.kernel_threads}
        self.ran = 0  # compiled stretches run so far
        self.ops = 0
        self._call = compiled(function, self._backend, CUT, whole=False)

    def __call__(self, *args: Any) -> Any:
        with unvalidated():
            return self._call(*args)

    def _backend(self, graph: torch.fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        self.ops += sum(node.op.startswith("call") for node in graph.graph.nodes)
        compiled = cast(Callable[..., Any], compile_fx(graph, examples, config_patches=self._patches))

        def counted(*args: Any) -> Any:
            self.ran += 1
            return compiled(*args)

        return counted
