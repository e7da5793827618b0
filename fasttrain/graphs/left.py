"""What a step leaves on an object with its graph (a hidden state, the last loss): a captured step leaves the value and no graph.

It looks as it would eagerly, so that a loss that goes back into that graph ends the next trace, and raises op by op.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from fasttrain.errors import CaptureError
from fasttrain.graphs.explain import EARLIER
from fasttrain.graphs.tracer import instead

NAME = "left by the step as"  # of a graph's node: what the step has called it


@contextmanager
def left_detached(at: CodeType) -> Iterator[None]:
    """Within a trace: what the step has left on an object when ``at`` takes its gradients is left without its graph, which the
    backward pass has used up."""
    from torch._dynamo.variables import TorchInGraphFunctionVariable

    before: Any = TorchInGraphFunctionVariable.call_function

    def call_function(this: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        out = before(this, tx, args, kwargs)
        kept = kwargs["retain_graph"].as_python_constant() if tx.f_code is at else True
        if this.value is torch.autograd.grad and not kept:
            for written in tx.output.side_effects.store_attr_mutations.values():
                written.update({name: _detached(value, tx, name) for name, value in written.items()})
        return out

    with instead(TorchInGraphFunctionVariable, "call_function", call_function):
        yield


def _detached(variable: Any, tx: Any, name: str) -> Any:
    from torch._dynamo.variables import TensorVariable, TupleVariable

    variable = variable.realize() if hasattr(variable, "realize") else variable
    if type(variable) is TupleVariable:
        return TupleVariable([_detached(item, tx, name) for item in variable.items])
    if type(variable) is TensorVariable and variable.as_proxy().node.meta["example_value"].grad_fn is not None:
        return without_graph(variable, tx, name)
    return variable


def without_graph(variable: Any, tx: Any, name: str) -> Any:
    """A tensor of a trace as the step leaves it under this name."""
    detached = variable.call_method(tx, "detach", [], {})
    detached.as_proxy().node.meta[NAME] = name
    return detached


def left_in(graph: torch.fx.GraphModule) -> dict[int, str]:
    """Which of a graph's results the step leaves so, and their names."""
    (output,) = graph.graph.find_nodes(op="output")
    return {i: n.meta[NAME] for i, n in enumerate(output.args[0]) if isinstance(n, torch.fx.Node) and NAME in n.meta}


def as_left(outs: Sequence[Any], left: dict[int, str], leaf: Tensor | None) -> list[Any]:
    """A graph's results with those tensors as they would be eagerly: requiring a gradient, which they do not have.

    ``leaf``: one that trains, whose gradient somebody would want."""
    made = list(outs)
    for i, name in left.items():
        if leaf is not None:
            made[i] = _Left.apply(made[i], leaf, name)  # type: ignore[no-untyped-call]
    return made


class _Left(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, leaf: Tensor, name: str) -> Tensor:
        ctx.name = name
        ctx.mark_dirty(value)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise CaptureError(f"{EARLIER}, through {ctx.name}: a captured step keeps no graph. Keep {ctx.name}.detach(), or capture='eager'.")
