"""Values and gradients against float64, within what an op-by-op evaluation is off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import xattn_kernels as xk
from xattn_kernels.schedule import Schedule
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


@dataclass(frozen=True)
class Peaked:
    """A query slot that reads sources jointly, with scores so large that few keys count."""

    heads: int
    sources: int
    queries: Tensor
    keys: Tensor
    values: Tensor
    """(B, C, N) of all sources, one after the other."""
    grad_output: Tensor
    grad_lse: Tensor
    """(B, heads, N), in float32."""

    @classmethod
    def make(cls, factor: float, heads: int, sources: int, dtype: torch.dtype) -> Peaked:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        query, grad = factor * draw(2, 32, 150), draw(2, 32, 150)
        key, value = (draw(2, 32, 140 * sources) for _ in range(2))
        slots = [x.to(dtype) for x in (query, key, value, grad)]
        return cls(heads, sources, *slots, draw(2, heads, 150).float())

    def results(self, run: Any, dtype: torch.dtype, lse: bool) -> list[Tensor]:
        """Output and gradients of query, key and value in `dtype`; of a loss with lse or without.

        Args:
            run: gives output and log-sum-exp of (query, key, value).
        """
        inputs = (self.queries, self.keys, self.values)
        leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
        output, log_sum_exp = run(*leaves)
        results, grads = [output], [self.grad_output.to(output.dtype)]
        if lse:
            results.append(log_sum_exp)
            grads.append(self.grad_lse.to(log_sum_exp.dtype))
        return [output.detach(), *torch.autograd.grad(results, leaves, grads)]

    def library(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        edges = [(0, source, 0, 0) for source in range(self.sources)]
        schedule = Schedule.from_edges(
            edges, num_queries=1, num_sources=self.sources, allow_self=True
        )
        parts = [list(x.chunk(self.sources, dim=2)) for x in (key, value)]
        outputs, lse = xk.softmax_cross_attention(
            [query], *parts, schedule, heads=self.heads, return_lse=True
        )
        return outputs[0], lse[0]

    def composition(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (x.unflatten(1, (self.heads, -1)) for x in (query, key, value))
        scores = q.mT @ k * q.size(2) ** -0.5
        output = v @ scores.softmax(dim=3).mT
        return output.flatten(1, 2), scores.logsumexp(dim=3)

    def torch_attention(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        q, k, v = (x.unflatten(1, (self.heads, -1)).mT for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v).mT.flatten(1, 2), None


def off(results: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Relative L2 errors."""
    pairs = zip(results, exact, strict=True)
    return [((x.double() - r).norm() / r.norm()).item() for x, r in pairs]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [1, 8, 64])
@pytest.mark.parametrize(("heads", "sources"), [(1, 1), (4, 1), (4, 2)])
def test_peaked_scores(
    engine: str, heads: int, sources: int, factor: float, dtype: torch.dtype
) -> None:
    """Gradients do not suffer from the rounding of outputs, with which they are computed."""
    case = Peaked.make(factor, heads, sources, dtype)
    exact = case.results(case.composition, torch.float64, lse=False)
    ours = off(case.results(case.library, dtype, lse=False), exact)
    theirs = off(case.results(case.torch_attention, dtype, lse=False), exact)
    assert all(x <= 2 * y for x, y in zip(ours, theirs, strict=True)), (ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [1, 64])
def test_gradients_of_log_sum_exp(engine: str, factor: float, dtype: torch.dtype) -> None:
    """Twice what rounding the exact gradients to 16 bits costs."""
    case = Peaked.make(factor, 4, 2, dtype)
    exact = case.results(case.composition, torch.float64, lse=True)
    ours = off(case.results(case.library, dtype, lse=True), exact)
    rounding = off([x.to(dtype) for x in exact], exact)
    assert all(x <= 2 * y for x, y in zip(ours, rounding, strict=True)), (ours, rounding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_one_by_one(engine: str, dtype: torch.dtype) -> None:
    """What keys and values are given does not depend on whether queries want a gradient."""
    case = Peaked.make(8, 4, 2, dtype)
    expected = case.results(case.library, dtype, lse=True)
    for i, name in enumerate(("queries", "keys", "values")):
        inputs = [case.queries, case.keys, case.values]
        leaf = inputs[i] = inputs[i].clone().requires_grad_()
        results = zip(case.library(*inputs), (case.grad_output, case.grad_lse), strict=True)
        outputs, grads = zip(*(pair for pair in results if pair[0].requires_grad), strict=True)
        (gradient,) = torch.autograd.grad(outputs, [leaf], grads)
        assert torch.equal(gradient, expected[i + 1]), name


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
