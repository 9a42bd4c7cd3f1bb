"""The cross-attention block in Triton: three launches, with projections and attention fused.

Sources with all their sets of weights, sums of states, queries with all their outputs. A query
projection, or that of keys and values, is computed once for all edges that share it.

Where a block is too wide for its precision to have a tile in registers (:func:`is_fused`),
projections are matrix products of torch and stored, in float32, and linear attention follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn_kernels.engines.triton import runtime, tuning
from xattn_kernels.engines.triton.block_tiles import (
    SourceTiles,
    TargetTiles,
    source_tiles,
    target_tiles,
)
from xattn_kernels.engines.triton.launch import launch
from xattn_kernels.engines.triton.runtime import (
    Table,
    blocks,
    ceil_div,
    layout,
    layout_constants,
    pieces,
)
from xattn_kernels.engines.triton.states import Chunks
from xattn_kernels.ops.features import describe
from xattn_kernels.ops.folding import fold_projections
from xattn_kernels.ops.linear_cross_attention import triton as linear
from xattn_kernels.problem import Problem


def refusals(problem: Problem) -> list[str]:
    """Why this engine cannot run a problem."""
    return runtime.refusals(problem)


def packed_bytes(dtype: torch.dtype, channels: int, num_weights: int) -> int:
    """Size of what :func:`pack` returns."""
    width = _padded(channels)
    return num_weights * 5 * width * (width * _weight_type(dtype).itemsize + 4)


def pack(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Return weights (W, 5, P, P) and float32 biases (W, 5, P), P a multiple of 16, as bytes."""
    padding = _padded(weight.size(3)) - weight.size(3)
    weights = F.pad(weight.to(_weight_type(dtype)), (0, padding, 0, padding))
    biases = F.pad(bias.float(), (0, padding))
    return torch.cat([x.contiguous().view(torch.uint8).flatten() for x in (weights, biases)])


