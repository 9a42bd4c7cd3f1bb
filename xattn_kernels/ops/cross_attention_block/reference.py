"""The cross-attention block in plain PyTorch: the oracle.

Computes in float32 (float64 for float64 inputs) and rounds the outputs once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn_kernels.ops.features import ACCUMULATORS, describe, in_format_of
from xattn_kernels.ops.folding import fold_projections
from xattn_kernels.ops.linear_cross_attention.reference import forward as attend
from xattn_kernels.problem import Problem


def refusals(problem: Problem) -> list[str]:
    """Nothing is refused."""
    return []


def pack(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the projections (W, 5, C, C + 1), weights then bias, in the accumulator's dtype."""
    return torch.cat([weight, bias.unsqueeze(3)], dim=3).to(ACCUMULATORS[dtype])


def fold(
    weight: Sequence[Tensor],
    gamma: Sequence[Tensor],
    beta: Sequence[Tensor],
    mean: Sequence[Tensor],
    var: Sequence[Tensor],
    bn_eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """As `pack`, of projections that batch norms follow."""
    return pack(*fold_projections(weight, gamma, beta, mean, var, bn_eps, dtype), dtype)


def forward(
    features: Sequence[Tensor],
    packed: Tensor,
    num_weights: int,
    edges: Sequence[int],
    eps: float,
) -> list[Tensor]:
    """Return the outputs (B, C, N) of the flat (query, source, output, weight) quadruples."""
    channels = features[0].size(1)
    if packed.shape != (num_weights, 5, channels, channels + 1):
        raise ValueError(
            f"packed: got {describe(packed)}, expected shape "
            f"{(num_weights, 5, channels, channels + 1)}, as pack_block_weights makes it on this "
            "engine"
        )
    x = [feature.to(packed.dtype) for feature in features]
    w, b = packed[..., :-1], packed[..., -1:]

    def project(slot: int, w_id: int, first: int, second: int) -> Tensor:
        hidden = F.relu(w[w_id, first] @ x[slot] + b[w_id, first])
        return w[w_id, second] @ hidden + b[w_id, second]

    queries, keys, values, triples = [], [], [], []
    # Every edge has its own projections: the core sees one query and one source slot an edge.
    for edge, (q, source, o, w_id) in enumerate(
        zip(edges[0::4], edges[1::4], edges[2::4], edges[3::4], strict=True)
    ):
        queries.append(project(q, w_id, 0, 1))
        keys.append(project(source, w_id, 2, 3))
        values.append(F.relu(w[w_id, 4] @ x[source] + b[w_id, 4]))
        triples += [edge, edge, o]
    results, _, _ = attend(queries, keys, values, triples, None, None, "softplus", eps)
    query_of = dict(zip(edges[2::4], edges[0::4], strict=True))
    return [in_format_of(features[query_of[o]], y) for o, y in enumerate(results)]
