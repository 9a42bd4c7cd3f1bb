"""Who attends to whom in a grid of tasks and scales, as passes of the operators.

The two patterns are computed by the same kernels, so that what differs is the pattern. A pass has
the slots of one width: cells of its scale, and cells of other scales brought to its width. Each
ordered pair has its own projections; those of cross-scale attention serve all sources of a target.
Cross-scale attention is given the same maps as cross-task attention: what goes between the two, a
fuse block, is part of neither pattern.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn_kernels import cost
from xattn_kernels.functional import (
    cross_attention_block,
    linear_cross_attention,
    pack_block_weights,
    softmax_cross_attention,
)
from xattn_kernels.schedule import Schedule
from xattn_kernels.testing import compositions
from xattn_kernels.testing.compare import Truth, check

SEQUENTIAL, ALL_PAIRS = "sequential", "all pairs"
LINEAR, SOFTMAX, STORED = "linear", "softmax", "softmax, scores stored"
WAYS = (
    (SEQUENTIAL, LINEAR),
    (SEQUENTIAL, SOFTMAX),
    (ALL_PAIRS, LINEAR),
    (ALL_PAIRS, SOFTMAX),
    (ALL_PAIRS, STORED),
)
"""Pattern and association. Scores are stored where every operation is a call of torch's."""

ELEMENT = 4
"""Bytes of a float32."""


@dataclass(frozen=True)
class Grid:
    """T tasks on a pyramid: cell (t, s) is a map of `sizes[s]`."""

    tasks: int
    sizes: tuple[cost.MapSize, ...]

    @classmethod
    def of(
        cls, image: tuple[int, int], tasks: int = 4, scales: int = 4, width: int = cost.WIDTHS[0]
    ) -> Grid:
        """The grid of an image: the first scales of the pyramid, `width` channels at the finest."""
        widths = [width * 2**s for s in range(scales)]
        return cls(tasks, cost.pyramid(image, cost.STRIDES[:scales], widths))

    def features(self, device: str = "cpu", seed: int = 0) -> list[list[Tensor]]:
        """(1, C_s, N_s) of task t at scale s, standard normal, the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        return [
            [torch.randn(1, s.width, s.tokens, generator=generator).to(device) for s in self.sizes]
            for _ in range(self.tasks)
        ]

    def model(self, pattern: str, kind: str) -> Model:
        """What the formulas say."""
        costs = {SEQUENTIAL: cost.sequential_cost, ALL_PAIRS: cost.all_pairs_cost}[pattern](
            self.tasks, self.sizes, dtype_bytes=ELEMENT
        )
        core = costs.linear_core_flops if kind == LINEAR else costs.softmax_core_flops
        flops = costs.linear_flops if kind == LINEAR else costs.softmax_flops
        # Every pair reads a query and a source map and writes a map: once each at the very least.
        moved = costs.score_bytes * 4 * (kind == STORED)
        outputs = 0
        for part in self.passes(pattern):
            tokens = part.tokens(self)
            written = sum(tokens[e.query] for e in part.schedule.edges) * part.width
            read = sum(tokens) * part.width
            outputs += ELEMENT * written
            moved += ELEMENT * (written + read)
        largest = ELEMENT * max(s.tokens for s in self.sizes) ** 2
        return Model(
            pairs=costs.pairs,
            core_flops=core,
            flops=flops,
            bytes_moved=moved,
            score_bytes=costs.score_bytes if kind != LINEAR else 0,
            # Kept to the end, and the scores and their softmax of the pair at work.
            peak_bytes=outputs + (2 * largest if kind == STORED else 0),
        )

    def passes(self, pattern: str) -> list[Pass]:
        """The passes of a pattern, one per target width (and task, for cross-scale attention)."""
        scales = range(len(self.sizes))
        if pattern == ALL_PAIRS:
            return [self._all_pairs(s) for s in scales]
        width = [size.width for size in self.sizes]
        tasks = range(self.tasks)
        cross_task = [
            Pass(width[s], tuple((t, s) for t in tasks), Schedule.cross_task(self.tasks))
            for s in scales
        ]
        cross_scale = [
            Pass(
                width[s],
                tuple((t, r) for r in scales[s:]),
                Schedule.from_edges([(0, r, r - 1, 0) for r in range(1, len(scales) - s)]),
            )
            for t in tasks
            for s in scales[:-1]
        ]
        return cross_task + cross_scale

    def _all_pairs(self, target: int) -> Pass:
        cells = [(t, target) for t in range(self.tasks)]
        cells += [(t, s) for t in range(self.tasks) for s in range(len(self.sizes)) if s != target]
        pairs = [(q, k) for q in range(self.tasks) for k in range(len(cells)) if q != k]
        edges = [(q, k, number, number) for number, (q, k) in enumerate(pairs)]
        return Pass(self.sizes[target].width, tuple(cells), Schedule.from_edges(edges))


@dataclass(frozen=True)
class Model:
    """What formulas say of one image in fp32."""

    pairs: int
    core_flops: int
    flops: int
    bytes_moved: int
    """Maps read and written once by every pass, and scores four times where they are stored."""
    score_bytes: int
    """Scores of all pairs, as training op by op keeps them."""
    peak_bytes: int
    """Outputs, and two score matrices of the largest pair where they are stored."""


@dataclass(frozen=True)
class Pass:
    """One call of an operator."""

    width: int
    cells: tuple[tuple[int, int], ...]
    """Task and scale of every slot; what has another width is brought to the pass's."""
    schedule: Schedule

    def tokens(self, grid: Grid) -> list[int]:
        """N of every slot."""
        return [grid.sizes[s].tokens for _, s in self.cells]

    @cached_property
    def projected(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]], Schedule]:
        """(slot, weight) of every query and of every source projection, and who attends to whom."""
        queries = list(dict.fromkeys((e.query, e.weight) for e in self.schedule.edges))
        sources = list(dict.fromkeys((e.source, e.weight) for e in self.schedule.edges))
        edges = [
            (queries.index((e.query, e.weight)), sources.index((e.source, e.weight)), e.output, 0)
            for e in self.schedule.edges
        ]
        return queries, sources, Schedule.from_edges(edges, allow_self=True)


