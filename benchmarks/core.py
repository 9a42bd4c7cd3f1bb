"""What a suite of benchmarks is given and what it returns."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from xattn_kernels.testing.device import device_interleaved
from xattn_kernels.testing.measure import Timing, interleaved

_RELATIONS: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le}

TIMES = "Times in ms: median ± half the interquartile range"
"""What a timing in a table says."""


QUESTIONS = {
    1: "What does attending in sequence, across tasks and then across scales, save against all "
    "pairs?",
    2: "What do the fused operators gain over what people use?",
    3: "What does a whole network gain?",
    4: "How far are the kernels from what the machine can do?",
}
"""What the suites answer, by `Result.question`."""


@dataclass(frozen=True)
class Preset:
    """What a run consists of, and how thorough it is."""

    name: str
    repetitions: int
    """Samples of every time; slow ones get fewer, see `repetitions_of`."""
    sample_seconds: float
    """What a sample lasts at least: shorter calls are repeated within it."""
    series_seconds: float
    """What the repetitions of one comparison may last, as far as it can be foreseen."""
    suites: tuple[str, ...] = ()
    """Modules of `suites`, in the order in which they run."""
    device: str = "cpu"
    """Type of the device that is measured."""
    thorough: bool = False
    """Whether sizes that take minutes are measured as well."""

    def repetitions_of(self, seconds: float) -> int:
        """Repetitions for calls that take `seconds` together; at least 3."""
        return max(3, min(self.repetitions, int(self.series_seconds / max(seconds, 1e-9))))


_SCALING = ("complexity", "scaling", "linear")
_OPERATORS = ("alternatives", "limits", "cam", "cam_memory", "recompute", "softmax")
_NETWORKS = ("head", "network", "network_training", "network_compiled", "network_scaling")

_QUICK = Preset("quick", repetitions=15, sample_seconds=0.01, series_seconds=5.0)
_FULL = Preset("full", repetitions=50, sample_seconds=0.05, series_seconds=12.0, thorough=True)

PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "smoke",
            repetitions=3,
            sample_seconds=0.0,
            series_seconds=0.0,
            suites=("complexity", "linear"),
        ),
        replace(_QUICK, suites=("complexity", "scaling", "alternatives", "limits", "cam")),
        replace(_FULL, suites=(*_SCALING, *_OPERATORS, *_NETWORKS)),
        replace(
            _FULL,
            name="gpu",
            suites=("complexity", "scaling", "alternatives", "limits", "recompute"),
            device="cuda",
        ),
        replace(_FULL, name="scaling", suites=_SCALING),
        replace(_FULL, name="network", suites=_NETWORKS),
    )
}


@dataclass
class Bar:
    """A promise, and what was measured of it."""

    name: str
    target: float
    relation: str
    """">=" or "<=": how the value has to stand to the target."""
    value: float | None
    """None: not measured; `note` says why."""
    unit: str = ""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the value is on the right side of the target; None if not measured."""
        if self.value is None:
            return None
        return _RELATIONS[self.relation](self.value, self.target)


@dataclass
class Series:
    """One curve, or one set of bars."""

    name: str
    x: list[Any]
    """Numbers, or names of groups of bars."""
    y: list[float]
    low: list[float] | None = None
    """Lower end of the spread of each y."""
    high: list[float] | None = None
    modelled: list[bool] | None = None
    """Which values come from a formula, not from a measurement."""


@dataclass
class Plot:
    """A picture, as plain data."""

    kind: str
    """"lines", "bars" or "roofline": lines are bounds, single points what was reached."""
    title: str
    x_label: str
    y_label: str
    series: list[Series] = field(default_factory=list)
    x_log: bool = False
    y_log: bool = False
    note: str = ""


@dataclass
class Result:
    """What a suite measured.

    Values of `rows` are numbers, text, or timings in milliseconds: a list of the median and the
    lower and upper quartile. Rows may lack columns.
    """

    title: str
    columns: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    question: int = 0
    """Which of `QUESTIONS` this answers; 0: none."""
    answers: list[str] = field(default_factory=list)
    """What was found: one sentence each, with its numbers, for readers new to the subject."""
    plots: list[Plot] = field(default_factory=list)
    failure: str | None = None
    """The check that did not pass; then there are no rows, bars, answers and plots."""


def measured(
    calls: Mapping[str, Callable[[], Any]],
    preset: Preset,
    *,
    warmup: int = 1,
    seconds: float | None = None,
    share: float = 1.0,
) -> dict[str, Timing]:
    """Time calls by turns on the preset's device, as often as the preset allows.

    Args:
        calls: what to time, by name.
        preset: how thorough to be.
        warmup: untimed calls of each beforehand.
        seconds: what all calls take together, if known; else each is called to see.
        share: part of the preset's `series_seconds` that this comparison may take.
    """
    if seconds is None:
        seconds = sum(map(seconds_of, calls.values()))
    allowed = replace(preset, series_seconds=share * preset.series_seconds)
    repetitions = allowed.repetitions_of(seconds)
    if preset.device == "cuda":
        return device_interleaved(calls, repetitions=repetitions, warmup=warmup)
    return interleaved(
        calls, repetitions=repetitions, warmup=warmup, min_sample_s=preset.sample_seconds
    )


class Suite(Protocol):
    """A module of `benchmarks.suites`."""

    def run(self, preset: Preset, say: Callable[[str], None]) -> Result:
        """Check, then measure.

        Args:
            preset: how thorough to be.
            say: tells the user what is going on.

        Raises:
            AssertionError: if a result is not accepted; nothing may be timed before.
        """
        ...


def milliseconds(timing: Timing) -> list[float]:
    """Median, lower and upper quartile."""
    return [1e3 * seconds for seconds in (timing.median, *timing.quartiles)]


def seconds_of(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
