"""Sequential against all-pairs attention as images, tasks, scales and widths grow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log
from statistics import linear_regression
from typing import Any

from xattn_kernels.testing.device import device_available_bytes, device_peak_memory
from xattn_kernels.testing.measure import (
    Timing,
    available_bytes,
    in_fresh_process,
    peak_memory,
)

from ..core import TIMES, Bar, Plot, Preset, Result, Series, measured, milliseconds, seconds_of
from ..patterns import ALL_PAIRS, LINEAR, SEQUENTIAL, SOFTMAX, STORED, WAYS, Grid, Runner

MIB, GIB = 2**20, 2**30
MEMORY_SHARE = 0.7
"""Part of the available memory that stored scores may take."""
SHARE = 0.2
"""Of the preset's time for one comparison, for each of the many here."""
Image = tuple[int, int]
Way = tuple[str, str]

BASE: Image = (96, 128)
"""Where tasks, scales and widths are varied."""
RESOLUTIONS: tuple[Image, ...] = (BASE, (128, 192), (192, 256))
THOROUGH: tuple[Image, ...] = (*RESOLUTIONS, (256, 384), (384, 512))
PUBLISHED: Image = (480, 640)
LARGER: tuple[Image, ...] = ((384, 512), PUBLISHED, (768, 1024), (1152, 1536))
"""By formula only, unless measured."""
CORES: dict[str, tuple[Image, ...]] = {
    SOFTMAX: ((128, 192), (192, 256), (384, 512)),
    LINEAR: ((192, 256), (384, 512), (768, 1024)),
}
"""Where the growth of the cores is fitted."""
CORE_SCALES = 2
"""The finest: where channels outnumber tokens, a state outweighs them, whatever their number."""
VARIED = {"tasks": (4, (2, 3, 5)), "scales": (4, (2, 3)), "width": (36, (18, 54))}
"""What is varied beside the resolution: its value elsewhere, and the others."""
EXPONENTS = {(ALL_PAIRS, SOFTMAX): (2.0, 0.15), (ALL_PAIRS, LINEAR): (1.0, 0.1)}
"""Of the core's time in the number of tokens, and how far from it is accepted."""


@dataclass
class Point:
    """One way at one size."""

    axis: str
    value: Any
    grid: Grid
    way: Way
    timing: Timing | None = None
    seconds: float = 0.0
    """The timing's median; by formula without one."""
    peak_bytes: float = 0.0

    @property
    def tokens(self) -> int:
        """At the finest scale."""
        return self.grid.sizes[0].tokens

    def row(self) -> dict[str, Any]:
        """What a table shows."""
        model = self.grid.model(*self.way)
        peak = self.peak_bytes / MIB
        return {
            "varied": self.axis,
            "value": self.value,
            "pattern": self.way[0],
            "attention": self.way[1],
            "pairs": model.pairs,
            "GFLOP": model.flops / 1e9,
            "MiB moved": model.bytes_moved / MIB,
            "time": milliseconds(self.timing) if self.timing else f"~{1e3 * self.seconds:,.0f}",
            "peak, MiB": peak if self.timing else f"~{peak:,.0f}",
        }


