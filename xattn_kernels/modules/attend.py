"""The cross-attentions of a set of edges, all at once.

The one place where the modules decide how they compute: folded (inference: batch norms in the
weights, one `cross_attention_block`), recomputed (one `cross_attention_block_training`, which keeps
no projection for the backward pass), or layer by layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xattn_kernels import functional
from xattn_kernels.collectives import Reduction
from xattn_kernels.functional.block import attend_packed, fold_block_weights
from xattn_kernels.modules.freezing import Freezable
from xattn_kernels.modules.layers import ProjectionSet, is_stock
from xattn_kernels.modules.normalisation import (
    BatchNorm,
    affine_tensors,
    norms_agree,
    reduction_of,
    tensor_of,
    update_running_of_each,
    uses_batch,
)
from xattn_kernels.modules.row_sharding import rows_of
from xattn_kernels.ops.autocast import no_autocast
from xattn_kernels.ops.tracing import is_transformed
from xattn_kernels.problem import TRAINING, Problem
from xattn_kernels.registry import current_backend, find
from xattn_kernels.schedule import Schedule


@dataclass(frozen=True)
class Wiring:
    """Edges (target slot, source slot, block), each with its own output.

    A block that projects the same slot for several edges does so once.
    """

    edges: tuple[tuple[int, int, int], ...]
    slots: int
    schedule: Schedule = field(init=False)
    """Between slots, with the blocks as weights."""

    def __post_init__(self) -> None:
        schedule = Schedule.from_edges(
            [(t, a, o, b) for o, (t, a, b) in enumerate(self.edges)],
            num_queries=self.slots,
            num_sources=self.slots,
            num_weights=1 + max(b for _, _, b in self.edges),
        )
        object.__setattr__(self, "schedule", schedule)


Way = Literal["folded", "recomputed", "layers"]

FEW_TOKENS = 16
"""Measured with C = 12 in float32: of 2 and 3 (sample, token) op by op has gradients that are
exactly zero, where closed form leaves rounding errors; from 4 to 8 closed form has up to 4.3 times
the error of op by op, from 12 on up to 1.6 times."""

STORING_ENGINES = (None, "reference")
"""Engines by which recomputing is no faster than storing: none, or that in plain PyTorch."""


def choose_way(
    blocks: Sequence[nn.Module],
    features: Sequence[Tensor],
    kind: str,
    recompute: bool | str,
    inference: bool,
    own: bool = False,
) -> Way:
    """How `attend` is to compute the cross-attentions of `blocks` between `features`.

    - "folded": in inference, for kind "linear".
    - "recomputed": if asked for by `recompute`, or "auto" finds it cheaper, for kind "linear".
    - "layers" otherwise: every layer is called. So too where some have hooks or were replaced,
      where some batch norms are frozen and others are not, for empty features; where batches or
      maps span processes and nothing is recomputed; and for batch statistics of few tokens, see
      `has_few_tokens`.

    Args:
        blocks: what projects.
        features: one (B, C, H, W) a slot, cast for autocast.
        kind: "linear" or "softmax".
        recompute: "auto", True or False.
        inference: whether the weights may be folded: `is_inference`, of the blocks and all that
            follows from it.
        own: whether the only block asks, in its `forward`.
    """
    if kind != "linear" or not is_stock(*blocks, own=own, synchronised=True):
        return "layers"
    projections = [p for block in _projecting(blocks) for p in block.projections()]
    norms = [p.bn for p in projections]
    if any(p.conv.bias is not None for p in projections) or not norms_agree(norms):
        return "layers"
    # All ranks have to choose alike, whatever their part of the tokens.
    reduction = reduction_of(norms[0], rows_of(blocks[0]))
    if reduction.is_local and any(x.numel() == 0 for x in features):
        return "layers"
    if inference and reduction.is_local:
        return "folded"
    if not (is_recomputing_cheaper(features) if recompute == "auto" else recompute):
        return "layers"
    if uses_batch(norms[0]) and has_few_tokens(reduction.counts(features)):
        return "layers"
    return "recomputed"


def _projecting(blocks: Sequence[nn.Module]) -> list[ProjectionSet]:
    """`blocks`, known to be stock."""
    return [block for block in blocks if isinstance(block, ProjectionSet)]


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
    problem = Problem.of(TRAINING, x, channels, channels, gradient=True)
    return find(problem) not in STORING_ENGINES


def attend(
    way: Way, blocks: Sequence[nn.Module], wiring: Wiring, features: Sequence[Tensor]
) -> list[Tensor]:
    """One output (B, C, H, W) per edge, in the size of its target.

    Differentiable; updates the running statistics of batch norms that train, edge by edge in
    their order, as calling the blocks one by one does.

    Args:
        way: what `choose_way` says, here "layers" or "recomputed".
        blocks: the blocks of `wiring`; called for "layers".
        wiring: the edges.
        features: one (B, C, H, W) a slot, cast for autocast.

    Raises:
        ValueError: if batch statistics of a single token are asked for.
    """
    if way == "layers":
        return [blocks[b](features[target], features[a]) for target, a, b in wiring.edges]
    projecting = _projecting(blocks)
    with no_autocast(features[0].device.type):
        reduction = reduction_of(projecting[0].projections()[0].bn, rows_of(blocks[0]))
        if reduction.is_local:
            return _attend_recomputed(projecting, wiring, features, reduction)
        # Collectives are not for compilers.
        run = torch.compiler.disable(_attend_recomputed)
        outputs: list[Tensor] = run(projecting, wiring, features, reduction)
        return outputs


def _attend_recomputed(
    blocks: Sequence[ProjectionSet],
    wiring: Wiring,
    features: Sequence[Tensor],
    reduction: Reduction,
) -> list[Tensor]:
    projections = [p for block in blocks for p in block.projections()]
    norms = [p.bn for p in projections]
    batch = uses_batch(norms[0])
    running_mean = [bn.running_mean for bn in norms if bn.running_mean is not None]
    running_var = [bn.running_var for bn in norms if bn.running_var is not None]
    outputs, statistics = functional.cross_attention_block_training(
        features,
        [p.conv.weight for p in projections],
        [bn.weight for bn in norms],
        [bn.bias for bn in norms],
        wiring.schedule,
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


def _update(
    blocks: Sequence[ProjectionSet],
    wiring: Wiring,
    statistics: Mapping[tuple[int, int, int], tuple[Tensor, Tensor]],
) -> None:
    """Update running statistics from means and unbiased variances of (slot, block, projection)."""
    projections = [block.projections() for block in blocks]
    # A batch norm once a round: reused ones need one for each edge.
    rounds: list[list[tuple[BatchNorm, Tensor, Tensor]]] = []
    uses: dict[int, int] = {}
    for target, source, b in wiring.edges:
        for slot, p in ((target, 0), (target, 1), (source, 2), (source, 3), (source, 4)):
            norm = projections[b][p].bn
            use = uses.get(id(norm), 0)
            uses[id(norm)] = use + 1
            if use == len(rounds):
                rounds.append([])
            rounds[use].append((norm, *statistics[slot, b, p]))
    for one in rounds:
        update_running_of_each(*zip(*one, strict=True))


def attend_folded(
    owner: Freezable,
    name: str,
    blocks: Sequence[nn.Module],
    wiring: Wiring,
    features: Sequence[Tensor],
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """As `attend` where `choose_way` says "folded"; into `out` if given.

    The folded weights are frozen with `owner`, under `name`.
    """
    dtype = features[0].dtype
    projections = [p for block in _projecting(blocks) for p in block.projections()]
    key = (name, dtype, projections[0].bn.eps, current_backend())
    with no_autocast(features[0].device.type):
        packed = owner.derived(key, lambda: pack_projections(projections, dtype))
        return attend_packed(features, packed, wiring.schedule, out)


def pack_projections(projections: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """What `functional.block.attend_packed` takes for features of `dtype`.

    Args:
        projections: 1x1 convolutions `conv` with batch norms `bn` in inference, five for every set
            of weights.
        dtype: of the features.
    """
    layers = [(p._modules["conv"], p._modules["bn"]) for p in projections]
    weights = [tensor_of(conv, "weight") for conv, _ in layers]
    vectors = zip(*(affine_tensors(bn) for _, bn in layers), strict=True)
    gamma, beta, mean, var = map(list, vectors)
    return fold_block_weights(weights, gamma, beta, mean, var, layers[0][1].eps, dtype)
