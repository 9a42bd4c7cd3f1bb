"""The cross-attentions of a set of edges, all at once.

The one place where the modules decide how they compute: folded (inference: batch norms in the
weights, one `cross_attention_block`) or packed (anything that needs a gradient or batch statistics:
the projections of each cell together, then one call of the attention core on all edges).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from xattn_kernels import functional
from xattn_kernels.distributed import rows_of
from xattn_kernels.modules import normalisation
from xattn_kernels.modules.cache import DerivedCache
from xattn_kernels.modules.layers import Projection, ProjectionSet, is_stock
from xattn_kernels.modules.normalisation import fold
from xattn_kernels.modules.projection import Layers, as_image, project_cell
from xattn_kernels.ops.features import ACCUMULATORS
from xattn_kernels.registry import current_backend
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


def can_pack(blocks: Sequence[ProjectionSet], features: Sequence[Tensor]) -> bool:
    """Whether `attend` computes what calling the blocks one by one would.

    False with hooks or replaced layers, with batch norms of which some are frozen, for empty
    features, and where batches or maps span processes: then the blocks have to be called.
    """
    if not is_stock(*blocks) or any(x.numel() == 0 for x in features):
        return False
    if rows_of(blocks[0]) is not None:
        return False
    projections = [p for block in blocks for p in block.projections()]
    if any(p.conv.bias is not None for p in projections):
        return False
    return normalisation.agree([p.bn for p in projections])


def attend(
    blocks: Sequence[ProjectionSet],
    wiring: Wiring,
    features: Sequence[Tensor],
    kind: str,
    heads: int,
) -> list[Tensor]:
    """One output (B, C, H, W) per edge, in the size of its target and channels-last order.

    Differentiable; updates the running statistics of batch norms that train, edge by edge in
    their order, as calling the blocks one by one does. Needs `can_pack`.

    Raises:
        ValueError: if batch statistics of a single token are asked for.
    """
    projections = [block.projections() for block in blocks]
    batch = normalisation.uses_batch(projections[0][0].bn)
    if batch:
        for x in features:
            normalisation.check_size(x)
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
    for target, source, b in wiring.edges if batch else ():
        for slot, p in ((target, 0), (target, 1), (source, 2), (source, 3), (source, 4)):
            normalisation.update(projections[b][p].bn, *statistics[slot, b, p])
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


def attend_folded(
    blocks: Sequence[ProjectionSet],
    wiring: Wiring,
    features: Sequence[Tensor],
    cache: DerivedCache,
    name: str,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """As `attend` of kind "linear" in inference, into `out` if given.

    Needs `can_pack` and `is_inference`. Folded weights are kept in `cache` under `name`.
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