def run(
    preset: Preset, say: Callable[[str], None], resolutions: Sequence[Image] | None = None
) -> Result:
    """Check and time all sizes, fit the growth of the cores, then count memory."""
    result = Result(
        "Attention between all tasks and scales: in sequence, and between all pairs, B=1, fp32",
        [
            "varied",
            "value",
            "pattern",
            "attention",
            "pairs",
            "GFLOP",
            "MiB moved",
            "time",
            "peak, MiB",
        ],
        question=1,
        notes=[
            f"{TIMES}. Unless varied: T=4, 4 scales, C=36 at the finest, {BASE[0]}x{BASE[1]}. "
            "Projections and adapters included. Both patterns run on this library's kernels; "
            "scores stored: one call of torch after the other. GFLOP, MiB moved (maps read and "
            "written once per pass, scores four times): by formula. peak: memory beyond inputs and "
            "weights, results included. ~: by formula, from the largest measured size."
        ],
    )
    if resolutions is None:
        resolutions = THOROUGH if preset.thorough else RESOLUTIONS
    points = _resolutions(preset, say, resolutions)
    result.notes += _left_out(preset, points, resolutions)
    base = [p for p in points if p.value == _name(resolutions[0]) and p.way != WAYS[-1]]
    for axis, (at_base, others) in VARIED.items():
        points += [replace(point, axis=axis, value=at_base) for point in base]
        for value in others:
            grid = Grid.of(resolutions[0], **{axis: value})
            points += _measure(preset, say, axis, value, grid, WAYS[:-1])
    say("growth of the cores")
    small = dict.fromkeys(CORES, resolutions)
    cores = _cores(preset, small if len(resolutions) < len(RESOLUTIONS) else CORES)
    say("memory")
    _count_memory(preset, points)
    points += _modelled(points)
    axes = ["resolution", *VARIED]
    points.sort(key=lambda p: (axes.index(p.axis), p.tokens if p.axis == axes[0] else p.value))
    result.rows = [point.row() for point in points]
    _conclude(result, points, cores, device_memory(preset))
    return result


def device_memory(preset: Preset) -> int:
    """Bytes that the machine, or the device, has for a problem."""
    return device_available_bytes() if preset.device == "cuda" else available_bytes()


def _resolutions(
    preset: Preset, say: Callable[[str], None], images: Sequence[Image]
) -> list[Point]:
    points = []
    for image in images:
        grid = Grid.of(image)
        allowed = MEMORY_SHARE * device_memory(preset)
        ways = [way for way in WAYS if grid.model(*way).peak_bytes < allowed]
        points += _measure(preset, say, "resolution", _name(image), grid, ways)
    return points


def _left_out(preset: Preset, points: Sequence[Point], images: Sequence[Image]) -> list[str]:
    """What was not tried for want of memory."""
    tried = {(point.value, point.way) for point in points}
    return [
        f"{', '.join(way)}, {_name(image)}: not run, as it takes "
        f"{Grid.of(image).model(*way).peak_bytes / GIB:.1f} GiB and of the "
        f"{device_memory(preset) / GIB:.1f} GiB available {MEMORY_SHARE:.0%} may be used."
        for image in images
        for way in WAYS
        if (_name(image), way) not in tried
    ]


def _measure(
    preset: Preset,
    say: Callable[[str], None],
    axis: str,
    value: Any,
    grid: Grid,
    ways: Iterable[Way],
) -> list[Point]:
    say(f"{axis} {value}")
    timings = _timed(preset, grid, list(ways), core=False)
    return [Point(axis, value, grid, way, timing, timing.median) for way, timing in timings.items()]


def _timed(preset: Preset, grid: Grid, ways: Sequence[Way], *, core: bool) -> dict[Way, Timing]:
    """Timings of ways, each accepted before."""
    runners = {way: Runner(grid, *way, preset.device, core=core) for way in ways}
    seconds = 0.0
    for runner in runners.values():
        outputs: list[Any] = []
        seconds += seconds_of(lambda run=runner, out=outputs: out.extend(run()))
        runner.check(outputs, every=grid == Grid.of(BASE))
    calls = {f"{way}": runner for way, runner in runners.items()}
    timings = measured(calls, preset, warmup=0, seconds=seconds, share=SHARE)
    return dict(zip(ways, timings.values(), strict=True))


def _cores(preset: Preset, images: Mapping[str, Sequence[Image]]) -> list[Point]:
    points = []
    for kind, sizes in images.items():
        ways = [way for way in WAYS if way[1] == kind]
        for image in sizes:
            grid = Grid.of(image, scales=CORE_SCALES)
            timings = _timed(preset, grid, ways, core=True)
            points += [Point("", _name(image), grid, w, t, t.median) for w, t in timings.items()]
    return points


