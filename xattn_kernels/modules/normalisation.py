"""Batch norm without calling its module: which statistics apply, and updating the running ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


def uses_batch(bn: nn.BatchNorm2d) -> bool:
    """Whether `bn` normalises with statistics of the batch rather than running ones."""
    return bn.training or bn.running_mean is None or bn.running_var is None


def agree(norms: Sequence[nn.BatchNorm2d]) -> bool:
    """Whether the norms agree in eps and in the kind of statistics."""
    eps, batch = norms[0].eps, uses_batch(norms[0])
    return all(bn.eps == eps and uses_batch(bn) == batch for bn in norms)


def is_inference(blocks: Iterable[nn.Module], features: Iterable[Tensor]) -> bool:
    """Whether no gradient can be asked for and every batch norm below uses running statistics."""
    gradient = torch.is_grad_enabled()
    if gradient and any(x.requires_grad for x in features):
        return False
    stack = list(blocks)
    while stack:
        module = stack.pop()
        if isinstance(module, nn.BatchNorm2d) and uses_batch(module):
            return False
        if gradient and any(p is not None and p.requires_grad for p in module._parameters.values()):
            return False
        stack += [child for child in module._modules.values() if child is not None]
    return True


def fold(
    convolutions: Sequence[nn.Conv2d], norms: Sequence[nn.BatchNorm2d], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Convolutions of one shape, each followed by a norm with running statistics, as affine maps.

    Returns:
        Weights (R, C_out, C_in, kH, kW) and biases (R, C_out) in `dtype`.
    """
    weight = _stack([conv.weight for conv in convolutions], dtype)
    scale = _stack([bn.weight for bn in norms], dtype)
    var = _stack([bn.running_var for bn in norms], dtype)
    scale = scale * torch.rsqrt(var + norms[0].eps)
    shift = _stack([bn.running_mean for bn in norms], dtype) * scale
    bias = _stack([bn.bias for bn in norms], dtype) - shift
    if convolutions[0].bias is not None:
        bias = bias + _stack([conv.bias for conv in convolutions], dtype) * scale
    return scale[:, :, None, None, None] * weight, bias


def tensors(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> list[Tensor]:
    """What `fold` reads."""
    candidates = (conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var)
    return [x for x in candidates if x is not None]


def _stack(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    return torch.stack([x for x in tensors if x is not None]).to(dtype)


def check_size(x: Tensor) -> None:
    """Refuse batch statistics of a single value as torch does.

    Raises:
        ValueError: if `x` (B, C, H, W) has one value per channel.
    """
    if x.numel() == x.shape[1]:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.shape}"
        )


def update(bn: nn.BatchNorm2d, mean: Tensor, var: Tensor) -> None:
    """Update running statistics as one training forward of `bn` does.

    Args:
        bn: a batch norm; nothing happens unless it trains and tracks statistics.
        mean: (C), of the batch.
        var: (C), of the batch, unbiased.
    """
    if not (bn.training and bn.track_running_stats):
        return
    count = bn.num_batches_tracked
    if count is not None:
        count.add_(1)
    for running, new in ((bn.running_mean, mean), (bn.running_var, var)):
        if running is None:
            continue
        factor: float | Tensor = 0.0 if bn.momentum is None else bn.momentum
        if bn.momentum is None and count is not None:
            factor = count.to(running.dtype).reciprocal()  # of all batches alike
        running.lerp_(new.to(running.dtype), factor)
