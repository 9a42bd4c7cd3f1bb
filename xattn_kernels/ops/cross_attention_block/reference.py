"""The cross-attention block in plain PyTorch: the oracle.

Computes in float32 (float64 for float64 inputs) and rounds the outputs once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from xattn_kernels.ops.features import ACCUMULATORS
from xattn_kernels.ops.linear_cross_attention.reference import forward as attend
from xattn_kernels.registry import Problem


def refusals(problem: Problem) -> list[str]:
    """Nothing is refused."""
    return []


def forward(
    features: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    edges: Sequence[int],
    eps: float,
    outputs: Sequence[Tensor],
) -> None:
    """Write every output (B, C, N) of the flat (query, source, output, weight) quadruples."""
    accumulator = ACCUMULATORS[features[0].dtype]
    x = [feature.to(accumulator) for feature in features]
    w = weight.to(accumulator)
    b = bias.to(accumulator).unsqueeze(3)

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
    for output, result in zip(outputs, results, strict=True):
        output.copy_(result)
