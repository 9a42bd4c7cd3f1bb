"""Cost model: pairs, floating-point operations and bytes, from formulas.

Nothing here is measured. A multiply-add counts as 2 FLOP; bias, normalisation, activations,
exponentials and interpolation are not counted.

Per edge, with N_q query tokens of width d, N_k source tokens of width C_k, one image:

===================================  ===================================
softmax core (scores and mixing)     4 N_q N_k d
linear core (state and its use)      2 d^2 (N_q + N_k)
projections (2 query, 2 key, value)  4 N_q d^2 + 6 N_k d^2
adapter, only where C_k != d         2 N_k C_k d
scores, where they are stored        N_q N_k elements per head
===================================  ===================================

The width is that of the target: a source of another width is brought to it by a 1x1 convolution at
the source's own resolution, once per edge. Every edge is counted on its own, also in a joint
output; what an implementation saves by sharing one query projection among the edges of a target is
an option (`share_queries`). The projections are those of the cross-attention module of Kim, Choi,
Min, "Sequential Cross Attention Based Multi-task Learning" (arXiv 2209.02518).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from operator import index
from typing import Any, Literal, NamedTuple, TypeAlias

from xattn_kernels.schedule import Schedule

STRIDES = (4, 8, 16, 32)
WIDTHS = (36, 72, 144, 288)
"""Feature widths C_s of SCA-MTL on HRNet-W18-small-v2."""


class MapSize(NamedTuple):
    """Size of one feature map: `tokens` N = H*W, `width` C channels."""

    tokens: int
    width: int


Sizes: TypeAlias = Sequence[MapSize | tuple[int, int]]


@dataclass(frozen=True)
class Cost:
    """Operations and bytes of a schedule. Costs add; ``cost * n`` is n times the same."""

    pairs: int
    """Number of edges."""
    softmax_core_flops: int
    linear_core_flops: int
    projection_flops: int
    adapter_flops: int
    score_bytes: int
    """Softmax scores of all edges, if they were stored."""
    state_bytes: int
    """States (S, Z) of the linear core: d(d+1) accumulators per output slot."""
    input_bytes: int
    output_bytes: int

    @property
    def linear_flops(self) -> int:
        """Linear core, projections and adapters."""
        return self.linear_core_flops + self.projection_flops + self.adapter_flops

    @property
    def softmax_flops(self) -> int:
        """Softmax core, projections and adapters."""
        return self.softmax_core_flops + self.projection_flops + self.adapter_flops

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: int) -> Cost:
        return Cost(*(getattr(self, f.name) * times for f in fields(self)))


@dataclass(frozen=True)
class Traffic:
    """Bytes moved between memory and the processor. Traffics add."""

    bytes_read: int
    bytes_written: int

    @property
    def total(self) -> int:
        """Bytes read and written."""
        return self.bytes_read + self.bytes_written

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.bytes_read + other.bytes_read, self.bytes_written + other.bytes_written)


@dataclass(frozen=True)
class Setting:
    """A benchmark setting: number of tasks and the feature pyramid of one image."""

    name: str
    num_tasks: int
    sizes: tuple[MapSize, ...]
    """Size of each scale's map, finest first."""


