"""The layers that the cross-attention block computes, and their parameters as stacked matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xattn_kernels.ops.cross_attention_block_training.op import Pair, Pairs
from xattn_kernels.ops.features import ACCUMULATORS

LAYERS = 5
QUERY1, QUERY2, KEY1, KEY2, VALUE = range(LAYERS)
"""The projections of a set of weights, in the order of the weights' second dimension."""

Row = tuple[int, int, int]
"""(slot, weight id, layer)."""


class Rows(NamedTuple):
    """Layers to compute, each once: those of queries, then those of keys, then those of values."""

    first: list[Row]
    second: list[Row]

    @classmethod
    def of(cls, pairs: Pairs) -> Rows:
        def rows(group: Sequence[Pair], layer: int) -> list[Row]:
            return [(slot, weight, layer) for slot, weight in group]

        targets, sources = pairs.targets, pairs.sources
        return cls(
            rows(targets, QUERY1) + rows(sources, KEY1) + rows(sources, VALUE),
            rows(targets, QUERY2) + rows(sources, KEY2),
        )


class Parameters(NamedTuple):
    """Tensors of all layers of all sets of weights, set by set."""

    weight: Sequence[Tensor]
    gamma: Sequence[Tensor]
    beta: Sequence[Tensor]
    running_mean: Sequence[Tensor]
    running_var: Sequence[Tensor]

    @property
    def batch(self) -> bool:
        """Whether the batch norms use statistics of the batch."""
        return not self.running_mean


class Layers(NamedTuple):
    """R layers of one kind, with r = 1 / sqrt(var + eps) of their statistics and D = gamma r.

    Weights and what engines apply to products with them are in the dtype of computation.

    Attributes:
        weight: (R, C, C).
        affine: (R, 2, C) of first layers, [D, beta - D mean]; (R, 3, C) of second layers,
            [-mean, D, beta].
        inverse_sigma: r (R, C), in float64.
        scale: D (R, C), in float64.
    """

    weight: Tensor
    affine: Tensor
    inverse_sigma: Tensor
    scale: Tensor

    def part(self, start: int, stop: int) -> Layers:
        """Some of the rows."""
        return Layers(*(x[start:stop] for x in self))


def first_layers(
    parameters: Parameters, rows: Sequence[Row], mean: Tensor, var: Tensor, eps: float
) -> Layers:
    """First layers with the statistics of W x', (R, C) in float64."""
    beta, inverse_sigma, scale = normalisation(parameters, rows, var, eps)
    return _layers(parameters, rows, [scale, beta - scale * mean], inverse_sigma, scale)


def second_layers(
    parameters: Parameters, rows: Sequence[Row], mean: Tensor, var: Tensor, eps: float
) -> Layers:
    """Second layers with the statistics of W h, (R, C) in float64."""
    beta, inverse_sigma, scale = normalisation(parameters, rows, var, eps)
    return _layers(parameters, rows, [-mean, scale, beta], inverse_sigma, scale)


