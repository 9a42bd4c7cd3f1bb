"""Linear cross-attention in CUDA C++: one launch a phase for all edges."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from xattn_kernels.ops import native_cuda
from xattn_kernels.ops.linear_cross_attention.op import Result, allocate
from xattn_kernels.ops.native import DTYPE_CODES, FEATURE_MAP_CODES, pointer, views
from xattn_kernels.registry import Problem

_cuda = native_cuda.module()


def refusals(problem: Problem) -> list[str]:
    """Why this engine cannot run a problem."""
    return native_cuda.refusals(problem)


def forward(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    edges: Sequence[int],
    state_s: Tensor | None,
    state_z: Tensor | None,
    feature_map: str,
    eps: float,
) -> Result:
    """Return outputs (B, Cv, N) and the states S (O, B, Cv, C), Z (O, B, C)."""
    outputs, new_s, new_z = allocate(query, value, edges)
    if query[0].size(0) == 0:
        return outputs, new_s, new_z
    # The kernels read the states as contiguous; held here, they live through the call.
    state_s, state_z = (None if x is None else x.contiguous() for x in (state_s, state_z))
    _cuda.linear_forward(
        native_cuda.context(query[0]),
        DTYPE_CODES[query[0].dtype],
        query[0].size(0),
        query[0].size(1),
        value[0].size(1),
        FEATURE_MAP_CODES[feature_map],
        eps,
        views(query),
        views(key),
        views(value),
        views(outputs),
        edges,
        pointer(state_s),
        pointer(state_z),
        new_s.data_ptr(),
        new_z.data_ptr(),
    )
    return outputs, new_s, new_z
