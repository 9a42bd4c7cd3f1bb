"""Linear cross-attention in Triton's interpreter: strides, empty slots, NaN, states, gradients."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import xattn_kernels as xk
from xattn_kernels.engines.triton import runtime
from xattn_kernels.schedule import Schedule
from xattn_kernels.testing.cases import CASES, LAYOUTS, Case, single

RAGGED = Case("ragged", Schedule.cross_scale(3), (70, 24, 9), (70, 24, 9), channels=18, batch=1)
MIXED = next(case for case in CASES if case.name == "mixed")


def flat(case: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [x for group in case.tensors(dtype) for x in group]


def run(case: Case, inputs: Sequence[Tensor], **options: Any) -> list[Tensor]:
    queries, keys = len(case.query_tokens), len(case.source_tokens)
    outputs, state = xk.linear_cross_attention(
        inputs[:queries],
        inputs[queries : queries + keys],
        inputs[queries + keys :],
        case.schedule,
        return_state=True,
        **options,
    )
    return [*outputs, *state]


def with_gradients(case: Case, inputs: Sequence[Tensor], layout: Any = None) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = run(case, leaves)
    torch.manual_seed(3)
    grads = [torch.randn(x.shape).to(x.dtype) for x in results]
    if layout is not None:
        grads = [layout(g) if g.dim() == 3 else g for g in grads]
    found = torch.autograd.grad(results, leaves, grads, allow_unused=True)
    return [*results, *(g for g in found if g is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_views(layout: str, dtype: torch.dtype) -> None:
    inputs = flat(RAGGED, dtype)
    views = [LAYOUTS[layout](x) for x in inputs]
    results, expected = with_gradients(RAGGED, views), with_gradients(RAGGED, inputs)
    assert all(map(torch.equal, results, expected))
    outputs = results[: RAGGED.schedule.num_outputs]
    for x, query in zip(outputs, RAGGED.schedule.output_queries, strict=True):
        assert (x.stride(1) == 1) == (views[query].stride(1) == 1)


def test_views_of_different_layouts() -> None:
    inputs = flat(RAGGED)
    makers = itertools.cycle(list(LAYOUTS.values())[1:])
    views = [make(x) for x, make in zip(inputs, makers, strict=False)]
    results, expected = with_gradients(RAGGED, views), with_gradients(RAGGED, inputs)
    assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_expanded_inputs(dim: int) -> None:
    inputs = [x.narrow(dim, 0, 1).expand(x.shape) for x in flat(RAGGED)]
    copies = [x.contiguous() for x in inputs]
    results, expected = with_gradients(RAGGED, inputs), with_gradients(RAGGED, copies)
    assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("layout", ["stepped", "token_major_sliced", "batch_last"])
def test_layouts_of_gradients(layout: str) -> None:
    inputs = flat(RAGGED)
    results = with_gradients(RAGGED, inputs, LAYOUTS[layout])
    assert all(map(torch.equal, results, with_gradients(RAGGED, inputs)))


def test_expanded_gradient() -> None:
    leaves = [x.requires_grad_() for x in flat(RAGGED)]
    outputs = run(RAGGED, leaves)[:-2]
    ones = [torch.ones_like(x) for x in outputs]
    used = {"allow_unused": True, "retain_graph": True}
    expected = torch.autograd.grad(outputs, leaves, ones, **used)
    given = torch.autograd.grad(sum(x.sum() for x in outputs), leaves, **used)
    for x, y in zip(given, expected, strict=True):
        assert (x is None) == (y is None)
        assert x is None or torch.equal(x, y)


def test_outputs_without_a_gradient() -> None:
    leaves = [x.requires_grad_() for x in flat(MIXED)]
    outputs = run(MIXED, leaves)
    with xk.backend("reference"):
        expected = run(MIXED, leaves)
    for used in ([0, 2], [3], [4], [1, 4]):
        grads = [
            torch.autograd.grad(
                [results[i] for i in used],
                leaves,
                [torch.ones_like(results[i]) for i in used],
                allow_unused=True,
                retain_graph=True,
            )
            for results in (outputs, expected)
        ]
        for x, y in zip(*grads, strict=True):
            if x is None or y is None:  # no gradient and one of zeros are the same
                assert all(z is None or not z.any() for z in (x, y))
            else:
                torch.testing.assert_close(x, y)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_some_gradients(count: int) -> None:
    case = replace(RAGGED, schedule=Schedule.cross_task(2), query_tokens=(9, 5))
    case = replace(case, source_tokens=(9, 5), channels=4)
    inputs = flat(case)
    whole = [x.detach().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(sum(x.sum() for x in run(case, whole)), whole)
    for chosen in itertools.combinations(range(6), count):
        leaves = [x.detach().requires_grad_(i in chosen) for i, x in enumerate(inputs)]
        sum(x.sum() for x in run(case, leaves)).backward()  # type: ignore[union-attr]
        for i, x in enumerate(leaves):
            assert (x.grad is not None) == (i in chosen)
            assert x.grad is None or torch.equal(x.grad, expected[i])


def test_started_from_a_state() -> None:
    case = next(case for case in CASES if case.name == "joint")
    torch.manual_seed(0)
    shape = (case.schedule.num_outputs, 2, 9, 9)
    s, z = torch.randn(shape), torch.rand(shape[:3]) + 1
    found = []
    for name in ("triton", "reference"):
        leaves = [x.detach().requires_grad_() for x in (*flat(case), s, z)]
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
        leaves = flat(case)
        sum(x.sum() for x in run(case, leaves, state=(s, z))).backward()  # type: ignore[union-attr]
        assert wanted.grad is not None and wanted.grad.isfinite().all()
        wanted.requires_grad_(False)


@pytest.mark.parametrize(("batch", "queries", "sources"), [(0, 5, 6), (2, 0, 6), (2, 7, 0)])
def test_nothing_to_do(batch: int, queries: int, sources: int) -> None:
    case = single("empty", queries, sources, batch=batch, value_channels=5)
    leaves = [x.requires_grad_() for x in flat(case)]
    results = run(case, leaves)
    assert results[0].shape == (batch, 5, queries)
    assert not results[0].any()
    grads = torch.autograd.grad(results[0].sum(), leaves)
    for x, grad in zip(leaves, grads, strict=True):
        assert grad.shape == x.shape
        assert not grad.any()


def test_empty_source_beside_others() -> None:
    case = replace(MIXED, source_tokens=(25, 0, 15))
    inputs = flat(case)
    results = with_gradients(case, inputs)
    assert not results[2].any()
    edges = [e for e in case.schedule.edges if e.source != 1]
    schedule = Schedule.from_edges(edges, num_queries=3, num_sources=3, allow_self=True)
    expected = run(replace(case, schedule=schedule), inputs)
    assert torch.equal(results[0], expected[0])
    assert torch.equal(results[1], expected[1])


def test_not_a_number() -> None:
    case = CASES[[case.name for case in CASES].index("cross_task_ragged")]
    inputs = flat(case)
    clean = run(case, inputs)
    key = inputs[4]
    key[1, 3, 4] = float("nan")
    dirty = run(case, inputs)
    for x, y, edge in zip(dirty, clean, case.schedule.edges, strict=False):
        assert torch.equal(x[0], y[0])
        assert x[1].isnan().all() if edge.source == 1 else torch.equal(x[1], y[1])
    key[1, 3, 4] = 0.5
    inputs[0][0, 2, 33] = float("nan")
    clean = run(case, inputs)[0]
    assert clean[0, :, 33].isnan().all()
    assert clean.isnan().sum() == clean.shape[1]


@pytest.mark.parametrize("stride", ["batch", "channel", "token"])
def test_offsets_beyond_32_bits(stride: str, tmp_path: Path) -> None:
    """Elements 2^31 apart, in a file with holes that takes a few pages of disk."""
    shape = (2, 3, 4)
    step = (2**31 + 8) // {"batch": 1, "channel": 2, "token": 3}[stride]
    strides = {"batch": (step, 4, 1), "channel": (4, step, 1), "token": (12, 4, step)}[stride]
    path = tmp_path / "memory"
    with path.open("wb") as file:
        file.truncate(4 * (2 * 2**31 + 4096))
    with path.open("r+b") as file:
        memory = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.float32)
    inputs = [torch.randn(shape) for _ in range(3)]
    far = [memory.as_strided(shape, strides, 64 * i).copy_(x) for i, x in enumerate(inputs)]
    assert torch.equal(xk.linear_cross_attention(*far), xk.linear_cross_attention(*inputs))


def test_many_edges() -> None:
    edges = 200
    schedule = Schedule.from_edges([(0, 0, i, 0) for i in range(edges)], allow_self=True)
    case = replace(single("edges", 2, 3, channels=2, batch=1), schedule=schedule)
    results = run(case, flat(case))
    assert len(results) == edges + 2
    assert torch.equal(results[edges - 1], results[0])


def test_refusals() -> None:
    query = torch.randn(1, 4, 5)
    with pytest.raises(RuntimeError, match="no float64"):
        xk.linear_cross_attention(*[query.double()] * 3)
    with pytest.raises(RuntimeError, match="up to 384 channels, not 385"):
        xk.linear_cross_attention(*[torch.randn(1, 385, 2)] * 3)
    problem = xk.explain("linear_cross_attention", query)
    assert problem.engine == "triton"
    assert "not on cuda" in runtime.refusals(problem.problem._replace(device="cuda"))[0]


def test_double_backward_is_an_error() -> None:
    x = torch.randn(1, 4, 5, requires_grad=True)
    grad = torch.autograd.grad(xk.linear_cross_attention(x, x, x).sum(), x, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
        grad.sum().backward()
