"""The cross-attention block as torch operators: packing of weights, and the pass over features."""

from __future__ import annotations

import torch
from torch import Tensor

from xattn_kernels import registry
from xattn_kernels.ops import library

OP = "cross_attention_block"


def _fake_pack(weight: Tensor, bias: Tensor, dtype: torch.dtype, engine: str) -> Tensor:
    num_weights, _, _, channels = weight.shape
    size = registry.engine_module(OP, engine).packed_bytes(dtype, int(channels), int(num_weights))
    return weight.new_empty((size,), dtype=torch.uint8)


def _fake_block(
    features: list[Tensor],
    packed: Tensor,
    num_weights: int,
    edges: list[int],
    eps: float,
    outputs: list[Tensor],
    engine: str,
) -> None:
    return None


pack_op = library.define(
    "pack_block_weights",
    "(Tensor weight, Tensor bias, ScalarType dtype, str engine) -> Tensor",
    OP,
    "pack",
    _fake_pack,
)
block_op = library.define(
    OP,
    "(Tensor[] features, Tensor packed, int num_weights, int[] edges, float eps,"
    " Tensor(a!)[] outputs, str engine) -> ()",
    OP,
    "forward",
    _fake_block,
)
library.bump_versions(block_op, outputs=5)
