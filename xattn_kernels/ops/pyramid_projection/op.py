"""The pyramid projection as a torch operator: schemas, fake kernels and autograd.

With z = sum_s upsample_s(W_s x_s), batch statistics mu and var of z over samples and positions,
r = 1 / sqrt(var + eps) (mu = 0 and r = 1 without them), h = relu(a r (z - mu) + c) and
y = V h + d, an engine's backward computes, for the gradient G of y::

    g = [h > 0] V^T G      dV = G h^T      dc = sum g      da = sum g r (z - mu)
    dz = a r (g - (dc + r (z - mu) da) / n)     (the last two terms for batch statistics only)
    dx_s = W_s^T upsample_s^T dz                dW_s = (upsample_s^T dz) x_s^T

Sums run over samples and positions, of which there are n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xattn_kernels.ops import library
from xattn_kernels.ops.features import ACCUMULATORS
from xattn_kernels.ops.gradients import empty_gradient
from xattn_kernels.ops.tracing import is_recorded

OP = "pyramid_projection"


class Results(NamedTuple):
    """Results of the operator."""

    output: Tensor
    """(B, O, H_0, W_0)."""
    mean: Tensor
    """(M) of z; empty without batch statistics."""
    var: Tensor
    """(M) of z, biased; empty without batch statistics."""
    hidden: Tensor
    """z (B, M, H_0 W_0), for the backward pass; empty unless asked for."""


def allocate(features: Sequence[Tensor], classifier: Tensor, batch: bool, save: bool) -> Results:
    """Uninitialised results; mean and var in the type that sums are kept in."""
    first = features[0]
    samples, _, height, width = first.shape
    outputs, hidden = classifier.shape
    if first.stride(1) == 1 and height * width > 1:
        output = first.new_empty(samples, height, width, outputs).permute(0, 3, 1, 2)
    else:
        output = first.new_empty(samples, outputs, height, width)
    count = hidden if batch else 0
    mean = first.new_empty(count, dtype=ACCUMULATORS[first.dtype])
    shape = (samples, hidden, height * width) if save else (0,)
    return Results(output, mean, torch.empty_like(mean), first.new_empty(shape))


def allocate_gradients(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    scale: Tensor,
    classifier: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Uninitialised gradients of features, weights, scale, shift, classifier and its bias."""
    parameters = (*weights, scale, scale, classifier, classifier[:, 0])
    gradients = [empty_gradient(x) for x in (*features, *parameters)]
    return [x for x, want in zip(gradients, wanted, strict=True) if want]


def call(
    features: list[Tensor],
    weights: list[Tensor],
    scale: Tensor,
    shift: Tensor,
    classifier: Tensor,
    classifier_bias: Tensor,
    batch_statistics: bool,
    eps: float,
    engine: str,
) -> Results:
    """Run the operator, recorded for a backward pass if one may come."""
    parameters = (*weights, scale, shift, classifier, classifier_bias)
    save = library.needs_gradient(features, parameters)
    args = (features, weights, scale, shift, classifier, classifier_bias)
    run = forward_op if is_recorded() else _autograd
    return Results(*run(*args, batch_statistics, eps, save, engine))


def _autograd(
    features: list[Tensor],
    weights: list[Tensor],
    scale: Tensor,
    shift: Tensor,
    classifier: Tensor,
    classifier_bias: Tensor,
    batch_statistics: bool,
    eps: float,
    save: bool,
    engine: str,
) -> tuple[Tensor, ...]:
    tensors = (*features, *weights, scale, shift, classifier, classifier_bias)
    options = (batch_statistics, eps, engine)
    if library.needs_gradient(tensors):
        return _apply(len(features), options, *tensors)
    with library.below_autograd():
        results: tuple[Tensor, ...] = forward_op(
            features,
            weights,
            scale,
            shift,
            classifier,
            classifier_bias,
            batch_statistics,
            eps,
            save,
            engine,
        )
    return results


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, levels: int, options: tuple[Any, ...], *tensors: Tensor) -> Any:
        batch_statistics, eps, engine = options
        features, weights, rest = _split(tensors, levels)
        with library.below_autograd():
            results = forward_op(features, weights, *rest, batch_statistics, eps, True, engine)
        _, mean, var, hidden = results
        ctx.save_for_backward(*tensors[:-1], mean, var, hidden)
        ctx.mark_non_differentiable(mean, var, hidden)
        ctx.set_materialize_grads(False)
        ctx.levels, ctx.options = levels, options
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        library.check_not_batched(OP, [grad_output])
        count = 2 * ctx.levels + 4
        if grad_output is None:
            return (None,) * (count + 2)
        *tensors, mean, var, hidden = ctx.saved_tensors
        features, weights, rest = _split(tensors, ctx.levels)
        batch_statistics, eps, engine = ctx.options
        wanted = list(ctx.needs_input_grad[2:])
        gradients = backward_op(
            grad_output,
            features,
            weights,
            *rest,
            mean,
            var,
            hidden,
            batch_statistics,
            eps,
            wanted,
            engine,
        )
        placed = library.place_gradients(gradients, wanted)
        return (None, None, *library.forbid_double_backward(OP, placed, (*tensors, grad_output)))


_apply: Callable[..., tuple[Tensor, ...]] = _Function.apply


def _split(
    tensors: Sequence[Tensor], levels: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return list(tensors[:levels]), list(tensors[levels : 2 * levels]), list(tensors[2 * levels :])


def _fake_forward(
    features: list[Tensor],
    weights: list[Tensor],
    scale: Tensor,
    shift: Tensor,
    classifier: Tensor,
    classifier_bias: Tensor,
    batch_statistics: bool,
    eps: float,
    save: bool,
    engine: str,
) -> tuple[Tensor, ...]:
    return tuple(allocate(features, classifier, batch_statistics, save))


def _fake_backward(
    grad_output: Tensor,
    features: list[Tensor],
    weights: list[Tensor],
    scale: Tensor,
    shift: Tensor,
    classifier: Tensor,
    mean: Tensor,
    var: Tensor,
    hidden: Tensor,
    batch_statistics: bool,
    eps: float,
    wanted: list[bool],
    engine: str,
) -> list[Tensor]:
    return allocate_gradients(features, weights, scale, classifier, wanted)


forward_op = library.define(
    OP,
    "(Tensor[] features, Tensor[] weights, Tensor scale, Tensor shift, Tensor classifier,"
    " Tensor classifier_bias, bool batch_statistics, float eps, bool save, str engine)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    OP,
    "forward",
    _fake_forward,
)
backward_op = library.define(
    f"{OP}_backward",
    "(Tensor grad_output, Tensor[] features, Tensor[] weights, Tensor scale, Tensor shift,"
    " Tensor classifier, Tensor mean, Tensor var, Tensor hidden, bool batch_statistics,"
    " float eps, bool[] wanted, str engine) -> Tensor[]",
    OP,
    "backward",
    _fake_backward,
)
library.library.impl(OP, _autograd, "Autograd")
