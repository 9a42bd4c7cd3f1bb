"""Linear cross-attention of the CUDA engine on the host: strides, empty slots, NaN, states."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import xattn_kernels as xk
from tests.ops.harness import CORES, flat, split
from xattn_kernels.engines import native_cuda
from xattn_kernels.schedule import Schedule
from xattn_kernels.testing.cases import CASES, LAYOUTS, Case, single

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RAGGED = Case("ragged", Schedule.cross_scale(3), (150, 24, 9), (150, 24, 9), channels=18, batch=2)
MIXED = next(case for case in CASES if case.name == "mixed")
#: Linux's MAP_NORESERVE, which Python has from 3.13 on.
NORESERVE = 0x4000


def inputs_of(case: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return flat(case.tensors(dtype))


def run(case: Case, inputs: Sequence[Tensor], **options: Any) -> list[Tensor]:
    return CORES["linear"].library(split(inputs, case), case, **options)


def with_gradients(
    case: Case, inputs: Sequence[Tensor], layout: Callable[[Tensor], Tensor] | None = None
) -> list[Tensor]:
    """Results and the gradients there are, those of the results in a layout."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = run(case, leaves)
    torch.manual_seed(3)
    grads = [torch.randn(x.shape).to(x.dtype) for x in results]
    if layout is not None:
        grads = [layout(g) if g.dim() == 3 else g for g in grads]
    found = torch.autograd.grad(results, leaves, grads, allow_unused=True)
    return [*results, *(g for g in found if g is not None)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", [(18, 18), (36, 20), (100, 49)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_views(layout: str, widths: tuple[int, int], dtype: torch.dtype) -> None:
    case = replace(RAGGED, channels=widths[0], value_channels=widths[1])
    inputs = inputs_of(case, dtype)
    views = [LAYOUTS[layout](x) for x in inputs]
    results, expected = with_gradients(case, views), with_gradients(case, inputs)
    assert all(map(torch.equal, results, expected))
    outputs = results[: case.schedule.num_outputs]
    for x, query in zip(outputs, case.schedule.output_queries, strict=True):
        assert (x.stride(1) == 1) == (views[query].stride(1) == 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_of_different_layouts(dtype: torch.dtype) -> None:
    inputs = inputs_of(RAGGED, dtype)
    makers = itertools.cycle(list(LAYOUTS.values())[1:])
    views = [make(x) for x, make in zip(inputs, makers, strict=False)]
    results, expected = with_gradients(RAGGED, views), with_gradients(RAGGED, inputs)
    assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_expanded_inputs(dim: int) -> None:
    inputs = [x.narrow(dim, 0, 1).expand(x.shape) for x in inputs_of(RAGGED)]
    copies = [x.contiguous() for x in inputs]
    results, expected = with_gradients(RAGGED, inputs), with_gradients(RAGGED, copies)
    assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("layout", ["stepped", "token_major", "token_major_sliced", "batch_last"])
def test_layouts_of_gradients(layout: str) -> None:
    for dtype in DTYPES:
        inputs = inputs_of(RAGGED, dtype)
        results = with_gradients(RAGGED, inputs, LAYOUTS[layout])
        assert all(map(torch.equal, results, with_gradients(RAGGED, inputs)))


def test_expanded_gradient() -> None:
    leaves = [x.requires_grad_() for x in inputs_of(RAGGED)]
    outputs = run(RAGGED, leaves)[:-2]
    ones = [torch.ones_like(x) for x in outputs]
    used = {"allow_unused": True, "retain_graph": True}
    expected = torch.autograd.grad(outputs, leaves, ones, **used)
    given = torch.autograd.grad(sum(x.sum() for x in outputs), leaves, **used)
    for x, y in zip(given, expected, strict=True):
        assert (x is None) == (y is None)
        assert x is None or torch.equal(x, y)


@pytest.mark.parametrize("used", [[0, 2], [3], [4], [1, 4]], ids=str)
def test_outputs_without_a_gradient(used: list[int]) -> None:
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


@pytest.mark.parametrize("count", [1, 2, 5])
def test_some_gradients(count: int) -> None:
    case = replace(RAGGED, schedule=Schedule.cross_task(2), query_tokens=(9, 5))
    case = replace(case, source_tokens=(9, 5), channels=4)
    inputs = inputs_of(case)
    whole = [x.detach().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(sum(x.sum() for x in run(case, whole)), whole)
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
    edges = [0, 1, 0]
    args = (query, key, value, edges)
    _, s, z = torch.ops.xattn_kernels.linear_cross_attention(
        *args, None, None, "softplus", 1e-12, "cuda"
    )
    grad = [torch.randn(2, 5, 9).to(dtype)]
    found = torch.ops.xattn_kernels.linear_cross_attention_backward(
        *args, s, z, grad, None, None, "softplus", 1e-12, [True] * 6 + [False] * 2, "cuda"
    )
    assert [bool(x.any()) for x in found] == [True, False, False, True, False, True]


def test_started_from_a_state() -> None:
    case = next(case for case in CASES if case.name == "joint")
    torch.manual_seed(0)
    shape = (case.schedule.num_outputs, 2, 9, 9)
    s, z = torch.randn(shape), torch.rand(shape[:3]) + 1
    found = []
    for name in ("cuda", "reference"):
        leaves = [x.detach().requires_grad_() for x in (*inputs_of(case), s, z)]
        with xk.backend(name):
            results = run(case, leaves[:-2], state=(leaves[-2], leaves[-1]))
        torch.manual_seed(1)
        grads = [torch.randn(x.shape) for x in results]
        found.append([*results, *torch.autograd.grad(results, leaves, grads)])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5)
    # One of the two initial states alone has a gradient as well.
    for wanted in (s, z):
        wanted.requires_grad_()
        sum(x.sum() for x in run(case, inputs_of(case), state=(s, z))).backward()  # type: ignore[union-attr]
        assert wanted.grad is not None and wanted.grad.isfinite().all()
        wanted.requires_grad_(False)


@pytest.mark.parametrize(("batch", "queries", "sources"), [(0, 5, 6), (2, 0, 6), (2, 7, 0)])
def test_nothing_to_do(batch: int, queries: int, sources: int) -> None:
    case = single("empty", queries, sources, batch=batch, value_channels=5)
    leaves = [x.requires_grad_() for x in inputs_of(case)]
    results = run(case, leaves)
    assert results[0].shape == (batch, 5, queries)
    assert not results[0].any()
    grads = torch.autograd.grad(results[0].sum(), leaves)
    for x, grad in zip(leaves, grads, strict=True):
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
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number(bad: float, dtype: torch.dtype) -> None:
    case = next(case for case in CASES if case.name == "cross_task_ragged")
    inputs = inputs_of(case, dtype)
    clean = with_gradients(case, inputs)
    outputs = case.schedule.num_outputs
    key = inputs[4]
    key[1, 3, 4] = bad
    dirty = with_gradients(case, inputs)
    with xk.backend("reference"):
        expected = with_gradients(case, inputs)
    for x, y, edge in zip(dirty, clean, case.schedule.edges, strict=False):
        assert torch.equal(x[0], y[0])
        if edge.source != 1:
            assert torch.equal(x[1], y[1])
    for i, (x, y) in enumerate(zip(dirty, expected, strict=True)):
        if i < outputs + 2:
            assert torch.equal(x.isfinite(), y.isfinite())
        else:  # of samples that have none, and of those where all are lost
            assert torch.equal(x[0].isfinite(), y[0].isfinite())
            assert not (x.isnan() & y.isfinite()).any()
    key[1, 3, 4] = 0.5
    inputs[0][0, 2, 33] = float("nan")
    found = with_gradients(case, inputs)
    assert found[0][0, :, 33].isnan().all()
    assert found[0].isnan().sum() == found[0].shape[1]
    query_gradient = found[outputs + 2]
    assert query_gradient[0, :, 33].isnan().all()
    assert query_gradient.isnan().sum() == query_gradient.shape[1]


@pytest.mark.parametrize("stride", ["batch", "channel", "token"])
def test_offsets_beyond_32_bits(stride: str) -> None:
    """Elements 2^31 apart, in memory of which a few pages are ever touched."""
    shape = (2, 3, 4)
    step = (2**31 + 8) // {"batch": 1, "channel": 2, "token": 3}[stride]
    strides = {"batch": (step, 4, 1), "channel": (4, step, 1), "token": (12, 4, step)}[stride]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    memory = mmap.mmap(-1, 2 * (2 * 2**31 + 4096), flags=flags)
    for dtype in (torch.float16, torch.bfloat16):
        numbers = torch.frombuffer(memory, dtype=dtype)
        inputs = [torch.randn(shape).to(dtype) for _ in range(4)]
        far = [numbers.as_strided(shape, strides, 64 * i).copy_(x) for i, x in enumerate(inputs)]
        found = []
        for *slots, grad in (inputs, far):
            leaves = [x.detach().requires_grad_() for x in slots]
            output = xk.linear_cross_attention(*leaves)
            assert isinstance(output, Tensor)
            found.append([output, *torch.autograd.grad(output, leaves, grad)])
        assert all(map(torch.equal, *found))


@pytest.mark.parametrize("edges", [30, 200])
def test_many_edges(edges: int) -> None:
    """More than a kernel's parameter holds: 30 outputs backward, 200 forward as well."""
    schedule = Schedule.from_edges([(0, 0, i, 0) for i in range(edges)], allow_self=True)
    case = replace(single("edges", 2, 3, channels=2, batch=1), schedule=schedule)
    one = replace(case, schedule=Schedule.identity(1))
    leaves = [x.requires_grad_() for x in inputs_of(case)]
    results, expected = run(case, leaves), run(one, leaves)
    assert len(results) == edges + 2
    assert all(torch.equal(x, expected[0]) for x in results[:edges])
    found = torch.autograd.grad(sum(x.sum() for x in results[:edges]), leaves)
    whole = torch.autograd.grad(expected[0].sum() * edges, leaves)
    for x, y in zip(found, whole, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_refusals() -> None:
    query = torch.randn(1, 4, 5)
    with pytest.raises(RuntimeError, match="no float64"):
        xk.linear_cross_attention(*[query.double()] * 3)
    with pytest.raises(RuntimeError, match="up to 384 channels, not 385"):
        xk.linear_cross_attention(*[torch.randn(1, 385, 2)] * 3)
    problem = xk.explain("linear_cross_attention", query)
    assert problem.engine == "cuda"
    assert "not on xpu" in native_cuda.refusals(problem.problem._replace(device="xpu"))[0]


def test_double_backward_is_an_error() -> None:
    x = torch.randn(1, 4, 5, requires_grad=True)
    grad = torch.autograd.grad(xk.linear_cross_attention(x, x, x).sum(), x, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
        grad.sum().backward()