def normalisation(
    parameters: Parameters, rows: Sequence[Row], var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """beta, r and D of layers, (R, C) in float64."""
    gamma, beta = (gather(x, rows, torch.float64) for x in parameters[1:3])
    inverse_sigma = torch.rsqrt(var + eps)
    return beta, inverse_sigma, gamma * inverse_sigma


class ClosedForm(NamedTuple):
    """Means and variances (R, C), and which rows are to be measured (R)."""

    mean: Tensor
    var: Tensor
    precise: Tensor


def closed_form(
    parameters: Parameters, rows: Sequence[Row], mean: Tensor, covariance: Tensor, eps: float
) -> ClosedForm:
    """Moments of W x' for first layers from those of x', (S, C) and (S, C, C).

    A row is `precise` if one of its channels has a variance of less than 1 / 16 of what it would be
    if the terms of W x' were independent: then they cancel, and rounding errors of W x' matter
    beside it. With random weights and what a convolutional network makes of a photograph it hardly
    ever is less than 1 / 10.
    """
    means, variances, precise = [], [], []
    groups = by_slot(rows)
    for slot, numbers in groups:
        weight = gather(parameters.weight, [rows[i] for i in numbers], torch.float64)
        # The sum of products that is never negative but for rounding.
        variance = ((weight @ covariance[slot]) * weight).sum(dim=2).clamp_min(0)
        sizes = covariance[slot].diagonal().clamp_min(0).sqrt()
        independent = (weight.abs() @ sizes).square() / weight.size(2)
        means.append(weight @ mean[slot])
        variances.append(variance)
        precise.append((16 * (variance + eps) < independent).any(dim=1))
    return ClosedForm(*(ungrouped(parts, groups) for parts in (means, variances, precise)))


def _layers(
    parameters: Parameters,
    rows: Sequence[Row],
    affine: Sequence[Tensor],
    inverse_sigma: Tensor,
    scale: Tensor,
) -> Layers:
    weight = gather(parameters.weight, rows, ACCUMULATORS[parameters.weight[0].dtype])
    return Layers(weight, torch.stack(list(affine), dim=1).to(weight.dtype), inverse_sigma, scale)


def gather(tensors: Sequence[Tensor], rows: Sequence[Row], dtype: torch.dtype) -> Tensor:
    """Parameters of layers, stacked; convolution weights as matrices."""
    stacked = torch.stack([tensors[w * LAYERS + layer] for _, w, layer in rows]).to(dtype)
    return stacked.flatten(2) if stacked.dim() > 2 else stacked


def take(x: Tensor, indices: Sequence[int]) -> Tensor:
    """Rows of `x`; without a copy if they are all."""
    if list(indices) == list(range(x.size(0))):
        return x
    return torch.stack([x[i] for i in indices])


def by_slot(rows: Sequence[Row]) -> list[tuple[int, list[int]]]:
    """Slots and the numbers of their rows."""
    groups: dict[int, list[int]] = {}
    for number, (slot, _, _) in enumerate(rows):
        groups.setdefault(slot, []).append(number)
    return list(groups.items())


def ungrouped(parts: Sequence[Tensor], groups: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
    """Tensors of the rows of each slot, of :func:`by_slot`, as one of all rows in their order."""
    order = [number for _, numbers in groups for number in numbers]
    return take(torch.cat(list(parts)), [order.index(number) for number in range(len(order))])


def counts_of(features: Sequence[Tensor]) -> Tensor:
    """Numbers of (sample, token) of every slot."""
    counts = [x.size(0) * x.size(2) for x in features]
    if all(count == counts[0] for count in counts):
        return features[0].new_full((len(counts),), counts[0], dtype=torch.float64)
    return torch.stack([features[0].new_full((), n, dtype=torch.float64) for n in counts])


def by_row(count: Tensor, rows: Sequence[Row]) -> Tensor:
    """The number of (sample, token) of every row, at least one: (R, 1)."""
    return take(count, [slot for slot, _, _ in rows]).clamp_min(1).unsqueeze(1)


def scaled(scale: Tensor, matrix: Tensor) -> Tensor:
    """diag(scale) matrix, for (R, C) and (R, C, C)."""
    return scale.unsqueeze(2) * matrix


def apply_rows(matrix: Tensor, vector: Tensor) -> Tensor:
    """Products of matrices (R, C, C) with vectors (R, C)."""
    return (matrix @ vector.unsqueeze(2)).squeeze(2)


def joint(x: Tensor, members: Sequence[Sequence[int]]) -> Tensor:
    """Sums of rows of `x`; without a copy if they are all, one each."""
    if all(len(group) == 1 for group in members):
        return take(x, [group[0] for group in members])
    return torch.stack([torch.stack([x[i] for i in group]).sum(dim=0) for group in members])


class Gradients:
    """Gradients of parameters: of a layer of a set of weights, the sum over its rows."""

    def __init__(self, parameters: Parameters) -> None:
        count = len(parameters.weight)
        self.weight: list[Tensor | None] = [None] * count
        self.gamma: list[Tensor | None] = [None] * count
        self.beta: list[Tensor | None] = [None] * count

    def add(self, rows: Sequence[Row], weight: Tensor, gamma: Tensor, beta: Tensor) -> None:
        """Add those of `rows`: (R, C, C), (R, C), (R, C)."""
        for number, (_, w, layer) in enumerate(rows):
            index = w * LAYERS + layer
            for total, part in zip(self, (weight, gamma, beta), strict=True):
                known = total[index]
                total[index] = part[number] if known is None else known + part[number]

    def __iter__(self) -> Any:
        return iter((self.weight, self.gamma, self.beta))
