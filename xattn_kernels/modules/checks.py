"""Argument checks that the modules share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import index

import torch
from torch import Tensor, nn

from xattn_kernels.ops.autocast import autocast_dtype, cast_for_autocast
from xattn_kernels.ops.features import ACCUMULATORS, describe
from xattn_kernels.ops.gradients import (
    CHANNELS_LAST,
    CONTIGUOUS,
    in_order,
    memory_order,
    with_plain_gradient,
)

KINDS = ("linear", "softmax")


def check_width(name: str, channels: object) -> int:
    """The positive integer that `channels` is, of any type of integers; else raises ValueError."""
    try:
        width = 0 if isinstance(channels, bool) else index(channels)  # type: ignore[arg-type]
    except TypeError:
        width = 0
    if width < 1:
        raise ValueError(f"{name}: got {shown(channels)}, expected a positive integer")
    return width


def shown(x: object) -> str:
    """What was given, for error messages: a short value itself, else what it is."""
    if not isinstance(x, str | bytes | int | float | None):
        return describe(x)
    text = repr(x)
    return text if len(text) <= 100 else f"{text[:100]}... ({len(text)} characters)"


def some(names: Iterable[object]) -> str:
    """Names for an error message, the first few of them."""
    found = [shown(name) for name in names]
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    return f"[{', '.join(found[:8])}]{more}"


def check_kind(kind: str, heads: int, widths: Sequence[int]) -> int:
    """The number of heads.

    Raises:
        ValueError: for an unknown kind, and for heads that do not fit it or the widths.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {shown(kind)}, expected one of {KINDS}")
    heads = check_width("heads", heads)
    if kind == "linear" and heads != 1:
        raise ValueError(f"heads: got {heads}, expected 1 for kind 'linear'")
    for width in widths:
        if width % heads:
            raise ValueError(f"heads: got {heads}, expected a divisor of the {width} channels")
    return heads


def check_recompute(recompute: bool | str, kind: str) -> None:
    """Raises ValueError for an unknown value, and for recomputing the kind that stores."""
    if recompute not in ("auto", True, False):
        raise ValueError(f"recompute: got {shown(recompute)}, expected 'auto', True or False")
    if recompute is True and kind != "linear":
        raise ValueError(f"recompute: got True, expected 'auto' or False for kind {kind!r}")


def check_names(name: str, names: Iterable[str]) -> tuple[str, ...]:
    """The names as a tuple.

    Raises:
        ValueError: for what is no collection of names, duplicates, and names that no module can
            have.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise ValueError(f"{name}: got {shown(names)}, expected a sequence of names")
    found = tuple(names)
    for i, task in enumerate(found):
        if not isinstance(task, str) or not task or "." in task or hasattr(nn.ModuleDict, task):
            raise ValueError(
                f"{name}[{i}]: got {shown(task)}, expected a name that a submodule can have: no "
                "dots, no attribute of torch.nn.ModuleDict"
            )
        if task in found[:i]:
            raise ValueError(
                f"{name}[{i}]: got {shown(task)} a second time, expected distinct names"
            )
    return found


def check_features(features: Sequence[tuple[str, Tensor, int]], weight: Tensor) -> None:
    """Check named features (B, C, H, W) of given widths against each other and the parameters.

    Raises:
        TypeError: for anything but dense floating-point tensors of the parameters' dtype (any of
            them under autocast).
        ValueError: for other shapes, or on another device than the parameters.
    """
    first = features[0][1]
    autocast = autocast_dtype(weight.device.type) is not None
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
        if x.is_meta:
            raise ValueError(
                f"{name}: got {describe(x)}, expected a tensor with data; for shapes alone, call "
                "the module under torch._subclasses.FakeTensorMode"
            )
        if x.device != weight.device:
            raise ValueError(
                f"{name}: got {describe(x)}, expected {weight.device} as the parameters"
            )


def as_inputs(features: Sequence[Tensor]) -> list[Tensor]:
    """Features as modules work on them: cast for autocast, with gradients of their own strides."""
    return [cast_for_autocast(with_plain_gradient(x)) for x in features]


def in_format_of(x: Tensor, like: Tensor) -> Tensor:
    """`x` (B, C, H, W) in channels_last order if `like` is, else contiguous."""
    return in_order(x, CHANNELS_LAST if memory_order(like) == CHANNELS_LAST else CONTIGUOUS)
