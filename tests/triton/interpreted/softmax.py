"""Softmax cross-attention in Triton's interpreter against float64."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import xattn_kernels as xk
from xattn_kernels.schedule import Schedule
from xattn_kernels.testing import compare, compositions
from xattn_kernels.testing.cases import CASES, LAYOUTS, Case, single

DTYPES = (torch.float32, torch.float16)
PAIR = single("pair", 37, 45, batch=1)
RAGGED = Case("ragged", Schedule.cross_scale(3), (40, 33, 9), (40, 33, 9), channels=12, batch=1)
#: The interpreter takes seconds for the others.
SMALL = [case for case in CASES if case.name != "cross_task"]
MIXED = replace(
    next(case for case in CASES if case.name == "mixed"),
    query_tokens=(20, 9, 5),
    source_tokens=(7, 18, 5),
)


def flat(case: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [x for group in case.tensors(dtype) for x in group]


def slots_of(case: Case, tensors: Sequence[Tensor]) -> tuple[Any, Any, Any]:
    queries, keys = len(case.query_tokens), len(case.source_tokens)
    return tensors[:queries], tensors[queries : queries + keys], tensors[queries + keys :]


def run(case: Case, inputs: Sequence[Tensor], function: Any = None, **options: Any) -> list[Tensor]:
    """Outputs and log-sum-exps."""
    if function is None:
        function, options = xk.softmax_cross_attention, {**options, "return_lse": True}
    outputs, lse = function(*slots_of(case, inputs), case.schedule, heads=case.heads, **options)
    return [*outputs, *lse]


def with_gradients(
    case: Case,
    inputs: Sequence[Tensor],
    dtype: torch.dtype = torch.float32,
    function: Any = None,
    layout: Any = None,
    **options: Any,
) -> list[Tensor]:
    """Results and the gradients of all inputs (0 for slots without an edge)."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = run(case, leaves, function, **options)
    generator = torch.Generator().manual_seed(7)
    drawn = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in results]
    grads = [g.to(dtype).to(x.dtype) for g, x in zip(drawn, results, strict=True)]
    if layout is not None:
        grads = [layout(g) for g in grads]
    found = torch.autograd.grad(results, leaves, grads, allow_unused=True)
    both = zip(leaves, found, strict=True)
    return [x.detach() for x in results] + [
        torch.zeros_like(x) if g is None else g for x, g in both
    ]


def judge(case: Case, dtype: torch.dtype, gradients: bool = True, **options: Any) -> None:
    inputs = flat(case, dtype)
    kept = [x.clone() for x in inputs]
    half = dtype is torch.float16

    def composition(tensors: Sequence[Tensor], seed: int) -> list[Tensor]:
        def in_order(query: Any, key: Any, value: Any, schedule: Schedule, **kw: Any) -> Any:
            if seed:
                orders = [
                    torch.randperm(k.shape[2], generator=torch.Generator().manual_seed(seed + i))
                    for i, k in enumerate(key)
                ]
                key = [x[:, :, order] for x, order in zip(key, orders, strict=True)]
                value = [x[:, :, order] for x, order in zip(value, orders, strict=True)]
            return compositions.softmax_cross_attention(query, key, value, schedule, **kw)

        return with_gradients(case, tensors, dtype, in_order, **options)

    truths = compare.truths(composition, inputs, dtype)
    results = with_gradients(case, inputs, dtype, **options)
    count = 2 * case.schedule.num_outputs
    largest = max(
        (x.exact.abs().max().item() for x in truths[count:] if x.exact.numel()), default=0
    )
    for i, (result, truth) in enumerate(zip(results, truths, strict=True)):
        if i >= count and (case.name == "one_token" or (half and 1 in case.source_tokens)):
            # A single key has all the weight: its gradient is a difference of equals.
            bound = {torch.float32: 1e-6, torch.float16: 1e-3}[dtype] * largest
            assert (result.double() - truth.exact).abs().max() <= bound
        elif i < count or gradients:
            compare.check(f"result {i}", result, truth, gradient=i >= count)
    assert all(map(torch.equal, inputs, kept)), "inputs changed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_cases(case: Case, dtype: torch.dtype) -> None:
    judge(case, dtype)


@pytest.mark.parametrize(
    ("channels", "value_channels", "heads"),
    [
        (1, 1, 1),
        (6, 17, 1),
        (33, 18, 1),
        (36, 36, 1),
        (72, 48, 1),
        (17, 72, 1),
        (12, 12, 3),
        (16, 40, 8),
        (72, 36, 2),
    ],
)
def test_widths_and_heads(channels: int, value_channels: int, heads: int) -> None:
    case = replace(PAIR, channels=channels, value_channels=value_channels, heads=heads)
    # With one channel the gradients of queries and keys cancel.
    judge(case, torch.float32, gradients=channels > 1)
    if heads > 1:
        judge(case, torch.float16)


@pytest.mark.parametrize("width", [144, 288, 384])
def test_wide(width: int) -> None:
    case = single("wide", 5, 9, channels=width, batch=1)
    judge(case, torch.float16)
    judge(case, torch.float32)


