"""The norm has the same bits on any number of threads and any instruction set; so has every update."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import AdamW

from fasttrain.errors import KernelError
from fasttrain.kernels import grad_norm, library, native_lists, reference
from fasttrain.kernels.native_lists import NativeSum
from fasttrain.kernels.native_tail import NativeTail
from tests.kernels.pairs import FEW, SHAPES, all_bits, assert_near, bits, make_grads, make_params, name_of, needs_native
from tests.kernels.pairs import tail_of as make_tail

pytestmark = needs_native
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture
def threads():
    """Sets torch's thread count, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def instruction_set():
    """Forces an instruction set, and puts the best one back."""
    yield library.force_instruction_set
    library.force_instruction_set(None)


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_equals_the_reference(dtype, norm_type):
    """Both norms of every dtype, odd sizes and empty tensors among them, to a float32 rounding or two."""
    tensors = make_params(dtype=dtype)
    wanted = reference.grad_norm(tensors, norm_type)
    assert abs(native_lists.norm(tensors, norm_type) - wanted) <= 3e-7 * wanted


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 20_000), st.sampled_from(DTYPES), st.integers(1, 3)), max_size=8))
def test_norm_of_any_list(parts):
    """Lists of any sizes, dtypes and strides."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, generator=generator).to(dtype)[::stride] for n, dtype, stride in parts]
    wanted = reference.grad_norm(tensors)
    assert abs(native_lists.norm(tensors, 2.0) - wanted) <= 3e-7 * wanted


@pytest.mark.parametrize("size", [1e-30, 1e-25, 1e-19, 1.0, 1e18, 1e25, 1e37])
def test_norm_neither_over_nor_underflows(size):
    """Squares leave the range of float32 long before the norm does."""
    tensors = [torch.full((1000,), size), torch.zeros(20_000)]
    assert native_lists.norm(tensors, 2.0) == pytest.approx(size * math.sqrt(1000), rel=1e-6)


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_bad_values(dtype, norm_type):
    """One NaN or inf anywhere makes the norm NaN or inf."""
    for index in (0, 100, 8191, 8192, 9999):
        for bad in (math.nan, math.inf, -math.inf):
            tensor = torch.ones(10_000, dtype=dtype)
            tensor[index] = bad
            norm = native_lists.norm([torch.ones(3, dtype=dtype), tensor], norm_type)
            assert math.isnan(norm) if math.isnan(bad) else norm == math.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_number(dtype):
    """All 65 536 bit patterns are read exactly, and rounded as torch rounds, subnormals and ties included."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[every.isfinite()]
    for value in finite[:: 97 if dtype == torch.float16 else 389]:
        if dtype == torch.float16 or float(value) == 0 or abs(float(value)) > 1.2e-38:  # bfloat16 subnormals are zero
            assert native_lists.norm([value.reshape(1)], math.inf) == abs(float(value))
    totals, terms = finite.clone(), finite.roll(12345).clone()
    wanted = (totals.float() + 0.37 * terms.float()).to(dtype)
    NativeSum([totals]).add_([terms], scale=0.37)
    normal = (wanted.float().abs() > 1.2e-38) | (dtype == torch.float16)
    assert torch.equal(totals[normal], wanted[normal])


def test_norm_is_bitwise_the_same_on_any_number_of_threads(threads):
    """One, two or three threads add the same partial sums in the same order."""
    tensors = [p.detach() for p in make_params([*SHAPES, (70_001,), (3, 40_000)])]
    results = set()
    for count in (1, 2, 3):
        threads(count)
        results.add((native_lists.norm(tensors, 2.0), native_lists.norm(tensors, math.inf)))
    assert len(results) == 1


@pytest.mark.parametrize(("kind", "options"), FEW, ids=name_of)
def test_update_is_bitwise_the_same_everywhere(kind, options, threads, instruction_set):
    """Every instruction set of this machine, on one thread and on two, gives the same bits."""
    results = []
    for level in library.INSTRUCTION_SETS:
        if instruction_set(level) != level:
            continue
        for count in (1, 2):
            threads(count)
            parts = []
            for dtype in DTYPES:
                params, optimizer, tail = make_tail(kind, options, dtype=dtype)
                for step in range(2):
                    tail.step(make_grads(params, step), max_norm=1.0)
                parts += all_bits(params, optimizer) + bits([tail.grad_norm.reshape(1)])
            results.append(parts)
    assert len(results) >= 2
    assert all(result == results[0] for result in results)


def test_inf_norm_clips():
    """A tail of norm_type inf measures and clips by the largest magnitude."""
    shapes = [shape for shape in SHAPES if 0 not in shape]  # clip_grad_norm_ has no inf norm of an empty tensor
    params, wanted = make_params(shapes), make_params(shapes)
    optimizer = AdamW(params)
    tail = NativeTail(optimizer, params, norm_type=math.inf)
    grads = make_grads(params, 0)
    for p, g in zip(wanted, grads, strict=True):
        p.grad = g.clone()
    norm = torch.nn.utils.clip_grad_norm_(wanted, 0.5, norm_type=math.inf)
    AdamW(wanted).step()
    assert (norm > 0.5).all()
    tail.step(grads, max_norm=0.5)
    assert tail.grad_norm == norm
    assert_near(params, wanted)


@pytest.mark.parametrize("norm_type", [2.0, math.inf, 1.0])
def test_grad_norm_takes_any_tensors(norm_type):
    """Views with gaps, other norms and other dtypes: what get_total_norm gives."""
    tensors = [torch.randn(10, 10)[:, ::3], torch.randn(5).expand(3, 5), torch.randn(4, 6).t(), torch.randn(3).double()]
    wanted = torch.nn.utils.get_total_norm(tensors, norm_type)
    assert grad_norm(tensors, norm_type) == pytest.approx(float(wanted), rel=1e-6)
    assert grad_norm([], norm_type) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_equals_the_reference(dtype):
    """Accumulating lists, scaled and with gaps, is adding tensor by tensor."""
    totals = [p.detach().clone() for p in make_params(dtype=dtype)]
    wanted = [t.clone() for t in totals]
    total = NativeSum(totals)
    for step in range(3):
        terms = make_grads(totals, step)
        reference.add_(wanted, terms, 0.5)
        total.add_(terms, scale=0.5)
    assert bits(totals) == bits(wanted)
    total.add_([None] * len(totals))
    assert bits(totals) == bits(wanted)
    with pytest.raises(KernelError, match="term 2"):
        total.add_([None, None, torch.zeros(2, dtype=dtype), *[None] * (len(totals) - 3)])
    with pytest.raises(KernelError, match="one memory"):
        NativeSum([totals[2], totals[2][:1]])
