"""Who attends to whom, as data.

A `Schedule` is a list of edges ``(query slot, source slot, output slot, weight id)``. It is the
only place that knows the pattern: operators and kernels see slot numbers and run the whole list.

* A *slot* is the position of one feature map in the list an operator is given. Query and source
  slots count separately; in the constructors below slot ``i`` is the same map on both sides.
* Edges that share an output slot share its query and are normalised *jointly*, as if their sources
  were one concatenated source. Edges with their own output are normalised separately.
* The weight id says which set of projections an edge uses, for the operators that project.

Patterns: `Schedule.cross_task` and `Schedule.cross_scale` are the cross-task and cross-scale
attention (CTAM, CSAM) of Kim, Choi, Min, "Sequential Cross Attention Based Multi-task Learning"
(arXiv 2209.02518); `Schedule.all_pairs` is the naive baseline they replace. Everything else comes
from `Schedule.from_edges` or `Schedule.from_json`.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

JSON_VERSION = 1
_JSON_COUNTS = ("num_queries", "num_sources", "num_outputs", "num_weights")
_JSON_NAMES = ("query_names", "source_names")
_JSON_KEYS = ("version", *_JSON_COUNTS, "allow_self", *_JSON_NAMES, "edges")
_MAX_SLOTS = 2**31 - 1  # kernels hold slot numbers in int32


class Edge(NamedTuple):
    """One attention: `query` reads `source` with projections `weight`, into `output`."""

    query: int
    source: int
    output: int
    weight: int


@dataclass(frozen=True)
class Schedule:
    """Immutable, hashable, validated list of edges.

    Args:
        edges: `Edge` values, or sequences of four integers. At least one.
        num_queries: Number of query slots; slots without an edge are allowed.
        num_sources: Number of source slots; slots without an edge are allowed.
        num_outputs: Number of output slots; each needs an edge.
        num_weights: Number of projection sets; sets without an edge are allowed.
        query_names: One name per query slot, or empty.
        source_names: One name per source slot, or empty.
        allow_self: Whether an edge may have ``query == source``. False (the default) fits schedules
            whose query slot i and source slot i are the same map that must not attend to itself.

    Raises:
        ValueError: If an edge has a slot out of range, repeats the query, source and output of an
            earlier edge, is a self-edge that is not allowed, or gives an output a second query
            (the message names the edge number); if an output has no edge; if counts or names are
            invalid.
    """

    edges: tuple[Edge, ...]
    num_queries: int
    num_sources: int
    num_outputs: int
    num_weights: int
    query_names: tuple[str, ...] = ()
    source_names: tuple[str, ...] = ()
    allow_self: bool = False
    groups: tuple[tuple[Edge, ...], ...] = field(init=False, repr=False, compare=False)
    """The edges of each output slot, in schedule order."""
    _flat: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _triples: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        counts = {name: _count(name, getattr(self, name)) for name in _JSON_COUNTS}
        if not isinstance(self.allow_self, bool):
            raise ValueError(f"allow_self: expected a bool, got {self.allow_self!r}")
        edges = _as_edges(self.edges)
        _check_edges(edges, counts, self.allow_self)
        groups: list[list[Edge]] = [[] for _ in range(counts["num_outputs"])]
        for edge in edges:
            groups[edge.output].append(edge)
        normalised: dict[str, Any] = {
            **counts,
            "edges": edges,
            "query_names": _names("query_names", self.query_names, counts["num_queries"]),
            "source_names": _names("source_names", self.source_names, counts["num_sources"]),
            "groups": tuple(tuple(group) for group in groups),
            "_flat": tuple(value for edge in edges for value in edge),
            "_triples": tuple(value for edge in edges for value in edge[:3]),
        }
        for name, value in normalised.items():
            object.__setattr__(self, name, value)

    # Constructors

    @classmethod
    def cross_task(
        cls,
        num_tasks: int,
        num_auxiliary: int = 0,
        *,
        names: Sequence[str] | None = None,
    ) -> Schedule:
        """Every target task attends to every other task, at one scale.

        Slots 0..T-1 are the target tasks, T..T+A-1 auxiliary tasks, which are sources only. One
        edge per ordered pair (target, other), with its own output and its own weight id, both equal
        to the edge number. Order: target by target, others ascending. T(T-1) + T*A edges.

        Args:
            num_tasks: T, number of target tasks.
            num_auxiliary: A, number of tasks that are attended to but do not attend.
            names: T + A task names, targets first.

        Raises:
            ValueError: If a target has no other task to attend to (T = 1 without auxiliary tasks).
        """
        tasks = _count("num_tasks", num_tasks)
        auxiliary = _count("num_auxiliary", num_auxiliary, minimum=0)
        total = tasks + auxiliary
        if total < 2:
            raise ValueError(
                f"num_tasks: cross-task attention needs at least 2 tasks, auxiliary ones included, "
                f"got {total}"
            )
        slots = _names("names", names or (), total)
        pairs = [(t, a) for t in range(tasks) for a in range(total) if a != t]
        return cls(
            edges=tuple(Edge(t, a, number, number) for number, (t, a) in enumerate(pairs)),
            num_queries=tasks,
            num_sources=total,
            num_outputs=len(pairs),
            num_weights=len(pairs),
            query_names=slots[:tasks],
            source_names=slots,
        )

    @classmethod
    def cross_scale(cls, num_scales: int, *, names: Sequence[str] | None = None) -> Schedule:
        """Every scale attends to every coarser scale, for one task.

        Slots 0..S-1 are the scales, 0 the finest. One edge (s <- r) for each r > s, with its own
        output (the edge number) and the weight id of its target scale s, so that the sources of a
        target share its projections. Order: s ascending, then r. S(S-1)/2 edges.

        Raises:
            ValueError: If S < 2: there is no coarser scale to attend to.
        """
        scales = _count("num_scales", num_scales)
        if scales < 2:
            raise ValueError(
                f"num_scales: cross-scale attention needs at least 2 scales, got {scales}"
            )
        slots = _names("names", names or (), scales)
        pairs = [(s, r) for s in range(scales) for r in range(s + 1, scales)]
        return cls(
            edges=tuple(Edge(s, r, number, s) for number, (s, r) in enumerate(pairs)),
            num_queries=scales,
            num_sources=scales,
            num_outputs=len(pairs),
            num_weights=scales - 1,
            query_names=slots,
            source_names=slots,
        )

    @classmethod
    def all_pairs(cls, num_tasks: int, num_scales: int, *, joint: bool = True) -> Schedule:
        """Every (task, scale) cell attends to every other cell: the naive baseline.

        Slot ``t * S + s`` is task t at scale s, named ``"t{t}s{s}"``. TS(TS-1) edges, ordered by
        query, then by source.

        Args:
            num_tasks: T.
            num_scales: S.
            joint: True: one output and one weight id per query cell, its sources normalised
                jointly. False: one output and one weight id per edge.

        Raises:
            ValueError: If T * S < 2: there is no other cell.
        """
        tasks = _count("num_tasks", num_tasks)
        scales = _count("num_scales", num_scales)
        cells = tasks * scales
        if cells < 2:
            raise ValueError(
                f"num_tasks, num_scales: all-pairs attention needs at least 2 cells, "
                f"got {tasks} x {scales} = {cells}"
            )
        pairs = [(q, k) for q in range(cells) for k in range(cells) if q != k]
        slots = tuple(f"t{t}s{s}" for t in range(tasks) for s in range(scales))
        groups = [q if joint else number for number, (q, _) in enumerate(pairs)]
        return cls(
            edges=tuple(Edge(q, k, o, o) for (q, k), o in zip(pairs, groups, strict=True)),
            num_queries=cells,
            num_sources=cells,
            num_outputs=cells if joint else len(pairs),
            num_weights=cells if joint else len(pairs),
            query_names=slots,
            source_names=slots,
        )

    @classmethod
    def identity(cls, num_slots: int) -> Schedule:
        """Output i is query i attending to source i; weight id i."""
        slots = _count("num_slots", num_slots)
        return cls(
            edges=tuple(Edge(i, i, i, i) for i in range(slots)),
            num_queries=slots,
            num_sources=slots,
            num_outputs=slots,
            num_weights=slots,
            allow_self=True,
        )

    @classmethod
    def from_edges(
        cls,
        edges: Iterable[Sequence[int]],
        *,
        num_queries: int | None = None,
        num_sources: int | None = None,
        num_outputs: int | None = None,
        num_weights: int | None = None,
        query_names: Sequence[str] = (),
        source_names: Sequence[str] = (),
        allow_self: bool = False,
    ) -> Schedule:
        """Schedule from ``(query, source, output, weight)`` quadruples.

        Counts that are not given follow from the names, where given, else from the largest slot.

        Raises:
            ValueError: As for `Schedule`.
        """
        listed = _as_edges(edges)
        given = (num_queries, num_sources, num_outputs, num_weights)
        named = (len(query_names), len(source_names), 0, 0)
        counts = {
            argument: count if count is not None else names or _slots_used(listed, i)
            for i, (argument, count, names) in enumerate(
                zip(_JSON_COUNTS, given, named, strict=True)
            )
        }
        return cls(
            edges=listed,
            **counts,
            query_names=tuple(query_names),
            source_names=tuple(source_names),
            allow_self=allow_self,
        )

    # JSON

    def to_json(self) -> str:
        """Versioned JSON text, one edge a line; `from_json` gives back an equal schedule."""
        head = {
            "version": JSON_VERSION,
            **{name: getattr(self, name) for name in _JSON_COUNTS},
            "allow_self": self.allow_self,
            **{name: list(getattr(self, name)) for name in _JSON_NAMES},
        }
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
        edges = ",\n".join(f"    {json.dumps(list(edge))}" for edge in self.edges)
        return "\n".join(["{", *lines, '  "edges": [', edges, "  ]", "}"])

    @classmethod
    def from_json(cls, text: str | bytes) -> Schedule:
        """Schedule from the text `to_json` writes.

        The object has exactly the keys ``version`` (1), ``num_queries``, ``num_sources``,
        ``num_outputs``, ``num_weights``, ``allow_self``, ``query_names``, ``source_names`` and
        ``edges`` (a list of ``[query, source, output, weight]``).

        Raises:
            ValueError: If the text is not JSON, a key is missing, unknown or repeated, a value has
                the wrong type, the version is another one, or the schedule is invalid.
        """
        try:
            data = json.loads(text, object_pairs_hook=_object_without_repeats)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"schedule JSON: cannot be parsed: {error}") from error
        if not isinstance(data, dict):
            raise ValueError(f"schedule JSON: expected an object, got {type(data).__name__}")
        if "version" in data and (data["version"] != JSON_VERSION or _not_int(data["version"])):
            raise ValueError(
                f"schedule JSON: version {data['version']!r} is not supported, "
                f"expected {JSON_VERSION}"
            )
        missing = [key for key in _JSON_KEYS if key not in data]
        unknown = [key for key in data if key not in _JSON_KEYS]
        if missing or unknown:
            raise ValueError(f"schedule JSON: missing keys {missing}, unknown keys {unknown}")
        for key in (*_JSON_NAMES, "edges"):
            if not isinstance(data[key], list):
                raise ValueError(
                    f"schedule JSON: {key}: expected a list, got {type(data[key]).__name__}"
                )
        return cls(**{key: data[key] for key in _JSON_KEYS if key != "version"})

    # Views

    @property
    def num_edges(self) -> int:
        """Number of edges, E."""
        return len(self.edges)

    @property
    def edges_flat(self) -> list[int]:
        """4E integers (query, source, output, weight per edge), for operators that project."""
        return list(self._flat)

    @property
    def triples_flat(self) -> list[int]:
        """3E integers (query, source, output per edge), for operators without weights."""
        return list(self._triples)

    @property
    def output_queries(self) -> tuple[int, ...]:
        """The query slot of each output slot."""
        return tuple(group[0].query for group in self.groups)

    def check_widths(
        self,
        query_widths: Sequence[int],
        key_widths: Sequence[int],
        value_widths: Sequence[int] | None = None,
    ) -> None:
        """Check that every output group has one width.

        Args:
            query_widths: Channels of the map in each query slot.
            key_widths: Channels of the key in each source slot.
            value_widths: Channels of the value in each source slot; None: same as the keys.

        Raises:
            ValueError: If a list does not have one entry per slot, if a key is not as wide as its
                query, or if values of one output group differ in width. Names the edge number.
        """
        values = key_widths if value_widths is None else value_widths
        for name, widths, slots in (
            ("query_widths", query_widths, self.num_queries),
            ("key_widths", key_widths, self.num_sources),
            ("value_widths", values, self.num_sources),
        ):
            if len(widths) != slots:
                raise ValueError(f"{name}: expected {slots} entries, got {len(widths)}")
        for number, edge in enumerate(self.edges):
            expected = query_widths[edge.query]
            if key_widths[edge.source] != expected:
                raise ValueError(
                    f"edge {number} {tuple(edge)}: key of source slot {edge.source} has "
                    f"{key_widths[edge.source]} channels, expected {expected} as query slot "
                    f"{edge.query}"
                )
            first = self.groups[edge.output][0].source
            if values[edge.source] != values[first]:
                raise ValueError(
                    f"edge {number} {tuple(edge)}: value of source slot {edge.source} has "
                    f"{values[edge.source]} channels, expected {values[first]} as the other "
                    f"sources of output slot {edge.output}"
                )

    def to_text(self, max_width: int = 120) -> str:
        """Text picture of who attends to whom.

        A matrix of query rows and source columns with ``output/weight`` in the cells, or, where
        that is wider than `max_width` characters, a list with one line per output slot.
        """
        head = (
            f"{self.num_edges} edges: {self.num_queries} queries x {self.num_sources} sources "
            f"-> {self.num_outputs} outputs, {self.num_weights} weights"
        )
        matrix = self._matrix_lines()
        if max(map(len, matrix)) <= max_width:
            return "\n".join([head, "rows: query, columns: source, cells: output/weight", *matrix])
        return "\n".join([head, *self._list_lines()])

    def plot(
        self, ax: Axes | None = None, *, color: Literal["output", "weight"] = "output"
    ) -> Axes:
        """Draw the query x source grid, coloured by output slot or weight id.

        Cells carry ``output/weight``; cells of one colour are normalised jointly (`color` is
        "output") or share their projections ("weight"). Needs matplotlib.

        Args:
            ax: Axes to draw into; None: those of a new figure.
            color: What the colours tell apart.

        Returns:
            The axes.
        """
        if color not in ("output", "weight"):
            raise ValueError(f"color: expected 'output' or 'weight', got {color!r}")
        import matplotlib
        from matplotlib.patches import Rectangle

        rows, columns = self.num_queries, self.num_sources
        if ax is None:
            import matplotlib.pyplot as plt

            size = (2.0 + 0.55 * columns, 1.6 + 0.5 * rows)
            ax = plt.subplots(figsize=size, layout="constrained")[1]
        palette = matplotlib.colormaps["turbo"]
        span = max(self.num_outputs if color == "output" else self.num_weights, 2) - 1
        for (query, source), edges in self._cells().items():
            shade = palette(0.08 + 0.84 * getattr(edges[0], color) / span)
            luminance = 0.299 * shade[0] + 0.587 * shade[1] + 0.114 * shade[2]
            ax.add_patch(Rectangle((source, query), 1, 1, facecolor=shade, edgecolor="white"))
            ax.text(
                source + 0.5,
                query + 0.5,
                "\n".join(f"{edge.output}/{edge.weight}" for edge in edges),
                ha="center",
                va="center",
                fontsize=8 if self.num_edges < 100 else 5,
                color="black" if luminance > 0.5 else "white",
            )
        ax.set_xlim(0, columns)
        ax.set_ylim(rows, 0)
        ax.set_aspect("equal")
        ax.set_xticks([i + 0.5 for i in range(columns)], self._labels("source"), rotation=45)
        ax.set_yticks([i + 0.5 for i in range(rows)], self._labels("query"))
        ax.tick_params(length=0)
        ax.set_xlabel("source")
        ax.set_ylabel("query")
        ax.set_title(f"{self.num_edges} edges (output/weight)")
        return ax

    def _labels(self, side: Literal["query", "source"]) -> list[str]:
        names = self.query_names if side == "query" else self.source_names
        slots = self.num_queries if side == "query" else self.num_sources
        return list(names) or [f"{side[0]}{i}" for i in range(slots)]

    def _cells(self) -> dict[tuple[int, int], list[Edge]]:
        cells: dict[tuple[int, int], list[Edge]] = {}
        for edge in self.edges:
            cells.setdefault((edge.query, edge.source), []).append(edge)
        return cells

    def _matrix_lines(self) -> list[str]:
        cells = self._cells()
        rows = [["", *self._labels("source")]]
        for query, label in enumerate(self._labels("query")):
            attended = [cells.get((query, source), []) for source in range(self.num_sources)]
            texts = [",".join(f"{e.output}/{e.weight}" for e in edges) for edges in attended]
            rows.append([label, *(text or "." for text in texts)])
        widths = [max(len(row[i]) for row in rows) for i in range(self.num_sources + 1)]
        return [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]

    def _list_lines(self) -> list[str]:
        queries, sources = self._labels("query"), self._labels("source")
        lines = []
        for output, group in enumerate(self.groups):
            weights = ",".join(str(weight) for weight in sorted({e.weight for e in group}))
            attended = ", ".join(sources[e.source] for e in group)
            lines.append(
                f"output {output}, weight {weights}: {queries[group[0].query]} <- {attended}"
            )
        return lines


def _not_int(value: object) -> bool:
    return isinstance(value, bool) or not hasattr(value, "__index__")


def _count(name: str, value: Any, minimum: int = 1) -> int:
    if _not_int(value) or not minimum <= value <= _MAX_SLOTS:
        raise ValueError(
            f"{name}: expected an integer from {minimum} to {_MAX_SLOTS}, got {value!r}"
        )
    return operator.index(value)


def _names(argument: str, names: Sequence[str], slots: int) -> tuple[str, ...]:
    listed = tuple(names)
    if isinstance(names, str) or any(not isinstance(name, str) for name in listed):
        raise ValueError(f"{argument}: expected a sequence of strings, got {names!r}")
    if listed and len(listed) != slots:
        raise ValueError(f"{argument}: expected {slots} names, got {len(listed)}")
    repeated = sorted({name for name in listed if listed.count(name) > 1})
    if repeated:
        raise ValueError(f"{argument}: expected different names, got {repeated} more than once")
    return listed


def _as_edges(edges: Iterable[Sequence[int]]) -> tuple[Edge, ...]:
    if not isinstance(edges, Iterable):
        raise ValueError(f"edges: expected an iterable of edges, got {edges!r}")
    listed = []
    for number, edge in enumerate(edges):
        values = list(edge) if isinstance(edge, Iterable) else None
        if values is None or len(values) != 4 or any(map(_not_int, values)):
            raise ValueError(
                f"edge {number}: expected four integers (query, source, output, weight), "
                f"got {edge!r}"
            )
        listed.append(Edge(*map(operator.index, values)))
    if not listed:
        raise ValueError("edges: expected at least one edge, got none")
    return tuple(listed)


def _slots_used(edges: Sequence[Edge], position: int) -> int:
    # Within the valid counts whatever the edges hold, so that the error names the bad edge.
    return min(max(0, *(edge[position] for edge in edges)), _MAX_SLOTS - 1) + 1


def _check_edges(edges: Sequence[Edge], counts: dict[str, int], allow_self: bool) -> None:
    seen: dict[tuple[int, int, int], int] = {}
    first_of_output: dict[int, int] = {}
    for number, edge in enumerate(edges):
        where = f"edge {number} {tuple(edge)}"
        for name, slot, count in zip(Edge._fields, edge, counts.values(), strict=True):
            if not 0 <= slot < count:
                raise ValueError(f"{where}: {name} {slot} out of range, expected 0 to {count - 1}")
        if edge.query == edge.source and not allow_self:
            raise ValueError(
                f"{where}: query and source are both slot {edge.query}; self-edges need "
                f"allow_self=True"
            )
        # The weight id does not tell edges apart: a source counts once in a joint normalisation.
        earlier = seen.setdefault(edge[:3], number)
        if earlier != number:
            raise ValueError(
                f"{where}: duplicate of edge {earlier}, expected each (query, source, output) once"
            )
        first = first_of_output.setdefault(edge.output, number)
        if edges[first].query != edge.query:
            raise ValueError(
                f"{where}: output slot {edge.output} has query {edges[first].query} in edge "
                f"{first}, expected one query per output, got {edge.query}"
            )
    if len(first_of_output) < counts["num_outputs"]:
        # Bounded by the number of edges, however large the count that was asked for.
        empty = next(slot for slot in range(len(edges) + 1) if slot not in first_of_output)
        raise ValueError(
            f"num_outputs: output slot {empty} of {counts['num_outputs']} has no edge, expected at "
            f"least one for each"
        )


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    repeated = sorted({key for key in keys if keys.count(key) > 1})
    if repeated:
        raise ValueError(f"keys {repeated} occur more than once")
    return dict(pairs)
