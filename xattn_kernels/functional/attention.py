"""The attention cores: linear and softmax cross-attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor

from xattn_kernels.functional.shared import check_eps
from xattn_kernels.ops.autocast import no_autocast
from xattn_kernels.ops.features import ACCUMULATORS, Features, describe
from xattn_kernels.ops.inputs import Inputs, Part, check_inputs
from xattn_kernels.ops.linear_cross_attention import op as linear_op
from xattn_kernels.ops.softmax_cross_attention import op as softmax_op
from xattn_kernels.schedule import Schedule

T = TypeVar("T")
#: (S, Z) of linear attention.
State = tuple[Tensor, Tensor]

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
    check_eps(eps)
    inputs = check_inputs(query, key, value, schedule)
    with no_autocast(inputs.device):
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
    Their backward computes the weights again as exp(score - lse), as FlashAttention does: the
    relative error of gradients grows with the log-sum-exp, by 6e-8 times its magnitude in float32.
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
    with no_autocast(inputs.device):
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
