"""The cross-attentions of a set of edges, all at once.

The one place where the modules decide how they compute: folded (inference: batch norms in the
weights, one `cross_attention_block`), recomputed (one `cross_attention_block_training`, which keeps
no projection for the backward pass), packed (the projections of each cell together, then one call
of the attention core on all edges), or layer by layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Literal

import torch
from torch import Tensor

from xattn_kernels import functional
from xattn_kernels.distributed import Reduction, rows_of
from xattn_kernels.modules import normalisation
from xattn_kernels.modules.cache import DerivedCache
from xattn_kernels.modules.checks import without_autocast
from xattn_kernels.modules.layers import Projection, ProjectionSet, is_stock
from xattn_kernels.modules.normalisation import BatchNorm, fold
from xattn_kernels.modules.projection import Layers, as_image, project_cell
from xattn_kernels.ops.features import ACCUMULATORS, is_transformed
from xattn_kernels.registry import TRAINING, Problem, current_backend, find
from xattn_kernels.schedule import Schedule


@dataclass(frozen=True)
class Wiring:
    """Edges (target slot, source slot, block), each with its own output.

    A block that projects the same slot for several edges does so once.
    """

    edges: tuple[tuple[int, int, int], ...]
    slots: int
    queries: tuple[tuple[int, ...], ...] = field(init=False)
    """Blocks that project each slot as a target."""
    sources: tuple[tuple[int, ...], ...] = field(init=False)
    """Blocks that project each slot as a source."""
    block_schedule: Schedule = field(init=False)
    """Between slots, for `cross_attention_block`."""
    core_schedule: Schedule = field(init=False)
    """Between projected queries and sources, slot by slot."""

    def __post_init__(self) -> None:
        queries = [_unique(b for t, _, b in self.edges if t == s) for s in range(self.slots)]
        sources = [_unique(b for _, a, b in self.edges if a == s) for s in range(self.slots)]
        query_index = _number(queries)
        source_index = _number(sources)
        blocks = 1 + max(b for _, _, b in self.edges)
        block_schedule = Schedule.from_edges(
            [(t, a, o, b) for o, (t, a, b) in enumerate(self.edges)],
            num_queries=self.slots,
            num_sources=self.slots,
            num_weights=blocks,
        )
        core_schedule = Schedule.from_edges(
            [
                (query_index[t, b], source_index[a, b], o, 0)
                for o, (t, a, b) in enumerate(self.edges)
            ],
            allow_self=True,
        )
        for name, value in (
            ("queries", tuple(queries)),
            ("sources", tuple(sources)),
            ("block_schedule", block_schedule),
            ("core_schedule", core_schedule),
        ):
            object.__setattr__(self, name, value)


Way = Literal["folded", "recomputed", "packed", "layers"]

FEW_TOKENS = 16
"""Measured with C = 36 to 288 in float32: gradients have up to 50 times the error of op by op for 2
to 4 (sample, token), up to 5 times for 5, and the same from 6 on."""

STORING_ENGINES = (None, "reference")
"""Engines by which recomputing is no faster than storing: none, or that in plain PyTorch."""


def choose_way(
    blocks: Sequence[ProjectionSet],
    features: Sequence[Tensor],
    kind: str,
    recompute: bool | str,
    inference: bool,
) -> Way:
    """How `attend` is to compute the cross-attentions of `blocks` between `features`.

    - "layers": every layer is called. Where some have hooks or were replaced, where some batch
      norms are frozen and others are not, for empty features; where batches or maps span processes
      and nothing is recomputed; and for batch statistics of few tokens, see `has_few_tokens`.
    - "folded": in inference, for kind "linear".
    - "recomputed": if asked for by `recompute`, or "auto" finds it cheaper, for kind "linear".
    - "packed" otherwise.

    Args:
        blocks: what projects.
        features: one (B, C, H, W) a slot, cast for autocast.
        kind: "linear" or "softmax".
        recompute: "auto", True or False.
        inference: whether the weights may be folded: `is_inference`, of the blocks and all that
            follows from it.
    """
    if not is_stock(*blocks, synchronised=True):
        return "layers"
    projections = [p for block in blocks for p in block.projections()]
    norms = [p.bn for p in projections]
    if any(p.conv.bias is not None for p in projections) or not normalisation.agree(norms):
        return "layers"
    # All ranks have to choose alike, whatever their part of the tokens.
    reduction = normalisation.reduction(norms[0], rows_of(blocks[0]))
    if reduction.is_local and any(x.numel() == 0 for x in features):
        return "layers"
    if inference and kind == "linear" and reduction.is_local:
        return "folded"
    recomputed = kind == "linear" and (
        is_recomputing_cheaper(features) if recompute == "auto" else bool(recompute)
    )
    if not reduction.is_local and not recomputed:
        return "layers"
    if normalisation.uses_batch(norms[0]) and has_few_tokens(reduction.counts(features)):
        return "layers"
    return "recomputed" if recomputed else "packed"


def has_few_tokens(counts: Sequence[int]) -> bool:
    """Whether a slot has too few (sample, token) for statistics in closed form.

    Of n values some channel's variance is by chance far below the others', the more likely the
    smaller n; it then loses digits in the product W Sigma W^T that a batch norm of W x keeps. Of a
    single value nothing is left: torch's layers know best what to say.
    """
    return any(count < FEW_TOKENS for count in counts)


def is_recomputing_cheaper(features: Sequence[Tensor]) -> bool:
    """What `recompute="auto"` stands for: whether an engine with kernels for it is in force."""
    x = features[0]
    if is_transformed():
        return False
    channels = index(x.shape[1])
    problem = Problem(
        TRAINING,
        x.dtype,
        x.device.type,
        channels,
        channels,
        gradient=True,
        device_index=x.device.index,
    )
    return find(problem) not in STORING_ENGINES


def attend(
    way: Way,
    blocks: Sequence[ProjectionSet],
    wiring: Wiring,
    features: Sequence[Tensor],
    kind: str,
    heads: int,
) -> list[Tensor]:
    """One output (B, C, H, W) per edge, in the size of its target.

    Differentiable; updates the running statistics of batch norms that train, edge by edge in
    their order, as calling the blocks one by one does.

    Args:
        way: what `choose_way` says, here "layers", "recomputed" or "packed".
        blocks: the blocks of `wiring`; called for "layers".
        wiring: the edges.
        features: one (B, C, H, W) a slot, cast for autocast.
        kind: "linear" or "softmax".
        heads: heads of kind "softmax".

    Raises:
        ValueError: if batch statistics of a single token are asked for.
    """
    if way == "layers":
        return [blocks[b](features[target], features[a]) for target, a, b in wiring.edges]
    with without_autocast(features[0]):
        if way == "packed":
            return _attend_packed(blocks, wiring, features, kind, heads)
        reduction = normalisation.reduction(blocks[0].projections()[0].bn, rows_of(blocks[0]))
        if reduction.is_local:
            return _attend_recomputed(blocks, wiring, features, reduction)
        # Collectives are not for compilers.
        run = torch.compiler.disable(_attend_recomputed)
        outputs: list[Tensor] = run(blocks, wiring, features, reduction)
        return outputs


def _attend_recomputed(
    blocks: Sequence[ProjectionSet],
    wiring: Wiring,
    features: Sequence[Tensor],
    reduction: Reduction,
) -> list[Tensor]:
    projections = [p for block in blocks for p in block.projections()]
    norms = [p.bn for p in projections]
    batch = normalisation.uses_batch(norms[0])
    running_mean = [bn.running_mean for bn in norms if bn.running_mean is not None]
    running_var = [bn.running_var for bn in norms if bn.running_var is not None]
    outputs, statistics = functional.cross_attention_block_training(
        features,
        [p.conv.weight for p in projections],
        [bn.weight for bn in norms],
        [bn.bias for bn in norms],
        wiring.block_schedule,
        running_mean=None if batch else running_mean,
        running_var=None if batch else running_var,
        bn_eps=norms[0].eps,
        reduction=reduction,
    )
    if batch:
        unbiased = statistics.counts / (statistics.counts - 1)
        rows = {
            (slot, b, p): (mean, var * unbiased[slot])
            for (slot, b, p), mean, var in zip(*statistics[:3], strict=True)
        }
        _update(blocks, wiring, rows)
    return outputs


def _attend_packed(
    blocks: Sequence[ProjectionSet],
    wiring: Wiring,
    features: Sequence[Tensor],
    kind: str,
    heads: int,
) -> list[Tensor]:
    """All projections of each cell together, then the attention core, in channels-last order."""
    projections = [block.projections() for block in blocks]
    batch = normalisation.uses_batch(projections[0][0].bn)
    queries, keys, values = [], [], []
    statistics: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
    for slot, x in enumerate(features):
        # (block, projection) of the first layers and of the second, which follow some of those.
        targets, sources = wiring.queries[slot], wiring.sources[slot]
        first = [(b, 0) for b in targets] + [(b, 2) for b in sources] + [(b, 4) for b in sources]
        second = [(b, 1) for b in targets] + [(b, 3) for b in sources]
        parameters = []
        for layer in (first, second):
            modules = [projections[b][p] for b, p in layer]
            parameters += _parameters(modules, running=not batch)
        layers = Layers(len(first), len(second), batch, projections[0][0].bn.eps)
        outputs, *seen = project_cell(x, layers, parameters)
        queries += outputs[: len(targets)]
        keys += outputs[len(targets) : len(second)]
        values += outputs[len(second) :]
        for layer, (mean, var) in zip((first, second), seen, strict=True):
            tokens = x.numel() // x.shape[1]
            unbiased = var * (tokens / (tokens - 1)) if batch else var
            for (b, p), row in zip(layer, zip(mean, unbiased, strict=True), strict=True):
                statistics[slot, b, p] = row
    if batch:
        _update(blocks, wiring, statistics)
    if kind == "linear":
        attended = functional.linear_cross_attention(queries, keys, values, wiring.core_schedule)
    else:
        attended = functional.softmax_cross_attention(
            queries, keys, values, wiring.core_schedule, heads=heads
        )
    return [
        as_image(output, features[target].shape[2:])
        for output, (target, _, _) in zip(attended, wiring.edges, strict=True)
    ]


def _update(
    blocks: Sequence[ProjectionSet],
    wiring: Wiring,
    statistics: Mapping[tuple[int, int, int], tuple[Tensor, Tensor]],
) -> None:
    """Update running statistics from means and unbiased variances of (slot, block, projection)."""
    projections = [block.projections() for block in blocks]
    # A block's batch norms once a round: reused blocks need one for each edge.
    rounds: list[list[tuple[BatchNorm, Tensor, Tensor]]] = []
    uses = dict.fromkeys(range(len(blocks)), 0)
    for target, source, b in wiring.edges:
        if uses[b] == len(rounds):
            rounds.append([])
        for slot, p in ((target, 0), (target, 1), (source, 2), (source, 3), (source, 4)):
            rounds[uses[b]].append((projections[b][p].bn, *statistics[slot, b, p]))
        uses[b] += 1
    for one in rounds:
        normalisation.update_each(*zip(*one, strict=True))


def attend_folded(
    blocks: Sequence[ProjectionSet],
    wiring: Wiring,
    features: Sequence[Tensor],
    cache: DerivedCache,
    name: str,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """As `attend` where `choose_way` says "folded"; into `out` if given.

    Folded weights are kept in `cache` under `name`.
    """
    projections = [p for block in blocks for p in block.projections()]
    dtype = features[0].dtype

    def make() -> tuple[Tensor, Tensor, Tensor]:
        weight, bias = fold(
            [p.conv for p in projections], [p.bn for p in projections], ACCUMULATORS[dtype]
        )
        weight = weight.flatten(2).unflatten(0, (len(blocks), -1))
        bias = bias.unflatten(0, (len(blocks), -1))
        return weight, bias, functional.pack_block_weights(weight, bias, dtype)

    weight, bias, packed = cache.get(
        name,
        [x for p in projections for x in normalisation.tensors(p.conv, p.bn)],
        (dtype, projections[0].bn.eps, current_backend()),
        make,
    )
    return functional.cross_attention_block(
        features, weight, bias, wiring.block_schedule, packed=packed, out=out
    )


def _parameters(modules: Sequence[Projection], running: bool) -> list[Tensor]:
    parameters = [m.conv.weight for m in modules]
    parameters += [m.bn.weight for m in modules]
    parameters += [m.bn.bias for m in modules]
    if running:
        buffers = [m.bn.running_mean for m in modules] + [m.bn.running_var for m in modules]
        parameters += [x for x in buffers if x is not None]
    return parameters


def _unique(blocks: Iterable[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(blocks))


def _number(blocks: Sequence[Sequence[int]]) -> dict[tuple[int, int], int]:
    pairs = [(slot, block) for slot, row in enumerate(blocks) for block in row]
    return {pair: number for number, pair in enumerate(pairs)}
