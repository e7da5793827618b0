"""Matrix products on the CPU other than the library's: small ones as generated loops, large ones by oneDNN where that is quicker.

Torch's fp32 products are MKL's. A call of it costs more than a small product's arithmetic, and on a processor that is not
Intel's it takes no AVX-512 path; oneDNN, which torch brings for convolutions, does.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrain.results import Build

# Measured on one thread against the library (bench/LOG.md); where the two are level, the library keeps the product.
NARROW = 12  # a side of the result this short leaves a blocked product's registers empty
TINY = 2**14  # multiplications that take no longer than the call
LARGE = 2**21  # multiplications from which oneDNN's call and its packing of the weights are paid for


@cache
def onednn_is_quicker() -> bool:
    """Is this a processor with AVX-512 that MKL does not use it on? The same answer in every run: it decides the bits."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def products(graph: bool) -> dict[str, bool]:
    """Which of them a new build has; on a device, which records ``graph``s, none."""
    return {"loops": not graph, "onednn": not graph and onednn_is_quicker()}


def product_patches(build: Build) -> dict[str, Any]:
    """The compiler's settings for them; none where somebody has a pass of his own there."""
    from torch._inductor import config

    wanted = (build.loops or build.onednn) and config.post_grad_custom_pre_pass is None
    return {"post_grad_custom_pre_pass": product_pass(build.loops, build.onednn)} if wanted else {}


@cache
def product_pass(loops: bool, onednn: bool) -> Any:
    """A pass of the compiler over fp32 ``mm`` and ``addmm``."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    if onednn:
        _lower()

    class Products(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            rewrite(graph, loops, onednn)

        def uuid(self) -> bytes:  # the compiler's cache knows the pass by it
            return get_hash_for_files((__file__,), repr((loops, onednn)))

    return Products()


def rewrite(graph: torch.fx.Graph, loops: bool = True, onednn: bool = False) -> int:
    """Change ``graph`` in place and count the products changed; what does not fit is left to the library."""
    aten, changed = torch.ops.aten, 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
            continue
        *bias, a, b = node.args
        sizes = _sizes(a.meta["val"], b.meta["val"])
        if sizes is None:
            continue
        with graph.inserting_before(node):
            if loops and _is_small(sizes, a.meta["val"], b.meta["val"]):
                left, right = _call(graph, aten.unsqueeze.default, a, 2), _call(graph, aten.unsqueeze.default, b, 0)
                out = _call(graph, aten.sum.dim_IntList, _call(graph, aten.mul.Tensor, left, right), [1])
            elif onednn and sizes[0] * sizes[1] * sizes[2] >= LARGE and _is_laid_out(b.meta["val"]):
                row = bias and tuple(bias[0].meta["val"].shape) == (sizes[1],) and bias[0].meta["val"].dtype is torch.float32
                out = _call(graph, _operation(), a, _call(graph, aten.permute.default, b, [1, 0]), bias.pop() if row else None)
            else:
                continue
            for term in bias:
                out = _call(graph, aten.add.Tensor, out, term)
        node.replace_all_uses_with(out)
        graph.erase_node(node)
        changed += 1
    return changed


def _sizes(a: Tensor, b: Tensor) -> tuple[int, int, int] | None:
    """Rows, columns and the length of the sums of a product on the CPU in fp32; None for any other."""
    sizes = (a.shape[0], b.shape[1], a.shape[1])
    fits = a.device.type == "cpu" and a.dtype is torch.float32 and all(isinstance(s, int) for s in sizes)
    return sizes if fits else None


def _is_small(sizes: tuple[int, int, int], a: Tensor, b: Tensor) -> bool:
    m, n, k = sizes
    tiny = m * n * k <= TINY
    if a.stride(1) == 1 and b.stride(0) == 1:  # both are read along the sum
        return tiny or (n <= NARROW and k >= 32)
    return b.stride(1) == 1 and (tiny or k <= NARROW or (k <= 64 and min(m, n) <= NARROW))


def _is_laid_out(b: Tensor) -> bool:
    """Row by row or column by column, or one row (or column) for all: oneDNN has no name for rows that overlap."""
    inner, outer = (1, 0) if b.stride(1) == 1 else (0, 1)
    return b.stride(inner) == 1 and (b.stride(outer) == 0 or b.stride(outer) >= b.shape[inner])


def _call(graph: torch.fx.Graph, target: Any, *args: Any) -> torch.fx.Node:
    node = graph.call_function(target, args)
    given = torch.fx.map_arg(args, lambda n: n.meta["val"])
    node.meta["val"] = target(*given)
    return node


@cache
def _operation() -> Any:
    """``x @ w.T (+ bias)`` by oneDNN: x [m, k] and w [n, k] of any strides, bias [n]. Returns [m, n]."""

    @torch.library.custom_op("fasttrain_graphs::product", mutates_args=())
    def product(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, w, bias, "none", [-1], "")
        return out

    @product.register_fake
    def _(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        return x.new_empty((x.shape[0], w.shape[0]))

    return torch.ops.fasttrain_graphs.product.default


@cache
def _lower() -> None:
    """In generated code it is a direct call of torch's own operation, without a layout that the weights would be copied into."""
    from torch._inductor.ir import FixedLayout, TensorBox
    from torch._inductor.lowering import register_lowering
    from torch._inductor.mkldnn_ir import LinearUnary, _create_output_node

    @register_lowering(_operation(), type_promotion_kind=None)
    def lowered(x: Any, w: Any, bias: Any) -> Any:
        # Torch's operation would lay a transposed x out by a copy that takes twice as long as the product.
        x, w = LinearUnary.require_contiguous(LinearUnary.realize_input(x)), LinearUnary.realize_input(w)
        inputs, constants = [x, w], ["none", [-1], ""]
        if bias is None:
            constants.insert(0, None)  # type: ignore[arg-type]
        else:
            inputs.append(LinearUnary.require_contiguous(LinearUnary.realize_input(bias)))
        layout = FixedLayout(device=x.get_device(), dtype=x.get_dtype(), size=[x.get_size()[0], w.get_size()[0]])
        packed = LinearUnary(layout=layout, inputs=inputs, constant_args=constants)
        return TensorBox.create(_create_output_node(packed))  # type: ignore[no-untyped-call]
