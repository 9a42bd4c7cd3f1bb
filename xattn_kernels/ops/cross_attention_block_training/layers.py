"""The layers that the cross-attention block computes, and their parameters as stacked matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xattn_kernels.ops.cross_attention_block_training.op import Pair, Pairs

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
    """R layers of one kind: weights (R, C, C), the rest (R, C).

    With r = 1 / sqrt(var + eps) and D = gamma r, an engine computes `matrix` x' + `shift` of first
    layers, where `matrix` is diag(D) W, and for second layers takes diag(r) W and, in place of the
    shift, [-r mean, gamma, beta].
    """

    weight: Tensor
    gamma: Tensor
    mean: Tensor
    inverse_sigma: Tensor
    scale: Tensor
    matrix: Tensor
    shift: Tensor

    def part(self, start: int, stop: int) -> Layers:
        """Some of the rows."""
        return Layers(*(x[start:stop] for x in self))


def first_layers(
    parameters: Parameters, rows: Sequence[Row], mean: Tensor, var: Tensor, eps: float
) -> Layers:
    """First layers with the statistics of their outputs."""
    weight, gamma, beta, inverse_sigma = _layers(parameters, rows, var, eps)
    scale = gamma * inverse_sigma
    shift = beta if parameters.batch else beta - scale * mean
    return Layers(
        weight, gamma, mean, inverse_sigma, scale, scale.unsqueeze(2) * weight, shift.contiguous()
    )


def second_layers(
    parameters: Parameters, rows: Sequence[Row], mean: Tensor, var: Tensor, eps: float
) -> Layers:
    """Second layers with the statistics of their outputs."""
    weight, gamma, beta, inverse_sigma = _layers(parameters, rows, var, eps)
    affine = torch.stack([-inverse_sigma * mean, gamma, beta], dim=1)
    matrix = inverse_sigma.unsqueeze(2) * weight
    return Layers(weight, gamma, mean, inverse_sigma, gamma * inverse_sigma, matrix, affine)


def _layers(
    parameters: Parameters, rows: Sequence[Row], var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight, gamma, beta = (gather(x, rows, var.dtype) for x in parameters[:3])
    return weight, gamma, beta, torch.rsqrt(var + eps)


def gather(tensors: Sequence[Tensor], rows: Sequence[Row], dtype: torch.dtype) -> Tensor:
    """Parameters of layers, stacked; convolution weights as matrices."""
    stacked = torch.stack([tensors[w * LAYERS + layer] for _, w, layer in rows]).to(dtype)
    return stacked.flatten(2) if stacked.dim() > 2 else stacked


def take(x: Tensor, indices: Sequence[int]) -> Tensor:
    """Rows of `x`; without a copy if they are all."""
    if list(indices) == list(range(x.size(0))):
        return x
    return torch.stack([x[i] for i in indices])


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
