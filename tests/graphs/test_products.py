"""Small matrix products as loops: which are rewritten, that they stay right, and that a checkpoint remembers it."""

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.data import DataLoader, TensorDataset

import fasttrain
from fasttrain.graphs.products import product_pass, rewrite
from tests.graphs.test_compile_rung import QUIET


def traced(function, *shapes, dtype=torch.float32):
    given = [torch.randn(s, dtype=dtype) for s in shapes]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        graph = make_fx(function)(*(mode.from_tensor(x) for x in given))
    return graph, given


FORWARD = lambda x, w, b: torch.addmm(b, x, w.t())  # noqa: E731
WEIGHTS = lambda g, x: g.t() @ x  # noqa: E731
INPUTS = lambda g, w: g @ w  # noqa: E731

SMALL = [
    (FORWARD, [(32, 784), (10, 784), (10,)]),
    (FORWARD, [(32, 12), (3, 12), (3,)]),
    (FORWARD, [(1, 784), (1, 784), (1,)]),
    (WEIGHTS, [(32, 10), (32, 784)]),
    (WEIGHTS, [(4, 512), (4, 512)]),
    (INPUTS, [(32, 10), (10, 784)]),
]
LEFT = [
    (FORWARD, [(32, 784), (128, 784), (128,)]),
    (FORWARD, [(32, 3), (784, 3), (784,)]),
    (FORWARD, [(8, 512), (2048, 512), (2048,)]),
    (WEIGHTS, [(1024, 10), (1024, 128)]),
    (INPUTS, [(32, 64), (64, 784)]),
]


@pytest.mark.parametrize(("function", "shapes"), SMALL)
def test_a_small_product_becomes_a_sum_with_the_same_value(function, shapes):
    graph, given = traced(function, *shapes)
    assert rewrite(graph.graph) == 1
    graph.recompile()
    assert not any("mm" in str(n.target) for n in graph.graph.nodes)
    torch.testing.assert_close(graph(*given), function(*given), rtol=1e-5, atol=1e-4)
    meta = next(n for n in graph.graph.nodes if n.op == "output").args[0].meta["val"]
    assert meta.shape == function(*given).shape


@pytest.mark.parametrize(("function", "shapes"), LEFT)
def test_what_the_library_does_better_is_left_to_it(function, shapes):
    graph, _ = traced(function, *shapes)
    assert rewrite(graph.graph) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_left_to_the_library(dtype):
    graph, _ = traced(FORWARD, (32, 784), (10, 784), (10,), dtype=dtype)
    assert rewrite(graph.graph) == 0


def test_a_scaled_addmm_is_left_to_the_library():
    graph, _ = traced(lambda x, w, b: torch.addmm(b, x, w.t(), beta=0.5), (32, 784), (10, 784), (10,))
    assert rewrite(graph.graph) == 0


class Narrow(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 3))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_run_trains_alike_and_says_how_it_was_built():
    x, y = torch.randn(96, 64), torch.randint(3, (96,))
    runs = {}
    for capture in ("eager", "compile"):
        module = Narrow()
        result = fasttrain.compile_fit(module, max_epochs=2, capture=capture, **QUIET).fit(DataLoader(TensorDataset(x, y), batch_size=16))
        runs[capture] = (module, result)
    assert runs["compile"][1].capture.build.loops
    for a, b in zip(runs["eager"][0].parameters(), runs["compile"][0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


LARGE = [
    (FORWARD, [(256, 96), (128, 96), (128,)]),
    (lambda x, w: x @ w.t(), [(256, 96), (128, 96)]),
    (WEIGHTS, [(256, 96), (256, 128)]),
    (INPUTS, [(256, 96), (96, 128)]),
    (lambda x, w, b: torch.addmm(b, x, w), [(256, 96), (96, 128), (256, 128)]),
]


@pytest.mark.parametrize(("function", "shapes"), LARGE)
@pytest.mark.parametrize("cpp_wrapper", [False, True])
def test_a_large_product_by_onednn_has_the_same_value(function, shapes, cpp_wrapper):
    """As a graph, and as generated code: a direct call of torch's own operation, of weights as they lie."""
    graph, given = traced(function, *shapes)
    assert rewrite(graph.graph, onednn=False) == 0
    assert rewrite(graph.graph, onednn=True) == 1
    graph.recompile()
    torch.testing.assert_close(graph(*given), function(*given), rtol=1e-5, atol=1e-4)
    patches = {"post_grad_custom_pre_pass": product_pass(True, True), "cpp_wrapper": cpp_wrapper, "fx_graph_cache": False}
    with torch.no_grad():
        out, (code,) = run_and_get_code(torch.compile(function, options=patches), *given)
    torch.testing.assert_close(out, function(*given), rtol=1e-5, atol=1e-4)
    assert out.is_contiguous()
    assert code.count("_linear_pointwise") >= 1
    own = function is WEIGHTS or (len(given) == 3 and given[2].dim() == 2)
    assert ("cpp_fused" in code) is own, "a transposed left side is laid out, and a whole matrix added, in a kernel; nothing else is"


def test_rows_that_overlap_are_left_to_the_library():
    graph, _ = traced(lambda w, s: w @ s.unfold(0, 128, 1), (256, 256), (383,))
    assert rewrite(graph.graph, onednn=True) == 0
    graph, _ = traced(lambda w, s: w @ s.expand(256, 128), (256, 256), (128,))
    assert rewrite(graph.graph, onednn=True) == 1


def test_the_rule_is_the_processors(monkeypatch):
    """Not a measurement: it decides which bits a run computes."""
    from fasttrain.graphs import products

    for vendor, capability, wanted in [
        ("AuthenticAMD", "AVX512", True), ("GenuineIntel", "AVX512", False), ("AuthenticAMD", "AVX2", False),
    ]:  # fmt: skip
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda given=capability: given)
        monkeypatch.setattr(products.Path, "read_text", lambda self, given=vendor: f"vendor_id : {given}")
        assert products.onednn_is_quicker.__wrapped__() is wanted


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(96, 256), nn.GELU(), nn.Linear(256, 128), nn.Tanh(), nn.Linear(128, 3))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class WideCut(Wide):
    def training_step(self, batch, batch_idx):
        hidden = self.net[:3](batch[0])
        torch._dynamo.graph_break()
        return nn.functional.cross_entropy(self.net[3:](hidden), batch[1])


@pytest.mark.parametrize("kind", [Wide, WideCut])
def test_a_run_with_large_products_trains_alike(kind, monkeypatch):
    """Whole and in pieces."""
    from fasttrain.graphs import products

    x, y = torch.randn(768, 96), torch.randint(3, (768,))
    runs = {}
    for name, quicker in (("eager", False), ("compile", False), ("compile", True)):
        monkeypatch.setattr(products, "onednn_is_quicker", lambda quicker=quicker: quicker)
        module = kind()
        result = fasttrain.compile_fit(module, max_epochs=2, capture=name, **QUIET).fit(DataLoader(TensorDataset(x, y), batch_size=256))
        runs[name, quicker] = [p.detach() for p in module.parameters()]
        assert result.capture.rung == name
        assert name == "eager" or result.capture.build.onednn is quicker
        assert name == "eager" or result.capture.whole is (kind is Wide)
    for a, b, c in zip(*runs.values(), strict=True):
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    library, onednn = runs["compile", False], runs["compile", True]
    assert any(not torch.equal(b, c) for b, c in zip(library, onednn, strict=True)), "another product was used"
