"""Softmax cross-attention in plain PyTorch, with the gradients of plain autograd: the oracle.

Computes in float32 (float64 for float64 inputs) and rounds the outputs once. Stores the scores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xattn_kernels.ops.features import ACCUMULATORS, group_by_output, in_format_of
from xattn_kernels.problem import Problem


def refusals(problem: Problem) -> list[str]:
    """Nothing is refused."""
    return []


def forward(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    edges: Sequence[int],
    heads: int,
    scale: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return outputs (B, Cv, N) and their log-sum-exps (B, heads, N)."""
    accumulator = ACCUMULATORS[query[0].dtype]
    queries, keys, values = (
        [x.to(accumulator).unflatten(1, (heads, -1)) for x in slots]
        for slots in (query, key, value)
    )
    outputs, all_lse = [], []
    for q, sources in group_by_output(edges):
        # Joint normalisation: the sources of an output are one concatenated source.
        joint_key = torch.cat([keys[source] for source in sources], dim=3)
        joint_value = torch.cat([values[source] for source in sources], dim=3)
        scores = (queries[q].transpose(2, 3) @ joint_key) * scale
        lse = scores.logsumexp(dim=3)
        output = joint_value @ scores.softmax(dim=3).transpose(2, 3)
        outputs.append(in_format_of(query[q], output.flatten(1, 2)))
        all_lse.append(lse)
    return outputs, all_lse
