"""Numbers that a compiler would give back as they were when it saw them first, for ever."""

from __future__ import annotations

import torch
from torch import Tensor


def frozen_float(graph: torch.fx.GraphModule) -> bool:
    """Does the graph give back a number computed from a Python float that changes? Inductor (2.13) gives back the traced one."""
    returned = next(n for n in reversed(graph.graph.nodes) if n.op == "output").args[0]
    for node in returned if isinstance(returned, (list, tuple)) else ():
        source = node.args[0] if isinstance(node, torch.fx.Node) and node.target is torch.scalar_tensor else None
        if isinstance(source, torch.fx.Node) and isinstance(source.meta.get("example_value"), torch.SymFloat) and _from_outside(source):
            return True
    return False


def _from_outside(number: torch.fx.Node) -> bool:
    """Is it computed from a Python float that came in (and not only from tensors' values)? Some come in wrapped in a tensor."""
    stack, seen = [number], set[torch.fx.Node]()
    while stack:
        node = stack.pop()
        wrapped = getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False)
        is_tensor = isinstance(node.meta.get("example_value"), Tensor)
        if node.op == "placeholder" and (wrapped or not is_tensor):
            return True
        if node not in seen and not is_tensor:
            stack += node.all_input_nodes
        seen.add(node)
    return False