@pytest.mark.parametrize("scale", [0.07, -0.4, 0.0])
def test_scale(scale: float) -> None:
    judge(PAIR, torch.float32, scale=scale)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views(layout: str) -> None:
    case, dtype = replace(RAGGED, heads=3), torch.float16
    inputs = flat(case, dtype)
    views = [LAYOUTS[layout](x) for x in inputs]
    results, expected = with_gradients(case, views, dtype), with_gradients(case, inputs, dtype)
    assert all(map(torch.equal, results, expected))
    outputs = results[: case.schedule.num_outputs]
    for x, query in zip(outputs, case.schedule.output_queries, strict=True):
        assert (x.stride(1) == 1) == (views[query].stride(1) == 1)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_expanded_inputs(dim: int) -> None:
    inputs = [x.narrow(dim, 0, 1).expand(x.shape) for x in flat(MIXED)]
    copies = [x.contiguous() for x in inputs]
    results, expected = with_gradients(MIXED, inputs), with_gradients(MIXED, copies)
    assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("layout", ["stepped", "token_major_sliced", "batch_last"])
def test_layouts_of_gradients(layout: str) -> None:
    inputs = flat(RAGGED)
    results = with_gradients(RAGGED, inputs, layout=LAYOUTS[layout])
    assert all(map(torch.equal, results, with_gradients(RAGGED, inputs)))


def test_results_without_a_gradient() -> None:
    leaves = [x.requires_grad_() for x in flat(MIXED)]
    found = []
    for name in ("triton", "reference"):
        with xk.backend(name):
            found.append(run(MIXED, leaves))
    for used in ([0, 2], [3], [1, 4]):
        grads = [
            torch.autograd.grad(
                [results[i] for i in used],
                leaves,
                [torch.ones_like(results[i]) for i in used],
                allow_unused=True,
                retain_graph=True,
            )
            for results in found
        ]
        for x, y in zip(*grads, strict=True):
            if x is None or y is None:  # no gradient and one of zeros are the same
                assert all(z is None or not z.any() for z in (x, y))
            else:
                torch.testing.assert_close(x, y)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_some_gradients(count: int) -> None:
    case = Case("two", Schedule.cross_task(2), (9, 5), (9, 5), channels=4, batch=1)
    inputs = flat(case)
    whole = [x.detach().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(sum(x.sum() for x in run(case, whole)), whole)
    for chosen in itertools.combinations(range(6), count):
        leaves = [x.detach().requires_grad_(i in chosen) for i, x in enumerate(inputs)]
        sum(x.sum() for x in run(case, leaves)).backward()  # type: ignore[union-attr]
        for i, x in enumerate(leaves):
            # Log-sum-exps do not depend on values, outputs do.
            assert (x.grad is not None) == (i in chosen)
            assert x.grad is None or torch.equal(x.grad, expected[i])


@pytest.mark.parametrize(("batch", "queries", "sources"), [(0, 5, 6), (2, 0, 6), (2, 7, 0)])
def test_nothing_to_do(batch: int, queries: int, sources: int) -> None:
    case = single("empty", queries, sources, batch=batch, value_channels=5)
    leaves = [x.requires_grad_() for x in flat(case)]
    output, lse = run(case, leaves)
    assert output.shape == (batch, 5, queries)
    assert not output.any()
    if sources == 0:
        assert torch.equal(lse, torch.full_like(lse, float("-inf")))
    for x, grad in zip(leaves, torch.autograd.grad(output.sum(), leaves), strict=True):
        assert grad.shape == x.shape
        assert not grad.any()


def test_empty_source_beside_others() -> None:
    case = replace(MIXED, source_tokens=(25, 0, 15), batch=1)
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
    dirty = run(case, inputs)[0]
    assert dirty[0, :, 33].isnan().all()
    assert dirty.isnan().sum() == dirty.shape[1]


def test_one_key() -> None:
    """Score 0, log-sum-exp 0, weight 1: values pass, and so do their gradients."""
    torch.manual_seed(0)
    query = torch.randint(-4, 5, (2, 6, 7)).float().requires_grad_()
    key = torch.zeros(2, 6, 1, requires_grad=True)
    value = torch.randint(-9, 10, (2, 5, 1)).float().requires_grad_()
    output, lse = xk.softmax_cross_attention(query, key, value, return_lse=True)
    gradient = torch.randint(-9, 10, (2, 5, 7)).float()
    grads = torch.autograd.grad(output, (query, key, value), gradient)
    assert torch.equal(output, value.expand_as(output))
    assert not lse.any() and not grads[0].any() and not grads[1].any()
    assert torch.equal(grads[2], gradient.sum(2, keepdim=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores(dtype: torch.dtype) -> None:
    case = replace(PAIR, channels=12)
    query, key, value = (x[0] for x in case.tensors(dtype))
    query, key = query * 100, key * 100
    output, lse = xk.softmax_cross_attention(query, key, value, return_lse=True)
    exact, exact_lse = compositions.softmax_cross_attention(
        *[[x.double()] for x in (query, key, value)], Schedule.identity(1)
    )
    torch.testing.assert_close(lse.double(), exact_lse[0], rtol=1e-6, atol=1e-2)
    # The largest score takes all; which one that is, rounding of the scores may decide.
    assert ((output.double() - exact[0]).abs().amax(1) > 0.05).sum() <= 1
    assert output.isfinite().all()
