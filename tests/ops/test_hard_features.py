"""The cross-attention block on features that batch norms find hard: few digits survive them.

Errors against float64 of the same, rounded features are compared with those of the composition of
stock operators in float32, the farthest off of some that add in different orders.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import xattn_kernels as xk
from xattn_kernels.ops.cross_attention_block_training.layers import (
    Parameters,
    Rows,
    closed_form,
)
from xattn_kernels.ops.cross_attention_block_training.op import pairs_of
from xattn_kernels.schedule import Schedule
from xattn_kernels.testing.compare import UNIT

from .test_block_training import LAYERS, Inputs, compose, run

BATCH, CHANNELS, HEIGHT, WIDTH = 2, 36, 24, 32
SCHEDULE = Schedule.cross_task(2)
FACTOR = 4.0
"""How many times as far off as the composition a result may be."""
ORDERS = 4

Draw = Callable[..., Tensor]


def _two_clusters(draw: Draw, x: Tensor) -> Tensor:
    return torch.where(draw(BATCH, 1, x.size(2)) < 0, draw(1, CHANNELS, 1), draw(1, CHANNELS, 1))


def _ramp(draw: Draw, x: Tensor) -> Tensor:
    rows = torch.linspace(0, 1, HEIGHT, dtype=x.dtype).repeat_interleave(WIDTH)
    columns = torch.linspace(0, 1, WIDTH, dtype=x.dtype).repeat(HEIGHT)
    slopes = [draw(1, CHANNELS, 1) for _ in range(3)]
    return (slopes[0] * rows + slopes[1] * columns + slopes[2]).expand_as(x)


def _scaled(x: Tensor, place: tuple[slice | int, ...], factor: float) -> Tensor:
    x = x.clone()
    x[place] *= factor
    return x


def _constant_channel(draw: Draw, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 3] = 3.25
    return x


#: From standard normal features (B, C, N) and a source of more such numbers to those of a kind.
KINDS: dict[str, Callable[[Draw, Tensor], Tensor]] = {
    "ordinary": lambda draw, x: x,
    "rank_1": lambda draw, x: draw(1, CHANNELS, 1) * x[:, :1],
    "rank_2": lambda draw, x: draw(CHANNELS, 2) @ x[:, :2],
    "two_clusters": _two_clusters,
    "constant_channel": _constant_channel,
    "huge_channel": lambda draw, x: _scaled(x, (slice(None), 3), 1e4),
    "huge_token": lambda draw, x: _scaled(x, (0, slice(None), 5), 1e4),
    "common_mode": lambda draw, x: x + 100 * draw(BATCH, 1, x.size(2)),
    "near_duplicates": lambda draw, x: x[:, :1] + 1e-3 * draw(*x.shape),
    "sparse": lambda draw, x: x * (draw(*x.shape) > 2),
    "tiny": lambda draw, x: 1e-4 * x,
    "ramp": _ramp,
    "mean_100": lambda draw, x: x + 100,
}


def make(kind: str, dtype: torch.dtype) -> Inputs:
    """Two slots of such features, and parameters."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    maps = [draw(BATCH, CHANNELS, HEIGHT * WIDTH) for _ in range(SCHEDULE.num_queries)]
    features = [KINDS[kind](draw, x).to(dtype) for x in maps]
    count = SCHEDULE.num_weights
    weight = draw(count, 5, CHANNELS, CHANNELS) * (2 / CHANNELS) ** 0.5
    gamma = 0.5 + draw(count, 5, CHANNELS).abs()
    return Inputs(features, weight.float(), gamma.float(), draw(count, 5, CHANNELS).float())


def cotangents(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    shape = (BATCH, CHANNELS, HEIGHT * WIDTH)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in SCHEDULE.edges]