class Runner:
    """A pattern on given features: with its projections and adapters, or its core alone.

    The core takes the features, brought to a pass's width, as queries, keys and values.
    """

    def __init__(
        self, grid: Grid, pattern: str, kind: str, device: str = "cpu", *, core: bool = False
    ) -> None:
        self.kind = kind
        self.core = core
        self.passes = grid.passes(pattern)
        self.features = grid.features(device)
        self.parameters = [Parameters(part, grid, device) for part in self.passes]
        self._adapted = self._all_adapted(torch.float32) if core else None

    @torch.no_grad()
    def __call__(self) -> list[Tensor]:
        """The maps of all pairs."""
        outputs = []
        given = self._adapted or [None] * len(self.passes)
        for part, parameters, ready in zip(self.passes, self.parameters, given, strict=True):
            slots = ready or parameters.adapted(part, self.features)
            if self.kind == LINEAR and not self.core:
                weights = (parameters.weight, parameters.bias)
                packed = parameters.packed
                outputs += cross_attention_block(slots, *weights, part.schedule, packed=packed)
            else:
                operands = self._operands(part, slots, parameters.weight, parameters.bias)
                outputs += _KERNELS[self.kind](*operands)
        return outputs

    def check(self, outputs: Sequence[Tensor], *, every: bool, tokens: int = 64) -> None:
        """Accept what a call returned.

        Compared are evenly spread query tokens of every pair, or of each pass's first and last.

        Raises:
            AssertionError: if an output is not accepted.
        """
        first = 0
        for part, parameters in zip(self.passes, self.parameters, strict=True):
            edges = part.schedule.edges
            for number in range(len(edges)) if every else {0, len(edges) - 1}:
                x = outputs[first + edges[number].output]
                where = picked(x.shape[2], tokens)
                exact = self._evaluate(part, parameters, number, where, torch.float64)
                by_op = self._evaluate(part, parameters, number, where, torch.float32)
                error = (by_op.double() - exact).abs()
                name = f"{self.kind}, width {part.width}, pair {number}"
                check(name, x[:, :, where], Truth(exact, error, error))
            first += part.schedule.num_outputs

    @torch.no_grad()
    def _evaluate(
        self, part: Pass, parameters: Parameters, number: int, where: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """One pair at some query tokens, op by op on the CPU."""
        edge = part.schedule.edges[number]
        alone = Pass(
            part.width,
            (part.cells[edge.query], part.cells[edge.source]),
            Schedule.from_edges([(0, 1, 0, 0)], num_queries=2),
        )
        target, source = parameters.adapted(alone, self.features, dtype)
        weight, bias = (
            x[edge.weight : edge.weight + 1].cpu().to(dtype)
            for x in (parameters.weight, parameters.bias)
        )
        slots = [target[:, :, where].cpu(), source.cpu()]
        *operands, schedule = self._operands(alone, slots, weight, bias)
        attend = _COMPOSITIONS[self.kind]
        [output], _ = attend(*operands, schedule)
        return output

    def _operands(
        self, part: Pass, slots: list[Tensor], weight: Tensor, bias: Tensor
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], Schedule]:
        if self.core:
            sources = slots[: part.schedule.num_sources]
            return slots[: part.schedule.num_queries], sources, sources, part.schedule
        return (*project(part, slots, weight, bias), part.projected[2])

    def _all_adapted(self, dtype: torch.dtype) -> list[list[Tensor]]:
        pairs = zip(self.passes, self.parameters, strict=True)
        return [parameters.adapted(part, self.features, dtype) for part, parameters in pairs]


