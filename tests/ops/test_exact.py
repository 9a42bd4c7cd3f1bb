"""Small integers and one-hot weights: every step is representable, so results are exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import xattn_kernels as xk
from xattn_kernels.schedule import Schedule
from xattn_kernels.testing import compositions
from xattn_kernels.testing.cases import DTYPES

CHANNELS, VALUE_CHANNELS, BATCH = 6, 5, 2


def one_hot(tokens: int, generator: torch.Generator, repeat: int) -> Tensor:
    """(B, C, tokens * C * repeat): every channel is hot in the same number of tokens."""
    order = torch.arange(CHANNELS).repeat(repeat * tokens)
    rows = [order[torch.randperm(len(order), generator=generator)] for _ in range(BATCH)]
    return torch.nn.functional.one_hot(torch.stack(rows), CHANNELS).transpose(1, 2).double()


@pytest.mark.parametrize("feature_map", ["relu", "identity"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(engine: str, feature_map: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    schedule = Schedule.from_edges(
        [(0, 0, 0, 0), (0, 1, 0, 0), (1, 1, 1, 0)], num_queries=2, allow_self=True
    )
    # Output 0 sums 4 + 4 hot tokens a channel, output 1 sums 4: divisors are powers of two.
    query = [one_hot(3, generator, 1), one_hot(11, generator, 1)]
    key = [one_hot(4, generator, 1), one_hot(4, generator, 1)]
    shape = (BATCH, VALUE_CHANNELS, key[0].shape[2])
    value = [8.0 * torch.randint(-3, 4, shape, generator=generator).double() for _ in key]
    inputs = [x.to(dtype).requires_grad_() for x in (*query, *key, *value)]
    exact_inputs = [x.requires_grad_() for x in (*query, *key, *value)]

    outputs = xk.linear_cross_attention(
        inputs[:2], inputs[2:4], inputs[4:], schedule, feature_map=feature_map
    )
    exact, _ = compositions.linear_cross_attention(
        exact_inputs[:2], exact_inputs[2:4], exact_inputs[4:], schedule, name=feature_map
    )
    gradients = [8.0 * torch.randint(-2, 3, x.shape, generator=generator).double() for x in exact]
    grads = torch.autograd.grad(outputs, inputs, [g.to(dtype) for g in gradients])
    exact_grads = torch.autograd.grad(exact, exact_inputs, gradients)
    for result, expected in zip((*outputs, *grads), (*exact, *exact_grads), strict=True):
        assert torch.equal(result, expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax(engine: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    query = one_hot(5, generator, 2)
    # A key scores 0 with the queries of one channel, and so low with all others that they have
    # no weight: four keys share the weight of every query.
    key = (one_hot(4, generator, 1) - 1) * 2000
    shape = (BATCH, VALUE_CHANNELS, key.shape[2])
    value = 4.0 * torch.randint(-5, 6, shape, generator=generator).double()
    gradient = 4.0 * torch.randint(-2, 3, (BATCH, VALUE_CHANNELS, query.shape[2])).double()
    inputs = [x.to(dtype).requires_grad_() for x in (query, key, value)]
    output, lse = xk.softmax_cross_attention(*inputs, scale=1.0, return_lse=True)
    weights = (query.transpose(1, 2) @ key == 0).double() / 4
    assert torch.equal(output, (value @ weights.transpose(1, 2)).to(dtype))
    assert (lse.double() - torch.tensor(4.0).double().log()).abs().max() < 1e-6
    grad_value = torch.autograd.grad(output, inputs[2], gradient.to(dtype))[0]
    assert (grad_value.double() - gradient @ weights).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax_of_one_key(engine: str, dtype: torch.dtype) -> None:
    # Score 0, log-sum-exp 0, weight 1: values pass, and so do their gradients.
    generator = torch.Generator().manual_seed(0)
    query = torch.randint(-4, 5, (BATCH, CHANNELS, 7), generator=generator).to(dtype)
    key = torch.zeros(BATCH, CHANNELS, 1, dtype=dtype)
    value = torch.randint(-9, 10, (BATCH, VALUE_CHANNELS, 1), generator=generator).to(dtype)
    gradient = torch.randint(-9, 10, (BATCH, VALUE_CHANNELS, 7), generator=generator).to(dtype)
    inputs = [x.requires_grad_() for x in (query, key, value)]
    output, lse = xk.softmax_cross_attention(*inputs, return_lse=True)
    grads = torch.autograd.grad(output, inputs, gradient)
    assert torch.equal(output, value.expand_as(output))
    assert not lse.any()
    assert not grads[0].any()
    assert not grads[1].any()
    assert torch.equal(grads[2], gradient.double().sum(2, keepdim=True).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_block(engine: str, dtype: torch.dtype) -> None:
    # Query and key projections are constant, 32 = softplus(32), so that values are averaged.
    generator = torch.Generator().manual_seed(0)
    channels, tokens = 4, (8, 16)
    weight = torch.zeros(2, 5, channels, channels)
    weight[:, 4] = torch.stack([torch.eye(channels), torch.eye(channels).flip(0)])
    bias = torch.zeros(2, 5, channels)
    bias[:, 1] = bias[:, 3] = 32
    bias[1, 4] = 2
    features = [
        16.0 * torch.randint(-3, 4, (BATCH, channels, n), generator=generator).double()
        for n in tokens
    ]
    schedule = Schedule.cross_task(2)
    with torch.no_grad():
        outputs = xk.cross_attention_block(
            [x.to(dtype) for x in features], weight.to(dtype), bias.to(dtype), schedule
        )
    means = [x.clamp_min(0).mean(dim=2, keepdim=True) for x in features]
    means[0] = (features[0].flip(1) + 2).clamp_min(0).mean(dim=2, keepdim=True)
    for output, source in zip(outputs, (1, 0), strict=True):
        assert torch.equal(output, means[source].expand(output.shape).to(dtype))
