"""The cross-attention block on the native CPU module: projections and attention fused, in C++."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xattn_kernels.ops.features import ACCUMULATORS, describe
from xattn_kernels.ops.native import DTYPE_CODES, core, cpu_refusals, views
from xattn_kernels.registry import Problem

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
    num_weights, _, _, channels = weight.shape
    accumulator = ACCUMULATORS[dtype]
    weight, bias = (x.to(accumulator).contiguous() for x in (weight, bias))
    packed = weight.new_empty(packed_bytes(dtype, channels, num_weights), dtype=torch.uint8)
    _core.block_pack(
        DTYPE_CODES[dtype],
        channels,
        num_weights,
        weight.data_ptr(),
        bias.data_ptr(),
        packed.data_ptr(),
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
