"""Argument checks that the modules share."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from xattn_kernels.ops.features import ACCUMULATORS, describe

KINDS = ("linear", "softmax")


def check_width(name: str, channels: int) -> None:
    """Raises ValueError unless `channels` is a positive integer."""
    if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
        raise ValueError(f"{name}: got {channels!r}, expected a positive integer")


def check_kind(kind: str, heads: int, widths: Sequence[int]) -> None:
    """Raises ValueError for an unknown kind, and for heads that do not fit it or the widths."""
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, expected one of {KINDS}")
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
        raise ValueError(f"heads: got {heads!r}, expected a positive integer")
    if kind == "linear" and heads != 1:
        raise ValueError(f"heads: got {heads}, expected 1 for kind 'linear'")
    for width in widths:
        if width % heads:
            raise ValueError(f"heads: got {heads}, expected a divisor of the {width} channels")


def check_recompute(recompute: bool | str, kind: str) -> None:
    """Raises ValueError for an unknown value, and for recomputing the kind that stores."""
    if recompute not in ("auto", True, False):
        raise ValueError(f"recompute: got {recompute!r}, expected 'auto', True or False")
    if recompute is True and kind != "linear":
        raise ValueError(f"recompute: got True, expected 'auto' or False for kind {kind!r}")


def check_names(name: str, names: Sequence[str]) -> None:
    """Raises ValueError for duplicates and for names that no module can have."""
    if isinstance(names, str):
        raise ValueError(f"{name}: got the string {names!r}, expected a sequence of names")
    for i, task in enumerate(names):
        if not isinstance(task, str) or not task or "." in task or hasattr(nn.ModuleDict, task):
            raise ValueError(
                f"{name}[{i}]: got {task!r}, expected a name that a submodule can have: no dots, "
                "no attribute of torch.nn.ModuleDict"
            )
        if task in names[:i]:
            raise ValueError(f"{name}[{i}]: got {task!r} a second time, expected distinct names")


def check_features(features: Sequence[tuple[str, Tensor, int]], weight: Tensor) -> None:
    """Check named features (B, C, H, W) of given widths against each other and the parameters.

    Raises:
        TypeError: for anything but dense floating-point tensors of the parameters' dtype (any of
            them under autocast).
        ValueError: for other shapes, or on another device than the parameters.
    """
    first = features[0][1]
    autocast = torch.is_autocast_enabled(weight.device.type)
    for name, x, channels in features:
        if not isinstance(x, Tensor) or x.layout is not torch.strided:
            raise TypeError(f"{name}: got {describe(x)}, expected a dense tensor")
        if x.dtype not in ACCUMULATORS or (x.dtype != weight.dtype and not autocast):
            raise TypeError(
                f"{name}: got {describe(x)}, expected {weight.dtype}, as the parameters"
            )
        if x.dim() != 4 or x.shape[1] != channels or x.shape[0] != first.shape[0]:
            batch = f"B = {first.shape[0]} and " if x is not first and x.dim() == 4 else ""
            raise ValueError(
                f"{name}: got {describe(x)}, expected (B, C, H, W) with {batch}C = {channels}"
            )
        if x.device != weight.device:
            raise ValueError(
                f"{name}: got {describe(x)}, expected {weight.device} as the parameters"
            )


def cast_for_autocast(x: Tensor) -> Tensor:
    """`x` in the dtype that autocast asks for, if it does."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype is not torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Context without the autocast of the device of `x`, which was cast already."""
    device = x.device.type
    enabled = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else nullcontext()


def in_format_of(x: Tensor, like: Tensor) -> Tensor:
    """`x` (B, C, H, W) in channels_last order if `like` is, else contiguous."""
    last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
