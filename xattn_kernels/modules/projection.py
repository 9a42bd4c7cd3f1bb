"""All projections of one cell in training, keeping none of their intermediates for backward.

A cell x with M tokens passes R first layers z1_r = bn(W1_r x); the first R2 of them go on through
z2_r = bn(W2_r relu(z1_r)) (queries and keys, left before their feature map), the others end in
relu(z1_r) (values). Batch statistics are not measured on the layers' outputs but follow from the
moments of their inputs: for y = W z with mean mu and covariance Sigma of z,

    mean(y) = W mu        var(y) = diag(W Sigma W^T)

so that every batch norm is folded into the product before it runs, forward and backward. Backward
keeps the moments and x, computes the hidden layers again, and for the gradient d of a layer's
output, with b = sum d, G = sum d (z - mu)^T, D = gamma / sigma, g = sum d yhat, uses

    dW = diag(D) (G - diag(g / sigma) W Sigma)
    dz = W^T diag(D) d - W^T diag(D g / (sigma M)) W (z - mu) - W^T (D b / M)

whose last two terms are affine in z: for the first layers they merge into one matrix and one vector
per cell. With running statistics (frozen batch norm) the terms of the moments vanish.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xattn_kernels.modules import roles
from xattn_kernels.modules.roles import Roles
from xattn_kernels.ops.features import ACCUMULATORS


class Layers(NamedTuple):
    """The layout of one cell's projections: what is not a tensor."""

    first: int
    second: int
    batch: bool
    """Whether the batch norms use statistics of the batch."""
    eps: float


class Statistics(NamedTuple):
    """What the batch norms of R layers see: means and biased variances, both (R, C)."""

    mean: Tensor
    var: Tensor


class _Layer(NamedTuple):
    """Weights (R, C, C) and batch-norm scales and shifts (R, C) of a cell's layers."""

    weight: Tensor
    gamma: Tensor
    beta: Tensor
    running: Statistics | None


class _Moments(NamedTuple):
    """Means (..., C) and covariances (..., C, C) of a layer's inputs; zero and empty if unused."""

    mean: Tensor
    covariance: Tensor