def _whole(name: str, value: Any, minimum: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < minimum:
        raise ValueError(f"{name}: expected a whole number >= {minimum}, got {value!r}")
    return index(value)


def pyramid(
    image_size: tuple[int, int],
    strides: Sequence[int] = STRIDES,
    widths: Sequence[int] = WIDTHS,
) -> tuple[MapSize, ...]:
    """Sizes of a feature pyramid, finest first: N_s = (H / stride_s) (W / stride_s), C_s.

    Args:
        image_size: (H, W) in pixels.
        strides: Stride of each scale.
        widths: Channels of each scale.

    Raises:
        ValueError: If H or W is not a multiple of every stride, or the lists differ in length.
    """
    if len(strides) != len(widths):
        raise ValueError(f"widths: expected {len(strides)} entries as strides, got {len(widths)}")
    height, width = (_whole("image_size", side, 1) for side in image_size)
    for stride in strides:
        if _whole("strides", stride, 1) and (height % stride or width % stride):
            raise ValueError(
                f"image_size: expected multiples of stride {stride}, got {height} x {width}"
            )
    return tuple(
        MapSize((height // stride) * (width // stride), _whole("widths", channels, 1))
        for stride, channels in zip(strides, widths, strict=True)
    )


NYUD_V2 = Setting("NYUD-v2", 4, pyramid((480, 640)))
PASCAL_CONTEXT = Setting("PASCAL-Context", 5, pyramid((512, 512)))


# Any schedule


def attention_cost(
    schedule: Schedule,
    sizes: Sizes,
    source_sizes: Sizes | None = None,
    *,
    batch: int = 1,
    dtype_bytes: int = 2,
    state_dtype_bytes: int = 4,
    heads: int = 1,
    share_queries: bool = False,
) -> Cost:
    """Operations and bytes of one schedule, by the formulas at the top of this module.

    Args:
        schedule: Who attends to whom.
        sizes: (tokens, width) of each slot. Without `source_sizes`, query slot i and source slot i
            are the same map and there is one entry for each; with it, one per query slot.
        source_sizes: (tokens, width) of each source slot.
        batch: Number of images; multiplies everything but the pairs.
        dtype_bytes: Bytes per element of maps and scores (2: fp16 or bf16).
        state_dtype_bytes: Bytes per element of the linear state (4: fp32).
        heads: Softmax heads: as many score matrices per edge; the operations do not change.
        share_queries: Count a query projection once per (query, weight id) and the use of a state
            once per output slot, instead of once per edge.

    Raises:
        ValueError: If a list does not have one entry per slot, or a size is not a whole number.
    """
    queries, sources = _slot_sizes(schedule, sizes, source_sizes)
    images = _whole("batch", batch, 0)
    softmax = linear = projections = adapters = scores = 0
    projected: set[tuple[int, int]] = set()
    applied: set[int] = set()
    for edge in schedule.edges:
        (n_q, d), (n_k, c_k) = queries[edge.query], sources[edge.source]
        projects = not share_queries or (edge.query, edge.weight) not in projected
        applies = not share_queries or edge.output not in applied
        projected.add((edge.query, edge.weight))
        applied.add(edge.output)
        softmax += 4 * n_q * n_k * d
        linear += 2 * d**2 * (n_q * applies + n_k)
        projections += 4 * n_q * d**2 * projects + 6 * n_k * d**2
        adapters += 2 * n_k * c_k * d if c_k != d else 0
        scores += n_q * n_k
    outputs = [queries[query] for query in schedule.output_queries]
    element = images * _whole("dtype_bytes", dtype_bytes, 1)
    return Cost(
        pairs=schedule.num_edges,
        softmax_core_flops=images * softmax,
        linear_core_flops=images * linear,
        projection_flops=images * projections,
        adapter_flops=images * adapters,
        score_bytes=element * _whole("heads", heads, 1) * scores,
        state_bytes=images
        * _whole("state_dtype_bytes", state_dtype_bytes, 1)
        * sum(d * (d + 1) for _, d in outputs),
        input_bytes=element * _input_elements(schedule, queries, sources, source_sizes is None),
        output_bytes=element * sum(n * d for n, d in outputs),
    )


def fused_traffic(
    schedule: Schedule,
    sizes: Sizes,
    source_sizes: Sizes | None = None,
    *,
    batch: int = 1,
    dtype_bytes: int = 2,
    state_dtype_bytes: int = 4,
) -> Traffic:
    """Bytes moved by the fused two-pass block (inference), at best.

    One launch per distinct target width. Its source pass reads each source map once for all edges
    and writes the states; its target pass reads each query map and the states once and writes the
    outputs. Weights (5 d^2 per weight id, and an adapter per edge where widths differ) are read
    once. Arguments and errors as for `attention_cost`.
    """
    queries, sources = _slot_sizes(schedule, sizes, source_sizes)
    images = _whole("batch", batch, 0)
    source_maps = {(queries[e.query].width, e.source) for e in schedule.edges}
    query_maps = {e.query for e in schedule.edges}
    weight_sets = {(e.weight, queries[e.query].width) for e in schedule.edges}
    maps = sum(sources[source].tokens * sources[source].width for _, source in source_maps) + sum(
        queries[query].tokens * queries[query].width for query in query_maps
    )
    adapters = sum(
        sources[e.source].width * queries[e.query].width
        for e in schedule.edges
        if sources[e.source].width != queries[e.query].width
    )
    weights = sum(5 * d**2 for _, d in weight_sets) + adapters
    cost = attention_cost(
        schedule,
        sizes,
        source_sizes,
        batch=batch,
        dtype_bytes=dtype_bytes,
        state_dtype_bytes=state_dtype_bytes,
    )
    return Traffic(
        bytes_read=dtype_bytes * (images * maps + weights) + cost.state_bytes,
        bytes_written=cost.output_bytes + cost.state_bytes,
    )


def op_by_op_traffic(
    schedule: Schedule,
    sizes: Sizes,
    source_sizes: Sizes | None = None,
    *,
    batch: int = 1,
    dtype_bytes: int = 2,
    kind: Literal["linear", "softmax"] = "linear",
) -> Traffic:
    """Bytes moved when every operation of every edge reads and writes memory, without any cache.

    Each of convolution, normalisation and activation reads one map and writes one: 6 reads and
    writes of the query map, 9 of the source map. Then the linear core reads k and v for S, k for Z,
    q for the numerator and for the denominator, and the numerator once more for the division; the
    softmax core (one head) reads q, k, v and writes the output, with scores written, read and
    written by the softmax, and read for the mixing. An adapter is a convolution and a
    normalisation. Normalisation parameters are not counted. Arguments and errors as for
    `attention_cost`.
    """
    if kind not in ("linear", "softmax"):
        raise ValueError(f"kind: expected 'linear' or 'softmax', got {kind!r}")
    queries, sources = _slot_sizes(schedule, sizes, source_sizes)
    images, element = _whole("batch", batch, 0), _whole("dtype_bytes", dtype_bytes, 1)
    total = Traffic(0, 0)
    for edge in schedule.edges:
        (n_q, d), (n_k, c_k) = queries[edge.query], sources[edge.source]
        read, written = 6 * n_q * d + 9 * n_k * d, 6 * n_q * d + 9 * n_k * d
        weights = 5 * d**2
        if c_k != d:
            read += n_k * c_k + n_k * d
            written += 2 * n_k * d
            weights += c_k * d
        if kind == "linear":
            state = d * (d + 1)
            # The denominator is one number per token: computed, clamped, then divided by.
            read += 3 * n_k * d + 3 * n_q * d + state + 2 * n_q
            written += 2 * n_q * d + state + 2 * n_q
        else:
            read += n_q * d + 2 * n_k * d + 2 * n_q * n_k
            written += n_q * d + 2 * n_q * n_k
        total += Traffic(element * (images * read + weights), element * images * written)
    return total


# The patterns of a task x scale grid


def cross_task_cost(
    num_tasks: int,
    sizes: Sizes,
    *,
    num_auxiliary: int = 0,
    batch: int = 1,
    dtype_bytes: int = 2,
) -> Cost:
    """Cross-task attention (CTAM) at every scale: T(T-1) pairs a scale.

    Args:
        num_tasks: T.
        sizes: (tokens, width) of each scale.
        num_auxiliary: Tasks that are attended to but do not attend.
        batch: Number of images.
        dtype_bytes: Bytes per element of maps and scores.
    """
    schedule = Schedule.cross_task(num_tasks, num_auxiliary)
    total = Cost(*(0 for _ in fields(Cost)))
    for size in _map_sizes("sizes", sizes):
        slots = [size] * schedule.num_sources
        total += attention_cost(schedule, slots, batch=batch, dtype_bytes=dtype_bytes)
    return total


def cross_scale_cost(
    num_tasks: int,
    sizes: Sizes,
    *,
    batch: int = 1,
    dtype_bytes: int = 2,
) -> Cost:
    """Cross-scale attention (CSAM) of every task: S(S-1)/2 pairs a task. Arguments as above."""
    schedule = Schedule.cross_scale(len(sizes))
    one = attention_cost(schedule, sizes, batch=batch, dtype_bytes=dtype_bytes)
    return one * _whole("num_tasks", num_tasks, 1)


def sequential_cost(
    num_tasks: int,
    sizes: Sizes,
    *,
    batch: int = 1,
    dtype_bytes: int = 2,
) -> Cost:
    """Cross-task attention at every scale, then cross-scale attention of every task."""
    return cross_task_cost(
        num_tasks, sizes, batch=batch, dtype_bytes=dtype_bytes
    ) + cross_scale_cost(num_tasks, sizes, batch=batch, dtype_bytes=dtype_bytes)


def all_pairs_cost(
    num_tasks: int,
    sizes: Sizes,
    *,
    batch: int = 1,
    dtype_bytes: int = 2,
) -> Cost:
    """Every (task, scale) cell attends to every other: TS(TS-1) pairs, the naive baseline.

    A pair has the width of its target cell, and an adapter where the two scales' widths differ;
    pairs within a scale have none.
    """
    schedule = Schedule.all_pairs(num_tasks, len(sizes))
    return attention_cost(schedule, list(sizes) * num_tasks, batch=batch, dtype_bytes=dtype_bytes)


def comparison(setting: Setting, *, batch: int = 1) -> dict[str, Cost]:
    """Costs of a setting by pattern: "cross-task", "cross-scale", "sequential", "all pairs"."""
    tasks, sizes = setting.num_tasks, setting.sizes
    return {
        "cross-task": cross_task_cost(tasks, sizes, batch=batch),
        "cross-scale": cross_scale_cost(tasks, sizes, batch=batch),
        "sequential": sequential_cost(tasks, sizes, batch=batch),
        "all pairs": all_pairs_cost(tasks, sizes, batch=batch),
    }


# Convolutions around the attention, as they are and rewritten


def fuse_block_flops(
    num_tasks: int,
    sizes: Sizes,
    *,
    num_auxiliary: int = 0,
    folded: bool = False,
    batch: int = 1,
) -> int:
    """FLOP of the fuse blocks after cross-task attention, all target tasks and scales.

    A basic block from the concatenation to C channels: 3x3, 3x3, and a 1x1 shortcut. With K = T-1
    other tasks (and auxiliary ones) the concatenation repeats the target K times: width 2KC.
    `folded` sums the weight slices of the repeats, which is exact: width (K+1)C.
    """
    tasks = _whole("num_tasks", num_tasks, 1)
    others = tasks - 1 + _whole("num_auxiliary", num_auxiliary, 0)
    if others < 1:
        raise ValueError(
            f"num_tasks: expected at least 2 tasks, auxiliary ones included, got {others + 1}"
        )
    maps = others + 1 if folded else 2 * others
    macs = sum((9 * maps + 9 + maps) * n * c**2 for n, c in _map_sizes("sizes", sizes))
    return 2 * _whole("batch", batch, 0) * tasks * macs


def aggregation_head_flops(
    num_tasks: int,
    sizes: Sizes,
    *,
    per_scale: bool = False,
    folded: bool = False,
    num_outputs: int = 0,
    batch: int = 1,
) -> int:
    """FLOP of the 1x1 convolutions of the aggregation heads, all tasks.

    The first convolution maps the concatenation of all scales, at the finest resolution, to as many
    channels. Scale s contributes its map once for each coarser scale, and as many attended maps:
    2(S-1-s) C_s channels, the coarsest C_{S-1} (1080 in all for S = 4, C = 36, 72, 144, 288).

    Args:
        num_tasks: T, number of heads.
        sizes: (tokens, width) of each scale, finest first.
        per_scale: Apply the convolution at each scale's own resolution, before the upsampling.
            Exact, as a 1x1 convolution commutes with bilinear interpolation.
        folded: Sum the weight slices of the repeated maps, which is exact: (S-s) C_s channels in.
        num_outputs: Channels of the classifier after it, a 1x1 convolution at the finest
            resolution; 0 leaves it out.
        batch: Number of images.
    """
    scales = _map_sizes("sizes", sizes)
    coarser = range(len(scales) - 1, -1, -1)
    channels = sum(max(2 * k, 1) * c for k, (_, c) in zip(coarser, scales, strict=True))
    macs = channels * _whole("num_outputs", num_outputs, 0) * scales[0].tokens
    for k, (n, c) in zip(coarser, scales, strict=True):
        maps = k + 1 if folded else max(2 * k, 1)
        macs += channels * maps * c * (n if per_scale else scales[0].tokens)
    return 2 * _whole("batch", batch, 0) * _whole("num_tasks", num_tasks, 1) * macs


def rewrite_savings_flops(num_tasks: int, sizes: Sizes, *, batch: int = 1) -> int:
    """FLOP a whole network saves by the exact rewrites of its fuse blocks and aggregation heads."""
    fuse = fuse_block_flops(num_tasks, sizes, batch=batch)
    head = aggregation_head_flops(num_tasks, sizes, batch=batch)
    return (
        fuse
        - fuse_block_flops(num_tasks, sizes, folded=True, batch=batch)
        + head
        - aggregation_head_flops(num_tasks, sizes, per_scale=True, folded=True, batch=batch)
    )


def _map_sizes(name: str, sizes: Sizes) -> list[MapSize]:
    checked = []
    for number, size in enumerate(sizes):
        if len(size) != 2:
            raise ValueError(f"{name}[{number}]: expected (tokens, width), got {size!r}")
        checked.append(
            MapSize(
                _whole(f"{name}[{number}] tokens", size[0], 0),
                _whole(f"{name}[{number}] width", size[1], 1),
            )
        )
    if not checked:
        raise ValueError(f"{name}: expected at least one (tokens, width), got none")
    return checked


def _slot_sizes(
    schedule: Schedule,
    sizes: Sizes,
    source_sizes: Sizes | None,
) -> tuple[list[MapSize], list[MapSize]]:
    queries = _map_sizes("sizes", sizes)
    if source_sizes is None:
        sources = queries
        expected = max(schedule.num_queries, schedule.num_sources)
    else:
        sources = _map_sizes("source_sizes", source_sizes)
        expected = schedule.num_queries
        if len(sources) != schedule.num_sources:
            raise ValueError(
                f"source_sizes: expected {schedule.num_sources} entries, one per source slot, "
                f"got {len(sources)}"
            )
    if len(queries) != expected:
        raise ValueError(f"sizes: expected {expected} entries, one per slot, got {len(queries)}")
    return queries, sources


def _input_elements(
    schedule: Schedule, queries: list[MapSize], sources: list[MapSize], shared: bool
) -> int:
    query_slots = {edge.query for edge in schedule.edges}
    source_slots = {edge.source for edge in schedule.edges}
    if shared:
        query_slots -= source_slots
    return sum(queries[slot].tokens * queries[slot].width for slot in query_slots) + sum(
        sources[slot].tokens * sources[slot].width for slot in source_slots
    )
