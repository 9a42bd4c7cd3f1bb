"""Softmax cross-attention in CUDA C++: online softmax, one launch a phase for all edges."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from xattn_kernels.engines import native_cuda
from xattn_kernels.engines.native import DTYPE_CODES, optional_views, pointer, views
from xattn_kernels.ops.features import group_by_output
from xattn_kernels.ops.library import place_gradients
from xattn_kernels.ops.softmax_cross_attention.op import Result, allocate, allocate_gradients
from xattn_kernels.problem import Problem

_cuda = native_cuda.module()


def refusals(problem: Problem) -> list[str]:
    """Why this engine cannot run a problem."""
    return native_cuda.refusals(problem)


def forward(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    edges: Sequence[int],
    heads: int,
    scale: float,
) -> Result:
    """Return outputs (B, Cv, N) and their log-sum-exps (B, heads, N)."""
    outputs, lse = allocate(query, value, edges, heads)
    if query[0].size(0) == 0:
        return outputs, lse
    _cuda.softmax_forward(
        native_cuda.context(query[0]),
        DTYPE_CODES[query[0].dtype],
        query[0].size(0),
        query[0].size(1),
        value[0].size(1),
        heads,
        scale,
        views(query),
        views(key),
        views(value),
        views(outputs),
        edges,
        [x.data_ptr() for x in lse],
    )
    return outputs, lse


def backward(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    output: Sequence[Tensor],
    edges: Sequence[int],
    lse: Sequence[Tensor],
    grad_output: Sequence[Tensor | None],
    grad_lse: Sequence[Tensor | None],
    heads: int,
    scale: float,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Return the wanted gradients, in the order queries, keys, values."""
    gradients = allocate_gradients([*query, *key, *value], wanted)
    if query[0].size(0) == 0:
        return gradients
    by_slot = place_gradients(gradients, wanted)
    keys, values = len(query), len(query) + len(key)
    # The kernels read these as contiguous; held here, they live through the call.
    lse = [x.contiguous() for x in lse]
    dense_lse = [None if x is None else x.contiguous() for x in grad_lse]
    _cuda.softmax_backward(
        native_cuda.context(query[0]),
        DTYPE_CODES[query[0].dtype],
        query[0].size(0),
        query[0].size(1),
        value[0].size(1),
        heads,
        scale,
        views(query),
        views(key),
        views(value),
        views(output),
        edges,
        [x.data_ptr() for x in lse],
        optional_views(grad_output, [query[q] for q, _ in group_by_output(edges)]),
        [pointer(x) for x in dense_lse],
        optional_views(by_slot[:keys], query),
        optional_views(by_slot[keys:values], key),
        optional_views(by_slot[values:], value),
    )
    return gradients