def _count_memory(preset: Preset, points: Sequence[Point]) -> None:
    cases = list(dict.fromkeys((point.grid, point.way) for point in points))
    peaks = (
        rises(cases, "cuda") if preset.device == "cuda" else in_fresh_process(rises, cases, "cpu")
    )
    known = dict(zip(cases, peaks, strict=True))
    for point in points:
        point.peak_bytes = known[point.grid, point.way]


def rises(cases: Sequence[tuple[Grid, Way]], device: str) -> list[int]:
    """Bytes at the peak of one call each beyond those before it, in this process."""
    measure = device_peak_memory if device == "cuda" else peak_memory
    for way in WAYS:
        Runner(Grid.of((32, 32)), *way, device)()
    return [measure(Runner(grid, *way, device)).rise for grid, way in cases]


def _modelled(points: Sequence[Point]) -> list[Point]:
    """Larger resolutions, scaled by formula from the largest measured one of each way."""
    found = []
    for way in WAYS:
        of_way = _of(points, "resolution", way)
        if not of_way:
            continue
        last = max(of_way, key=lambda point: point.tokens)
        there = last.grid.model(*way)
        for image in LARGER:
            grid = Grid.of(image)
            if grid.sizes[0].tokens <= last.tokens:
                continue
            here = grid.model(*way)
            seconds = last.seconds * here.flops / there.flops
            peak = last.peak_bytes * here.peak_bytes / there.peak_bytes
            found.append(Point("resolution", _name(image), grid, way, None, seconds, peak))
    return found


# What follows from it


def _conclude(result: Result, points: Sequence[Point], cores: Sequence[Point], memory: int) -> None:
    exponents = {way: _exponent([p for p in cores if p.way == way]) for way in WAYS[:-1]}
    for (pattern, kind), exponent in exponents.items():
        result.notes.append(
            f"Core alone, {pattern}, {kind}, {CORE_SCALES} finest scales: the time grows as "
            f"N^{exponent:.3f}."
        )
    result.bars = [
        Bar(
            f"{pattern}, {kind} core, |growth exponent - {expected:.0f}|",
            allowed,
            "<=",
            abs(exponents[pattern, kind] - expected),
        )
        for (pattern, kind), (expected, allowed) in EXPONENTS.items()
    ]
    result.answers = [
        _speed_answer(points),
        f"Twice the pixels took {2 ** exponents[ALL_PAIRS, SOFTMAX]:.1f}x the time with softmax "
        f"between all pairs and {2 ** exponents[ALL_PAIRS, LINEAR]:.1f}x with linear attention "
        f"(measured exponents {exponents[ALL_PAIRS, SOFTMAX]:.2f} and "
        f"{exponents[ALL_PAIRS, LINEAR]:.2f}; theory says 2 and 1): the gain grows with the image.",
        _memory_answer(points, memory),
    ]
    result.plots = _plots(points, cores, memory)


def _speed_answer(points: Sequence[Point]) -> str:
    best = max(
        (p for p in _of(points, "resolution", (ALL_PAIRS, SOFTMAX)) if p.timing),
        key=lambda point: point.tokens,
    )
    at = {p.way: p.seconds for p in points if p.axis == "resolution" and p.value == best.value}
    ours = at[SEQUENTIAL, LINEAR]
    return (
        f"At {best.value} pixels, linear attention across tasks and then scales took "
        f"{1e3 * ours:.0f} ms; between all pairs it took {1e3 * at[ALL_PAIRS, LINEAR]:.0f} ms "
        f"({at[ALL_PAIRS, LINEAR] / ours:.0f}x), and softmax attention between all pairs "
        f"{1e3 * at[ALL_PAIRS, SOFTMAX]:.0f} ms ({at[ALL_PAIRS, SOFTMAX] / ours:.0f}x)."
    )


