"""The cross-attention block, for inference and for training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xattn_kernels.collectives import LOCAL, Reduction
from xattn_kernels.functional.shared import check_eps
from xattn_kernels.ops.autocast import no_autocast
from xattn_kernels.ops.block_inputs import (
    BlockInputs,
    check_block_inputs,
    check_block_weights,
    check_outputs,
    check_slots,
    check_training_inputs,
)
from xattn_kernels.ops.cross_attention_block import op as block_op
from xattn_kernels.ops.cross_attention_block_training import autograd as training
from xattn_kernels.ops.cross_attention_block_training import op as training_op
from xattn_kernels.ops.tracing import is_observed, is_transformed
from xattn_kernels.problem import Problem
from xattn_kernels.registry import select
from xattn_kernels.schedule import Schedule


def cross_attention_block(
    features: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    schedule: Schedule,
    *,
    eps: float = 1e-12,
    packed: Tensor | None = None,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Projections and linear cross-attention of all edges in one call, for inference.

    For every edge with weight id w, of target x_t and source x_a, with the batch norms folded into
    ``weight`` and ``bias``::

        q = softplus(W_q2 relu(W_q1 x_t + b_q1) + b_q2)      v = relu(W_v x_a + b_v)
        k = softplus(W_k2 relu(W_k1 x_a + b_k1) + b_k2)
        S = sum over edges and n of v_n k_n^T      Z = sum over edges and n of k_n
        out_m = S q_m / max(Z . q_m, eps)

    where the sums run over the edges of an output slot. Engines with kernels store nothing of the
    size of a feature map but the outputs. The cross-attention module of Kim, Choi, Min, "Sequential
    Cross Attention Based Multi-task Learning" (arXiv 2209.02518).

    Args:
        features: one tensor per slot, (B, C, N_i) or (B, C, H_i, W_i), of any strides. Queries and
            sources of the schedule index the same slots. float32, float64, bfloat16 or float16.
        weight: (W, 5, C, C), ``weight[w, p, c_out, c_in]`` with the projections p in the order
            query 1, query 2, key 1, key 2, value. In the dtype of the features or, for 16-bit
            features, in float32.
        bias: (W, 5, C), dtype as ``weight``.
        schedule: who attends to whom. The edges of one output share their weight id.
        eps: lower bound of the denominator, > 0.
        packed: what :func:`pack_block_weights` made of ``weight`` and ``bias``, to save packing
            them again.
        out: one tensor per output slot to write into, such as slices of a consumer's buffer, of the
            shape of the output and any strides. Default: new tensors.

    Returns:
        One output per output slot, in the shape, dtype and (if new) memory format of its query.

    Raises:
        RuntimeError: if a gradient would be needed, or the engine asked for cannot run the problem.
        TypeError: for other dtypes, mixed dtypes, or arguments that are not tensors.
        ValueError: for shapes or devices that do not fit each other or the schedule, and for
            outputs that share memory with each other or with an input.
    """
    check_eps(eps)
    inputs = check_block_inputs(features, weight, bias, schedule)
    if torch.is_grad_enabled():
        tensors = {"features": features, "weight": [weight], "bias": [bias], "out": out or ()}
        for name, group in tensors.items():
            if any(x.requires_grad for x in group):
                raise RuntimeError(
                    f"{name}: requires a gradient, which this inference operator has none for: "
                    "call it under torch.no_grad(), or use the modules in train mode"
                )
    if packed is None or packed.numel() == 0:
        packed = pack_block_weights(weight, bias, inputs.features[0].dtype)
    return _attend(inputs, packed, schedule, eps, out, [weight, bias])


