"""Suites on patterns, alternatives and limits fill their tables, on problems of hardly any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import core, environment, operators, patterns
from benchmarks.core import PRESETS, Preset, Result
from benchmarks.suites import SUITES, alternatives, complexity, limits, scaling
from xattn_kernels import cost
from xattn_kernels.schedule import Schedule
from xattn_kernels.testing.cases import CROSS_SCALE, SCALES, Case

SMOKE = PRESETS["smoke"]
SMALL = Case("small", Schedule.cross_task(3), (20,) * 3, (20,) * 3, channels=8, batch=1)
IMAGES = ((32, 32), (32, 64))


def quiet(text: str) -> None:
    assert text


def complete(result: Result, *, without: tuple[str, ...] = ()) -> None:
    assert result.failure is None and result.notes and result.answers
    columns = {name for row in result.rows for name in row}
    assert columns == set(result.columns) - set(without)
    assert all(bar.value is not None or bar.note for bar in result.bars)
    for plot in result.plots:
        for series in plot.series:
            assert len(series.x) == len(series.y)
            for spread in (series.low, series.high, series.modelled):
                assert spread is None or len(spread) == len(series.y)


def test_presets_name_suites() -> None:
    assert set(PRESETS) == {"smoke", "quick", "full", "gpu", "scaling", "network"}
    for preset in PRESETS.values():
        assert preset.suites and set(preset.suites) <= set(SUITES)
    assert set(PRESETS["full"].suites) == set(SUITES)
    assert PRESETS["gpu"].device == "cuda"


def test_slow_calls_get_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = Preset("", repetitions=50, sample_seconds=0.0, series_seconds=10.0)
    found: dict[str, Any] = {}
    monkeypatch.setattr(core, "interleaved", lambda calls, **options: found.update(options))
    core.measured({"a": lambda: None}, preset, seconds=1.0, share=0.5)
    assert found["repetitions"] == 5
    monkeypatch.setattr(core, "device_interleaved", lambda calls, **options: found.update(options))
    on_gpu = Preset("", 50, 0.0, 10.0, device="cuda")
    core.measured({"a": lambda: None}, on_gpu, seconds=1.0)
    assert found["repetitions"] == 10


# Patterns


@pytest.mark.parametrize("way", patterns.WAYS)
def test_patterns_cost_what_the_formulas_say(way: tuple[str, str]) -> None:
    model = patterns.Grid.of((480, 640)).model(*way)
    costs = cost.comparison(cost.NYUD_V2)[way[0]]
    assert model.pairs == costs.pairs
    linear = way[1] == patterns.LINEAR
    assert model.flops == (costs.linear_flops if linear else costs.softmax_flops)
    assert model.score_bytes == (0 if linear else 2 * costs.score_bytes)


@pytest.mark.parametrize("core_alone", [False, True])
@pytest.mark.parametrize("way", patterns.WAYS)
def test_patterns_are_right(way: tuple[str, str], core_alone: bool) -> None:
    grid = patterns.Grid.of((32, 64), tasks=2, scales=3, width=6)
    runner = patterns.Runner(grid, *way, core=core_alone)
    outputs = runner()
    assert len(outputs) == grid.model(*way).pairs
    runner.check(outputs, every=True)
    outputs[-1][0, 0, 0] += 1
    with pytest.raises(AssertionError, match=r"pair \d+: largest error"):
        runner.check(outputs, every=False)


def test_scores_count_twice_at_the_peak() -> None:
    grid = patterns.Grid.of((96, 128))
    stored, kept = (
        grid.model(patterns.ALL_PAIRS, kind) for kind in (patterns.STORED, patterns.SOFTMAX)
    )
    assert stored.peak_bytes - kept.peak_bytes == 2 * 4 * 768**2


def test_limit_of_memory() -> None:
    inference, training = (scaling.limit(16 * 2**30, training=t) for t in (False, True))
    model = patterns.Grid.of(training).model(patterns.ALL_PAIRS, patterns.STORED)
    assert training < inference
    assert model.score_bytes <= 16 * 2**30


def test_complexity() -> None:
    result = complexity.run(SMOKE, quiet)
    complete(result)
    assert all(bar.met for bar in result.bars)
    assert len(result.rows) == 8


def test_complexity_tells_a_wrong_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {**complexity.PUBLISHED["NYUD-v2"], "all pairs": (240, 1872.5, 16.45, 411.5)}
    monkeypatch.setitem(complexity.PUBLISHED, "NYUD-v2", wrong)
    monkeypatch.setattr(complexity, "COUNTED", ((patterns.SEQUENTIAL, patterns.LINEAR),))
    bar = complexity.run(SMOKE, quiet).bars[0]
    assert bar.value == 1 and bar.met is False


@pytest.fixture
def small_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    original = patterns.Grid.of

    def narrow(image: tuple[int, int], **sizes: int) -> patterns.Grid:
        return original(image, **{**sizes, "width": sizes.get("width", 36) // 9})

    monkeypatch.setattr(patterns.Grid, "of", narrow)
    monkeypatch.setattr(scaling, "in_fresh_process", lambda function, *args: function(*args))
    monkeypatch.setattr(scaling, "VARIED", {"tasks": (4, (2,)), "width": (36, (18,))})


@pytest.mark.usefixtures("small_scaling")
def test_scaling() -> None:
    result = scaling.run(SMOKE, quiet, IMAGES)
    complete(result)
    measured = [row for row in result.rows if isinstance(row["time"], list)]
    # Two images in five ways; tasks and widths in four, once more at the first image.
    assert len(measured) == 2 * 5 + 4 * 4
    modelled = [row for row in result.rows if row not in measured]
    assert {row["value"] for row in modelled} == {"384x512", "480x640", "768x1024", "1152x1536"}
    assert all(row["time"].startswith("~") for row in modelled)
    time, memory = result.plots[:2]
    assert time.series[0].modelled == [False, False, True, True, True, True]
    assert memory.series[-1].name == "memory of this machine"


@pytest.mark.usefixtures("small_scaling")
def test_stored_scores_that_do_not_fit_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = patterns.Grid.of(IMAGES[0]).model(*patterns.WAYS[-1]).peak_bytes
    monkeypatch.setattr(scaling, "device_memory", lambda preset: (fits + 1) / scaling.MEMORY_SHARE)
    points = scaling._resolutions(SMOKE, quiet, IMAGES)
    stored = [point for point in points if point.way == patterns.WAYS[-1]]
    assert [point.value for point in stored] == ["32x32"]
    notes = scaling._left_out(SMOKE, points, IMAGES)
    assert notes[-1].startswith("all pairs, softmax, scores stored, 32x64: not run, as it takes")


@pytest.mark.usefixtures("small_scaling")
def test_wrong_patterns_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = patterns.cross_attention_block
    monkeypatch.setattr(
        patterns,
        "cross_attention_block",
        lambda *args, **options: [1.001 * x for x in original(*args, **options)],
    )
    monkeypatch.setattr(scaling, "measured", None)
    with pytest.raises(AssertionError, match="linear, width 4, pair 0"):
        scaling.run(SMOKE, quiet, IMAGES)


# Operators


@pytest.mark.parametrize("operator", operators.OPERATORS)
def test_operators_on_cases(operator: str) -> None:
    xs = operators.operands(operator, SMALL)
    attend, exact = operators.ours(operator, SMALL), operators.composed(operator, SMALL)
    gradients = operator != operators.BLOCK
    judge = operators.Judge(exact, xs, gradients=gradients)
    results = (operators.both if gradients else operators.forward)(attend, xs)()
    judge(operator, results)
    judge(operator, operators.forward(attend, xs)())
    with pytest.raises(AssertionError, match="results, expected"):
        judge(operator, results[:1])
    if gradients:
        alone = operators.backward(attend, xs)()
        for x, y in zip(alone, results[-len(xs) :], strict=True):
            torch.testing.assert_close(x, y)


def test_published_cases() -> None:
    sizes = [cost.MapSize(case.query_tokens[0], case.channels) for case in SCALES]
    assert tuple(sizes) == cost.NYUD_V2.sizes
    assert CROSS_SCALE.source_tokens == tuple(size.tokens for size in cost.NYUD_V2.sizes)


def test_alternatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "compiler_error", lambda: "no compiler today")
    names = (alternatives.LINEAR, alternatives.SOFTMAX, alternatives.MULTIHEAD)
    result = alternatives.run(SMOKE, quiet, [(name, SMALL) for name in names])
    complete(result, without=(alternatives.GRAPH,))
    assert {row["way"] for row in result.rows} == {
        "ours",
        "op by op",
        "scaled_dot_product_attention, flash",
        "scaled_dot_product_attention, math",
        "nn.MultiheadAttention",
    }
    notes = "\n".join(result.notes)
    for way in (alternatives.COMPILED, alternatives.FLEX, alternatives.FLA):
        assert f"without {way}: " in notes
    assert len(result.bars) == 4  # none for projections that others choose
    assert result.plots[2].series[0].name == alternatives.OURS


def test_alternatives_that_refuse_are_left_out_with_their_reason() -> None:
    def refuses(xs: Any) -> Any:
        raise NotImplementedError("no such\nthing")

    def refuses_gradients(xs: Any) -> Any:
        if any(x.requires_grad for x in xs):
            raise RuntimeError("no gradients")
        return exact(xs)

    exact = operators.composed(operators.SOFTMAX, SMALL)
    xs = operators.operands(operators.SOFTMAX, SMALL)
    judge = operators.Judge(exact, xs, gradients=True)
    ways = alternatives.Ways({"a": refuses, "b": refuses_gradients, "c": exact})
    alternatives._refuse(ways, judge, xs, quiet)
    assert list(ways.calls) == ["b", "c"] and ways.forward_only == {"b"}
    assert ways.reasons == {
        "a": "NotImplementedError: no such",
        "b, backward": "RuntimeError: no gradients",
    }


def test_wrong_alternatives_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = alternatives.softmax_cross_attention
    monkeypatch.setattr(
        alternatives, "softmax_cross_attention", lambda *args: [1.001 * x for x in original(*args)]
    )
    monkeypatch.setattr(alternatives, "measured", None)
    with pytest.raises(AssertionError, match="ours, result 0"):
        alternatives.run(SMOKE, quiet, [(alternatives.MULTIHEAD, SMALL)])


@pytest.mark.filterwarnings("ignore:flex_attention called")
def test_flex_attention_has_the_same_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    # Not compiled, it computes the same, from stored scores.
    original: Any = torch.compile

    def compile_others(function: Any, **options: Any) -> Any:
        return function if function is flex_attention else original(function, **options)

    monkeypatch.setattr(torch, "compile", compile_others)
    case = Case("", Schedule.cross_task(3), (128,) * 3, (128,) * 3, channels=16, batch=1)
    xs = operators.operands(operators.SOFTMAX, case)
    judge = operators.Judge(operators.composed(operators.SOFTMAX, case), xs, gradients=False)
    judge("flex", operators.forward(alternatives._flex(case, "cpu"), xs)())


def test_limits() -> None:
    problems = [(name, SMALL) for name in operators.OPERATORS]
    result = limits.run(SMOKE, quiet, problems, gemm_side=64, copy_bytes=2**16)
    complete(result)
    at = {row["call"]: row for row in result.rows}
    assert at["GEMM"]["of the limit"] == pytest.approx(1.0)
    assert at["copy"]["of the limit"] == pytest.approx(1.0)
    [plot] = result.plots
    assert plot.kind == "roofline" and [len(s.x) for s in plot.series] == [3, 1, 1, 1]


def test_wrong_kernels_have_no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    original = operators.linear_cross_attention
    monkeypatch.setattr(
        operators, "linear_cross_attention", lambda *args: [1.001 * x for x in original(*args)]
    )
    monkeypatch.setattr(limits, "measured", None)
    with pytest.raises(AssertionError, match="linear core, small, result 0"):
        limits.run(SMOKE, quiet, [(operators.LINEAR, SMALL)], gemm_side=8, copy_bytes=64)
