"""The operators as functions: they validate, document the contract, pick an engine and call it.

Engines with kernels are called through ``torch.ops.xattn_kernels``; the ``reference`` engine is
plain PyTorch and is called directly, so that its gradients are those of plain autograd.

Shapes: B samples, C channels of queries and keys, Cv channels of values and outputs, N tokens.
Feature tensors are (B, C, N) or (B, C, H, W) of any strides; channels_last runs without a copy.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from operator import index
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor

from xattn_kernels.ops.block_inputs import (
    block_outputs,
    check_block_inputs,
    check_block_weights,
)
from xattn_kernels.ops.cross_attention_block import op as block_op
from xattn_kernels.ops.features import ACCUMULATORS, Features, describe, is_transformed
from xattn_kernels.ops.inputs import Inputs, Part, check_inputs
from xattn_kernels.ops.linear_cross_attention import op as linear_op
from xattn_kernels.ops.pyramid_inputs import check_pyramid_inputs
from xattn_kernels.ops.pyramid_projection import op as pyramid_op
from xattn_kernels.ops.softmax_cross_attention import op as softmax_op
from xattn_kernels.registry import Problem, select
from xattn_kernels.schedule import Schedule

T = TypeVar("T")
#: (S, Z) of linear attention.
State = tuple[Tensor, Tensor]

__all__ = [
    "cross_attention_block",
    "linear_cross_attention",
    "pack_block_weights",
    "pyramid_projection",
    "softmax_cross_attention",
]

FEATURE_MAPS = ("softplus", "relu", "elu", "identity")


@overload
def linear_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    schedule: None = ...,
    *,
    feature_map: str = ...,
    eps: float = ...,
    state: State | None = ...,
    return_state: Literal[False] = ...,
) -> Tensor: ...


@overload
def linear_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    schedule: None = ...,
    *,
    feature_map: str = ...,
    eps: float = ...,
    state: State | None = ...,
    return_state: Literal[True],
) -> tuple[Tensor, State]: ...


@overload
def linear_cross_attention(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    schedule: Schedule | None = ...,
    *,
    feature_map: str = ...,
    eps: float = ...,
    state: State | None = ...,
    return_state: Literal[False] = ...,
) -> list[Tensor]: ...


@overload
def linear_cross_attention(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    schedule: Schedule | None = ...,
    *,
    feature_map: str = ...,
    eps: float = ...,
    state: State | None = ...,
    return_state: Literal[True],
) -> tuple[list[Tensor], State]: ...


@overload
def linear_cross_attention(
    query: Features,
    key: Features,
    value: Features,
    schedule: Schedule | None = ...,
    *,
    feature_map: str = ...,
    eps: float = ...,
    state: State | None = ...,
    return_state: bool = ...,
) -> Any: ...


def linear_cross_attention(
    query: Features,
    key: Features,
    value: Features,
    schedule: Schedule | None = None,
    *,
    feature_map: str = "softplus",
    eps: float = 1e-12,
    state: State | None = None,
    return_state: bool = False,
) -> Any:
    r"""Cross-attention with a feature map :math:`\phi` in place of the softmax.

    For every output slot o, whose edges share one query and are normalised jointly::

        S_o = sum over edges and n of v_n phi(k_n)^T      (B, Cv, C)
        Z_o = sum over edges and n of phi(k_n)            (B, C)
        out_o[:, :, m] = S_o phi(q_m) / max(Z_o . phi(q_m), eps)

    Time and memory are linear in the number of tokens. Sums and the division are in float32
    (float64 for float64 inputs). Linear attention: Katharopoulos et al., "Transformers are RNNs"
    (2020), eq. 5; softplus and the clamp: Kim, Choi, Min (arXiv 2209.02518).

    Token-sharded use: with an empty query (B, C, 0) and ``return_state=True`` a shard gives its
    (S, Z); sum these over the shards; then empty sources (B, C, 0) and ``state`` give the outputs.

    Args:
        query: a tensor or one per query slot, (B, C, N_q) or (B, C, H, W), before the feature map.
            float32, float64, bfloat16 or float16.
        key: a tensor or one per source slot, (B, C, N_k) or 4-D, before the feature map.
        value: a tensor or one per source slot, (B, Cv, N_k) or 4-D.
        schedule: who attends to whom; weight ids are ignored. None: output i is query i attending
            to source i. Outputs may differ in width (C, Cv).
        feature_map: "softplus" (linear above 20, as PyTorch's), "relu", "elu" (elu + 1) or
            "identity".
        eps: lower bound of the denominator, > 0.
        state: (S, Z) to start from, (O, B, Cv, C) and (O, B, C) for O outputs, in float32 (float64
            for float64 inputs). Differentiable.
        return_state: also return (S, Z), of these shapes and dtype. Differentiable.

    Returns:
        A list of outputs, one per output slot, (B, Cv) + spatial shape of the query, in the
        query's dtype and memory format; a tensor instead if query, key and value are tensors and
        there is one output. With ``return_state``: (outputs, (S, Z)).

    Raises:
        TypeError: for other dtypes, mixed dtypes, or arguments that are not tensors.
        ValueError: for shapes or devices that do not fit each other or the schedule.
        RuntimeError: if the engine asked for cannot run the problem.
    """
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map: got {feature_map!r}, expected one of {FEATURE_MAPS}")
    _check_eps(eps)
    inputs = check_inputs(query, key, value, schedule)
    with _no_autocast(inputs.autocast):
        part = inputs.whole()
        if part is not None:
            state_s, state_z = (None, None) if state is None else _check_state(state, part)
            outputs, *new_state = _linear(part, feature_map, eps, state_s, state_z)
        elif state is not None or return_state:
            raise ValueError("state, return_state: outputs of different widths have no one state")
        else:
            outputs = _by_width(inputs, lambda part: _linear(part, feature_map, eps)[0])
    result = inputs.restore(outputs)
    return (result, tuple(new_state)) if return_state else result


@overload
def softmax_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    schedule: None = ...,
    *,
    heads: int = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def softmax_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    schedule: None = ...,
    *,
    heads: int = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def softmax_cross_attention(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    schedule: Schedule | None = ...,
    *,
    heads: int = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
) -> list[Tensor]: ...


@overload
def softmax_cross_attention(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    schedule: Schedule | None = ...,
    *,
    heads: int = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
) -> tuple[list[Tensor], list[Tensor]]: ...


@overload
def softmax_cross_attention(
    query: Features,
    key: Features,
    value: Features,
    schedule: Schedule | None = ...,
    *,
    heads: int = ...,
    scale: float | None = ...,
    return_lse: bool = ...,
) -> Any: ...


def softmax_cross_attention(
    query: Features,
    key: Features,
    value: Features,
    schedule: Schedule | None = None,
    *,
    heads: int = 1,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Scaled dot-product cross-attention; the sources of one output slot are concatenated.

    For every output slot o, head h and query token m, over the tokens n of all its sources::

        score_n = scale * q_m . k_n      out_o[:, :, m] = sum_n softmax_n(score) v_n

    Computed in float32 (float64 for float64 inputs); engines with kernels store no score matrix.
    Vaswani et al., "Attention Is All You Need" (2017), eq. 1.

    Args:
        query: a tensor or one per query slot, (B, C, N_q) or (B, C, H, W). float32, float64,
            bfloat16 or float16. Head h has the channels from h*C/heads to (h+1)*C/heads - 1.
        key: a tensor or one per source slot, (B, C, N_k) or 4-D.
        value: a tensor or one per source slot, (B, Cv, N_k) or 4-D.
        schedule: who attends to whom; weight ids are ignored. None: output i is query i attending
            to source i. Outputs may differ in width (C, Cv).
        heads: number of heads; divides C and Cv.
        scale: factor of the scores; default (C / heads) ** -0.5.
        return_lse: also return, per output slot, the log-sum-exp of the scores (natural
            logarithm), (B, heads, N_q), in float32 (float64 for float64 inputs). Differentiable.

    Returns:
        A list of outputs, one per output slot, (B, Cv) + spatial shape of the query, in the
        query's dtype and memory format; a tensor instead if query, key and value are tensors and
        there is one output. With ``return_lse``: (outputs, lse), both of that structure. Where
        there are no source tokens the output is 0, the log-sum-exp -inf and the gradients 0.

    Raises:
        TypeError: for other dtypes, mixed dtypes, or arguments that are not tensors.
        ValueError: for shapes or devices that do not fit each other, the heads or the schedule.
        RuntimeError: if the engine asked for cannot run the problem.
    """
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
        raise ValueError(f"heads: got {heads!r}, expected a positive integer")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale: got {scale!r}, expected a finite number")
    inputs = check_inputs(query, key, value, schedule)
    with _no_autocast(inputs.autocast):
        part = inputs.whole()
        if part is not None:
            outputs, lse = _softmax(part, heads, scale)
        else:
            pairs = _by_width(
                inputs, lambda part: list(zip(*_softmax(part, heads, scale), strict=True))
            )
            outputs, lse = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    result = inputs.restore(outputs)
    return (result, inputs.unwrap(lse)) if return_lse else result


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
    _check_eps(eps)
    inputs = check_block_inputs(features, weight, bias, schedule)
    if torch.is_grad_enabled():
        tensors = {"features": features, "weight": [weight], "bias": [bias], "out": out or ()}
        for name, group in tensors.items():
            if any(x.requires_grad for x in group):
                raise RuntimeError(
                    f"{name}: requires a gradient, which this inference operator has none for: "
                    "call it under torch.no_grad(), or use the modules in train mode"
                )
    with _no_autocast(inputs.autocast), torch.no_grad():
        outputs, flat = block_outputs(out, inputs, weight, bias, schedule)
        engine = _block_engine(inputs.features[0].dtype, weight)
        edges = schedule.edges_flat
        if engine == "reference":
            from xattn_kernels.ops.cross_attention_block import reference

            reference.forward(inputs.features, weight, bias, edges, eps, flat)
        else:
            if packed is None or packed.numel() == 0:
                packed = block_op.pack_op(weight, bias, inputs.features[0].dtype, engine)
            block_op.block_op(
                inputs.features, packed, schedule.num_weights, edges, eps, flat, engine
            )
    return outputs


def pack_block_weights(weight: Tensor, bias: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Lay weights out as the engine in force wants them for :func:`cross_attention_block`.

    Args:
        weight: (W, 5, C, C), as in :func:`cross_attention_block`.
        bias: (W, 5, C).
        dtype: dtype of the features that they will be used with. Default: that of ``weight``.

    Returns:
        An opaque tensor, valid for this engine and ``dtype``. Empty for the ``reference`` engine,
        which needs none; every engine takes an empty one for none.

    Raises:
        RuntimeError: if the engine asked for cannot run the problem.
        TypeError: if the weights are of another dtype than ``dtype`` or its accumulator's.
        ValueError: for other shapes, or weights on different devices.
    """
    check_block_weights(weight, bias, dtype)
    dtype = dtype or weight.dtype
    engine = _block_engine(dtype, weight)
    with torch.no_grad():
        if engine == "reference":
            return weight.new_empty(0, dtype=torch.uint8)
        packed: Tensor = block_op.pack_op(weight, bias, dtype, engine)
    return packed


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
        Problem(
            pyramid_op.OP,
            first.dtype,
            first.device.type,
            index(first.size(1)),
            index(classifier.size(0)),
            transformed=is_transformed(),
        )
    )
    args = (inputs.features, inputs.weights, scale, shift, classifier, inputs.classifier_bias)
    with _no_autocast(inputs.autocast):
        if engine == "reference":
            from xattn_kernels.ops.pyramid_projection import reference

            output, mean, var = reference.forward(*args, batch_statistics, eps)
        else:
            output, mean, var, _ = pyramid_op.call(*args, batch_statistics, eps, engine)
    return (output, mean, var) if batch_statistics else output


def _block_engine(dtype: torch.dtype, weight: Tensor) -> str:
    channels = index(weight.size(-1))
    return select(
        Problem(
            block_op.OP, dtype, weight.device.type, channels, channels, transformed=is_transformed()
        )
    )


def _linear(
    part: Part,
    feature_map: str,
    eps: float,
    state_s: Tensor | None = None,
    state_z: Tensor | None = None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    engine = part.engine(linear_op.OP)
    args = (*part[:4], state_s, state_z, feature_map, eps)
    if engine == "reference":
        from xattn_kernels.ops.linear_cross_attention import reference

        return reference.forward(*args)
    return linear_op.call(*args, engine)


def _softmax(part: Part, heads: int, scale: float | None) -> tuple[list[Tensor], list[Tensor]]:
    for name, width in (("query", part.channels), ("value", part.value_channels)):
        if width % heads:
            raise ValueError(
                f"heads: got {heads}, expected a divisor of the {width} channels of {name}"
            )
    if scale is None:
        scale = (part.channels // heads) ** -0.5
    engine = part.engine(softmax_op.OP, heads)
    args = (*part[:4], heads, scale)
    if engine == "reference":
        from xattn_kernels.ops.softmax_cross_attention import reference

        return reference.forward(*args)
    return softmax_op.call(*args, engine)


def _by_width(inputs: Inputs, run: Callable[[Part], Sequence[T]]) -> list[T]:
    """Run every part of ``inputs`` and return one result per output slot."""
    results: dict[int, T] = {}
    for part, slots in inputs.by_width():
        results.update(zip(slots, run(part), strict=True))
    return [results[slot] for slot in range(len(results))]


def _check_state(state: tuple[Tensor, Tensor], part: Part) -> tuple[Tensor, Tensor]:
    query = part.query[0]
    dtype = ACCUMULATORS[query.dtype]
    outputs = len(set(part.edges[2::3]))
    shape_z = (outputs, query.size(0), part.channels)
    shape_s = (outputs, query.size(0), part.value_channels, part.channels)
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        raise TypeError(f"state: got {describe(state)}, expected the two tensors (S, Z)")
    for name, x, shape in (("S", state[0], shape_s), ("Z", state[1], shape_z)):
        expected = f"{dtype} of shape {shape} on {query.device}"
        if not isinstance(x, Tensor) or x.dtype is not dtype or x.layout is not torch.strided:
            raise TypeError(f"state, {name}: got {describe(x)}, expected {expected}")
        if x.shape != shape or x.device != query.device:
            raise ValueError(f"state, {name}: got {describe(x)}, expected {expected}")
    return state[0].contiguous(), state[1].contiguous()


def _check_eps(eps: float) -> None:
    if not 0 < eps < math.inf:
        raise ValueError(f"eps: got {eps!r}, expected a positive finite number")


def _no_autocast(device: str | None) -> contextlib.AbstractContextManager[Any]:
    """The slots are cast already: what the operators compute in is theirs to say."""
    return contextlib.nullcontext() if device is None else torch.autocast(device, enabled=False)
