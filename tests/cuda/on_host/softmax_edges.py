"""Softmax cross-attention of the CUDA engine on the host: strides, empty slots, NaN, many edges."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import xattn_kernels as xk
from tests.ops.harness import CORES, flat, split
from xattn_kernels.schedule import Schedule
from xattn_kernels.testing.cases import CASES, LAYOUTS, Case, single

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RAGGED = Case("ragged", Schedule.cross_scale(3), (80, 24, 9), (80, 24, 9), channels=18, batch=2)
MIXED = replace(
    next(case for case in CASES if case.name == "mixed"),
    query_tokens=(20, 9, 5),
    source_tokens=(7, 18, 5),
)
#: Linux's MAP_NORESERVE, which Python has from 3.13 on.
NORESERVE = 0x4000


def inputs_of(case: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return flat(case.tensors(dtype))


def run(case: Case, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs and log-sum-exps."""
    return CORES["softmax"].library(split(inputs, case), case)


def with_gradients(
    case: Case, inputs: Sequence[Tensor], layout: Callable[[Tensor], Tensor] | None = None
) -> list[Tensor]:
    """Results and the gradients there are, those of the results in a layout."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = run(case, leaves)
    torch.manual_seed(3)
    grads = [torch.randn(x.shape).to(x.dtype) for x in results]
    if layout is not None:
        grads = [layout(g) for g in grads]
    found = torch.autograd.grad(results, leaves, grads, allow_unused=True)
    return [*results, *(g for g in found if g is not None)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", [(18, 18, 1), (36, 20, 2), (72, 72, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_views(layout: str, widths: tuple[int, int, int], dtype: torch.dtype) -> None:
    channels, value_channels, heads = widths
    case = replace(RAGGED, channels=channels, value_channels=value_channels, heads=heads, batch=1)
    inputs = inputs_of(case, dtype)
    views = [LAYOUTS[layout](x) for x in inputs]
    results, expected = with_gradients(case, views), with_gradients(case, inputs)
    assert all(map(torch.equal, results, expected))
    outputs = results[: case.schedule.num_outputs]
    for x, query in zip(outputs, case.schedule.output_queries, strict=True):
        assert (x.stride(1) == 1) == (views[query].stride(1) == 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first", range(3))
def test_views_of_different_layouts(first: int, dtype: torch.dtype) -> None:
    """Kernels of exact widths leave these to others, which round weights differently."""
    inputs = inputs_of(RAGGED, dtype)
    makers = itertools.cycle(list(LAYOUTS.values())[first:])
    views = [make(x) for x, make in zip(inputs, makers, strict=False)]
    results, expected = with_gradients(RAGGED, views), with_gradients(RAGGED, inputs)
    tolerance = 1e-2 if dtype is torch.bfloat16 else 0.0
    for x, y in zip(results, expected, strict=True):
        assert (x.double() - y.double()).norm() <= tolerance * y.double().norm()


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_expanded_inputs(dim: int) -> None:
    inputs = [x.narrow(dim, 0, 1).expand(x.shape) for x in inputs_of(MIXED)]
    copies = [x.contiguous() for x in inputs]
    results, expected = with_gradients(MIXED, inputs), with_gradients(MIXED, copies)
    assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("layout", ["stepped", "token_major", "token_major_sliced", "batch_last"])
def test_layouts_of_gradients(layout: str) -> None:
    for dtype in DTYPES:
        inputs = inputs_of(RAGGED, dtype)
        results = with_gradients(RAGGED, inputs, LAYOUTS[layout])
        assert all(map(torch.equal, results, with_gradients(RAGGED, inputs)))


@pytest.mark.parametrize("used", [[0, 2], [3], [1, 4]], ids=str)
def test_results_without_a_gradient(used: list[int]) -> None:
    leaves = [x.requires_grad_() for x in inputs_of(MIXED)]
    grads = []
    for name in ("cuda", "reference"):
        with xk.backend(name):
            results = [run(MIXED, leaves)[i] for i in used]
        ones = [torch.ones_like(x) for x in results]
        grads.append(torch.autograd.grad(results, leaves, ones, allow_unused=True))
    for x, y in zip(*grads, strict=True):
        if x is None or y is None:  # no gradient and one of zeros are the same
            assert all(z is None or not z.any() for z in (x, y))
        else:
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_some_gradients(count: int, dtype: torch.dtype) -> None:
    case = Case("two", Schedule.cross_task(2), (9, 5), (9, 5), channels=4, batch=1)
    inputs = inputs_of(case, dtype)
    whole = [x.detach().requires_grad_() for x in inputs]
    expected = torch.autograd.grad([x.sum() for x in run(case, whole)], whole)
    for chosen in itertools.combinations(range(6), count):
        leaves = [x.detach().requires_grad_(i in chosen) for i, x in enumerate(inputs)]
        sum(x.sum() for x in run(case, leaves)).backward()  # type: ignore[union-attr]
        for i, x in enumerate(leaves):
            assert (x.grad is not None) == (i in chosen)
            assert x.grad is None or torch.equal(x.grad, expected[i])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slots_without_edges_have_zero_gradients(dtype: torch.dtype) -> None:
    """Asked for by the operator's own name, which is told what is wanted."""
    query, key, value = ([torch.randn(2, 5, n).to(dtype) for n in (9, 3)] for _ in range(3))
    operators = torch.ops.xattn_kernels
    edges = [0, 1, 0]
    output, lse = operators.softmax_cross_attention(query, key, value, edges, 1, 0.4, "cuda")
    grads = [[torch.randn_like(x) for x in both] for both in (output, lse)]
    found = operators.softmax_cross_attention_backward(
        query, key, value, output, edges, lse, *grads, 1, 0.4, [True] * 6, "cuda"
    )
    assert [bool(x.any()) for x in found] == [True, False, False, True, False, True]


