"""x's interpreter against float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import xattn_kernels as xk
from xattn_kernels.schedule import Schedule
from xattn_kernels.testing import compare, compositions
from xattn_kernels.testing.cases import CASES, MEANS, Case, single

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PAIR = single("pair", 37, 45, batch=1)
RAGGED = Case("ragged", Schedule.cross_scale(3), (70, 24, 9), (70, 24, 9), channels=18, batch=1)


def slots_of(case: Case, tensors: Sequence[Tensor]) -> tuple[Any, Any, Any]:
    queries, keys = len(case.query_tokens), len(case.source_tokens)
    return tensors[:queries], tensors[queries : queries + keys], tensors[queries + keys :]


def cotangents(results: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    drawn = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in results]
    return [g.to(dtype).to(x.dtype) for g, x in zip(drawn, results, strict=True)]


def evaluate(
    function: Any, case: Case, inputs: Sequence[Tensor], dtype: torch.dtype, **options: Any
) -> list[Tensor]:
    """Outputs, S and Z, and the gradients of all inputs (0 for slots without an edge)."""
    leaves = [x.detach().requires_grad_(False) for x in inputs]
    outputs, state = function(*slots_of(case, leaves), case.schedule, **options)
    results = [*outputs, *state]
    return [x.detach() for x in results]


def judge(
    case: Case,
    dtype: torch.dtype,
    feature_map: str = "softplus",
    gradients: bool = True,
    **options: Any,
) -> None:
    inputs = [x for group in case.tensors(dtype) for x in group]
    kept = [x.clone() for x in inputs]

    def other_order(tensors: Sequence[Tensor], seed: int) -> list[Tensor]:
        if seed == 0:
            return list(tensors)
        query, key, value = slots_of(case, tensors)
        orders = [
            torch.randperm(k.shape[2], generator=torch.Generator().manual_seed(seed + 10 * i))
            for i, k in enumerate(key)
        ]
        moved = [
            [x[:, :, order] for x, order in zip(group, orders, strict=True)]
            for group in (key, value)
        ]
        return [*query, *moved[0], *moved[1]]

    def composition(tensors: Sequence[Tensor], seed: int) -> list[Tensor]:
        def in_order(query: Any, key: Any, value: Any, schedule: Schedule, **kw: Any) -> Any:
            slots = slots_of(case, other_order([*query, *key, *value], seed))
            return compositions.linear_cross_attention(*slots, schedule, **kw)

        return evaluate(in_order, case, tensors, dtype, name=feature_map, **options)

    truths = compare.truths(composition, inputs, dtype)
    results = evaluate(
        xk.linear_cross_attention,
        case,
        inputs,
        dtype,
        return_state=True,
        feature_map=feature_map,
        **options,
    )
    outputs = case.schedule.num_outputs
    largest = max((x.exact.abs().max().item() for x in truths if x.exact.numel()), default=0.0)
    for i, (result, truth) in enumerate(zip(results, truths, strict=True)):
        if i >= outputs + 2 and dtype is torch.float16 and 1 in case.source_tokens:
            # Nothing depends on the key of a single token: its gradient is a difference of equals.
            assert (result.double() - truth.exact).abs().max() <= 1e-3 * largest
        elif i >= outputs and i < outputs + 2 and dtype in (torch.float16, torch.bfloat16):
            compare.check(f"result {i}", result.to(dtype), truth)
        elif i < outputs + 2 or gradients:
            compare.check(f"result {i}", result, truth, gradient=i >= outputs + 2)
    assert all(map(torch.equal, inputs, kept)), "inputs changed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases(case: Case, dtype: torch.dtype) -> None:
    judge(case, dtype)


@pytest.mark.parametrize(
    ("channels", "value_channels"),
    [(1, 1), (6, 17), (33, 18), (36, 36), (48, 72), (72, 36), (17, 144), (144, 6), (288, 20)],
)
def test_widths(channels: int, value_channels: int) -> None:
    case = replace(PAIR, channels=channels, value_channels=value_channels)
    # With one channel the gradients of queries and keys cancel.
    judge(case, torch.float32, gradients=channels > 1)


@pytest.mark.parametrize("width", [144, 288, 384])
def test_wide_values_and_keys(width: int) -> None:
    judge(single("wide", 5, 9, channels=width, batch=1), torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("feature_map", ["softplus", "relu", "elu"])
def test_feature_maps_far_from_zero(feature_map: str, mean: float, dtype: torch.dtype) -> None:
    judge(replace(PAIR, mean=mean), dtype, feature_map)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identity_feature_map(dtype: torch.dtype) -> None:
    judge(replace(PAIR, mean=1.5), dtype, "identity")


def test_chunks_of_tokens() -> None:
    # Sources of 3 and of 2 chunks; their sums are far above what float16 holds.
    judge(
        Case("chunks", Schedule.cross_task(2), (3, 5), (600, 300), channels=4, batch=1),
        torch.float16,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clamped_denominator(dtype: torch.dtype) -> None:
    # Z . phi(q) is about 8 * 20 * ln(2)^2 = 77; half of the tokens' lie below eps.
    judge(replace(PAIR, source_tokens=(20,)), dtype, eps=110.0)
