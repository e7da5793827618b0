"""Small matrix products on the CPU as generated loops: a call of the library costs more there than its arithmetic."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

# Measured on one thread against the library (bench/LOG.md); where the two are level, the library keeps the product.
NARROW = 12  # a side of the result this short leaves a blocked product's registers empty
TINY = 2**14  # multiplications that take no longer than the call


@cache
def small_products() -> Any:
    """A pass of the compiler that writes small fp32 ``mm`` and ``addmm`` as a product and a sum, which it turns into loops."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class SmallProducts(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            rewrite(graph)

        def uuid(self) -> bytes:  # the compiler's cache knows the pass by it
            return get_hash_for_files((__file__,))

    return SmallProducts()


def rewrite(graph: torch.fx.Graph) -> int:
    """Change ``graph`` in place and count the products changed; what does not fit is left to the library."""
    aten, changed = torch.ops.aten, 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
            continue
        *bias, a, b = node.args
        if not _is_small(a.meta["val"], b.meta["val"]):
            continue
        with graph.inserting_before(node):
            left, right = _call(graph, aten.unsqueeze.default, a, 2), _call(graph, aten.unsqueeze.default, b, 0)
            out = _call(graph, aten.sum.dim_IntList, _call(graph, aten.mul.Tensor, left, right), [1])
            for term in bias:
                out = _call(graph, aten.add.Tensor, out, term)
        node.replace_all_uses_with(out)
        graph.erase_node(node)
        changed += 1
    return changed


def _is_small(a: torch.Tensor, b: torch.Tensor) -> bool:
    sizes = (a.shape[0], b.shape[1], a.shape[1])
    if a.device.type != "cpu" or a.dtype is not torch.float32 or not all(isinstance(s, int) for s in sizes):
        return False
    m, n, k = sizes
    tiny = m * n * k <= TINY
    if a.stride(1) == 1 and b.stride(0) == 1:  # both are read along the sum
        return tiny or (n <= NARROW and k >= 32)
    return b.stride(1) == 1 and (tiny or k <= NARROW or (k <= 64 and min(m, n) <= NARROW))


def _call(graph: torch.fx.Graph, target: Any, *args: Any) -> torch.fx.Node:
    node = graph.call_function(target, args)
    given = torch.fx.map_arg(args, lambda n: n.meta["val"])
    node.meta["val"] = target(*given)
    return node