def _memory_answer(points: Sequence[Point], memory: int) -> str:
    model = Grid.of(PUBLISHED).model(ALL_PAIRS, STORED)
    ours = next(
        p for p in _of(points, "resolution", (SEQUENTIAL, LINEAR)) if p.value == _name(PUBLISHED)
    )
    return (
        f"With {memory / GIB:.0f} GiB of memory, all pairs with stored scores stop at "
        f"{_name(limit(memory, training=False))} pixels in inference (one pair at a time) and at "
        f"{_name(limit(memory, training=True))} in training (scores of all pairs are kept: "
        f"{model.score_bytes / GIB:.0f} GiB in fp32 at {_name(PUBLISHED)}); attending in sequence "
        f"with linear attention takes {ours.peak_bytes / MIB:.0f} MiB there."
    )


def limit(memory: int, *, training: bool) -> Image:
    """The largest image of sides 3:4 for which all pairs with stored scores fit, by formula."""
    image = (96, 128)
    while True:
        larger = (image[0] + 96, image[1] + 128)
        model = Grid.of(larger).model(ALL_PAIRS, STORED)
        if max(model.peak_bytes, model.score_bytes if training else 0) > memory:
            return image
        image = larger


def _exponent(points: Sequence[Point]) -> float:
    logs = [(log(point.tokens), log(point.seconds)) for point in points]
    return linear_regression(*zip(*logs, strict=True)).slope


def _of(points: Sequence[Point], axis: str, way: Way) -> list[Point]:
    return [point for point in points if point.axis == axis and point.way == way]


def _name(image: Image) -> str:
    return f"{image[0]}x{image[1]}"


def _plots(points: Sequence[Point], cores: Sequence[Point], memory: int) -> list[Plot]:
    tokens = "tokens of the finest map"
    on_logs: dict[str, Any] = {"x_log": True, "y_log": True}
    by_resolution = [(way, _of(points, "resolution", way)) for way in WAYS]
    plots = [
        Plot(
            "lines",
            "Time of attention between all tasks and scales",
            tokens,
            "ms",
            [_times(way, found, [p.tokens for p in found]) for way, found in by_resolution],
            **on_logs,
            note="Hollow: by formula, from the largest measured size.",
        ),
        Plot(
            "lines",
            "Peak memory of attention between all tasks and scales",
            tokens,
            "MiB",
            [
                Series(
                    ", ".join(way),
                    [p.tokens for p in found],
                    [p.peak_bytes / MIB for p in found],
                    modelled=[p.timing is None for p in found],
                )
                for way, found in by_resolution
            ]
            + [
                Series(
                    "memory of this machine",
                    [f(p.tokens for _, found in by_resolution for p in found) for f in (min, max)],
                    [memory / MIB] * 2,
                )
            ],
            **on_logs,
            note="Hollow: by formula. Training keeps the scores of all pairs, and stops earlier.",
        ),
        Plot(
            "lines",
            "Growth of the attention cores alone",
            tokens,
            "ms",
            [
                _times(way, found, [p.tokens for p in found])
                for way in WAYS[:-1]
                for found in [[p for p in cores if p.way == way]]
            ],
            **on_logs,
        ),
    ]
    labels = {"tasks": "tasks T", "scales": "scales", "width": "channels of the finest map"}
    for axis, label in labels.items():
        series = [
            _times(way, found, [p.value for p in found])
            for way in WAYS[:-1]
            for found in [_of(points, axis, way)]
        ]
        title = f"Time by {axis}, {_name(BASE)} pixels"
        plots.append(Plot("lines", title, label, "ms", series, y_log=True))
    return plots


def _times(way: Way, points: Sequence[Point], x: list[Any]) -> Series:
    quartiles = [p.timing.quartiles if p.timing else (p.seconds, p.seconds) for p in points]
    return Series(
        ", ".join(way),
        x,
        [1e3 * p.seconds for p in points],
        [1e3 * low for low, _ in quartiles],
        [1e3 * high for _, high in quartiles],
        [p.timing is None for p in points],
    )
