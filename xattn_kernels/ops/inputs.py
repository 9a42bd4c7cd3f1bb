"""Query, key and value slots of the two attention cores, checked against each other."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from xattn_kernels.ops.autocast import autocast_dtype, cast_for_autocast
from xattn_kernels.ops.features import (
    Features,
    as_list,
    check_first,
    flatten,
)
from xattn_kernels.ops.tracing import is_transformed
from xattn_kernels.problem import Problem
from xattn_kernels.registry import select, wants_gradient
from xattn_kernels.schedule import Schedule

_NAMES = ("query", "key", "value")
#: For speed: what a single query, source and output need. Not to be changed.
_ONE_EDGE = [0, 0, 0]


class Part(NamedTuple):
    """Slots of one width, with the edges between them: what one call of an operator takes."""

    query: list[Tensor]
    key: list[Tensor]
    value: list[Tensor]
    edges: list[int]
    """Flat (query, source, output) triples."""
    channels: int
    value_channels: int

    def engine(self, op: str, heads: int = 1) -> str:
        """The engine that runs this part now."""
        first = self.query[0]
        return select(
            Problem.of(
                op,
                first,
                self.channels,
                self.value_channels,
                heads=heads,
                transformed=is_transformed(),
                gradient=wants_gradient((*self.query, *self.key, *self.value)),
            )
        )


class Inputs(NamedTuple):
    """Checked slots, flattened to (B, C, N)."""

    query: list[Tensor]
    key: list[Tensor]
    value: list[Tensor]
    schedule: Schedule | None
    single: bool
    """Whether the caller gave tensors, and not lists."""
    device: str
    """The device type."""
    given: list[Tensor]
    """The queries in the caller's shape."""

    def whole(self) -> Part | None:
        """All slots as one part; None if they differ in width."""
        query, key, value, schedule = self[:4]
        channels, value_channels = query[0].size(1), value[0].size(1)
        for x in query:
            if x.size(1) != channels:
                return None
        for x in key:
            if x.size(1) != channels:
                return None
        for x in value:
            if x.size(1) != value_channels:
                return None
        if schedule is not None:
            edges = schedule.triples_flat
        elif len(query) == 1:
            edges = _ONE_EDGE
        else:
            edges = [slot for slot in range(len(query)) for _ in range(3)]
        return Part(query, key, value, edges, channels, value_channels)

    def by_width(self) -> list[tuple[Part, list[int]]]:
        """One part for each pair of widths (C, Cv), with the output slots that it computes.

        Raises:
            ValueError: if the widths of an edge or of the edges of an output do not fit each other.
        """
        schedule = self.schedule or Schedule.identity(len(self.query))
        schedule.check_widths(*([x.size(1) for x in slots] for slots in self[:3]))
        outputs: dict[tuple[int, int], list[int]] = {}
        for output, group in enumerate(schedule.groups):
            widths = (self.query[group[0].query].size(1), self.value[group[0].source].size(1))
            outputs.setdefault(widths, []).append(output)
        parts = []
        for widths, slots in outputs.items():
            edges = [
                (number, edge) for number, o in enumerate(slots) for edge in schedule.groups[o]
            ]
            queries = sorted({edge.query for _, edge in edges})
            sources = sorted({edge.source for _, edge in edges})
            triples = [
                index
                for number, edge in edges
                for index in (queries.index(edge.query), sources.index(edge.source), number)
            ]
            part = Part(
                [self.query[q] for q in queries],
                [self.key[s] for s in sources],
                [self.value[s] for s in sources],
                triples,
                *widths,
            )
            parts.append((part, slots))
        return parts

    def restore(self, outputs: list[Tensor]) -> list[Tensor] | Tensor:
        """Give outputs the spatial shape of their queries, and the caller's structure."""
        given = self.given
        if given is not self.query:  # some are 4-D
            queries = range(len(outputs)) if self.schedule is None else self.schedule.output_queries
            outputs = [
                output if given[q].dim() == 3 else output.unflatten(2, given[q].shape[2:])
                for output, q in zip(outputs, queries, strict=True)
            ]
        return self.unwrap(outputs)

    def unwrap(self, per_output: list[Tensor]) -> list[Tensor] | Tensor:
        """A list with an entry per output in the caller's structure."""
        return per_output[0] if self.single and len(per_output) == 1 else per_output


def check_inputs(
    query: Features, key: Features, value: Features, schedule: Schedule | None
) -> Inputs:
    """Check types, shapes and slot counts; cast under autocast; flatten to (B, C, N).

    Widths are left to :meth:`Inputs.whole` and :meth:`Inputs.by_width`.

    Raises:
        TypeError: for tensors that an operator cannot work on, or of mixed dtypes.
        ValueError: for shapes, devices or numbers of slots that do not fit each other.
    """
    single = isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)
    queries, keys, values = as_list("query", query), as_list("key", key), as_list("value", value)
    first = queries[0]
    check_first("query[0]", first)
    device = first.device.type
    if autocast_dtype(device) is not None:
        queries, keys, values = (
            [cast_for_autocast(x) if isinstance(x, Tensor) else x for x in slots]
            for slots in (queries, keys, values)
        )
        first = queries[0]
    given = queries
    queries, keys, values = flatten(_NAMES, (queries, keys, values), first)
    if schedule is None:
        if not len(queries) == len(keys) == len(values):
            raise ValueError(
                f"query, key, value: got {len(queries)}, {len(keys)} and {len(values)} slots, "
                "expected as many of each where there is no schedule"
            )
    else:
        counts = (schedule.num_queries, schedule.num_sources, schedule.num_sources)
        for name, slots, count in zip(_NAMES, (queries, keys, values), counts, strict=True):
            if len(slots) != count:
                raise ValueError(f"{name}: got {len(slots)} slots, the schedule has {count}")
    for k, v in zip(keys, values, strict=True):
        if k.size(2) != v.size(2):
            slot = next(i for i, x in enumerate(keys) if x is k)
            raise ValueError(
                f"value[{slot}]: got {v.size(2)} tokens, expected {k.size(2)} as key[{slot}] has"
            )
    return Inputs(queries, keys, values, schedule, single, device, given)