def fold(
    weight: Sequence[Tensor],
    gamma: Sequence[Tensor],
    beta: Sequence[Tensor],
    mean: Sequence[Tensor],
    var: Sequence[Tensor],
    bn_eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """As :func:`pack`, of projections that batch norms follow."""
    return pack(*fold_projections(weight, gamma, beta, mean, var, bn_eps, dtype), dtype)


def forward(
    features: Sequence[Tensor],
    packed: Tensor,
    num_weights: int,
    edges: Sequence[int],
    eps: float,
    outputs: Sequence[Tensor],
) -> None:
    """Write the outputs (B, C, N) of the flat (query, source, output, weight) quadruples."""
    batch, channels, _ = features[0].shape
    dtype = features[0].dtype
    size = packed_bytes(dtype, channels, num_weights)
    if packed.dtype is not torch.uint8 or packed.shape != (size,) or not packed.is_contiguous():
        raise ValueError(
            f"packed: got {describe(packed)}, expected {size} bytes as pack_block_weights makes "
            "them on this engine for these weights and this dtype"
        )
    if batch == 0:
        return
    width = _padded(channels)
    weights = packed[: size - num_weights * 5 * width * 4].view(_weight_type(dtype))
    biases = packed[size - num_weights * 5 * width * 4 :].view(torch.float32)
    sources, members, targets, results = _pairs(edges)
    dot = runtime.precision(dtype)
    if not is_fused(channels, dot):
        weights = weights.view(num_weights, 5, width, width)[:, :, :channels, :channels]
        biases = biases.view(num_weights, 5, width, 1)[:, :, :channels]
        _unfused(features, weights, biases, sources, members, targets, results, eps, outputs)
        return

    table = Table()
    rows = table.add_slots(features)
    source_pairs = table.add([x for pair in sources for x in pair])
    target_pairs = table.add([x for pair in targets for x in pair])
    by_output, by_target = table.add_lists(members), table.add_lists(results)
    output_rows = table.add_slots(outputs)
    tokens = [features[slot].size(2) for slot, _ in sources]
    chunks = Chunks(table, tokens, batch, channels, features[0])
    state_s = chunks.sums.new_empty(len(outputs), batch, channels, channels)
    state_z = chunks.sums.new_empty(len(outputs), batch, channels)

    first, second = pieces(channels)
    constants: dict[str, Any] = {
        "C": channels,
        "P": width,
        "C0": first,
        "C1": second,
        "DOT": dot,
        "DT": runtime.language_type(dtype),
        "SIZE": features[0].element_size(),
        **layout_constants(X=layout(features)),
    }
    output_layout = layout(outputs)

    def start_sources(tiles: SourceTiles) -> Any:
        from xattn_kernels.engines.triton.block_kernels import source_kernel

        groups = ceil_div(channels, sum(tiles.rows)) * ceil_div(channels, sum(tiles.columns))
        return launch(
            source_kernel,
            groups * chunks.per_slot * batch * len(sources),
            *unwritten,
            weights,
            biases,
            chunks.sums,
            rows,
            source_pairs,
            chunks.starts,
            batch,
            chunks.per_slot,
            chunks.size,
            **constants,
            R0=tiles.rows[0],
            R1=tiles.rows[1],
            K0=tiles.columns[0],
            K1=tiles.columns[1],
            BK=tiles.hidden,
            BN=tiles.tokens,
            warps=tiles.warps,
        )

    def start_targets(tiles: TargetTiles) -> Any:
        from xattn_kernels.engines.triton.block_kernels import target_kernel

        steps = blocks([features[slot].size(2) for slot, _ in targets], tiles.tokens)
        return launch(
            target_kernel,
            steps * batch * len(targets),
            unwritten.table,
            weights,
            biases,
            state_s,
            state_z,
            rows,
            target_pairs,
            by_target,
            output_rows,
            batch,
            steps,
            eps,
            **constants,
            **layout_constants(O=output_layout),
            BR=tiles.rows,
            BK=tiles.hidden,
            BM=tiles.tokens,
            warps=tiles.warps,
        )

    def task(kernel: str, slots: Sequence[tuple[int, int]], *details: str) -> tuning.Task:
        longest = max((features[slot].size(2) for slot, _ in slots), default=0)
        details = (str(dtype), constants["X_MINOR"], *details)
        return tuning.Task(
            f"block {kernel}", (channels,), dot, details, longest, batch * len(slots)
        )

    device = features[0].device
    with runtime.device_of(features[0]):
        unwritten = table.by_kernel(device, runs=chunks.per_slot > 0)
        tuning.run(task("source", sources), source_tiles, start_sources, device)
        chunks.reduce(unwritten.table, by_output, len(outputs), None, None, state_s, state_z)
        target_task = task("target", targets, output_layout.minor)
        tuning.run(target_task, target_tiles, start_targets, device)


def is_fused(channels: int, dot: str) -> bool:
    """Whether one kernel computes projections and attention."""
    return channels <= {"ieee": 80, "tf32": 160, "bf16": runtime.MAX_WIDTH}[dot]


def _unfused(
    features: Sequence[Tensor],
    weights: Tensor,
    biases: Tensor,
    sources: Sequence[tuple[int, int]],
    members: Sequence[Sequence[int]],
    targets: Sequence[tuple[int, int]],
    results: Sequence[Sequence[int]],
    eps: float,
    outputs: Sequence[Tensor],
) -> None:
    def project(x: Tensor, weight: int, first: int, second: int) -> Tensor:
        hidden = torch.relu(weights[weight, first] @ x + biases[weight, first])
        return weights[weight, second] @ hidden + biases[weight, second]

    x = [feature.float() for feature in features]
    queries = [project(x[slot], w, 0, 1) for slot, w in targets]
    keys = [project(x[slot], w, 2, 3) for slot, w in sources]
    values = [torch.relu(weights[w, 4] @ x[slot] + biases[w, 4]) for slot, w in sources]
    query_of = {output: number for number, group in enumerate(results) for output in group}
    triples = [
        index
        for output, group in enumerate(members)
        for source in group
        for index in (query_of[output], source, output)
    ]
    attended, _, _ = linear.forward(queries, keys, values, triples, None, None, "softplus", eps)
    for output, result in zip(outputs, attended, strict=True):
        output.copy_(result)


def _pairs(
    edges: Sequence[int],
) -> tuple[list[tuple[int, int]], list[list[int]], list[tuple[int, int]], list[list[int]]]:
    """Projections to compute, each once, and who uses them.

    Returns:
        Pairs (source, weight); for every output those that it sums; pairs (query, weight); for each
        of these its outputs.
    """
    sources: dict[tuple[int, int], int] = {}
    targets: dict[tuple[int, int], list[int]] = {}
    members: dict[int, list[int]] = {}
    for query, source, output, weight in zip(*(edges[i::4] for i in range(4)), strict=True):
        number = sources.setdefault((source, weight), len(sources))
        if output not in members:
            targets.setdefault((query, weight), []).append(output)
        members.setdefault(output, []).append(number)
    ordered = [members[output] for output in sorted(members)]
    return list(sources), ordered, list(targets), list(targets.values())


def _padded(channels: int) -> int:
    return ceil_div(channels, 16) * 16


def _weight_type(dtype: torch.dtype) -> torch.dtype:
    """What products are computed from: float16 features are multiplied as tf32."""
    return torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
