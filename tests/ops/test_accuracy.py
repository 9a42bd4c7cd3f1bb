"""Values and gradients against float64, within what an op-by-op evaluation is off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from xattn_kernels.testing import compare
from xattn_kernels.testing.cases import CASES, DTYPES, MEANS, WIDTHS, Case, single

from .harness import CORES, Core, flat, in_other_order, split, with_gradients

PAIR = single("pair", 70, 90)


def judge(
    core: Core, case: Case, dtype: torch.dtype, gradients: bool = True, **options: Any
) -> None:
    """Check outputs, states or log-sum-exps, and all gradients of ``case``."""
    inputs = flat(case.tensors(dtype))
    kept = [x.clone() for x in inputs]
    library_options = dict(options)
    if "name" in options:
        library_options["feature_map"] = library_options.pop("name")
    results, grads = with_gradients(
        lambda slots: core.library(slots, case, **library_options), inputs, case, dtype
    )

    def evaluate(tensors: Sequence[Tensor], order: int) -> list[Tensor]:
        exact, exact_grads = with_gradients(
            lambda slots: core.composition(in_other_order(slots, order), case, **options),
            tensors,
            case,
            dtype,
        )
        # A slot without an edge has no gradient; zeros stand in, to keep the places.
        return exact + [
            torch.zeros_like(x) if g is None else g
            for x, g in zip(tensors, exact_grads, strict=True)
        ]

    truths = compare.truths(evaluate, inputs, dtype)
    accumulator = torch.float64 if dtype is torch.float64 else torch.float32
    outputs = case.schedule.num_outputs
    for i, result in enumerate(results):
        assert result.dtype is (dtype if i < outputs else accumulator)
        compare.check(f"result {i}", result, truths[i])
    if gradients:
        for i, (x, grad) in enumerate(zip(inputs, grads, strict=True)):
            if grad is not None:
                assert grad.dtype is dtype
                assert grad.shape == x.shape
                compare.check(f"gradient {i}", grad, truths[len(results) + i], gradient=True)
    assert all(torch.equal(x, y) for x, y in zip(inputs, kept, strict=True)), "inputs changed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases(engine: str, core: Core, case: Case, dtype: torch.dtype) -> None:
    judge(core, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", WIDTHS)
def test_widths(engine: str, core: Core, channels: int, dtype: torch.dtype) -> None:
    # With one channel the gradients of queries and keys cancel: test_autograd has them in float64.
    judge(core, replace(PAIR, channels=channels), dtype, gradients=channels > 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("feature_map", ["softplus", "relu", "elu"])
def test_feature_maps_far_from_zero(
    engine: str, feature_map: str, mean: float, dtype: torch.dtype
) -> None:
    judge(CORES["linear"], replace(PAIR, mean=mean), dtype, name=feature_map)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identity_feature_map(engine: str, dtype: torch.dtype) -> None:
    judge(CORES["linear"], replace(PAIR, mean=1.5), dtype, name="identity")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "value_channels", "heads"), [(12, 0, 3), (16, 40, 8)])
def test_heads(
    engine: str, channels: int, value_channels: int, heads: int, dtype: torch.dtype
) -> None:
    case = replace(PAIR, channels=channels, value_channels=value_channels, heads=heads)
    judge(CORES["softmax"], case, dtype)


def test_scale(engine: str) -> None:
    judge(CORES["softmax"], PAIR, torch.float32, scale=0.07)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_tokens(engine: str, core: Core, dtype: torch.dtype) -> None:
    # Denominators near 1e5: sums kept in 16 bits would be infinite.
    queries, sources = (19_200, 19_200) if core.name == "linear" else (200, 4_800)
    judge(core, single("many", queries, sources, channels=18, batch=1), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clamped_denominator(engine: str, dtype: torch.dtype) -> None:
    # Z . phi(q) is about 8 * 20 * ln(2)^2 = 77; half of the tokens' lie below eps.
    judge(CORES["linear"], replace(PAIR, source_tokens=(20,)), dtype, eps=110.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_started_from_a_state(engine: str, dtype: torch.dtype) -> None:
    case = next(case for case in CASES if case.name == "joint")
    torch.manual_seed(0)
    outputs = case.schedule.num_outputs
    s = torch.randn(outputs, 2, 9, 9, dtype=dtype)
    z = torch.rand(outputs, 2, 9, dtype=dtype) + 1
    inputs = [*flat(case.tensors(dtype)), s, z]
    core = CORES["linear"]

    def run(function: Any, tensors: Sequence[Tensor], order: int = 0) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        slots = in_other_order(split(leaves[:-2], case), order)
        results = function(slots, case, state=(leaves[-2], leaves[-1]))
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in results]
        return [*results, *torch.autograd.grad(results, leaves, grads)]

    truths = compare.truths(lambda x, order: run(core.composition, x, order), inputs, dtype)
    for i, (result, truth) in enumerate(zip(run(core.library, inputs), truths, strict=True)):
        compare.check(f"result {i}", result, truth, gradient=i >= outputs + 2)
