"""Softmax cross-attention in Triton: online softmax, one launch a phase for all edges.

Forward in one launch; backward in three, with scores computed anew. Keys and values of a joint
group are read where they are. All sums are in float32 and in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from xattn_kernels.engines.triton import runtime, tuning
from xattn_kernels.engines.triton.launch import launch
from xattn_kernels.engines.triton.runtime import (
    Layout,
    Table,
    blocks,
    layout_constants,
    pieces,
    programs,
)
from xattn_kernels.engines.triton.softmax_tiles import (
    SourceTiles,
    Tiles,
    forward_tiles,
    query_gradient_tiles,
    source_gradient_tiles,
)
from xattn_kernels.ops.features import group_by_output
from xattn_kernels.ops.library import place_gradients
from xattn_kernels.ops.softmax_cross_attention.op import Result, allocate, allocate_gradients
from xattn_kernels.problem import Problem

#: Queries and channels a step of the kernel that multiplies outputs by their gradients.
_DELTA_QUERIES, _DELTA_STEP = 128, 16


def refusals(problem: Problem) -> list[str]:
    """Why this engine cannot run a problem."""
    return runtime.refusals(problem)


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
    groups = group_by_output(edges)
    queries = [query[q] for q, _ in groups]
    table = Table()
    rows = [table.add_slots(x) for x in (queries, key, value, outputs)]
    lists = table.add_lists([sources for _, sources in groups])
    lse_row = table.add([x.data_ptr() for x in lse])
    width, value_width = query[0].size(1) // heads, value[0].size(1) // heads
    dot = runtime.precision(query[0].dtype)
    first, second = pieces(value_width)
    layouts = {
        name: _layout(slots, heads)
        for name, slots in (("Q", queries), ("K", key), ("V", value), ("O", outputs))
    }
    batch, device = query[0].size(0), query[0].device

    def start(tiles: Tiles) -> Any:
        from xattn_kernels.engines.triton.softmax_kernels import forward_kernel

        steps = blocks([q.size(2) for q in queries], tiles.queries)
        works = steps * heads * batch * len(groups)
        return launch(
            forward_kernel,
            programs(works, tiles.warps, device),
            on_device,
            *rows,
            lists,
            lse_row,
            batch,
            steps,
            works,
            scale,
            **_constants(query[0], heads),
            D=width,
            V=value_width,
            V0=first,
            V1=second,
            BK=tiles.step,
            BM=tiles.queries,
            BN=tiles.keys,
            UNROLL=tiles.unroll,
            DOT=dot,
            **layout_constants(**layouts),
            warps=tiles.warps,
        )

    task = _task("forward", queries, (width, value_width), dot, heads, layouts.values())
    with runtime.device_of(query[0]):
        on_device = table.on(device)
        tuning.run(task, forward_tiles, start, device)
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
    batch = query[0].size(0)
    if batch == 0:
        return gradients
    by_slot = place_gradients(gradients, wanted)
    keys, values = len(query), len(query) + len(key)
    query_grads, key_grads, value_grads = by_slot[:keys], by_slot[keys:values], by_slot[values:]
    groups = group_by_output(edges)
    queries = [query[q] for q, _ in groups]
    outputs_of_query: list[list[int]] = [[] for _ in query]
    outputs_of_source: list[list[int]] = [[] for _ in key]
    for number, (q, sources) in enumerate(groups):
        outputs_of_query[q].append(number)
        for source in sources:
            outputs_of_source[source].append(number)

    # The kernels read these as contiguous; held here, they live through the call.
    lse = [x.contiguous() for x in lse]
    dense_lse = [None if x is None else x.contiguous() for x in grad_lse]
    longest = max(q.size(2) for q in queries)
    delta = lse[0].new_empty(len(groups), batch, heads, max(longest, 1))
    table = Table()
    by_query = table.add_lists(outputs_of_query)
    by_output = table.add_lists([sources for _, sources in groups])
    by_source = table.add_lists(outputs_of_source)
    lse_row = table.add([x.data_ptr() for x in lse])
    grad_lse_row = table.add([0 if x is None else x.data_ptr() for x in dense_lse])
    row = {
        name: table.add_slots(slots)
        for name, slots in {
            "query": query,
            "queries": queries,
            "key": key,
            "value": value,
            "output": output,
            "gradient": grad_output,
            "dq": query_grads,
            "dk": key_grads,
            "dv": value_grads,
        }.items()
    }
    width, value_width = query[0].size(1) // heads, value[0].size(1) // heads
    dot = runtime.precision(query[0].dtype)
    widths, device = (width, value_width), query[0].device
    layouts = {
        name: _layout(slots, heads)
        for name, slots in (("Q", query), ("K", key), ("V", value), ("G", grad_output))
    }
    # Two tiles of float32 features in flight would be more shared memory than consumer cards have.
    stages = 1 if dot == "tf32" and query[0].element_size() == 4 else 2
    shared: dict[str, Any] = {**_constants(query[0], heads), "V": value_width}
    products: dict[str, Any] = {
        **shared,
        "D": width,
        "DOT": dot,
        **layout_constants(**layouts),
    }
    result_layouts = [_layout(x, heads) for x in (query_grads, key_grads, value_grads)]
    d_pieces, v_pieces = pieces(width), pieces(value_width)

    def start_queries(tiles: Tiles) -> Any:
        from xattn_kernels.engines.triton.softmax_gradient_kernels import query_gradient_kernel

        steps = blocks([q.size(2) for q in query], tiles.queries)
        works = steps * heads * batch * len(query)
        return launch(
            query_gradient_kernel,
            programs(works, tiles.warps, device),
            on_device,
            delta,
            *(row[name] for name in ("query", "key", "value", "gradient", "dq")),
            by_query,
            by_output,
            lse_row,
            batch,
            steps,
            works,
            delta.size(3),
            scale,
            **products,
            BK=tiles.step,
            UNROLL=tiles.unroll,
            BM=tiles.queries,
            BN=tiles.keys,
            D0=d_pieces[0],
            D1=d_pieces[1],
            **layout_constants(R=result_layouts[0]),
            warps=tiles.warps,
            stages=stages,
        )

    with_keys = any(x is not None for x in key_grads)
    with_values = any(x is not None for x in value_grads)

    def start_sources(tiles: SourceTiles) -> Any:
        from xattn_kernels.engines.triton.softmax_gradient_kernels import source_gradient_kernel

        parts = [(with_keys, False), (False, with_values)]
        if tiles.together:
            parts = [(with_keys, with_values)]
        steps = blocks([k.size(2) for k in key], tiles.keys)
        works = steps * heads * batch * len(key)
        compiled = None
        for keys_now, values_now in parts:
            if not (keys_now or values_now):
                continue
            compiled = launch(
                source_gradient_kernel,
                programs(works, tiles.warps, device),
                on_device,
                delta,
                *(row[name] for name in ("queries", "key", "value", "gradient", "dk", "dv")),
                by_source,
                lse_row,
                batch,
                steps,
                works,
                delta.size(3),
                scale,
                **products,
                BK=tiles.step,
                UNROLL=tiles.unroll,
                BM=tiles.queries,
                BN=tiles.keys,
                D0=d_pieces[0],
                D1=d_pieces[1],
                V0=v_pieces[0],
                V1=v_pieces[1],
                WITH_KEYS=keys_now,
                WITH_VALUES=values_now,
                **layout_constants(DK=result_layouts[1], DV=result_layouts[2]),
                warps=tiles.warps,
                stages=stages,
            )
        return compiled

    with runtime.device_of(query[0]):
        from xattn_kernels.engines.triton.softmax_gradient_kernels import delta_kernel

        on_device = table.on(device)
        steps = blocks([q.size(2) for q in queries], _DELTA_QUERIES)
        launch(
            delta_kernel,
            steps * heads * batch * len(groups),
            on_device,
            delta,
            row["output"],
            row["gradient"],
            grad_lse_row,
            batch,
            steps,
            delta.size(3),
            **shared,
            BK=_DELTA_STEP,
            BM=_DELTA_QUERIES,
            **layout_constants(O=_layout(output, heads), G=layouts["G"]),
        )
        if any(x is not None for x in query_grads):
            read = (*layouts.values(), result_layouts[0])
            task = _task("query_gradient", query, widths, dot, heads, read)
            tuning.run(task, query_gradient_tiles, start_queries, device)
        if with_keys or with_values:
            read = (*layouts.values(), *result_layouts[1:])
            task = _task("source_gradient", key, widths, dot, heads, read, with_keys, with_values)
            tuning.run(task, source_gradient_tiles, start_sources, device)
    return gradients


def _task(
    kernel: str,
    slots: Sequence[Tensor],
    widths: tuple[int, int],
    dot: str,
    heads: int,
    layouts: Iterable[Layout],
    *flags: bool,
) -> tuning.Task:
    minors = [x.minor for x in layouts]
    longest = max(x.size(2) for x in slots)
    rows = slots[0].size(0) * len(slots)
    details: tuple[str | int | bool, ...] = (slots[0].element_size(), heads, *minors, *flags)
    return tuning.Task(f"softmax {kernel}", widths, dot, details, longest, rows)


def _constants(query: Tensor, heads: int) -> dict[str, Any]:
    return {
        "HEADS": heads,
        "DT": runtime.language_type(query.dtype),
        "SIZE": query.element_size(),
    }


def _layout(slots: Sequence[Tensor | None], heads: int) -> Layout:
    """As :func:`runtime.layout`, for accesses that begin at the first channel of any head."""
    minor, vector, wide = runtime.layout(slots)
    channels = next((x.size(1) for x in slots if x is not None), heads) // heads
    while minor == "c" and channels % vector:
        vector //= 2
    return Layout(minor, vector, wide)
