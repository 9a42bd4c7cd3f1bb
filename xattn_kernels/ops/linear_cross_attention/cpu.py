"""Linear cross-attention on the native CPU module: two passes over the tokens, in C++."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xattn_kernels.engines.native import (
    DTYPE_CODES,
    FEATURE_MAP_CODES,
    core,
    cpu_refusals,
    optional_views,
    pointer,
    views,
)
from xattn_kernels.ops.features import group_by_output
from xattn_kernels.ops.library import place_gradients
from xattn_kernels.ops.linear_cross_attention.op import Result, allocate, allocate_gradients
from xattn_kernels.problem import Problem

_core = core()


def refusals(problem: Problem) -> list[str]:
    """Why this engine cannot run a problem."""
    return cpu_refusals(problem)


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
    _core.linear_forward(
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
        torch.get_num_threads(),
    )
    return outputs, new_s, new_z


def backward(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    edges: Sequence[int],
    state_s: Tensor,
    state_z: Tensor,
    grad_outputs: Sequence[Tensor | None],
    grad_s: Tensor | None,
    grad_z: Tensor | None,
    feature_map: str,
    eps: float,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Return the wanted gradients, in the order queries, keys, values, initial S, initial Z."""
    gradients = allocate_gradients([*query, *key, *value], state_s, state_z, wanted)
    *by_slot, initial_s, initial_z = place_gradients(gradients, wanted)
    if wanted[-1] != wanted[-2]:  # the kernel gives both or neither
        initial_s = state_s.new_empty(state_s.shape) if initial_s is None else initial_s
        initial_z = state_z.new_empty(state_z.shape) if initial_z is None else initial_z
    keys, values = len(query), len(query) + len(key)
    # The kernel reads the states' gradients as contiguous; held here, they live through the call.
    grad_s, grad_z = (None if x is None else x.contiguous() for x in (grad_s, grad_z))
    _core.linear_backward(
        DTYPE_CODES[query[0].dtype],
        query[0].size(0),
        query[0].size(1),
        value[0].size(1),
        FEATURE_MAP_CODES[feature_map],
        eps,
        views(query),
        views(key),
        views(value),
        edges,
        state_s.data_ptr(),
        state_z.data_ptr(),
        optional_views(grad_outputs, [query[q] for q, _ in group_by_output(edges)]),
        pointer(grad_s),
        pointer(grad_z),
        optional_views(by_slot[:keys], query),
        optional_views(by_slot[keys:values], key),
        optional_views(by_slot[values:], value),
        pointer(initial_s),
        pointer(initial_z),
        torch.get_num_threads(),
    )
    return gradients
