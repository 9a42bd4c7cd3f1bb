"""The aggregation of a feature pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

from torch import Tensor

from xattn_kernels.ops.autocast import no_autocast
from xattn_kernels.ops.pyramid_inputs import check_pyramid_inputs
from xattn_kernels.ops.pyramid_projection import op as pyramid_op
from xattn_kernels.ops.tracing import is_transformed
from xattn_kernels.problem import Problem
from xattn_kernels.registry import select, wants_gradient


@overload
def pyramid_projection(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    scale: Tensor,
    shift: Tensor,
    classifier: Tensor,
    classifier_bias: Tensor | None = ...,
    *,
    batch_statistics: Literal[False] = ...,
    eps: float = ...,
) -> Tensor: ...


@overload
def pyramid_projection(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    scale: Tensor,
    shift: Tensor,
    classifier: Tensor,
    classifier_bias: Tensor | None = ...,
    *,
    batch_statistics: Literal[True],
    eps: float = ...,
) -> tuple[Tensor, Tensor, Tensor]: ...


def pyramid_projection(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    scale: Tensor,
    shift: Tensor,
    classifier: Tensor,
    classifier_bias: Tensor | None = None,
    *,
    batch_statistics: bool = False,
    eps: float = 1e-5,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Aggregate a feature pyramid at its finest level: project, upsample, add, activate, classify.

    With ^ the bilinear interpolation to the size of the finest level (align_corners=False)::

        z = sum over levels s of ^(W_s x_s)                               (B, M, H_0, W_0)
        out = V relu(scale * z + shift) + b                               (B, O, H_0, W_0)

    or, with batch statistics, the mean and the biased variance of z over samples and pixels::

        out = V relu(scale * (z - mean) / sqrt(var + eps) + shift) + b

    This is a 1x1 convolution of the concatenation of all upsampled levels, a batch norm, a relu and
    a 1x1 convolution: a 1x1 convolution commutes with an interpolation, whose weights sum to 1.
    Engines with kernels store neither the concatenation nor, unless it is needed for a gradient or
    for batch statistics, z. The aggregation head of Kim, Choi, Min, "Sequential Cross Attention
    Based Multi-task Learning" (arXiv 2209.02518).

    Differentiable in all tensors.

    Args:
        features: x_s (B, C_s, H_s, W_s) of every level, finest first, of any strides. float32,
            float64, bfloat16 or float16.
        weights: W_s (M, C_s) of every level. All parameters have the dtype of the features or, for
            16-bit features, float32. Transposed matrices, views of (C_s, M), are read in place.
        scale: (M).
        shift: (M).
        classifier: V (O, M).
        classifier_bias: b (O). Default: zeros.
        batch_statistics: whether to normalise z with its own statistics.
        eps: added to the variance; not used without batch statistics.

    Returns:
        The output in the dtype and memory format of features[0]; with batch statistics also mean
        and biased variance of z, (M) in float32 (float64 for float64), without gradients.

    Raises:
        RuntimeError: if the engine asked for cannot run the problem.
        TypeError: for other dtypes, mixed dtypes, or arguments that are not tensors.
        ValueError: for shapes or devices that do not fit each other, and for batch statistics of
            fewer than two values per channel.
    """
    inputs = check_pyramid_inputs(
        features, weights, scale, shift, classifier, classifier_bias, batch_statistics
    )
    first = inputs.features[0]
    if batch_statistics and not eps >= 0:
        raise ValueError(f"eps: got {eps!r}, expected a number that is not negative")
    engine = select(
        Problem.of(
            pyramid_op.OP,
            first,
            first.size(1),
            classifier.size(0),
            transformed=is_transformed(),
            gradient=wants_gradient(
                (*inputs.features, *weights, scale, shift, classifier, classifier_bias)
            ),
        )
    )
    args = (inputs.features, inputs.weights, scale, shift, classifier, inputs.classifier_bias)
    with no_autocast(first.device.type):
        if engine == "reference":
            from xattn_kernels.ops.pyramid_projection import reference

            output, mean, var = reference.forward(*args, batch_statistics, eps)
        else:
            output, mean, var, _ = pyramid_op.call(*args, batch_statistics, eps, engine)
    return (output, mean, var) if batch_statistics else output
