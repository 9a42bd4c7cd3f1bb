"""Linear cross-attention in plain PyTorch, with the gradients of plain autograd: the oracle.

Computes in float32 (float64 for float64 inputs) and rounds the outputs once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
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
    state_s: Tensor | None,
    state_z: Tensor | None,
    feature_map: str,
    eps: float,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return outputs (B, Cv, N) and the states S (O, B, Cv, C), Z (O, B, C)."""
    accumulator = ACCUMULATORS[query[0].dtype]
    queries = [apply_feature_map(q.to(accumulator), feature_map) for q in query]
    keys = [apply_feature_map(k.to(accumulator), feature_map) for k in key]
    values = [v.to(accumulator) for v in value]
    outputs, all_s, all_z = [], [], []
    for o, (q, sources) in enumerate(group_by_output(edges)):
        s = None if state_s is None else state_s[o]
        z = None if state_z is None else state_z[o]
        for source in sources:
            s_edge = values[source] @ keys[source].transpose(1, 2)
            z_edge = keys[source].sum(dim=2)
            s = s_edge if s is None else s + s_edge
            z = z_edge if z is None else z + z_edge
        assert s is not None, "every output has an edge"
        assert z is not None
        denominator = (z.unsqueeze(1) @ queries[q]).clamp_min(eps)
        outputs.append(in_format_of(query[q], (s @ queries[q]) / denominator))
        all_s.append(s)
        all_z.append(z)
    return outputs, torch.stack(all_s), torch.stack(all_z)


def apply_feature_map(x: Tensor, name: str) -> Tensor:
    """Map pre-activations to non-negative features (``identity`` leaves them)."""
    if name == "softplus":
        return F.softplus(x)
    if name == "relu":
        return F.relu(x)
    if name == "elu":
        # elu(x) + 1 without the cancellation of expm1(x) + 1.
        return torch.where(x > 0, x + 1, x.clamp_max(0).exp())
    return x
