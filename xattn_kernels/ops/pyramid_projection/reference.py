"""The pyramid projection in plain PyTorch: the oracle.

Computes in float32 (float64 for float64 features) and rounds the output once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn_kernels.ops.features import ACCUMULATORS
from xattn_kernels.problem import Problem


def refusals(problem: Problem) -> list[str]:
    """Nothing is refused."""
    return []


def forward(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    scale: Tensor,
    shift: Tensor,
    classifier: Tensor,
    classifier_bias: Tensor,
    batch_statistics: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, O, H_0, W_0), and mean and biased variance (M) of z, empty if not asked for."""
    first = features[0]
    dtype = ACCUMULATORS[first.dtype]
    if first.numel() == 0:
        output = classifier_bias.to(first.dtype)[:, None, None]
        output = output.expand(first.shape[0], -1, *first.shape[2:]).contiguous()
        return output, output.new_empty(0), output.new_empty(0)
    hidden: Tensor | None = None
    for x, weight in zip(features, weights, strict=True):
        projected = F.conv2d(x.to(dtype), weight.to(dtype)[:, :, None, None])
        if hidden is None:
            hidden = projected
        else:
            hidden = hidden + F.interpolate(
                projected, size=first.shape[2:], mode="bilinear", align_corners=False
            )
    assert hidden is not None
    scale, shift = scale.to(dtype), shift.to(dtype)
    mean = var = hidden.new_empty(0)
    if batch_statistics:
        var, mean = torch.var_mean(hidden, dim=(0, 2, 3), correction=0)
        centred = hidden - mean[:, None, None]
        hidden = centred * (var + eps).rsqrt()[:, None, None]
    activated = F.relu(hidden * scale[:, None, None] + shift[:, None, None])
    output = F.conv2d(activated, classifier.to(dtype)[:, :, None, None], classifier_bias.to(dtype))
    last = first.stride(1) == 1 and first.shape[2:].numel() > 1
    layout = torch.channels_last if last else torch.contiguous_format
    return output.to(first.dtype).contiguous(memory_format=layout), mean.detach(), var.detach()
