"""Levels, weights and classifier of the pyramid projection, checked against each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xattn_kernels.ops.autocast import autocast_dtype, cast_for_autocast
from xattn_kernels.ops.features import (
    ACCUMULATORS,
    as_list,
    check_first,
    describe,
    flatten,
)
from xattn_kernels.ops.gradients import with_plain_gradient


class PyramidInputs(NamedTuple):
    """Checked arguments."""

    features: list[Tensor]
    weights: list[Tensor]
    classifier_bias: Tensor


def check_pyramid_inputs(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    scale: Tensor,
    shift: Tensor,
    classifier: Tensor,
    classifier_bias: Tensor | None,
    batch_statistics: bool,
) -> PyramidInputs:
    """Check types, shapes and devices; cast features under autocast.

    Raises:
        TypeError: for tensors that the operator cannot work on, or of mixed dtypes.
        ValueError: for shapes or devices that do not fit each other; for a level without pixels
            beside a finest level with some; for batch statistics of fewer than two values.
    """
    levels = as_list("features", features)
    first = levels[0]
    check_first("features[0]", first)
    if autocast_dtype(first.device.type) is not None:
        levels = [cast_for_autocast(x) if isinstance(x, Tensor) else x for x in levels]
        first = levels[0]
    flatten(("features",), (levels,), first)
    for s, x in enumerate(levels):
        if x.dim() != 4:
            raise ValueError(f"features[{s}]: got {describe(x)}, expected shape (B, C, H, W)")
        if first.numel() and not x.numel():
            raise ValueError(
                f"features[{s}]: got {describe(x)}, expected pixels, as the finest level has"
            )
    matrices = as_list("weights", weights)
    if len(matrices) != len(levels):
        raise ValueError(f"weights: got {len(matrices)}, expected {len(levels)}, one per level")
    hidden = classifier.shape[1] if isinstance(classifier, Tensor) and classifier.dim() == 2 else 0
    if not hidden or not classifier.shape[0]:
        raise ValueError(f"classifier: got {describe(classifier)}, expected shape (O, M)")
    if classifier_bias is None:
        classifier_bias = classifier.new_zeros(classifier.shape[0])
    shapes: list[tuple[str, Tensor, tuple[int, ...]]] = [
        (f"weights[{s}]", w, (hidden, x.shape[1]))
        for s, (w, x) in enumerate(zip(matrices, levels, strict=True))
    ]
    shapes += [
        ("scale", scale, (hidden,)),
        ("shift", shift, (hidden,)),
        ("classifier", classifier, tuple(classifier.shape)),
        ("classifier_bias", classifier_bias, (classifier.shape[0],)),
    ]
    allowed = tuple(dict.fromkeys((first.dtype, ACCUMULATORS[first.dtype])))
    for name, x, shape in shapes:
        got = f"{name}: got {describe(x)}, expected"
        if not isinstance(x, Tensor) or x.layout is not torch.strided:
            raise TypeError(f"{got} a dense tensor")
        if x.dtype not in allowed or x.dtype is not classifier.dtype:
            expected = f"{classifier.dtype} as the classifier has"
            if classifier.dtype not in allowed:
                expected = " or ".join(str(dtype) for dtype in allowed)
            raise TypeError(f"{got} {expected}")
        if tuple(x.shape) != shape:
            raise ValueError(f"{got} shape {shape}")
        if x.device != first.device:
            raise ValueError(f"{got} a tensor on {first.device}, where the features are")
    values = first.numel() // first.shape[1]
    if batch_statistics and values < 2:
        raise ValueError(
            f"features[0]: got {describe(first)}, expected more than one value per channel for "
            "batch statistics"
        )
    levels = [with_plain_gradient(x) for x in levels]
    return PyramidInputs(levels, matrices, classifier_bias)
