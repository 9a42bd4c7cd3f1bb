"""Softmax cross-attention as a torch operator: schemas, fake kernels and autograd.

With p_mn = exp(scale q_m . k_n - lse_m), g the gradient of the output, h that of the log-sum-exp
and D_m = g_m . out_m, an engine's backward computes, head by head, without storing p::

    ds_mn = p_mn (g_m . v_n - D_m + h_m)        dv_n = sum_m p_mn g_m
    dq_m = scale sum_n ds_mn k_n                dk_n = scale sum_m ds_mn q_m
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from xattn_kernels.ops import library
from xattn_kernels.ops.features import group_by_output, new_output, new_state
from xattn_kernels.ops.tracing import is_recorded

OP = "softmax_cross_attention"

Result = tuple[list[Tensor], list[Tensor]]


def allocate(
    query: Sequence[Tensor], value: Sequence[Tensor], edges: Sequence[int], heads: int
) -> Result:
    """Uninitialised outputs (B, Cv, N) and log-sum-exps (B, heads, N)."""
    queries = [query[q] for q, _ in group_by_output(edges)]
    outputs = [new_output(x, value[0].size(1)) for x in queries]
    return outputs, [new_state(x, x.size(0), heads, x.size(2)) for x in queries]


def allocate_gradients(slots: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
    """Uninitialised gradients of those slots that are wanted."""
    return [new_output(x, x.size(1)) for x, want in zip(slots, wanted, strict=True) if want]


def call(
    query: list[Tensor],
    key: list[Tensor],
    value: list[Tensor],
    edges: list[int],
    heads: int,
    scale: float,
    engine: str,
) -> Result:
    """Run the operator, recorded for a backward pass if one may come."""
    args = (query, key, value, edges, heads, scale, engine)
    # Where nothing is recorded the dispatcher would do no more than call the same function.
    result: Result = forward_op(*args) if is_recorded() else _autograd(*args)
    return result


def _autograd(
    query: list[Tensor],
    key: list[Tensor],
    value: list[Tensor],
    edges: list[int],
    heads: int,
    scale: float,
    engine: str,
) -> Result:
    if library.needs_gradient(query, key, value):
        options = (edges, heads, scale, engine)
        results = _apply(len(query), len(key), options, *query, *key, *value)
        outputs = len(results) // 2
        return list(results[:outputs]), list(results[outputs:])
    with library.below_autograd():
        result: Result = forward_op(query, key, value, edges, heads, scale, engine)
    return result


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: int, keys: int, options: tuple[Any, ...], *slots: Tensor
    ) -> tuple[Tensor, ...]:
        split = (slots[:queries], slots[queries : queries + keys], slots[queries + keys :])
        with library.below_autograd():
            outputs, lse = forward_op(*split, *options)
        ctx.save_for_backward(*slots, *outputs, *lse)
        ctx.queries, ctx.keys, ctx.options = queries, keys, options
        ctx.set_materialize_grads(False)
        return (*outputs, *lse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        library.check_not_batched(OP, grads)
        edges, heads, scale, engine = ctx.options
        queries, keys = ctx.queries, ctx.keys
        outputs = len(grads) // 2
        saved = ctx.saved_tensors
        slots, results = saved[: queries + 2 * keys], saved[queries + 2 * keys :]
        used = library.slots_in_use(edges, queries, keys)
        wanted = [a and b for a, b in zip(ctx.needs_input_grad[3:], used, strict=True)]
        gradients = backward_op(
            slots[:queries],
            slots[queries : queries + keys],
            slots[queries + keys :],
            results[:outputs],
            edges,
            results[outputs:],
            grads[:outputs],
            grads[outputs:],
            heads,
            scale,
            wanted,
            engine,
        )
        placed = library.place_gradients(gradients, wanted)
        return (None, None, None, *library.forbid_double_backward(OP, placed, (*slots, *grads)))


_apply: Callable[..., tuple[Tensor, ...]] = _Function.apply


def _fake_forward(
    query: list[Tensor],
    key: list[Tensor],
    value: list[Tensor],
    edges: list[int],
    heads: int,
    scale: float,
    engine: str,
) -> Result:
    return allocate(query, value, edges, heads)


def _fake_backward(
    query: list[Tensor],
    key: list[Tensor],
    value: list[Tensor],
    output: list[Tensor],
    edges: list[int],
    lse: list[Tensor],
    grad_output: list[Tensor | None],
    grad_lse: list[Tensor | None],
    heads: int,
    scale: float,
    wanted: list[bool],
    engine: str,
) -> list[Tensor]:
    return allocate_gradients([*query, *key, *value], wanted)


forward_op = library.define(
    OP,
    "(Tensor[] query, Tensor[] key, Tensor[] value, int[] edges, int heads, float scale,"
    " str engine) -> (Tensor[], Tensor[])",
    OP,
    "forward",
    _fake_forward,
)
backward_op = library.define(
    f"{OP}_backward",
    "(Tensor[] query, Tensor[] key, Tensor[] value, Tensor[] output, int[] edges, Tensor[] lse,"
    " Tensor?[] grad_output, Tensor?[] grad_lse, int heads, float scale, bool[] wanted,"
    " str engine) -> Tensor[]",
    OP,
    "backward",
    _fake_backward,
)
library.library.impl(OP, _autograd, "Autograd")