def named(outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> dict[str, Tensor]:
    """Outputs, gradients of features, and those of each kind of parameter of each layer."""
    slots = SCHEDULE.num_queries
    results = {f"output {i}": y for i, y in enumerate(outputs)}
    results |= {f"gradient of slot {i}": g for i, g in enumerate(gradients[:slots])}
    for parameter, gradient in zip(("weight", "gamma", "beta"), gradients[slots:], strict=True):
        results |= {f"{parameter} of {name}": gradient[:, i] for i, name in enumerate(LAYERS)}
    return {name: x.detach() for name, x in results.items()}


def composed(inputs: Inputs, dtype: torch.dtype, order: int = 0) -> dict[str, Tensor]:
    """Results of stock operators, with tokens and channels in another order for each `order`."""
    generator = torch.Generator().manual_seed(order)
    channels, *tokens = (
        torch.randperm(n, generator=generator) if order else torch.arange(n)
        for n in (CHANNELS, *(x.size(2) for x in inputs.features))
    )
    back, *token_back = (p.argsort() for p in (channels, *tokens))
    other = inputs.to(dtype)
    pairs = zip(other.features, tokens, strict=True)
    other.features = [x[:, channels][:, :, p].contiguous() for x, p in pairs]
    first = [layer for layer, name in enumerate(LAYERS) if not name.endswith("2")]
    other.weight = other.weight.clone()
    other.weight[:, first] = other.weight[:, first][..., channels]
    other.require()
    outputs = compose(other, SCHEDULE)
    given = cotangents(inputs.features[0].dtype)
    given = [g.to(dtype)[:, :, p] for g, p in zip(given, tokens, strict=True)]
    *gradients, weight, gamma, beta = torch.autograd.grad(outputs, other.leaves(), given)
    weight = weight.clone()
    weight[:, first] = weight[:, first][..., back]
    return named(
        [y[:, :, p] for y, p in zip(outputs, token_back, strict=True)],
        [
            *(g[:, back][:, :, p] for g, p in zip(gradients, token_back, strict=True)),
            *(weight, gamma, beta),
        ],
    )


class Expected(NamedTuple):
    exact: dict[str, Tensor]
    by_op: dict[str, float]
    """Largest L2 errors of compositions in float32."""


@functools.cache
def expected(kind: str, dtype: torch.dtype) -> Expected:
    inputs = make(kind, dtype)
    exact = composed(inputs, torch.float64)
    runs = [composed(inputs, torch.float32, order) for order in range(ORDERS)]
    by_op = {name: max(distance(run[name], x) for run in runs) for name, x in exact.items()}
    return Expected(exact, by_op)


def distance(x: Tensor, exact: Tensor) -> float:
    return (x.double() - exact).norm().item()


def check(name: str, x: Tensor, exact: Tensor, by_op: float) -> None:
    """L2 errors: FACTOR times that of op by op, rounding, and 2 units of the largest value each."""
    rounding = distance(exact.to(x.dtype), exact)
    floor = 2 * UNIT[torch.float32] * exact.abs().max().item() * exact.numel() ** 0.5
    error, bound = distance(x, exact), FACTOR * by_op + 2 * rounding + floor
    size = exact.norm().item()
    assert error <= bound, f"{name}: {error / size:.1e}, op by op {by_op / size:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_training(engine: str, kind: str, dtype: torch.dtype) -> None:
    exact, by_op = expected(kind, dtype)
    inputs = make(kind, dtype).require()
    outputs, _ = run(inputs, SCHEDULE)
    gradients = torch.autograd.grad(outputs, inputs.leaves(), cotangents(dtype))
    for name, x in named(outputs, gradients).items():
        check(name, x, exact[name], by_op[name])


@pytest.mark.parametrize("kind", KINDS)
def test_inference(engine: str, kind: str) -> None:
    """With the statistics of the features themselves as running ones, folded into the weights."""
    inputs = make(kind, torch.float32)
    mean, var = (torch.empty_like(inputs.gamma) for _ in range(2))
    with xk.backend("reference"):
        _, statistics = run(inputs.to(torch.float64), SCHEDULE)
    for (_, w, layer), m, v in zip(*statistics[:3], strict=True):
        mean[w, layer], var[w, layer] = m, v
    inputs.running_mean, inputs.running_var = mean, var
    scale = inputs.gamma.double() / (var.double() + 1e-5).sqrt()
    weight = (scale.unsqueeze(3) * inputs.weight).float()
    bias = (inputs.beta - scale * mean).float()
    with torch.no_grad():
        outputs = xk.cross_attention_block(inputs.features, weight, bias, SCHEDULE)
    exact = compose(inputs.to(torch.float64), SCHEDULE)
    single = compose(inputs, SCHEDULE)
    for i, (x, y, r) in enumerate(zip(outputs, single, exact, strict=True)):
        check(f"output {i}", x, r, distance(y, r))


def test_variances_are_those_of_torch(engine: str) -> None:
    """Also where the covariance alone has no digit of them left in float32."""
    inputs = make("near_duplicates", torch.float32)
    inputs.weight -= inputs.weight.mean(dim=3, keepdim=True)  # takes away what channels share
    _, statistics = run(inputs, SCHEDULE)
    for (slot, w, layer), mean, var in zip(*statistics[:3], strict=True):
        if not LAYERS[layer].endswith("2"):
            y = inputs.weight[w, layer].double() @ inputs.features[slot].double()
            torch.testing.assert_close(var.double(), y.var((0, 2), correction=0), rtol=1e-4, atol=0)
            error = (mean.double() - y.mean((0, 2))).abs()
            assert (error <= 1e-4 * y.std((0, 2)) + 1e-6).all()


@pytest.mark.parametrize(
    ("kind", "measured"),
    [
        *[(kind, False) for kind in ("ordinary", "huge_channel", "mean_100", "sparse", "tiny")],
        *[(kind, True) for kind in ("rank_1", "common_mode", "near_duplicates", "huge_token")],
    ],
)
def test_only_what_cancels_is_measured(kind: str, measured: bool) -> None:
    inputs = make(kind, torch.float64)
    rows = Rows.of(pairs_of(SCHEDULE.edges_flat)).first
    parameters = Parameters(*([*x.flatten(0, 1)] for x in inputs.leaves()[-3:]), [], [])
    features = [x.transpose(0, 1).flatten(1) for x in inputs.features]
    covariance = torch.stack([x.cov(correction=0) for x in features])
    mean = torch.stack([x.mean(dim=1) for x in features])
    found = closed_form(parameters, rows, mean, covariance, 1e-5)
    assert found.precise.any() == measured
    for row, (slot, w, layer) in enumerate(rows):
        y = inputs.weight[w, layer].double() @ features[slot]
        torch.testing.assert_close(found.mean[row], y.mean(dim=1))
        torch.testing.assert_close(found.var[row], y.var(dim=1, correction=0))
