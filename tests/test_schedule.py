"""Schedules: patterns, validation, JSON, pictures."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xattn_kernels.schedule import Edge, Schedule

TASKS = ("semseg", "normals", "edge", "depth")


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Any valid schedule: joint and separate outputs, unused slots and weights."""
    queries = draw(st.integers(1, 5))
    sources = draw(st.integers(1, 5))
    weights = draw(st.integers(1, 4))
    outputs = draw(st.lists(st.integers(0, queries - 1), min_size=1, max_size=6))
    edges = [
        (query, source, output, draw(st.integers(0, weights - 1)))
        for output, query in enumerate(outputs)
        for source in sorted(draw(st.sets(st.integers(0, sources - 1), min_size=1)))
    ]
    return Schedule.from_edges(
        draw(st.permutations(edges)),
        num_queries=queries,
        num_sources=sources,
        num_weights=weights,
        query_names=draw(st.sampled_from([(), tuple(f"q-{i}" for i in range(queries))])),
        source_names=draw(st.sampled_from([(), tuple(f'"{i}" é' for i in range(sources))])),
        allow_self=True,
    )


class TestConstructors:
    @given(st.integers(2, 9))
    def test_cross_task_attends_to_every_other_task(self, tasks: int) -> None:
        schedule = Schedule.cross_task(tasks)
        assert schedule.num_edges == tasks * (tasks - 1)
        assert {(e.query, e.source) for e in schedule.edges} == {
            (t, a) for t in range(tasks) for a in range(tasks) if t != a
        }
        assert [(e.output, e.weight) for e in schedule.edges] == [
            (i, i) for i in range(schedule.num_edges)
        ]
        assert schedule.num_queries == schedule.num_sources == tasks

    def test_cross_task_order(self) -> None:
        pairs = [(e.query, e.source) for e in Schedule.cross_task(3).edges]
        assert pairs == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]

    @given(st.integers(1, 6), st.integers(1, 4))
    def test_auxiliary_tasks_are_sources_only(self, tasks: int, auxiliary: int) -> None:
        schedule = Schedule.cross_task(tasks, auxiliary)
        assert schedule.num_edges == tasks * (tasks - 1 + auxiliary)
        assert (schedule.num_queries, schedule.num_sources) == (tasks, tasks + auxiliary)
        assert {e.query for e in schedule.edges} == set(range(tasks))
        for query in range(tasks):
            sources = [e.source for e in schedule.edges if e.query == query]
            assert sources == [a for a in range(tasks + auxiliary) if a != query]

    @given(st.integers(2, 9))
    def test_cross_scale_attends_to_coarser_scales(self, scales: int) -> None:
        schedule = Schedule.cross_scale(scales)
        assert schedule.num_edges == schedule.num_outputs == scales * (scales - 1) // 2
        assert all(e.source > e.query == e.weight for e in schedule.edges)
        assert len({(e.query, e.source) for e in schedule.edges}) == schedule.num_edges
        assert schedule.num_weights == scales - 1

    def test_cross_scale_order(self) -> None:
        pairs = [(e.query, e.source) for e in Schedule.cross_scale(4).edges]
        assert pairs == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]

    @given(st.integers(1, 4), st.integers(1, 4), st.booleans())
    def test_all_pairs_attends_to_every_other_cell(
        self, tasks: int, scales: int, joint: bool
    ) -> None:
        cells = tasks * scales
        if cells == 1:
            with pytest.raises(ValueError, match="at least 2 cells, got 1 x 1"):
                Schedule.all_pairs(tasks, scales, joint=joint)
            return
        schedule = Schedule.all_pairs(tasks, scales, joint=joint)
        assert schedule.num_edges == cells * (cells - 1)
        assert len({(e.query, e.source) for e in schedule.edges}) == schedule.num_edges
        assert schedule.num_outputs == (cells if joint else schedule.num_edges)
        assert all(e.output == e.weight for e in schedule.edges)
        assert all(e.output == e.query for e in schedule.edges) or not joint

    def test_all_pairs_slots_are_task_major(self) -> None:
        schedule = Schedule.all_pairs(2, 3)
        assert schedule.query_names == ("t0s0", "t0s1", "t0s2", "t1s0", "t1s1", "t1s2")

    def test_identity(self) -> None:
        schedule = Schedule.identity(3)
        assert schedule.edges == (Edge(0, 0, 0, 0), Edge(1, 1, 1, 1), Edge(2, 2, 2, 2))

    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (lambda: Schedule.cross_task(1), "at least 2 tasks, auxiliary ones included, got 1"),
            (lambda: Schedule.cross_task(0), "num_tasks: expected an integer from 1"),
            (lambda: Schedule.cross_task(2, -1), "num_auxiliary: expected an integer from 0"),
            (lambda: Schedule.cross_task(2.0), "num_tasks: .*got 2.0"),  # type: ignore[arg-type]
            (lambda: Schedule.cross_task(True), "num_tasks: .*got True"),
            (lambda: Schedule.cross_scale(1), "at least 2 scales, got 1"),
            (lambda: Schedule.identity(0), "num_slots: .*got 0"),
            (lambda: Schedule.cross_task(2, names=["a"]), "names: expected 2 names, got 1"),
            (lambda: Schedule.cross_task(3, names=["a", "b", "a"]), r"\['a'\] more than once"),
            (lambda: Schedule.cross_task(2, names="ab"), "names: expected a sequence of strings"),
            (lambda: Schedule.cross_scale(2, names=["a", 1]), "sequence of strings"),  # type: ignore[list-item]
        ],
    )
    def test_impossible_patterns_are_refused(self, build: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            build()

    def test_names_reach_their_slots(self) -> None:
        schedule = Schedule.cross_task(2, 1, names=["a", "b", "c"])
        assert schedule.query_names == ("a", "b")
        assert schedule.source_names == ("a", "b", "c")


class TestFromEdges:
    def test_counts_follow_the_largest_slots(self) -> None:
        schedule = Schedule.from_edges([(0, 4, 1, 2), (2, 0, 0, 0)])
        assert (schedule.num_queries, schedule.num_sources) == (3, 5)
        assert (schedule.num_outputs, schedule.num_weights) == (2, 3)

    def test_counts_follow_the_names(self) -> None:
        schedule = Schedule.from_edges(
            [(0, 1, 0, 0)], query_names=["a", "b", "c"], source_names=["a", "b"]
        )
        assert (schedule.num_queries, schedule.num_sources) == (3, 2)

    def test_any_integer_type_is_accepted_and_normalised(self) -> None:
        edges = np.array([[0, 1, 0, 0], [1, 0, 1, 1]], dtype=np.int32)
        schedule = Schedule.from_edges(edges)
        assert schedule == Schedule.from_edges([[0, 1, 0, 0], (1, 0, 1, 1)])
        assert all(type(value) is int for edge in schedule.edges for value in edge)
        assert schedule == Schedule.from_edges(edge for edge in schedule.edges)

    @pytest.mark.parametrize(
        ("edges", "counts", "message"),
        [
            ([(0, 1, 0, 0), (0, 3, 1, 0)], {"num_sources": 3}, r"edge 1 .*source 3 .*0 to 2"),
            ([(0, 1, 0, 0), (2, 1, 1, 0)], {"num_queries": 2}, r"edge 1 .*query 2 .*0 to 1"),
            ([(0, 1, 1, 0)], {"num_outputs": 1}, r"edge 0 .*output 1 .*0 to 0"),
            ([(0, 1, 0, 1)], {"num_weights": 1}, r"edge 0 .*weight 1 .*0 to 0"),
            ([(0, 1, 0, 0), (0, -1, 1, 0)], {}, r"edge 1 .*source -1 out of range"),
            ([(0, 2**40, 0, 0)], {}, r"edge 0 .*source 1099511627776 out of range"),
            ([(0, 1, 0, 0), (1, 0, 1, 0), (0, 1, 0, 0)], {}, "edge 2 .*duplicate of edge 0"),
            ([(0, 1, 0, 0), (0, 1, 0, 1)], {}, "edge 1 .*duplicate of edge 0"),
            ([(0, 1, 0, 0), (1, 1, 1, 1)], {}, "edge 1 .*both slot 1.*allow_self=True"),
            (
                [(0, 1, 0, 0), (1, 0, 0, 0)],
                {},
                "edge 1 .*output slot 0 has query 0 in edge 0.*got 1",
            ),
            ([(0, 1, 1, 0)], {}, "num_outputs: output slot 0 of 2 has no edge"),
            ([(0, 1, 0, 0)], {"num_outputs": 10**9}, "output slot 1 of 1000000000 has no edge"),
            ([(0, 1, 0, 0)], {"num_queries": 0}, "num_queries: .*from 1.*got 0"),
            ([(0, 1, 0, 0)], {"num_queries": 2**31}, "num_queries: .*got 2147483648"),
            ([(0, 1, 0, 0)], {"num_weights": 1.5}, "num_weights: .*got 1.5"),
            ([(0, 1, 0, 0)], {"allow_self": 1}, "allow_self: expected a bool, got 1"),
            (
                [(0, 1, 0, 0)],
                {"query_names": ["a", "b"], "num_queries": 1},
                "query_names: expected",
            ),
            ([(0, 1, 0, 0)], {"source_names": ["a", "a"]}, "source_names: .*more than once"),
            ([(0, 1, 0, 0), (0, 1, 0)], {}, r"edge 1: expected four integers .*got \(0, 1, 0\)"),
            ([(0, 1, 0, 0.0)], {}, "edge 0: expected four integers"),
            ([(0, True, 0, 0)], {}, "edge 0: expected four integers"),
            (["0100"], {}, "edge 0: expected four integers"),
            ([7], {}, "edge 0: expected four integers"),
            (7, {}, "edges: expected an iterable of edges, got 7"),
            ([], {}, "at least one edge"),
        ],
    )
    def test_errors_name_the_edge(self, edges: Any, counts: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Schedule.from_edges(edges, **counts)

    def test_separate_outputs_may_repeat_a_pair(self) -> None:
        schedule = Schedule.from_edges([(0, 1, 0, 0), (0, 1, 1, 0)])
        assert schedule.num_outputs == 2

    def test_self_edges_on_request(self) -> None:
        schedule = Schedule.from_edges([(0, 0, 0, 0), (0, 1, 0, 0)], allow_self=True)
        assert schedule.num_edges == 2


class TestValue:
    @given(schedules())
    def test_equal_hashable_and_copyable(self, schedule: Schedule) -> None:
        for twin in (
            pickle.loads(pickle.dumps(schedule)),
            copy.deepcopy(schedule),
            Schedule.from_json(schedule.to_json()),
        ):
            assert twin == schedule
            assert hash(twin) == hash(schedule)
            assert twin.groups == schedule.groups
            assert twin.edges_flat == schedule.edges_flat

    def test_frozen(self) -> None:
        schedule = Schedule.cross_task(2)
        with pytest.raises(AttributeError):
            schedule.num_queries = 3  # type: ignore[misc]
        schedule.edges_flat[0] = 99
        assert schedule.edges_flat[0] == 0

    def test_different_schedules_differ(self) -> None:
        built = {
            Schedule.cross_task(3),
            Schedule.cross_task(2, 1),
            Schedule.cross_task(3, names=["a", "b", "c"]),
            Schedule.cross_scale(3),
            Schedule.all_pairs(3, 1),
            Schedule.all_pairs(3, 1, joint=False),
        }
        assert len(built) == 6

    @given(schedules())
    def test_flat_forms_and_groups_hold_every_edge(self, schedule: Schedule) -> None:
        flat = np.array(schedule.edges_flat).reshape(-1, 4)
        assert [Edge(*row) for row in flat.tolist()] == list(schedule.edges)
        assert np.array_equal(np.array(schedule.triples_flat).reshape(-1, 3), flat[:, :3])
        assert schedule.num_edges == len(flat)
        assert len(schedule.groups) == schedule.num_outputs
        for output, group in enumerate(schedule.groups):
            assert group == tuple(e for e in schedule.edges if e.output == output)
            assert {e.query for e in group} == {schedule.output_queries[output]}

    @given(schedules(), st.randoms())
    def test_edge_order_does_not_change_the_groups(self, schedule: Schedule, random: Any) -> None:
        edges = list(schedule.edges)
        random.shuffle(edges)
        shuffled = Schedule.from_edges(edges, num_weights=schedule.num_weights, allow_self=True)
        assert list(map(set, shuffled.groups)) == list(map(set, schedule.groups))
        assert shuffled.output_queries == schedule.output_queries


class TestJson:
    @given(schedules())
    def test_round_trip(self, schedule: Schedule) -> None:
        text = schedule.to_json()
        assert Schedule.from_json(text) == schedule
        assert Schedule.from_json(text.encode()) == schedule
        assert Schedule.from_json(json.dumps(json.loads(text))).to_json() == text

    def test_text_is_stable(self) -> None:
        assert json.loads(Schedule.cross_scale(3, names=["a", "b", "c"]).to_json()) == {
            "version": 1,
            "num_queries": 3,
            "num_sources": 3,
            "num_outputs": 3,
            "num_weights": 2,
            "allow_self": False,
            "query_names": ["a", "b", "c"],
            "source_names": ["a", "b", "c"],
            "edges": [[0, 1, 0, 0], [0, 2, 1, 0], [1, 2, 2, 1]],
        }

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{",
            "[" * 100_000,
            "nonsense",
            '{"edges": [1' + "0" * 5000 + "]}",
            b"\xff\xfe\x00",
            None,
        ],
    )
    def test_unparsable_text(self, text: Any) -> None:
        with pytest.raises(ValueError, match="schedule JSON: cannot be parsed"):
            Schedule.from_json(text)

    @pytest.mark.parametrize("text", ["[]", "null", "3", '"a"'])
    def test_not_an_object(self, text: str) -> None:
        with pytest.raises(ValueError, match="schedule JSON: expected an object"):
            Schedule.from_json(text)

    def test_repeated_key(self) -> None:
        text = Schedule.cross_task(2).to_json().replace("{", '{"edges": [],', 1)
        with pytest.raises(ValueError, match=r"keys \['edges'\] occur more than once"):
            Schedule.from_json(text)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"version": 2}, "version 2 is not supported, expected 1"),
            ({"version": "1"}, "version '1' is not supported"),
            ({"version": True}, "version True is not supported"),
            ({"version": ...}, r"missing keys \['version'\]"),
            ({"edges": ...}, r"missing keys \['edges'\]"),
            ({"comment": "hello"}, r"unknown keys \['comment'\]"),
            ({"edges": {"0": 1}}, "edges: expected a list, got dict"),
            ({"query_names": "ab"}, "query_names: expected a list, got str"),
            ({"source_names": [1, 2]}, "source_names: expected a sequence of strings"),
            ({"num_queries": "2"}, "num_queries: .*got '2'"),
            ({"num_queries": None}, "num_queries: .*got None"),
            ({"num_sources": 2.0}, "num_sources: .*got 2.0"),
            ({"allow_self": 0}, "allow_self: expected a bool, got 0"),
            ({"edges": [[0, 1, 0, 0], [1, 0, 1]]}, "edge 1: expected four integers"),
            ({"edges": [[0, 1, 0, 0], [1, 5, 1, 1]]}, "edge 1 .*source 5 out of range"),
        ],
    )
    def test_bad_content(self, change: dict[str, Any], message: str) -> None:
        data = {**json.loads(Schedule.cross_task(2).to_json()), **change}
        text = json.dumps({key: value for key, value in data.items() if value is not ...})
        with pytest.raises(ValueError, match=message):
            Schedule.from_json(text)

    @given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists))
    def test_any_edges_value_is_a_schedule_or_a_value_error(self, edges: Any) -> None:
        data = {**json.loads(Schedule.cross_task(2).to_json()), "edges": edges}
        with pytest.raises(ValueError, match="edge"):
            Schedule.from_json(json.dumps(data))