class _Folded(NamedTuple):
    """A layer and its statistics as one affine map: y = weight (z - mu) + bias for mean mu of z.

    `scale` is gamma / sigma, `shift` the difference of W mu to the mean that the norm subtracts.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor
    inverse_sigma: Tensor
    shift: Tensor


def project_cell(
    x: Tensor, layers: Layers, parameters: list[Tensor]
) -> tuple[list[Tensor], Statistics, Statistics]:
    """Queries and keys before their feature map, values, and the batch statistics.

    Args:
        x: (B, C, H, W), not empty.
        layers: the layout.
        parameters: for the first layers, then for the second: all convolution weights
            (C, C, 1, 1), all batch-norm weights, all biases, and unless the batch norms use batch
            statistics all running means and all running variances.

    Returns:
        The second layers' outputs, then the values, each (B, C, H W) with a token's channels
        together and in the dtype of `x`; and the statistics of the first and the second layers.
    """
    if torch.is_grad_enabled() and any(p.requires_grad for p in (x, *parameters)):
        outputs = _ProjectCell.apply(x, layers, *parameters)  # type: ignore[no-untyped-call]
    else:
        outputs = _ProjectCell.forward(x, layers, *parameters)
    statistics = outputs[layers.first : layers.first + 4]
    return list(outputs[: layers.first]), Statistics(*statistics[:2]), Statistics(*statistics[2:])


class _ProjectCell(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, layers: Layers, *parameters: Tensor) -> tuple[Tensor, ...]:
        first, second = _unpack(x, layers, parameters)
        tokens = _tokens(x)
        moments = _Moments(tokens.new_zeros(tokens.shape[1]), tokens.new_empty(0))
        correction = torch.zeros_like(moments.mean)
        if layers.batch:
            # Twice: where the mean is large, the first has the rounding error of large numbers.
            mean = tokens.mean(dim=0)
            tokens = tokens - mean
            correction = tokens.mean(dim=0)
            tokens = tokens - correction
            product = roles.outer(tokens.unsqueeze(0), tokens)[0]
            moments = _Moments(mean, product / tokens.shape[0])
        statistics = _statistics(first, moments)
        folded = _fold(first, moments.mean, statistics, layers.eps)
        # Apart, so that the values, which stay, share no memory with the hidden layers.
        weights = folded.weight.split([layers.second, layers.first - layers.second])
        biases = folded.bias.split([layers.second, layers.first - layers.second])
        hidden, values = (
            roles.relu_(roles.linear(tokens, weight, bias))
            for weight, bias in zip(weights, biases, strict=True)
        )

        hidden_moments = _Moments(tokens.new_zeros(second.gamma.shape), tokens.new_empty(0))
        if layers.batch:
            mean = roles.sums(hidden) / tokens.shape[0]
            product = roles.outer(hidden, hidden) / tokens.shape[0]
            hidden_moments = _Moments(mean, product - mean.unsqueeze(2) * mean.unsqueeze(1))
        hidden_statistics = _statistics(second, hidden_moments)
        folded = _fold(second, hidden_moments.mean, hidden_statistics, layers.eps)
        bias = folded.bias - _apply(folded.weight, hidden_moments.mean)
        outputs = roles.linear(hidden, folded.weight, bias)
        return (
            *(_features(y, x) for y in outputs),
            *(_features(v, x) for v in values),
            *statistics,
            *hidden_statistics,
            *moments,
            *hidden_moments,
            correction,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, layers, *parameters = inputs
        values, rest = output[layers.second : layers.first], output[layers.first :]
        ctx.layers = layers
        ctx.mark_non_differentiable(*rest)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *values, *rest, *parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        layers: Layers = ctx.layers
        x, *saved = ctx.saved_tensors
        count = layers.first - layers.second
        values, saved = saved[:count], saved[count:]
        statistics, hidden_statistics = Statistics(*saved[:2]), Statistics(*saved[2:4])
        moments, hidden_moments = _Moments(*saved[4:6]), _Moments(*saved[6:8])
        correction = saved[8]
        first, second = _unpack(x, layers, saved[9:])
        tokens = _tokens(x) - moments.mean - correction
        folded = _fold(first, moments.mean, statistics, layers.eps)
        part = slice(0, layers.second)
        hidden = roles.relu_(roles.linear(tokens, folded.weight[part], folded.bias[part]))

        gradient = _gradients(gradients[part], x, tokens)
        total = roles.sums(gradient)
        product = roles.outer(gradient, hidden)
        product = product - total.unsqueeze(2) * hidden_moments.mean.unsqueeze(1)
        folded_second = _fold(second, hidden_moments.mean, hidden_statistics, layers.eps)
        back = _backward(second, folded_second, hidden_moments, total, product, tokens.shape[0])
        constant = back.constant - _apply(back.matrix, hidden_moments.mean)
        through = roles.linear(gradient, folded_second.weight.transpose(1, 2), constant)
        if layers.batch:
            through = roles.add_(through, roles.linear(hidden, back.matrix, None))
        gradient = roles.relu_backward(through, hidden)
        del through, hidden
        if count:
            gradient_values = _gradients(gradients[layers.second : layers.first], x, tokens)
            gradient_values = roles.relu_backward(gradient_values, _roles(values, tokens))
            gradient = roles.join(gradient, gradient_values)
        total = roles.sums(gradient)
        product = roles.outer(gradient, tokens)
        back_first = _backward(first, folded, moments, total, product, tokens.shape[0])
        gradient_x = None
        if ctx.needs_input_grad[0]:
            through_x = roles.gather(gradient, folded.weight)
            if layers.batch:
                matrix = back_first.matrix.sum(dim=0, keepdim=True)
                constant = back_first.constant.sum(dim=0, keepdim=True)
                through_x = through_x + roles.linear(tokens, matrix, constant)[0]
            gradient_x = as_image(_features(through_x, x), x.shape[2:])
        return (
            gradient_x,
            None,
            *_unpacked(back_first, layers.first, layers.batch, saved[9]),
            *_unpacked(back, layers.second, layers.batch, saved[9]),
        )


class _Backward(NamedTuple):
    """Gradients of a layer's parameters, and of its input z: d W' + (z - mu) matrix + constant."""

    weight: Tensor
    gamma: Tensor
    beta: Tensor
    matrix: Tensor
    constant: Tensor


def _backward(
    layer: _Layer, folded: _Folded, moments: _Moments, total: Tensor, product: Tensor, tokens: int
) -> _Backward:
    """Backward of convolution and batch norm from sums over the tokens.

    `total` is the sum of the gradient d, `product` the sum of d (z - mu)^T.
    """
    gamma = (layer.weight * product).sum(dim=2) + total * folded.shift
    gamma = gamma * folded.inverse_sigma
    weight = folded.scale.unsqueeze(2) * product
    if layer.running is not None:
        zero = torch.zeros_like(layer.weight)
        return _Backward(weight, gamma, total, zero, torch.zeros_like(total))
    through = (gamma * folded.inverse_sigma).unsqueeze(2) * layer.weight
    weight = weight - folded.scale.unsqueeze(2) * (through @ moments.covariance)
    matrix = folded.weight.transpose(1, 2) @ through / -tokens
    constant = _apply(folded.weight.transpose(1, 2), total) / -tokens
    return _Backward(weight, gamma, total, matrix, constant)


def _statistics(layer: _Layer, moments: _Moments) -> Statistics:
    """Running statistics, or those of W z from the moments of z."""
    if layer.running is not None:
        return layer.running
    var = ((layer.weight @ moments.covariance) * layer.weight).sum(dim=2)
    return Statistics(_apply(layer.weight, moments.mean), var.clamp_min(0))


def _fold(layer: _Layer, mu: Tensor, statistics: Statistics, eps: float) -> _Folded:
    inverse_sigma = torch.rsqrt(statistics.var + eps)
    scale = layer.gamma * inverse_sigma
    # Exactly zero with batch statistics, whatever the size of the mean.
    shift = _apply(layer.weight, mu) - statistics.mean
    bias = layer.beta + scale * shift
    return _Folded(scale.unsqueeze(2) * layer.weight, bias, scale, inverse_sigma, shift)


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    """Products of R matrices (R, C, C) with R vectors (R, C) or one vector (C)."""
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _unpack(x: Tensor, layers: Layers, parameters: Sequence[Tensor]) -> tuple[_Layer, _Layer]:
    """Stack the parameters of the first and of the second layers in the compute dtype."""
    dtype = ACCUMULATORS[x.dtype]
    end = layers.first * (3 if layers.batch else 5)
    first = _unpack_layer(parameters[:end], layers.first, dtype)
    return first, _unpack_layer(parameters[end:], layers.second, dtype)


def _unpack_layer(parameters: Sequence[Tensor], count: int, dtype: torch.dtype) -> _Layer:
    stacked = [
        torch.stack(list(parameters[start : start + count])).to(dtype)
        for start in range(0, len(parameters), count)
    ]
    weight, gamma, beta, *running = stacked
    return _Layer(weight.flatten(2), gamma, beta, Statistics(*running) if running else None)


def _unpacked(back: _Backward, count: int, batch: bool, like: Tensor) -> list[Tensor | None]:
    """Gradients of a layer's parameters in the order of the arguments."""
    weight = back.weight[:, :, :, None, None]
    parts: list[Tensor | None] = [x.to(like.dtype) for x in (*weight, *back.gamma, *back.beta)]
    return parts if batch else parts + [None] * (2 * count)


