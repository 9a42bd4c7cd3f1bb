"""The cross-attention block in CUDA C++: sources, sums of states and targets of all edges.

With ``XATTN_CUDA_SM90A=1`` in the environment, bfloat16 on compute capability 9.0 goes by kernels
for sm_90a where there are some for its width: sources of 33 to 48, 65 to 72, 89 to 96 and 137 to
144 channels, targets of these and of 185 to 192 and 281 to 288. No GPU has run them yet.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn_kernels.engines import native_cuda
from xattn_kernels.engines.native import DTYPE_CODES, views
from xattn_kernels.ops.features import describe
from xattn_kernels.ops.folding import fold_projections
from xattn_kernels.problem import Problem

_cuda = native_cuda.module()

#: Biases of channels that there are none of: relu and softplus make zero of them.
_NO_CHANNEL = -1e30


def refusals(problem: Problem) -> list[str]:
    """Why this engine cannot run a problem."""
    return native_cuda.refusals(problem)


def packed_bytes(dtype: torch.dtype, channels: int, num_weights: int) -> int:
    """Size of what :func:`pack` returns."""
    width = _padded(channels)
    return num_weights * 5 * width * (width * _weight_type(dtype).itemsize + 4)


def pack(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Return weights (W, 5, P, P) and then float32 biases (W, 5, P) as bytes.

    P is C rounded up to a multiple of 16. Matrices are filled up with zeros. Those in bfloat16 are
    stored in cores of 8 x 8 elements, 128 bytes side by side.
    """
    padding = _padded(weight.size(3)) - weight.size(3)
    weights = F.pad(weight.to(_weight_type(dtype)), (0, padding, 0, padding))
    if weights.dtype is torch.bfloat16:
        weights = weights.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)
    biases = F.pad(bias.float(), (0, padding), value=_NO_CHANNEL)
    return torch.cat([x.contiguous().view(torch.uint8).flatten() for x in (weights, biases)])


def fold(
    weight: Sequence[Tensor],
    gamma: Sequence[Tensor],
    beta: Sequence[Tensor],
    mean: Sequence[Tensor],
    var: Sequence[Tensor],
    bn_eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """As :func:`pack`, of projections that batch norms follow."""
    return pack(*fold_projections(weight, gamma, beta, mean, var, bn_eps, dtype), dtype)


def forward(
    features: Sequence[Tensor],
    packed: Tensor,
    num_weights: int,
    edges: Sequence[int],
    eps: float,
    outputs: Sequence[Tensor],
) -> None:
    """Write the outputs (B, C, N) of the flat (query, source, output, weight) quadruples."""
    batch, channels, _ = features[0].shape
    dtype = features[0].dtype
    size = packed_bytes(dtype, channels, num_weights)
    if packed.dtype is not torch.uint8 or packed.shape != (size,) or not packed.is_contiguous():
        raise ValueError(
            f"packed: got {describe(packed)}, expected {size} bytes as pack_block_weights makes "
            "them on this engine for these weights and this dtype"
        )
    if batch == 0:
        return
    if packed.data_ptr() % 16 != 0:
        packed = packed.clone()
    _cuda.block_forward(
        native_cuda.context(features[0]),
        DTYPE_CODES[dtype],
        batch,
        channels,
        eps,
        views(features),
        packed.data_ptr(),
        num_weights,
        edges,
        views(outputs),
    )


def _padded(channels: int) -> int:
    return -(-channels // 16) * 16


def _weight_type(dtype: torch.dtype) -> torch.dtype:
    """What products are computed from: float16 features are multiplied as tf32."""
    return torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