class Parameters:
    """Adapters to the width of a pass, and its projections, folded."""

    def __init__(self, part: Pass, grid: Grid, device: str) -> None:
        generator = torch.Generator().manual_seed(part.width + part.schedule.num_edges)
        d, sets = part.width, part.schedule.num_weights

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.adapters = {
            s: (draw(d, grid.sizes[s].width) * grid.sizes[s].width ** -0.5).to(device)
            for _, s in part.cells
            if grid.sizes[s].width != d
        }
        self.weight = (draw(sets, 5, d, d) * d**-0.5).to(device)
        self.bias = (0.1 * draw(sets, 5, d)).to(device)
        self.packed = pack_block_weights(self.weight, self.bias)

    def adapted(
        self, part: Pass, features: list[list[Tensor]], dtype: torch.dtype = torch.float32
    ) -> list[Tensor]:
        """The slots of a pass, in its width."""
        slots = []
        for t, s in part.cells:
            x = features[t][s].to(dtype)
            adapter = self.adapters.get(s)
            slots.append(x if adapter is None else torch.matmul(adapter.to(dtype), x))
        return slots


def picked(tokens: int, count: int) -> Tensor:
    """Numbers of some tokens, evenly spread."""
    return torch.linspace(0, tokens - 1, min(count, tokens)).round().long()


def project(
    part: Pass, slots: Sequence[Tensor], weight: Tensor, bias: Tensor
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Query, key and value pre-activations of a pass, one matrix product after the other."""

    def layer(x: Tensor, w: int, p: int) -> Tensor:
        return torch.baddbmm(bias[w, p, None, :, None], weight[w, p].expand(len(x), -1, -1), x)

    queries, sources, _ = part.projected
    return (
        [layer(F.relu(layer(slots[i], w, 0)), w, 1) for i, w in queries],
        [layer(F.relu(layer(slots[i], w, 2)), w, 3) for i, w in sources],
        [F.relu(layer(slots[i], w, 4)) for i, w in sources],
    )


def _stored(
    query: Sequence[Tensor], key: Sequence[Tensor], value: Sequence[Tensor], schedule: Schedule
) -> list[Tensor]:
    """One pair after the other, its scores in memory."""
    outputs = []
    for edge in schedule.edges:
        q, k, v = query[edge.query], key[edge.source], value[edge.source]
        scores = torch.bmm(q.transpose(1, 2) * q.shape[1] ** -0.5, k).softmax(dim=2)
        outputs.append(torch.bmm(v, scores.transpose(1, 2)))
    return outputs


_KERNELS: dict[str, Callable[..., list[Tensor]]] = {
    LINEAR: linear_cross_attention,
    SOFTMAX: softmax_cross_attention,
    STORED: _stored,
}
_COMPOSITIONS: dict[str, Callable[..., Any]] = {
    LINEAR: compositions.linear_cross_attention,
    SOFTMAX: compositions.softmax_cross_attention,
    STORED: compositions.softmax_cross_attention,
}
