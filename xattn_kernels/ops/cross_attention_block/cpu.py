"""The cross-attention block on the native CPU module: projections and attention fused, in C++."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xattn_kernels.engines.native import DTYPE_CODES, core, cpu_refusals, views
from xattn_kernels.ops.features import ACCUMULATORS, describe
from xattn_kernels.problem import Problem

_core = core()


def refusals(problem: Problem) -> list[str]:
    """Why this engine cannot run a problem."""
    return cpu_refusals(problem)


def packed_bytes(dtype: torch.dtype, channels: int, num_weights: int) -> int:
    """Size of what :func:`pack` returns."""
    size: int = _core.block_packed_bytes(DTYPE_CODES[dtype], channels, num_weights)
    return size


def pack(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the projections in the kernel's layout for features of ``dtype``, as bytes."""
    none: list[Tensor | None] = [None] * (5 * weight.size(0))
    return _pack(weight.flatten(0, 1), none, bias.flatten(0, 1), none, none, 0.0, dtype)


def fold(
    weight: Sequence[Tensor],
    gamma: Sequence[Tensor],
    beta: Sequence[Tensor],
    mean: Sequence[Tensor],
    var: Sequence[Tensor],
    bn_eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """As :func:`pack`, of projections that batch norms follow; folded while they are packed."""
    return _pack(weight, gamma, beta, mean, var, bn_eps, dtype)


def _pack(
    weight: Sequence[Tensor] | Tensor,
    gamma: Sequence[Tensor | None],
    beta: Sequence[Tensor] | Tensor,
    mean: Sequence[Tensor | None],
    var: Sequence[Tensor | None],
    bn_eps: float,
    dtype: torch.dtype,
) -> Tensor:
    accumulator, like = ACCUMULATORS[dtype], beta[0]
    channels = like.size(0)
    addresses, held = [], []  # copies are held until the call returns
    for layer in zip(weight, gamma, beta, mean, var, strict=True):
        size, row = channels**2, []
        for x in layer:
            if x is None:
                row.append(0)
                continue
            if x.numel() != size:
                raise ValueError(
                    f"layers: got {describe(x)}, expected {channels} channels as the first has"
                )
            size = channels
            # Asked first: five tensors of every projection come here in every call.
            if not (x.dtype is accumulator and x.is_contiguous()) or x.is_neg():
                x = x.to(accumulator).contiguous().resolve_neg()
                held.append(x)
            row.append(x.data_ptr())
        addresses.append(row)
    packed = like.new_empty(packed_bytes(dtype, channels, len(addresses) // 5), dtype=torch.uint8)
    _core.block_pack(
        DTYPE_CODES[dtype],
        channels,
        addresses,
        bn_eps,
        packed.data_ptr(),
        torch.get_num_threads(),
    )
    return packed


def forward(
    features: Sequence[Tensor],
    packed: Tensor,
    num_weights: int,
    edges: Sequence[int],
    eps: float,
    outputs: Sequence[Tensor],
) -> None:
    """Write the outputs (B, C, N) of the flat (query, source, output, weight) quadruples."""
    size = packed_bytes(features[0].dtype, features[0].size(1), num_weights)
    if packed.dtype is not torch.uint8 or packed.shape != (size,) or not packed.is_contiguous():
        raise ValueError(
            f"packed: got {describe(packed)}, expected {size} bytes as pack_block_weights makes "
            "them on this engine for these weights and this dtype"
        )
    _core.block_forward(
        DTYPE_CODES[features[0].dtype],
        features[0].size(0),
        features[0].size(1),
        eps,
        views(features),
        packed.data_ptr(),
        edges,
        views(outputs),
        torch.get_num_threads(),
    )
