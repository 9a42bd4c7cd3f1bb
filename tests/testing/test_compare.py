"""The acceptance rules accept what rounding does and reject what it does not."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from xattn_kernels.testing.cases import DTYPES
from xattn_kernels.testing.compare import Truth, check, truths

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def mean_of_products(inputs: Sequence[Tensor], order: int) -> list[Tensor]:
    """(B, C, N) from two (B, N, C) and (B, N, N) tensors: sums of many products."""
    x, y = inputs
    if order:
        shuffled = torch.randperm(y.shape[2], generator=torch.Generator().manual_seed(order))
        x, y = x[:, shuffled], y[:, :, shuffled]
    return [(y @ x).transpose(1, 2) / x.shape[1]]


@pytest.fixture
def problem() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(2, 130, 12, generator=generator, dtype=torch.float64),
        torch.randn(2, 130, 130, generator=generator, dtype=torch.float64),
    )


def truth_of(problem: tuple[Tensor, Tensor], dtype: torch.dtype) -> Truth:
    return truths(mean_of_products, [x.to(dtype) for x in problem], dtype)[0]


@dtypes
def test_rounding_is_accepted(problem: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    truth = truth_of(problem, dtype)
    check("rounded once", truth.exact.to(dtype), truth)
    if dtype in (torch.float32, torch.float64):
        check("op by op", mean_of_products([x.to(dtype) for x in problem], 9)[0], truth)


@dtypes
@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda x: x.mul_(1.02), id="factor"),
        pytest.param(lambda x: x[1, 3, 128:].zero_(), id="last partial tile"),
        pytest.param(lambda x: x[0, 0, 5].add_(0.1), id="one element"),
        pytest.param(lambda x: x[0, 0, 5].fill_(float("nan")), id="nan"),
        pytest.param(lambda x: x[0, 0, 5].fill_(float("inf")), id="inf"),
        pytest.param(lambda x: x.copy_(x.roll(1, dims=1)), id="channels"),
    ],
)
def test_errors_are_rejected(
    problem: tuple[Tensor, Tensor], dtype: torch.dtype, spoil: object
) -> None:
    truth = truth_of(problem, dtype)
    result = truth.exact.to(dtype).contiguous()
    assert callable(spoil)
    spoil(result)
    with pytest.raises(AssertionError, match="output: "):
        check("output", result, truth)


def test_a_lower_precision_is_rejected(problem: tuple[Tensor, Tensor]) -> None:
    truth = truth_of(problem, torch.float32)
    lower = mean_of_products([x.bfloat16() for x in problem], 0)[0]
    with pytest.raises(AssertionError, match="largest error"):
        check("output", lower.float(), truth)
    tf32 = [(x.float().view(torch.int32) & ~0x1FFF).view(torch.float32) for x in problem]
    with pytest.raises(AssertionError, match="largest error"):
        check("output", mean_of_products(tf32, 0)[0], truth)


def test_one_bad_tile_does_not_hide_among_good_ones() -> None:
    # Small values beside large ones: the largest error says nothing about them.
    exact = torch.cat([torch.full((1, 4, 64), 1e3), torch.full((1, 4, 64), 1e-3)], dim=2).double()
    zeros = torch.zeros_like(exact)
    result = exact.float()
    check("output", result, Truth(exact, zeros, zeros))
    result[:, :, 64:] *= 1 + 1e-4
    with pytest.raises(AssertionError, match=r"tokens from 64: relative L2 error 1\.0"):
        check("output", result, Truth(exact, zeros, zeros))


def test_places_of_what_is_not_finite() -> None:
    exact = torch.tensor([[[1.0, float("nan"), float("inf"), 1e6]]]).double()
    zeros = torch.zeros_like(exact)
    truth = Truth(exact, zeros, zeros)
    check("overflows in float16", exact.half(), truth)
    check("fits in float32", exact.float(), truth)
    with pytest.raises(AssertionError, match="1 elements are finite in one"):
        check("output", exact.half().nan_to_num(nan=0.0, posinf=float("inf")), truth)
    with pytest.raises(AssertionError, match="of another kind"):
        check("output", exact.float().nan_to_num(nan=float("inf"), posinf=float("inf")), truth)


def test_shapes_and_empty_results() -> None:
    empty = torch.zeros(0, 3, 4, dtype=torch.float64)
    check("empty", empty.float(), Truth(empty, empty, empty))
    with pytest.raises(AssertionError, match=r"shape \(0, 3, 4\), expected \(0, 3, 5\)"):
        check("output", empty.float(), Truth(torch.zeros(0, 3, 5), empty, empty))


def test_subnormal_results_of_16_bit() -> None:
    exact = torch.full((1, 2, 3), 1e-11, dtype=torch.float64)
    zeros = torch.zeros_like(exact)
    check("rounds to zero", exact.half(), Truth(exact, zeros, zeros))
