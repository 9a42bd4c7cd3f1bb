"""Batch norms with running statistics, folded into the convolutions before them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xattn_kernels.ops.features import ACCUMULATORS


def fold(
    weight: Sequence[Tensor],
    gamma: Sequence[Tensor],
    beta: Sequence[Tensor],
    mean: Sequence[Tensor],
    var: Sequence[Tensor],
    bn_eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """R convolutions of one shape, without bias, each followed by a batch norm, as affine maps.

    Args:
        weight: (C_out, C_in, kH, kW) of every convolution.
        gamma: (C_out), weight of every batch norm.
        beta: (C_out), its bias.
        mean: (C_out), its running mean.
        var: (C_out), its running variance.
        bn_eps: added to the variances.
        dtype: of the results.

    Returns:
        diag(s) W (R, C_out, C_in, kH, kW) and beta - s mean (R, C_out) in `dtype`, for
        s = gamma / sqrt(var + eps).
    """
    # The scale in double: its rounding error is that of all products of a channel alike.
    scale = _stack(gamma, torch.float64) / (_stack(var, torch.float64) + bn_eps).sqrt()
    shift = scale * _stack(mean, torch.float64)
    folded = _stack(weight, dtype) * scale.to(dtype)[:, :, None, None, None]
    return folded, (_stack(beta, torch.float64) - shift).to(dtype)


def fold_projections(
    weight: Sequence[Tensor],
    gamma: Sequence[Tensor],
    beta: Sequence[Tensor],
    mean: Sequence[Tensor],
    var: Sequence[Tensor],
    bn_eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`fold` of the five projections of W sets, for features of `dtype`.

    Returns:
        Weights (W, 5, C, C) and biases (W, 5, C) in the type that such features are computed in.
    """
    folded, bias = fold(weight, gamma, beta, mean, var, bn_eps, ACCUMULATORS[dtype])
    return folded.flatten(2).unflatten(0, (-1, 5)), bias.unflatten(0, (-1, 5))


def _stack(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.stack(list(tensors)).to(dtype)
