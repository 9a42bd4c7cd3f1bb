"""Linear cross-attention as a torch operator: schemas, fake kernels and autograd.

With phi the feature map, q^ = phi(q), k^ = phi(k), d_m = max(Z . q^_m, eps), g the gradient of the
output and c_m = g_m . out_m (0 where the clamp is active), an engine's backward computes::

    dS = sum_m g_m q^_m^T / d_m        dZ = - sum_m c_m q^_m / d_m        (plus those of S and Z)
    dq^_m = (S^T g_m - c_m Z) / d_m    dk^_n = dS^T v_n + dZ    dv_n = dS k^_n
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from xattn_kernels.ops import library
from xattn_kernels.ops.features import group_by_output, new_output, new_state
from xattn_kernels.ops.tracing import is_recorded

OP = "linear_cross_attention"

Result = tuple[list[Tensor], Tensor, Tensor]


def allocate(query: Sequence[Tensor], value: Sequence[Tensor], edges: Sequence[int]) -> Result:
    """Uninitialised outputs (B, Cv, N) and states S (O, B, Cv, C), Z (O, B, C)."""
    batch, channels, _ = query[0].shape
    value_channels = value[0].size(1)
    outputs = [new_output(query[q], value_channels) for q, _ in group_by_output(edges)]
    state_s = new_state(query[0], len(outputs), batch, value_channels, channels)
    return outputs, state_s, new_state(query[0], len(outputs), batch, channels)


def allocate_gradients(
    slots: Sequence[Tensor], state_s: Tensor, state_z: Tensor, wanted: Sequence[bool]
) -> list[Tensor]:
    """Uninitialised gradients of those slots and initial states (S, Z) that are wanted."""
    gradients = [new_output(x, x.size(1)) for x, want in zip(slots, wanted, strict=False) if want]
    states = zip((state_s, state_z), wanted[-2:], strict=True)
    return gradients + [x.new_empty(x.shape) for x, want in states if want]


def call(
    query: list[Tensor],
    key: list[Tensor],
    value: list[Tensor],
    edges: list[int],
    state_s: Tensor | None,
    state_z: Tensor | None,
    feature_map: str,
    eps: float,
    engine: str,
) -> Result:
    """Run the operator, recorded for a backward pass if one may come."""
    args = (query, key, value, edges, state_s, state_z, feature_map, eps, engine)
    # Where nothing is recorded the dispatcher would do no more than call the same function.
    result: Result = forward_op(*args) if is_recorded() else _autograd(*args)
    return result


def _autograd(
    query: list[Tensor],
    key: list[Tensor],
    value: list[Tensor],
    edges: list[int],
    state_s: Tensor | None,
    state_z: Tensor | None,
    feature_map: str,
    eps: float,
    engine: str,
) -> Result:
    if library.needs_gradient(query, key, value, (state_s, state_z)):
        options = (edges, feature_map, eps, engine)
        slots = (*query, *key, *value)
        results = _apply(len(query), len(key), options, *slots, state_s, state_z)
        return list(results[:-2]), results[-2], results[-1]
    with library.below_autograd():
        result: Result = forward_op(
            query, key, value, edges, state_s, state_z, feature_map, eps, engine
        )
    return result


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: int, keys: int, options: tuple[Any, ...], *tensors: Any
    ) -> tuple[Tensor, ...]:
        *slots, state_s, state_z = tensors
        edges, feature_map, eps, engine = options
        split = (slots[:queries], slots[queries : queries + keys], slots[queries + keys :])
        with library.below_autograd():
            outputs, new_s, new_z = forward_op(
                *split, edges, state_s, state_z, feature_map, eps, engine
            )
        ctx.save_for_backward(*slots, new_s, new_z)
        ctx.queries, ctx.keys, ctx.options = queries, keys, options
        ctx.set_materialize_grads(False)
        return (*outputs, new_s, new_z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        library.check_not_batched(OP, grads)
        *slots, state_s, state_z = ctx.saved_tensors
        edges, feature_map, eps, engine = ctx.options
        queries, keys = ctx.queries, ctx.keys
        used = library.slots_in_use(edges, queries, keys)
        needed = ctx.needs_input_grad[3:]
        wanted = [a and b for a, b in zip(needed, [*used, True, True], strict=True)]
        split = (slots[:queries], slots[queries : queries + keys], slots[queries + keys :])
        gradients = backward_op(
            *split,
            edges,
            state_s,
            state_z,
            list(grads[:-2]),
            grads[-2],
            grads[-1],
            feature_map,
            eps,
            wanted,
            engine,
        )
        placed = library.place_gradients(gradients, wanted)
        return (None, None, None, *library.forbid_double_backward(OP, placed, (*slots, *grads)))


_apply: Callable[..., tuple[Tensor, ...]] = _Function.apply


def _fake_forward(
    query: list[Tensor], key: list[Tensor], value: list[Tensor], edges: list[int], *_: Any
) -> Result:
    return allocate(query, value, edges)


def _fake_backward(
    query: list[Tensor],
    key: list[Tensor],
    value: list[Tensor],
    edges: list[int],
    state_s: Tensor,
    state_z: Tensor,
    grad_outputs: list[Tensor | None],
    grad_s: Tensor | None,
    grad_z: Tensor | None,
    feature_map: str,
    eps: float,
    wanted: list[bool],
    engine: str,
) -> list[Tensor]:
    return allocate_gradients([*query, *key, *value], state_s, state_z, wanted)


forward_op = library.define(
    OP,
    "(Tensor[] query, Tensor[] key, Tensor[] value, int[] edges, Tensor? state_s, Tensor? state_z,"
    " str feature_map, float eps, str engine) -> (Tensor[], Tensor, Tensor)",
    OP,
    "forward",
    _fake_forward,
)
backward_op = library.define(
    f"{OP}_backward",
    "(Tensor[] query, Tensor[] key, Tensor[] value, int[] edges, Tensor state_s, Tensor state_z,"
    " Tensor?[] grad_output, Tensor? grad_s, Tensor? grad_z, str feature_map, float eps,"
    " bool[] wanted, str engine) -> Tensor[]",
    OP,
    "backward",
    _fake_backward,
)
library.library.impl(OP, _autograd, "Autograd")
