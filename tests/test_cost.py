"""Cost model: the published figures, and properties of the formulas."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xattn_kernels import cost
from xattn_kernels.cost import (
    NYUD_V2,
    PASCAL_CONTEXT,
    Cost,
    MapSize,
    Traffic,
    aggregation_head_flops,
    all_pairs_cost,
    attention_cost,
    comparison,
    cross_scale_cost,
    cross_task_cost,
    fuse_block_flops,
    fused_traffic,
    op_by_op_traffic,
    pyramid,
    rewrite_savings_flops,
    sequential_cost,
)
from xattn_kernels.schedule import Schedule

SIZES = st.builds(MapSize, st.integers(0, 500), st.integers(1, 40))
PYRAMIDS = st.lists(SIZES, min_size=2, max_size=4)


class TestPublishedTable:
    """GFLOP and GiB to the digits printed; pairs exactly."""

    @pytest.mark.parametrize(
        ("setting", "pattern", "pairs", "softmax", "scores", "linear"),
        [
            (NYUD_V2, "cross-task", 48, "727.8", "8.79", "16.72"),
            (NYUD_V2, "cross-scale", 24, "78.8", "0.96", "4.72"),
            (NYUD_V2, "sequential", 72, "806.6", "9.75", "21.44"),
            (NYUD_V2, "all pairs", 240, "1872.5", "16.45", "411.4"),
            (PASCAL_CONTEXT, "sequential", 110, "955.0", "11.54", "28.81"),
            (PASCAL_CONTEXT, "all pairs", 380, "2185.7", "19.38", "550.0"),
        ],
    )
    def test_row(
        self,
        setting: cost.Setting,
        pattern: str,
        pairs: int,
        softmax: str,
        scores: str,
        linear: str,
    ) -> None:
        row = comparison(setting)[pattern]

        def printed(value: float, like: str) -> str:
            return f"{value:.{len(like.split('.')[1])}f}"

        assert row.pairs == pairs
        assert printed(row.softmax_core_flops / 1e9, softmax) == softmax
        assert printed(row.score_bytes / 2**30, scores) == scores
        assert printed(row.linear_flops / 1e9, linear) == linear

    def test_settings(self) -> None:
        assert NYUD_V2.sizes == ((19200, 36), (4800, 72), (1200, 144), (300, 288))
        assert PASCAL_CONTEXT.sizes == ((16384, 36), (4096, 72), (1024, 144), (256, 288))

    def test_one_edge_is_14_c2_n(self) -> None:
        row = attention_cost(Schedule.cross_task(2), [(100, 8)] * 2)
        assert row.linear_flops == 2 * 14 * 8**2 * 100


class TestRewrites:
    def test_fuse_block(self) -> None:
        flops = [fuse_block_flops(4, NYUD_V2.sizes, folded=folded) for folded in (False, True)]
        assert [f"{value / 1e9:.1f}" for value in flops] == ["54.9", "39.0"]

    def test_aggregation_head(self) -> None:
        flops = [
            aggregation_head_flops(4, NYUD_V2.sizes),
            aggregation_head_flops(4, NYUD_V2.sizes, per_scale=True),
            aggregation_head_flops(4, NYUD_V2.sizes, per_scale=True, folded=True),
        ]
        assert [f"{value / 1e9:.1f}" for value in flops] == ["179.2", "51.5", "36.6"]

    def test_network(self) -> None:
        # 170.7 GMAC published for the whole network; two thirds of the savings are the heads'.
        total = 2 * 170.7e9
        saved = rewrite_savings_flops(4, NYUD_V2.sizes)
        assert f"{(total - saved) / 1e9:.1f}" == "182.9"
        assert saved == pytest.approx((54.9 - 39.0 + 179.2 - 36.6) * 1e9, rel=1e-3)

    def test_classifier(self) -> None:
        extra = aggregation_head_flops(1, NYUD_V2.sizes, num_outputs=40) - aggregation_head_flops(
            1, NYUD_V2.sizes
        )
        assert extra == 2 * 1080 * 40 * 19200

    def test_folding_at_full_resolution(self) -> None:
        assert aggregation_head_flops(1, NYUD_V2.sizes, folded=True) == (
            2 * 1080 * 19200 * (4 * 36 + 3 * 72 + 2 * 144 + 288)
        )

    def test_one_scale_has_nothing_to_fold(self) -> None:
        flops = [
            aggregation_head_flops(1, [(10, 8)], per_scale=flag, folded=flag)
            for flag in (False, True)
        ]
        assert flops == [2 * 8 * 8 * 10] * 2

    @given(st.integers(1, 6), st.integers(0, 3), PYRAMIDS)
    def test_auxiliary_tasks_widen_the_fuse_block(
        self, tasks: int, auxiliary: int, sizes: list[MapSize]
    ) -> None:
        others = tasks - 1 + auxiliary
        if others == 0:
            with pytest.raises(ValueError, match=r"at least 2 tasks, .* got 1"):
                fuse_block_flops(tasks, sizes, num_auxiliary=auxiliary)
            return
        macs = sum(n * c**2 for n, c in sizes)
        for folded, maps in ((False, 2 * others), (True, others + 1)):
            flops = fuse_block_flops(tasks, sizes, num_auxiliary=auxiliary, folded=folded)
            assert flops == 2 * tasks * (9 * maps + 9 + maps) * macs

    @given(st.integers(2, 5), PYRAMIDS)
    def test_folding_never_costs_more(self, tasks: int, sizes: list[MapSize]) -> None:
        assert fuse_block_flops(tasks, sizes, folded=True) <= fuse_block_flops(tasks, sizes)
        whole = aggregation_head_flops(tasks, sizes)
        assert aggregation_head_flops(tasks, sizes, folded=True) <= whole


class TestAttentionCost:
    def test_formulas_of_one_edge(self) -> None:
        schedule = Schedule.from_edges([(0, 0, 0, 0)], allow_self=True)
        row = attention_cost(schedule, [(7, 5)], [(11, 3)], batch=2, dtype_bytes=4, heads=3)
        assert row == Cost(
            pairs=1,
            softmax_core_flops=2 * 4 * 7 * 11 * 5,
            linear_core_flops=2 * 2 * 5**2 * (7 + 11),
            projection_flops=2 * (4 * 7 * 5**2 + 6 * 11 * 5**2),
            adapter_flops=2 * 2 * 11 * 3 * 5,
            score_bytes=2 * 4 * 3 * 7 * 11,
            state_bytes=2 * 4 * 5 * 6,
            input_bytes=2 * 4 * (7 * 5 + 11 * 3),
            output_bytes=2 * 4 * 7 * 5,
        )
        assert row.linear_flops == (
            row.linear_core_flops + row.projection_flops + row.adapter_flops
        )
        assert row.softmax_flops == (
            row.softmax_core_flops + row.projection_flops + row.adapter_flops
        )

    def test_shared_slots_are_one_input(self) -> None:
        # Slot 0 is query and source, slot 1 a source, slot 2 a query, slot 3 unused.
        schedule = Schedule.from_edges([(0, 1, 0, 0), (2, 0, 1, 0)], num_queries=4, num_sources=4)
        sizes = [(1, 2), (3, 4), (5, 6), (7, 8)]
        assert attention_cost(schedule, sizes).input_bytes == 2 * (2 + 12 + 30)
        assert attention_cost(schedule, sizes, sizes).input_bytes == 2 * (2 + 30 + 2 + 12)

    def test_shared_query_projections(self) -> None:
        schedule = Schedule.cross_scale(3)
        sizes = [(16, 4), (8, 4), (2, 4)]
        apart = attention_cost(schedule, sizes)
        shared = attention_cost(schedule, sizes, share_queries=True)
        assert apart.projection_flops - shared.projection_flops == 4 * 16 * 4**2
        assert apart.linear_core_flops == shared.linear_core_flops

    def test_a_joint_output_applies_its_state_once_when_shared(self) -> None:
        sizes = [(5, 4)] * 3
        joint = Schedule.all_pairs(3, 1)
        apart = attention_cost(joint, sizes)
        shared = attention_cost(joint, sizes, share_queries=True)
        assert apart.linear_core_flops - shared.linear_core_flops == 3 * 2 * 4**2 * 5
        assert apart.projection_flops - shared.projection_flops == 3 * 4 * 5 * 4**2

    @given(st.integers(2, 5), PYRAMIDS)
    def test_sequential_is_the_sum_of_its_passes(self, tasks: int, sizes: list[MapSize]) -> None:
        scales = len(sizes)
        total = sequential_cost(tasks, sizes)
        assert total == cross_task_cost(tasks, sizes) + cross_scale_cost(tasks, sizes)
        assert total.pairs == scales * tasks * (tasks - 1) + tasks * scales * (scales - 1) // 2
        everyone = all_pairs_cost(tasks, sizes)
        assert everyone.pairs == tasks * scales * (tasks * scales - 1)
        assert total.softmax_core_flops <= everyone.softmax_core_flops
        assert total.linear_flops <= everyone.linear_flops

    @given(st.integers(2, 4), SIZES, st.integers(0, 3), st.integers(1, 8))
    def test_batch_and_element_size(
        self, tasks: int, size: MapSize, batch: int, element: int
    ) -> None:
        schedule = Schedule.cross_task(tasks)
        one = attention_cost(schedule, [size] * tasks, dtype_bytes=1)
        many = attention_cost(schedule, [size] * tasks, batch=batch, dtype_bytes=element)
        assert many.pairs == one.pairs
        assert many.linear_flops == batch * one.linear_flops
        assert many.softmax_flops == batch * one.softmax_flops
        assert many.score_bytes == batch * element * one.score_bytes
        assert many.output_bytes == batch * element * one.output_bytes
        assert many.state_bytes == batch * one.state_bytes

    @given(st.integers(2, 5), SIZES, st.randoms())
    def test_edge_order_does_not_matter(self, tasks: int, size: MapSize, random: Any) -> None:
        schedule = Schedule.cross_task(tasks)
        edges = list(schedule.edges)
        random.shuffle(edges)
        assert attention_cost(Schedule.from_edges(edges), [size] * tasks) == attention_cost(
            schedule, [size] * tasks
        )

    @given(st.permutations(range(3)), st.lists(SIZES, min_size=3, max_size=3))
    def test_renumbering_slots_does_not_matter(
        self, order: list[int], sizes: list[MapSize]
    ) -> None:
        schedule = Schedule.cross_scale(3)
        renumbered = Schedule.from_edges(
            [(order[e.query], order[e.source], e.output, e.weight) for e in schedule.edges],
            num_queries=3,
            num_sources=3,
        )
        moved = [sizes[order.index(slot)] for slot in range(3)]
        assert attention_cost(renumbered, moved) == attention_cost(schedule, sizes)

    def test_auxiliary_tasks(self) -> None:
        row = cross_task_cost(2, [(10, 4), (5, 8)], num_auxiliary=1)
        assert row.pairs == 2 * 2 * 2
        assert row.linear_flops == 2 * 2 * 14 * (4**2 * 10 + 8**2 * 5)

    def test_costs_multiply(self) -> None:
        row = cross_scale_cost(1, NYUD_V2.sizes)
        assert row * 4 == row + row + row + row == cross_scale_cost(4, NYUD_V2.sizes)


class TestTraffic:
    @pytest.mark.parametrize(
        ("scale", "megabytes"), [(0, "222"), (1, "115"), (2, "74"), (3, "102")]
    )
    def test_fused_cross_task(self, scale: int, megabytes: str) -> None:
        # The H200 roofline of the fused block: batch 8, T = 4, bf16, fp32 states.
        sizes = [NYUD_V2.sizes[scale]] * 4
        traffic = fused_traffic(Schedule.cross_task(4), sizes, batch=8)
        assert f"{traffic.total / 1e6:.0f}" == megabytes

    def test_fused_cross_scale(self) -> None:
        traffic = fused_traffic(Schedule.cross_scale(4), NYUD_V2.sizes, batch=8)
        assert 4 * traffic.total == pytest.approx(335e6, rel=0.01)

    def test_op_by_op_cross_task(self) -> None:
        sizes = [NYUD_V2.sizes[0]] * 4
        traffic = op_by_op_traffic(Schedule.cross_task(4), sizes, batch=8)
        assert traffic.total == pytest.approx(5e9, rel=0.02)

    def test_fused_reads_each_map_once_a_pass(self) -> None:
        schedule = Schedule.cross_task(3)
        traffic = fused_traffic(schedule, [(10, 4)] * 3, dtype_bytes=2, state_dtype_bytes=8)
        state = 6 * 4 * 5 * 8
        assert traffic == Traffic(
            bytes_read=2 * (2 * 3 * 10 * 4 + 6 * 5 * 4**2) + state,
            bytes_written=2 * 6 * 10 * 4 + state,
        )

    def test_fused_reads_a_source_once_per_target_width(self) -> None:
        # Targets 0 and 1 have different widths, so two launches read source 2.
        schedule = Schedule.from_edges([(0, 2, 0, 0), (1, 2, 1, 1)])
        traffic = fused_traffic(schedule, [(10, 2), (10, 4), (100, 2)], state_dtype_bytes=1)
        weights = 5 * (2**2 + 4**2) + 2 * 4
        assert traffic.bytes_read == 2 * (10 * 2 + 10 * 4 + 2 * 100 * 2 + weights) + 6 + 20

    def test_op_by_op_formulas_of_one_edge(self) -> None:
        schedule = Schedule.from_edges([(0, 0, 0, 0)], allow_self=True)
        linear = op_by_op_traffic(schedule, [(7, 5)], [(11, 3)], dtype_bytes=1)
        softmax = op_by_op_traffic(
            schedule, [(7, 5)], [(11, 3)], batch=2, dtype_bytes=4, kind="softmax"
        )
        weights = 5 * 5**2 + 3 * 5
        adapter_read, adapter_written = 11 * 3 + 11 * 5, 2 * 11 * 5
        assert linear == Traffic(
            9 * 7 * 5 + 12 * 11 * 5 + 2 * 7 + 30 + adapter_read + weights,
            8 * 7 * 5 + 9 * 11 * 5 + 2 * 7 + 30 + adapter_written,
        )
        assert softmax == Traffic(
            4 * (2 * (7 * 7 * 5 + 11 * 11 * 5 + 2 * 7 * 11 + adapter_read) + weights),
            4 * 2 * (7 * 7 * 5 + 9 * 11 * 5 + 2 * 7 * 11 + adapter_written),
        )

    @given(st.integers(2, 5), st.builds(MapSize, st.integers(1, 500), st.integers(1, 40)))
    def test_fused_moves_less(self, tasks: int, size: MapSize) -> None:
        schedule = Schedule.cross_task(tasks)
        fused = fused_traffic(schedule, [size] * tasks, state_dtype_bytes=2)
        assert fused.total < op_by_op_traffic(schedule, [size] * tasks).total
        assert fused.total == fused.bytes_read + fused.bytes_written

    def test_kind_is_checked(self) -> None:
        with pytest.raises(ValueError, match="kind: expected 'linear' or 'softmax', got 'cosine'"):
            op_by_op_traffic(Schedule.cross_task(2), [(1, 1)] * 2, kind="cosine")  # type: ignore[arg-type]


class TestErrors:
    def test_pyramid(self) -> None:
        assert pyramid((64, 96), strides=(8, 16), widths=(3, 5)) == ((96, 3), (24, 5))
        with pytest.raises(ValueError, match="multiples of stride 32, got 480 x 650"):
            pyramid((480, 650), strides=(2, 32), widths=(1, 1))
        with pytest.raises(ValueError, match="widths: expected 4 entries as strides, got 1"):
            pyramid((64, 64), widths=(1,))
        with pytest.raises(ValueError, match="image_size: expected a whole number >= 1, got 0"):
            pyramid((0, 64))
        with pytest.raises(ValueError, match="strides: expected a whole number >= 1, got 0"):
            pyramid((64, 64), strides=(0,), widths=(1,))

    @pytest.mark.parametrize(
        ("arguments", "options", "message"),
        [
            (([(1, 1)],), {}, "sizes: expected 2 entries, one per slot, got 1"),
            (([(1, 1)] * 3,), {}, "sizes: expected 2 entries, one per slot, got 3"),
            (([(1, 1)] * 2, [(1, 1)]), {}, "source_sizes: expected 2 entries"),
            (([],), {}, "sizes: expected at least one"),
            (([(1, 1), (1,)],), {}, r"sizes\[1\]: expected \(tokens, width\), got \(1,\)"),
            (([(1, 1), (-1, 1)],), {}, r"sizes\[1\] tokens: expected a whole number >= 0, got -1"),
            (([(1, 1), (1, 0)],), {}, r"sizes\[1\] width: expected a whole number >= 1, got 0"),
            (([(1, 1), (1.5, 1)],), {}, r"sizes\[1\] tokens: .*got 1.5"),
            (([(1, 1)] * 2,), {"batch": -1}, "batch: expected a whole number >= 0, got -1"),
            (([(1, 1)] * 2,), {"dtype_bytes": 0}, "dtype_bytes: expected a whole number >= 1"),
            (([(1, 1)] * 2,), {"heads": True}, "heads: expected a whole number >= 1, got True"),
            (([(1, 1)] * 2,), {"state_dtype_bytes": 0.5}, "state_dtype_bytes: .*got 0.5"),
        ],
    )
    def test_sizes(self, arguments: Any, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            attention_cost(Schedule.cross_task(2), *arguments, **options)

    def test_patterns(self) -> None:
        with pytest.raises(ValueError, match="at least 2 tasks"):
            cross_task_cost(1, NYUD_V2.sizes)
        with pytest.raises(ValueError, match="at least 2 scales"):
            cross_scale_cost(4, NYUD_V2.sizes[:1])
        with pytest.raises(ValueError, match="num_tasks: expected a whole number"):
            cross_scale_cost(0, NYUD_V2.sizes)
