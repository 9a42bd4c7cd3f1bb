"""Softmax cross-attention of the CUDA engine against float64, forward and backward, on the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.harness import CORES, flat, in_other_order, with_gradients
from xattn_kernels.schedule import Schedule
from xattn_kernels.testing import compare
from xattn_kernels.testing.cases import CASES, Case, single

CORE = CORES["softmax"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PAIR = single("pair", 37, 75, batch=1)
SMALL_CARD = 99 * 1024


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def results_of(case: Case, inputs: Sequence[Tensor], **options: Any) -> list[Tensor]:
    """Outputs, log-sum-exps, and the gradients of all inputs, 0 for slots without an edge."""
    results, grads = with_gradients(
        lambda slots: CORE.library(slots, case, **options), inputs, case, inputs[0].dtype
    )
    both = zip(inputs, grads, strict=True)
    return results + [torch.zeros_like(x) if g is None else g for x, g in both]


def truths_of(case: Case, inputs: Sequence[Tensor], **options: Any) -> list[compare.Truth]:
    """What :func:`results_of` is compared with."""
    dtype = inputs[0].dtype

    def evaluate(tensors: Sequence[Tensor], order: int) -> list[Tensor]:
        results, grads = with_gradients(
            lambda slots: CORE.composition(in_other_order(slots, order), case, **options),
            tensors,
            case,
            dtype,
        )
        both = zip(tensors, grads, strict=True)
        return results + [torch.zeros_like(x) if g is None else g for x, g in both]

    return compare.truths(evaluate, inputs, dtype)


def judge(case: Case, dtype: torch.dtype, gradients: bool = True, **options: Any) -> None:
    inputs = flat(case.tensors(dtype))
    kept = [x.clone() for x in inputs]
    truths = truths_of(case, inputs, **options)
    outputs = case.schedule.num_outputs
    grads = [x.exact.abs().max().item() for x in truths[2 * outputs :] if x.exact.numel()]
    for i, (result, truth) in enumerate(
        zip(results_of(case, inputs, **options), truths, strict=True)
    ):
        if i < 2 * outputs:
            if i >= outputs:
                assert result.dtype is torch.float32
            compare.check(f"result {i}", result, truth)
        elif case.name == "one_token" or (dtype is not torch.float32 and 1 in case.source_tokens):
            # A single key has all the weight: its gradient is a difference of equals.
            bound = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
            assert (result.double() - truth.exact).abs().max() <= bound * max(grads)
        elif gradients:
            compare.check(f"gradient {i - 2 * outputs}", result, truth, gradient=True)
    assert all(map(torch.equal, inputs, kept)), "inputs changed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases(case: Case, dtype: torch.dtype) -> None:
    judge(case, dtype)


#: Channels, value channels and heads: kernels of exact widths (32, 48, 64, 80, 96, 144 for
#: bfloat16) and of any.
WIDTHS = [
    (1, 1, 1),
    (6, 17, 1),
    (18, 18, 1),
    (36, 36, 1),
    (64, 64, 1),
    (72, 72, 1),
    (96, 96, 1),
    (36, 100, 1),
    (100, 36, 1),
    (12, 12, 3),
    (16, 40, 8),
    (72, 36, 2),
    (144, 144, 4),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "value_channels", "heads"), WIDTHS)
def test_widths_and_heads(
    channels: int, value_channels: int, heads: int, dtype: torch.dtype
) -> None:
    case = replace(PAIR, channels=channels, value_channels=value_channels, heads=heads)
    # With one channel the gradients of queries and keys cancel.
    judge(case, dtype, gradients=channels > 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [144, 192, 288, 383, 384])
def test_wide(twin: Any, width: int, dtype: torch.dtype) -> None:
    """On a card with much shared memory, and with little: chunks of channels, a single stage."""
    case = single("wide", 20, 35, channels=width, batch=1)
    judge(case, dtype)
    twin.twin_configure(seed=width, processors=2, shared_bytes=SMALL_CARD)
    judge(case, dtype)
    assert max(launch[3] for launch in twin.twin_launches()) <= SMALL_CARD


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [36, 72])
def test_many_tiles(twin: Any, width: int, dtype: torch.dtype) -> None:
    """Several tiles of queries and of keys, on a card of either size."""
    case = Case("tiles", Schedule.cross_task(2), (300, 70), (300, 70), channels=width, batch=1)
    judge(case, dtype)
    inputs = flat(case.tensors(dtype))
    first = results_of(case, inputs)
    twin.twin_configure(seed=1, processors=1, shared_bytes=SMALL_CARD)
    unit = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for x, y in zip(results_of(case, inputs), first, strict=True):
        assert (x.double() - y.double()).norm() <= unit * y.double().norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.07, -0.4, 0.0])
def test_scale(scale: float, dtype: torch.dtype) -> None:
    judge(replace(PAIR, channels=36), dtype, scale=scale)


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("widths", [(18, 18), (36, 100), (144, 40)])
def test_tf32_only_if_asked_for(widths: tuple[int, int]) -> None:
    case = Case("pairs", Schedule.cross_task(2), (70, 30), (70, 30), *widths, batch=1)
    inputs = flat(case.tensors(torch.float32))
    truths = truths_of(case, inputs)
    errors = []
    for precision in ("tf32", "ieee"):
        torch.backends.cuda.matmul.fp32_precision = precision
        both = zip(results_of(case, inputs), truths, strict=True)
        errors.append([(x - t.exact).norm() / t.exact.norm() for x, t in both])
    for coarse, fine in zip(*errors, strict=True):
        assert fine < 1e-5
        assert coarse < 1e-3
    assert max(errors[0]) > 1e-4


def test_results_repeat_bit_for_bit(twin: Any) -> None:
    case = Case("pairs", Schedule.cross_task(3), (200, 30, 1), (200, 30, 1), 36, batch=1)
    for dtype in DTYPES:
        inputs = flat(case.tensors(dtype))
        first = results_of(case, inputs)
        for seed in range(3):
            twin.twin_configure(seed=seed, processors=2 + seed)
            assert all(map(torch.equal, results_of(case, inputs), first))


def test_scores_that_keep_rising() -> None:
    """Every tile has larger scores than those before, by little and by much."""
    torch.manual_seed(0)
    for step in (0.05, 0.5, 5.0):
        query, value = torch.ones(1, 1, 9), torch.randn(1, 36, 400)
        key = (torch.arange(400.0) * step / 16).reshape(1, 1, 400)
        case = single("rising", 9, 400, channels=1, value_channels=36, batch=1)
        for dtype in DTYPES:
            inputs = [x.to(dtype) for x in (query, key, value)]
            truths = truths_of(case, inputs)[:2]
            for i, truth in enumerate(truths):
                compare.check(f"result {i}", results_of(case, inputs)[i], truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores(dtype: torch.dtype) -> None:
    case = replace(PAIR, channels=36)
    query, key, value = flat(case.tensors(dtype))
    query, key = query * 100, key * 100
    output, lse = CORE.library(([query], [key], [value]), case)
    exact, exact_lse = CORE.composition(([query.double()], [key.double()], [value.double()]), case)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-2)
    # The largest score takes all; which one that is, rounding of the scores may decide.
    assert ((output.double() - exact).abs().amax(1) > 0.05).sum() <= 1
    assert output.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [20, 36])
def test_scores_far_from_zero(width: int, dtype: torch.dtype) -> None:
    """Beyond the last token scores are 0, 300 more than those before it; they must not count."""
    case = single("far", 21, 37, channels=width)
    for sign in (-1, 1):
        query, key, value = flat(case.tensors(dtype))
        query[:, 0], key[:, 0] = 32, sign * 64
        inputs, size = [query, key, value], 1e-4 if dtype is torch.float32 else 2e-2
        truths = truths_of(case, inputs, scale=0.15)
        for i, result in enumerate(results_of(case, inputs, scale=0.15)):
            if i < 2:
                compare.check(f"result {i}", result, truths[i])
            # The log-sum-exp, of which gradients are made, has few digits behind its point.
            exact = truths[i].exact
            assert (result.double() - exact).norm() <= size * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_key(dtype: torch.dtype) -> None:
    """Score 0, log-sum-exp 0, weight 1: values pass, and so do their gradients."""
    torch.manual_seed(0)
    query = torch.randint(-4, 5, (2, 6, 7)).to(dtype).requires_grad_()
    key = torch.zeros(2, 6, 1, dtype=dtype, requires_grad=True)
    value = torch.randint(-9, 10, (2, 5, 1)).to(dtype).requires_grad_()
    case = single("one", 7, 1, channels=6, value_channels=5)
    output, lse = CORE.library(([query], [key], [value]), case)
    gradient = torch.randint(-9, 10, (2, 5, 7)).to(dtype)
    grads = torch.autograd.grad(output, (query, key, value), gradient)
    assert torch.equal(output, value.expand_as(output))
    assert not lse.any()
    assert not grads[0].any()
    assert not grads[1].any()
    assert torch.equal(grads[2], gradient.double().sum(2, keepdim=True).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_scores(dtype: torch.dtype) -> None:
    """All weights are 1 / 64: means of small integers are exact in every type."""
    torch.manual_seed(0)
    case = single("equal", 5, 64, channels=36)
    query = torch.randint(-4, 5, (2, 36, 5)).to(dtype)
    key = torch.zeros(2, 36, 64, dtype=dtype)
    value = 4 * torch.randint(-5, 6, (2, 36, 64))
    output, lse = CORE.library(([query], [key], [value.to(dtype)]), case)
    mean = value.double().mean(2, keepdim=True)
    assert torch.equal(output, mean.expand_as(output).to(dtype))
    torch.testing.assert_close(lse.double(), torch.full_like(lse, 64.0).double().log())