def _tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) or (B, C, N) as a matrix (M, C) in the compute dtype."""
    return x.flatten(2).transpose(1, 2).flatten(0, 1).to(ACCUMULATORS[x.dtype])


def _roles(parts: Sequence[Tensor], tokens: Tensor) -> Roles:
    """Features (B, C, N) of several roles as matrices, kept as suits a cell with `tokens`."""
    matrices = [_tokens(part) for part in parts]
    return matrices if roles.listed(tokens) else torch.stack(matrices)


def _gradients(parts: Sequence[Tensor | None], x: Tensor, tokens: Tensor) -> Roles:
    """Gradients of the roles' features as matrices; zeros for outputs that nobody used."""
    return _roles([x.new_zeros(x.shape) if part is None else part for part in parts], tokens)


def _features(tokens: Tensor, x: Tensor) -> Tensor:
    """A matrix (M, C) as features (B, C, N) in the dtype of `x`."""
    result: Tensor = tokens.to(x.dtype).unflatten(0, (x.shape[0], -1))
    return result.transpose(1, 2)


def as_image(x: Tensor, size: torch.Size) -> Tensor:
    """Features (B, C, N) with a token's channels together as (B, C, H, W) in channels_last.

    Not by `unflatten`: for B = 1 that makes up a batch stride by which torch's CPU batch norm takes
    the tensor for a contiguous one and reads it wrongly.
    """
    result: Tensor = x.transpose(1, 2).unflatten(1, size)
    return result.permute(0, 3, 1, 2)
