"""The operators composed from stock PyTorch calls, in whatever dtype the inputs have.

In float64 they are what results are compared with; in the dtype of a kernel they show how far
rounding alone takes an op-by-op evaluation. They never call this library's operators.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn_kernels.schedule import Schedule

State = tuple[Tensor, Tensor]


def feature_map(x: Tensor, name: str) -> Tensor:
    """phi(x)."""
    if name == "softplus":
        return F.softplus(x)
    if name == "relu":
        return F.relu(x)
    if name == "elu":
        # elu(x) + 1, without what elu's subtraction of 1 loses.
        return torch.where(x > 0, x + 1, x.clamp_max(0).exp())
    return x


def linear_cross_attention(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    schedule: Schedule,
    *,
    name: str = "softplus",
    eps: float = 1e-12,
    state: State | None = None,
) -> tuple[list[Tensor], State]:
    """Outputs (B, Cv, N) and (S, Z), one query and one set of sources after the other."""
    outputs, all_s, all_z = [], [], []
    for output, group in enumerate(schedule.groups):
        mapped = feature_map(query[group[0].query], name)
        keys = torch.cat([feature_map(key[edge.source], name) for edge in group], dim=2)
        values = torch.cat([value[edge.source] for edge in group], dim=2)
        s = torch.einsum("bvn,bcn->bvc", values, keys)
        z = keys.sum(dim=2)
        if state is not None:
            s, z = s + state[0][output], z + state[1][output]
        numerator = torch.einsum("bvc,bcm->bvm", s, mapped)
        denominator = torch.einsum("bc,bcm->bm", z, mapped).unsqueeze(1)
        outputs.append(numerator / denominator.clamp_min(eps))
        all_s.append(s)
        all_z.append(z)
    return outputs, (torch.stack(all_s), torch.stack(all_z))


def softmax_cross_attention(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    schedule: Schedule,
    *,
    heads: int = 1,
    scale: float | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs (B, Cv, N) and log-sum-exps (B, heads, N)."""
    outputs, all_lse = [], []
    for group in schedule.groups:
        q = query[group[0].query]
        k = torch.cat([key[edge.source] for edge in group], dim=2)
        v = torch.cat([value[edge.source] for edge in group], dim=2)
        factor = (q.shape[1] // heads) ** -0.5 if scale is None else scale
        parts, lse = [], []
        for q_h, k_h, v_h in zip(*(x.chunk(heads, dim=1) for x in (q, k, v)), strict=True):
            scores = torch.einsum("bcm,bcn->bmn", q_h, k_h) * factor
            parts.append(torch.einsum("bvn,bmn->bvm", v_h, scores.softmax(dim=2)))
            lse.append(scores.logsumexp(dim=2))
        outputs.append(torch.cat(parts, dim=1))
        all_lse.append(torch.stack(lse, dim=1))
    return outputs, all_lse


def cross_attention_block(
    features: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    schedule: Schedule,
    *,
    eps: float = 1e-12,
) -> list[Tensor]:
    """Outputs (B, C, N); every edge projects anew."""

    def project(x: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
        return torch.einsum("oc,bcn->bon", weights, x) + biases.unsqueeze(1)

    outputs = []
    for group in schedule.groups:
        w, b = weight[group[0].weight], bias[group[0].weight]
        x = features[group[0].query]
        query = project(F.relu(project(x, w[0], b[0])), w[1], b[1])
        keys, values = [], []
        for edge in group:
            source = features[edge.source]
            keys.append(project(F.relu(project(source, w[2], b[2])), w[3], b[3]))
            values.append(F.relu(project(source, w[4], b[4])))
        joined = Schedule.identity(1)
        attended, _ = linear_cross_attention(
            [query], [torch.cat(keys, dim=2)], [torch.cat(values, dim=2)], joined, eps=eps
        )
        outputs += attended
    return outputs


def pyramid_projection(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    scale: Tensor,
    shift: Tensor,
    classifier: Tensor,
    classifier_bias: Tensor,
    *,
    batch_statistics: bool = False,
    eps: float = 1e-5,
    order: int = 0,
) -> Tensor:
    """(B, O, H_0, W_0): everything upsampled and concatenated first, channels in any order."""
    size = features[0].shape[2:]
    wide = torch.cat(
        [F.interpolate(x, size=size, mode="bilinear", align_corners=False) for x in features], dim=1
    )
    weight = torch.cat(list(weights), dim=1)
    if order:
        generator = torch.Generator().manual_seed(order)
        index = torch.randperm(wide.shape[1], generator=generator)
        wide, weight = wide[:, index], weight[:, index]
    hidden = F.conv2d(wide, weight[:, :, None, None])
    if batch_statistics:
        hidden = F.batch_norm(hidden, None, None, scale, shift, training=True, eps=eps)
    else:
        hidden = hidden * scale[:, None, None] + shift[:, None, None]
    return F.conv2d(F.relu(hidden), classifier[:, :, None, None], classifier_bias)
