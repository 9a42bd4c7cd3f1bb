"""Linear cross-attention in Triton: one launch a phase for all edges, states summed in two stages.

Forward: states of chunks of every source, their sums for every output, outputs. Backward: gradients
of queries, states of chunks of every output, their sums for every source, gradients of sources. All
sums are in float32 and in a fixed order: results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xattn_kernels.engines.triton import runtime, tuning
from xattn_kernels.engines.triton.launch import launch
from xattn_kernels.engines.triton.linear_tiles import (
    StateTiles,
    TokenTiles,
    output_tiles,
    query_gradient_tiles,
    source_gradient_tiles,
    state_tiles,
)
from xattn_kernels.engines.triton.runtime import (
    Layout,
    Table,
    blocks,
    ceil_div,
    layout,
    layout_constants,
)
from xattn_kernels.engines.triton.states import Chunks
from xattn_kernels.ops.features import group_by_output
from xattn_kernels.ops.library import place_gradients
from xattn_kernels.ops.linear_cross_attention.op import Result, allocate, allocate_gradients
from xattn_kernels.problem import Problem


def refusals(problem: Problem) -> list[str]:
    """Why this engine cannot run a problem."""
    return runtime.refusals(problem)


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
    groups = group_by_output(edges)
    queries = [query[q] for q, _ in groups]
    call = _Call(query[0], value[0], feature_map, eps)
    states = _States(call, key, value)
    table = call.table
    lists = table.add_lists([sources for _, sources in groups])
    query_rows, output_rows = table.add_slots(queries), table.add_slots(outputs)
    with runtime.device_of(query[0]):
        call.upload()
        states.compute()
        states.reduce(lists, len(groups), state_s, state_z, new_s, new_z)
        _outputs(call, queries, outputs, query_rows, output_rows, new_s, new_z)
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
    if query[0].size(0) == 0:
        return [x.zero_() for x in gradients]
    *by_slot, initial_s, initial_z = place_gradients(gradients, wanted)
    keys, values = len(query), len(query) + len(key)
    query_grads, key_grads, value_grads = by_slot[:keys], by_slot[keys:values], by_slot[values:]
    groups = group_by_output(edges)
    state_s, state_z = state_s.contiguous(), state_z.contiguous()
    grad_s, grad_z = (None if x is None else x.contiguous() for x in (grad_s, grad_z))

    call = _Call(query[0], value[0], feature_map, eps)
    table = call.table
    longest = max(q.size(2) for q in query)
    weights = state_s.new_empty(len(groups), query[0].size(0), 2, max(longest, 1))
    states = _States(call, [query[q] for q, _ in groups], grad_outputs, weights)
    outputs_of_query: list[list[int]] = [[] for _ in query]
    outputs_of_source: list[list[int]] = [[] for _ in key]
    for output, (q, sources) in enumerate(groups):
        outputs_of_query[q].append(output)
        for source in sources:
            outputs_of_source[source].append(output)
    by_query = table.add_lists(outputs_of_query)
    by_source = table.add_lists(outputs_of_source)
    by_output = table.add_lists([[output] for output in range(len(groups))])
    rows = [
        table.add_slots(x)
        for x in (query, grad_outputs, query_grads, key, value, key_grads, value_grads)
    ]
    with runtime.device_of(query[0]):
        call.upload()
        _query_gradients(
            call, query, grad_outputs, query_grads, rows[:3], by_query, state_s, state_z, weights
        )
        sources_wanted = any(x is not None for x in (*key_grads, *value_grads))
        initials_wanted = initial_s is not None or initial_z is not None
        if sources_wanted or initials_wanted:
            states.compute()
        if initials_wanted:
            initial_s = torch.empty_like(state_s) if initial_s is None else initial_s
            initial_z = torch.empty_like(state_z) if initial_z is None else initial_z
            states.reduce(
                by_output, len(groups), grad_s, grad_z, initial_s, initial_z, by_member=True
            )
        if sources_wanted:
            source_s = state_s.new_empty(len(key), *state_s.shape[1:])
            source_z = state_z.new_empty(len(key), *state_z.shape[1:])
            states.reduce(by_source, len(key), grad_s, grad_z, source_s, source_z, by_member=True)
            _source_gradients(
                call, (key, value, key_grads, value_grads), rows[3:], source_s, source_z
            )
    return gradients


class _Call:
    """What all launches of a call share."""

    def __init__(self, query: Tensor, value: Tensor, feature_map: str, eps: float) -> None:
        self.batch, self.channels, _ = query.shape
        self.value_channels = value.size(1)
        self.device = query.device
        self.dot = runtime.precision(query.dtype)
        self.eps = eps
        self.table = Table()
        self.device_table: Any = None
        self.constants: dict[str, Any] = {
            "C": self.channels,
            "CV": self.value_channels,
            "PHI": feature_map,
            "DOT": self.dot,
            "DT": runtime.language_type(query.dtype),
            "SIZE": query.element_size(),
        }

    def upload(self) -> None:
        self.device_table = self.table.on(self.device)

    def task(
        self, kernel: str, slots: Sequence[Tensor | None], *details: Layout | bool
    ) -> tuning.Task:
        tokens = [x.size(2) for x in slots if x is not None]
        return tuning.Task(
            f"linear {kernel}",
            (self.channels, self.value_channels),
            self.dot,
            (self.constants["SIZE"], *(x.minor if isinstance(x, Layout) else x for x in details)),
            max(tokens, default=0),
            self.batch * len(tokens),
        )


class _States:
    """Sums over tokens of slots: their chunks, and states made of these."""

    def __init__(
        self,
        call: _Call,
        keys: Sequence[Tensor],
        values: Sequence[Tensor | None],
        weights: Tensor | None = None,
    ) -> None:
        self.call = call
        self.weights = weights
        tokens = [0 if v is None else k.size(2) for k, v in zip(keys, values, strict=True)]
        self.chunks = Chunks(call.table, tokens, call.batch, call.value_channels, keys[0])
        self.keys = keys
        self.rows = call.table.add_slots(keys), call.table.add_slots(values)
        self.layouts = layout(keys), layout(values)

    def compute(self) -> None:
        """Sum over the tokens of every chunk."""
        from xattn_kernels.engines.triton.linear_kernels import state_kernel

        call, chunks = self.call, self.chunks

        def start(tiles: StateTiles) -> Any:
            groups = ceil_div(call.channels, sum(tiles.columns))
            groups *= ceil_div(call.value_channels, sum(tiles.rows))
            return launch(
                state_kernel,
                groups * chunks.per_slot * call.batch * chunks.slots,
                call.device_table,
                chunks.sums if self.weights is None else self.weights,
                chunks.sums,
                self.rows[0],
                self.rows[1],
                chunks.starts,
                call.batch,
                chunks.per_slot,
                chunks.size,
                0 if self.weights is None else self.weights.size(3),
                **call.constants,
                R0=tiles.rows[0],
                R1=tiles.rows[1],
                C0=tiles.columns[0],
                C1=tiles.columns[1],
                BN=tiles.tokens,
                WEIGHTED=self.weights is not None,
                **layout_constants(K=self.layouts[0], V=self.layouts[1]),
                warps=tiles.warps,
            )

        task = call.task("state", self.keys, *self.layouts, self.weights is not None)
        tuning.run(task, state_tiles, start, call.device)

    def reduce(self, *args: Any, **kwargs: Any) -> None:
        """As :meth:`Chunks.reduce`."""
        self.chunks.reduce(self.call.device_table, *args, **kwargs)


def _outputs(
    call: _Call,
    queries: Sequence[Tensor],
    outputs: Sequence[Tensor],
    query_rows: int,
    output_rows: int,
    state_s: Tensor,
    state_z: Tensor,
) -> None:
    from xattn_kernels.engines.triton.linear_kernels import output_kernel

    layouts = {"Q": layout(queries), "O": layout(outputs)}

    def start(tiles: TokenTiles) -> Any:
        steps = blocks([q.size(2) for q in queries], tiles.tokens)
        groups = ceil_div(call.value_channels, sum(tiles.rows))
        return launch(
            output_kernel,
            groups * steps * call.batch * len(queries),
            call.device_table,
            state_s,
            state_z,
            query_rows,
            output_rows,
            call.batch,
            steps,
            call.eps,
            **call.constants,
            R0=tiles.rows[0],
            R1=tiles.rows[1],
            BK=tiles.step,
            BM=tiles.tokens,
            **layout_constants(**layouts),
            warps=tiles.warps,
        )

    tuning.run(call.task("output", queries, *layouts.values()), output_tiles, start, call.device)


def _query_gradients(
    call: _Call,
    query: Sequence[Tensor],
    grad_outputs: Sequence[Tensor | None],
    query_grads: Sequence[Tensor | None],
    rows: Sequence[int],
    lists: int,
    state_s: Tensor,
    state_z: Tensor,
    weights: Tensor,
) -> None:
    from xattn_kernels.engines.triton.linear_gradient_kernels import query_gradient_kernel

    layouts = {"Q": layout(query), "G": layout(grad_outputs), "R": layout(query_grads)}

    def start(tiles: TokenTiles) -> Any:
        steps = blocks([q.size(2) for q in query], tiles.tokens)
        return launch(
            query_gradient_kernel,
            steps * call.batch * len(query),
            call.device_table,
            state_s,
            state_z,
            weights,
            *rows,
            lists,
            call.batch,
            steps,
            weights.size(3),
            call.eps,
            **call.constants,
            C0=tiles.rows[0],
            C1=tiles.rows[1],
            BK=tiles.step,
            BM=tiles.tokens,
            **layout_constants(**layouts),
            warps=tiles.warps,
        )

    task = call.task("query_gradient", query, *layouts.values())
    tuning.run(task, query_gradient_tiles, start, call.device)


def _source_gradients(
    call: _Call,
    slots: Sequence[Sequence[Tensor | None]],
    rows: Sequence[int],
    grad_s: Tensor,
    grad_z: Tensor,
) -> None:
    from xattn_kernels.engines.triton.linear_gradient_kernels import source_gradient_kernel

    key, value, key_grads, value_grads = slots
    layouts = {
        "K": layout(key), "V": layout(value), "DK": layout(key_grads), "DV": layout(value_grads)
    }  # fmt: skip

    def start(tiles: TokenTiles) -> Any:
        steps = blocks([0 if k is None else k.size(2) for k in key], tiles.tokens)
        groups = sum(ceil_div(w, tiles.rows[0]) for w in (call.channels, call.value_channels))
        return launch(
            source_gradient_kernel,
            groups * steps * call.batch * len(key),
            call.device_table,
            grad_s,
            grad_z,
            *rows,
            call.batch,
            steps,
            **call.constants,
            BR=tiles.rows[0],
            BK=tiles.step,
            BN=tiles.tokens,
            **layout_constants(**layouts),
            warps=tiles.warps,
        )

    task = call.task("source_gradient", key, *layouts.values())
    tuning.run(task, source_gradient_tiles, start, call.device)