@pytest.mark.parametrize(("batch", "queries", "sources"), [(0, 5, 6), (2, 0, 6), (2, 7, 0)])
def test_nothing_to_do(batch: int, queries: int, sources: int) -> None:
    case = single("empty", queries, sources, batch=batch, value_channels=5)
    for dtype in DTYPES:
        leaves = [x.requires_grad_() for x in inputs_of(case, dtype)]
        output, lse = run(case, leaves)
        assert output.shape == (batch, 5, queries)
        assert not output.any()
        if sources == 0:
            assert torch.equal(lse, torch.full_like(lse, float("-inf")))
        for x, grad in zip(leaves, torch.autograd.grad(output.sum(), leaves), strict=True):
            assert grad.shape == x.shape
            assert not grad.any()


def test_empty_source_beside_others() -> None:
    case = replace(MIXED, source_tokens=(25, 0, 15))
    inputs = inputs_of(case)
    results = with_gradients(case, inputs)
    assert not results[2].any()
    edges = [e for e in case.schedule.edges if e.source != 1]
    schedule = Schedule.from_edges(edges, num_queries=3, num_sources=3, allow_self=True)
    expected = run(replace(case, schedule=schedule), inputs)
    assert torch.equal(results[0], expected[0])
    assert torch.equal(results[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [4, 6, 7], ids=str)
def test_not_a_number(place: int, dtype: torch.dtype) -> None:
    """In a key, wherever its exponential is computed; in a query; in a value."""
    case = replace(next(case for case in CASES if case.name == "cross_task_ragged"), channels=36)
    case = replace(case, value_channels=36)
    inputs = inputs_of(case, dtype)
    clean = run(case, inputs)
    key, value = inputs[4], inputs[7]
    key[1, 3, place] = float("nan")
    dirty = with_gradients(case, inputs)
    for x, y, edge in zip(dirty, clean, case.schedule.edges, strict=False):
        assert torch.equal(x[0], y[0])
        assert x[1].isnan().all() if edge.source == 1 else torch.equal(x[1], y[1])
    gradients = dirty[2 * case.schedule.num_outputs :]
    assert all(x[0].isfinite().all() for x in gradients)
    assert gradients[4][1].isnan().all()
    key[1, 3, place] = 0.5
    inputs[0][0, 2, 33] = float("nan")
    dirty = run(case, inputs)
    assert dirty[0][0, :, 33].isnan().all()
    assert dirty[0].isnan().sum() == dirty[0].shape[1]
    inputs[0][0, 2, 33] = 0.5
    value[0, 5, place] = float("inf")
    infinite = run(case, inputs)
    for x, edge in zip(infinite, case.schedule.edges, strict=False):
        expected = torch.zeros_like(x, dtype=torch.bool)
        expected[0, 5] = edge.source == 1
        assert torch.equal(x == float("inf"), expected)


@pytest.mark.parametrize("channels", [3, 18])
@pytest.mark.parametrize("stride", ["batch", "channel", "token"])
def test_offsets_beyond_32_bits(stride: str, channels: int) -> None:
    """Elements 2^31 apart, in memory of which a few pages are ever touched; copied in vectors."""
    shape = (2, channels, 4)
    step = 2**31 // {"batch": 1, "channel": channels - 1, "token": 3}[stride] // 8 * 8 + 8
    strides = {"batch": (step, 8, 1), "channel": (8, step, 1), "token": (24, 1, step)}[stride]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    memory = mmap.mmap(-1, 2 * (2 * 2**31 + 4096), flags=flags)
    for dtype in (torch.float16, torch.bfloat16):
        numbers = torch.frombuffer(memory, dtype=dtype)
        inputs = [torch.randn(shape).to(dtype) for _ in range(4)]
        far = [numbers.as_strided(shape, strides, 256 * i).copy_(x) for i, x in enumerate(inputs)]
        found = []
        for *slots, grad in (inputs, far):
            leaves = [x.detach().requires_grad_() for x in slots]
            output = xk.softmax_cross_attention(leaves[0], leaves[1], leaves[2])
            assert isinstance(output, Tensor)
            found.append([output, *torch.autograd.grad(output, leaves, grad)])
        assert all(map(torch.equal, *found))


@pytest.mark.parametrize("edges", [20, 200])
def test_many_edges(edges: int) -> None:
    """More than a kernel's parameter holds: 20 outputs backward, 200 forward as well."""
    schedule = Schedule.from_edges([(0, 0, i, 0) for i in range(edges)], allow_self=True)
    case = replace(single("edges", 2, 3, channels=2, batch=1), schedule=schedule)
    one = replace(case, schedule=Schedule.identity(1))
    leaves = [x.requires_grad_() for x in inputs_of(case)]
    results, expected = run(case, leaves), run(one, leaves)
    assert len(results) == 2 * edges
    assert all(torch.equal(x, expected[0]) for x in results[:edges])
    found = torch.autograd.grad([x.sum() for x in results[:edges]], leaves)
    whole = torch.autograd.grad(expected[0].sum() * edges, leaves)
    for x, y in zip(found, whole, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_else_is_written(dtype: torch.dtype) -> None:
    """Results in slices of a larger buffer, by the module's own functions."""
    case = replace(RAGGED, batch=1)
    inputs = inputs_of(case, dtype)
    expected = run(case, inputs)
    from xattn_kernels.engines import native_cuda
    from xattn_kernels.engines.native import DTYPE_CODES, views

    slots = split(inputs, case)
    buffers, outputs = [], []
    for x in expected[: case.schedule.num_outputs]:
        buffer = torch.full((1, 40, x.shape[2] + 6), float("nan"), dtype=dtype)
        buffers.append(buffer)
        outputs.append(buffer[:, 7 : 7 + x.shape[1], 3:-3])
    lse = [torch.full_like(x, float("nan")) for x in expected[case.schedule.num_outputs :]]
    edges = [n for e in case.schedule.edges for n in (e.query, e.source, e.output)]
    native_cuda.module().softmax_forward(
        native_cuda.context(inputs[0]),
        DTYPE_CODES[dtype],
        1,
        18,
        18,
        1,
        18**-0.5,
        *(views(x) for x in (*slots, outputs)),
        edges,
        [x.data_ptr() for x in lse],
    )
    assert all(map(torch.equal, [*outputs, *lse], expected))
    for buffer, output in zip(buffers, outputs, strict=True):
        output.fill_(float("nan"))
        assert buffer.isnan().all()