class TestWidths:
    def test_equal_widths_pass(self) -> None:
        Schedule.cross_task(3).check_widths([8, 8, 8], [8, 8, 8])
        Schedule.identity(2).check_widths([4, 8], [4, 8], [3, 5])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                ([8, 8], [8, 8, 4]),
                "edge 1 .*source slot 2 has 4 channels, expected 8 as query slot 0",
            ),
            (
                ([8, 4], [8, 8, 8]),
                "edge 2 .*source slot 0 has 8 channels, expected 4 as query slot 1",
            ),
            (([8, 8], [8, 8, 8], [2, 3, 4]), "edge 1 .*source slot 2 has 4 channels, expected 3"),
            (([8], [8, 8, 8]), "query_widths: expected 2 entries, got 1"),
            (([8, 8], [8, 8]), "key_widths: expected 3 entries, got 2"),
            (([8, 8], [8, 8, 8], []), "value_widths: expected 3 entries, got 0"),
        ],
    )
    def test_mixed_widths_name_the_edge(self, arguments: Any, message: str) -> None:
        # Output 0 joins sources 1 and 2 for query 0; output 1 is query 1 with source 0.
        schedule = Schedule.from_edges([(0, 1, 0, 0), (0, 2, 0, 0), (1, 0, 1, 1)])
        with pytest.raises(ValueError, match=message):
            schedule.check_widths(*arguments)


