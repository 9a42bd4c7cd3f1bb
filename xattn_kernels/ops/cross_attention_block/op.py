"""The cross-attention block as torch operators: packing of weights, and the pass over features.

What an engine packs is its own business; every engine folds batch norms into what it packs.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from xattn_kernels import registry
from xattn_kernels.ops import library
from xattn_kernels.ops.features import new_output
from xattn_kernels.ops.tracing import is_observed

OP = "cross_attention_block"


def allocate(features: Sequence[Tensor], edges: Sequence[int]) -> list[Tensor]:
    """Uninitialised outputs (B, C, N) of flat (query, source, output, weight) quadruples."""
    queries = dict(zip(edges[2::4], edges[0::4], strict=True))
    return [new_output(features[queries[o]], features[0].size(1)) for o in sorted(queries)]


def fold(
    weight: Sequence[Tensor],
    gamma: Sequence[Tensor],
    beta: Sequence[Tensor],
    mean: Sequence[Tensor],
    var: Sequence[Tensor],
    bn_eps: float,
    dtype: torch.dtype,
    engine: str,
) -> Tensor:
    """`fold_op`, without torch's dispatcher where nobody listens to it: hundreds of tensors."""
    packed: Tensor
    if is_observed():
        packed = fold_op(weight, gamma, beta, mean, var, bn_eps, dtype, engine)
    else:
        module = registry.engine_module(OP, engine)
        packed = module.fold(weight, gamma, beta, mean, var, bn_eps, dtype)
    return packed


def _forward(
    module: ModuleType,
    features: Sequence[Tensor],
    packed: Tensor,
    num_weights: int,
    edges: Sequence[int],
    eps: float,
) -> list[Tensor]:
    outputs = allocate(features, edges)
    module.forward(features, packed, num_weights, edges, eps, outputs)
    return outputs


def _fake_packed(weight: Tensor, dtype: torch.dtype, num_weights: int, engine: str) -> Tensor:
    size = registry.engine_module(OP, engine).packed_bytes(dtype, int(weight.size(-1)), num_weights)
    return weight.new_empty((size,), dtype=torch.uint8)


def _fake_pack(weight: Tensor, bias: Tensor, dtype: torch.dtype, engine: str) -> Tensor:
    return _fake_packed(weight, dtype, int(weight.size(0)), engine)


def _fake_fold(
    weight: list[Tensor],
    gamma: list[Tensor],
    beta: list[Tensor],
    mean: list[Tensor],
    var: list[Tensor],
    bn_eps: float,
    dtype: torch.dtype,
    engine: str,
) -> Tensor:
    return _fake_packed(weight[0].flatten(1), dtype, len(weight) // 5, engine)


def _fake_block(
    features: list[Tensor],
    packed: Tensor,
    num_weights: int,
    edges: list[int],
    eps: float,
    engine: str,
) -> list[Tensor]:
    return allocate(features, edges)


def _fake_block_out(
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
fold_op = library.define(
    "fold_block_weights",
    "(Tensor[] weight, Tensor[] gamma, Tensor[] beta, Tensor[] mean, Tensor[] var, float bn_eps,"
    " ScalarType dtype, str engine) -> Tensor",
    OP,
    "fold",
    _fake_fold,
)
block_op = library.define(
    OP,
    "(Tensor[] features, Tensor packed, int num_weights, int[] edges, float eps, str engine)"
    " -> Tensor[]",
    OP,
    _forward,
    _fake_block,
)
block_out_op = library.define(
    f"{OP}_out",
    "(Tensor[] features, Tensor packed, int num_weights, int[] edges, float eps,"
    " Tensor(a!)[] outputs, str engine) -> ()",
    OP,
    "forward",
    _fake_block_out,
)
library.bump_versions(block_out_op, outputs=5)