def attend_packed(
    features: Sequence[Tensor],
    packed: Tensor,
    schedule: Schedule,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """As :func:`cross_attention_block`, of what :func:`fold_block_weights` gave, without gradients.

    Args:
        features: see :func:`cross_attention_block`.
        packed: for the engine in force.
        schedule: see :func:`cross_attention_block`.
        out: see :func:`cross_attention_block`.
    """
    return _attend(check_slots(features, schedule), packed, schedule, 1e-12, out, [packed])


def _attend(
    inputs: BlockInputs,
    packed: Tensor,
    schedule: Schedule,
    eps: float,
    out: Sequence[Tensor] | None,
    others: Sequence[Tensor],
) -> list[Tensor]:
    first = inputs.features[0]
    engine = _block_engine(first.dtype, first)
    args = (inputs.features, packed, schedule.num_weights, schedule.edges_flat, eps)
    with no_autocast(first.device.type), torch.no_grad():
        flat = None if out is None else check_outputs(out, inputs, others, schedule)
        if flat is not None and engine != "reference" and not is_observed():
            block_op.block_out_op(*args, flat, engine)
            return list(out or ())
        if engine == "reference":
            from xattn_kernels.ops.cross_attention_block import reference

            results = reference.forward(*args)
        else:
            results = block_op.block_op(*args, engine)
        if flat is not None:
            for place, result in zip(flat, results, strict=True):
                place.copy_(result)
            return list(out or ())
    sizes = [inputs.spatial[query] for query in schedule.output_queries]
    return [
        x if len(size) == 1 else x.unflatten(2, size)
        for x, size in zip(results, sizes, strict=True)
    ]


def pack_block_weights(weight: Tensor, bias: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Lay weights out as the engine in force wants them for :func:`cross_attention_block`.

    Args:
        weight: (W, 5, C, C), as in :func:`cross_attention_block`.
        bias: (W, 5, C).
        dtype: dtype of the features that they will be used with. Default: that of ``weight``.

    Returns:
        An opaque tensor, valid for this engine and ``dtype``; every engine takes an empty one for
        none.

    Raises:
        RuntimeError: if the engine asked for cannot run the problem.
        TypeError: if the weights are of another dtype than ``dtype`` or its accumulator's.
        ValueError: for other shapes, or weights on different devices.
    """
    check_block_weights(weight, bias, dtype)
    dtype = dtype or weight.dtype
    engine = _block_engine(dtype, weight)
    packed: Tensor
    with torch.no_grad():
        if engine == "reference":
            from xattn_kernels.ops.cross_attention_block import reference

            packed = reference.pack(weight, bias, dtype)
        else:
            packed = block_op.pack_op(weight, bias, dtype, engine)
    return packed


def fold_block_weights(
    weight: Sequence[Tensor],
    gamma: Sequence[Tensor],
    beta: Sequence[Tensor],
    mean: Sequence[Tensor],
    var: Sequence[Tensor],
    bn_eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """As :func:`pack_block_weights`, of convolutions with batch norms, which are folded into them.

    Args:
        weight: (C, C, 1, 1) of 5 W convolutions, set by set.
        gamma: (C) of 5 W batch norms, as the following.
        beta: their biases.
        mean: their running means.
        var: their running variances.
        bn_eps: added to the variances.
        dtype: of the features.
    """
    engine = _block_engine(dtype, weight[0].flatten(1))
    packed: Tensor
    with torch.no_grad():
        if engine == "reference":
            from xattn_kernels.ops.cross_attention_block import reference

            packed = reference.fold(weight, gamma, beta, mean, var, bn_eps, dtype)
        else:
            packed = block_op.fold(weight, gamma, beta, mean, var, bn_eps, dtype, engine)
    return packed


def cross_attention_block_training(
    features: Sequence[Tensor],
    weight: Tensor | Sequence[Tensor],
    gamma: Tensor | Sequence[Tensor],
    beta: Tensor | Sequence[Tensor],
    schedule: Schedule,
    *,
    running_mean: Tensor | Sequence[Tensor] | None = None,
    running_var: Tensor | Sequence[Tensor] | None = None,
    bn_eps: float = 1e-5,
    eps: float = 1e-12,
    reduction: Reduction | None = None,
) -> tuple[list[Tensor], training.BlockStatistics]:
    """Projections with batch norms and linear cross-attention of all edges, differentiably.

    For every edge with weight id w, of target x_t and source x_a, where bn normalises each
    projection with its mean and variance over samples and tokens, scales by `gamma` and adds
    `beta`::

        q = softplus(bn(W_q2 relu(bn(W_q1 x_t))))      v = relu(bn(W_v x_a))
        k = softplus(bn(W_k2 relu(bn(W_k1 x_a))))
        S = sum over edges and n of v_n k_n^T      Z = sum over edges and n of k_n
        out_m = S q_m / max(Z . q_m, eps)

    where the sums run over the edges of an output slot. Nothing of the size of a feature map is
    kept for the backward pass but the features themselves: it projects them again. It also keeps
    the parameters, the statistics, one covariance (C, C) for each slot, and S and Z. The
    cross-attention module of Kim, Choi, Min, "Sequential Cross Attention Based Multi-task Learning"
    (arXiv 2209.02518), in training.

    Differentiable, once, in features, weight, gamma and beta. Computes in float32 (float64 for
    float64 features) whatever the dtype of the features. With batch statistics of a handful of
    (sample, token), variances in closed form lose digits that a convolution and a batch norm one
    after the other keep.

    Args:
        features: one tensor per slot, (B, C, N_i) or (B, C, H_i, W_i), of any strides. Queries and
            sources of the schedule index the same slots. float32, float64, bfloat16 or float16.
        weight: (W, 5, C, C), ``weight[w, p, c_out, c_in]`` with the projections p in the order
            query 1, query 2, key 1, key 2, value; or these 5 W matrices one by one, (C, C) or
            (C, C, 1, 1), such as the parameters of convolutions, which then are not copied to be
            kept. In the dtype of the features or, for 16-bit features, in float32.
        gamma: (W, 5, C) or 5 W vectors (C); dtypes as for `weight`.
        beta: as `gamma`.
        schedule: who attends to whom. The edges of one output share their weight id.
        running_mean: (W, 5, C) or 5 W vectors (C): normalise with these statistics and not with
            those of the batch. No gradients.
        running_var: belongs to `running_mean`.
        bn_eps: added to the variances.
        eps: lower bound of the denominator.
        reduction: completes sums over tokens where the batch is spread over processes, see
            `xattn_kernels.distributed`.

    Returns:
        One output per output slot, in the shape, dtype and memory format of its query; and the
        statistics that every projection was normalised with, without gradients.

    Raises:
        RuntimeError: if the engine asked for cannot run the problem; NotImplementedError when
            gradients of gradients are asked for.
        TypeError: for other dtypes, mixed dtypes, or arguments that are not tensors.
        ValueError: for shapes or devices that do not fit each other or the schedule, and for batch
            statistics of a single value per channel.
    """
    check_eps(eps)
    if not bn_eps >= 0:
        raise ValueError(f"bn_eps: got {bn_eps!r}, expected a number that is not negative")
    reduction = LOCAL if reduction is None else reduction
    inputs, parameters = check_training_inputs(
        features, weight, gamma, beta, running_mean, running_var, schedule
    )
    first = inputs.features[0]
    if parameters.batch and reduction.is_local:
        for i, x in enumerate(inputs.features):
            if x.size(0) * x.size(2) == 1:
                raise ValueError(
                    "Expected more than 1 value per channel when training, got input size "
                    f"{features[i].shape}"
                )
    channels = first.size(1)
    engine = select(
        Problem.of(
            training_op.OP,
            first,
            channels,
            channels,
            transformed=is_transformed(),
            gradient=True,
        )
    )
    outputs, statistics = training.call(
        inputs.features, parameters, schedule.edges_flat, bn_eps, eps, reduction, engine
    )
    spatial = [inputs.spatial[query] for query in schedule.output_queries]
    outputs = [
        x if len(size) == 1 else x.unflatten(2, size)
        for x, size in zip(outputs, spatial, strict=True)
    ]
    return outputs, statistics


def _block_engine(dtype: torch.dtype, like: Tensor) -> str:
    """The engine for features of `dtype`; `like` has their device and, in dimension 1, their width.

    A tensor of weights (W, 5, C, C) has it in dimension 3.
    """
    channels = like.size(3) if like.dim() == 4 else like.size(1)
    problem = Problem.of(block_op.OP, like, channels, channels, transformed=is_transformed())
    return select(problem._replace(dtype=dtype))