class TestPictures:
    def test_text_matrix(self) -> None:
        assert Schedule.cross_task(4, names=TASKS).to_text() == "\n".join(
            [
                "12 edges: 4 queries x 4 sources -> 12 outputs, 12 weights",
                "rows: query, columns: source, cells: output/weight",
                "         semseg  normals   edge  depth",
                "semseg        .      0/0    1/1    2/2",
                "normals     3/3        .    4/4    5/5",
                "edge        6/6      7/7      .    8/8",
                "depth       9/9    10/10  11/11      .",
            ]
        )

    def test_text_list_when_the_matrix_is_too_wide(self) -> None:
        schedule = Schedule.from_edges([(0, 1, 0, 1), (0, 2, 0, 0), (1, 2, 1, 1)])
        assert schedule.to_text(max_width=10) == "\n".join(
            [
                "3 edges: 2 queries x 3 sources -> 2 outputs, 2 weights",
                "output 0, weight 0,1: q0 <- s1, s2",
                "output 1, weight 1: q1 <- s2",
            ]
        )

    @given(schedules(), st.integers(0, 200))
    def test_text_shows_every_output(self, schedule: Schedule, width: int) -> None:
        text = schedule.to_text(width)
        if "rows: query" in text:
            cells = [
                cell for line in text.split("\n")[3:] for cell in line.replace(",", " ").split()
            ]
            shown = sorted(cell for cell in cells if "/" in cell)
            assert shown == sorted(f"{e.output}/{e.weight}" for e in schedule.edges)
            assert max(map(len, text.split("\n")[2:])) <= width
        else:
            assert len(text.split("\n")) == 1 + schedule.num_outputs

    @pytest.mark.parametrize("color", ["output", "weight"])
    def test_plot_draws_one_cell_per_pair(self, color: Any) -> None:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle

        schedule = Schedule.cross_scale(4, names=["1/4", "1/8", "1/16", "1/32"])
        ax = Figure().add_subplot()
        assert schedule.plot(ax, color=color) is ax
        cells = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
        assert len(cells) == 6
        drawn = {(int(c.get_y()), int(c.get_x())): c.get_facecolor() for c in cells}
        assert set(drawn) == {(e.query, e.source) for e in schedule.edges}
        assert len(set(drawn.values())) == (6 if color == "output" else 3)
        assert [label.get_text() for label in ax.get_xticklabels()] == list(schedule.source_names)
        assert {text.get_text() for text in ax.texts} == {
            f"{e.output}/{e.weight}" for e in schedule.edges
        }

    def test_plot_makes_its_own_figure(self) -> None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        ax = Schedule.identity(1).plot()
        ax.figure.canvas.draw()
        assert len(ax.patches) == 1
        plt.close("all")

    def test_plot_refuses_an_unknown_color(self) -> None:
        with pytest.raises(ValueError, match="color: expected 'output' or 'weight', got 'edge'"):
            Schedule.cross_task(2).plot(color="edge")  # type: ignore[arg-type]

    def test_matplotlib_is_imported_only_to_plot(self) -> None:
        code = "import sys, xattn_kernels.schedule; sys.exit('matplotlib' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
