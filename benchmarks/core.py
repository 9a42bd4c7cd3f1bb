"""What a suite of benchmarks is given and what it returns."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from xattn_kernels.testing.measure import Timing

_RELATIONS: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le}

TIMES = "Times in ms: median ± half the interquartile range"
"""What a timing in a table says."""


@dataclass(frozen=True)
class Preset:
    """How thorough a run is."""

    name: str
    repetitions: int
    """Samples of every time; slow ones get fewer, see `repetitions_of`."""
    sample_seconds: float
    """What a sample lasts at least: shorter calls are repeated within it."""
    series_seconds: float
    """What the repetitions of one comparison may last, as far as it can be foreseen."""

    def repetitions_of(self, seconds: float) -> int:
        """Repetitions for calls that take `seconds` together; at least 3."""
        return max(3, min(self.repetitions, int(self.series_seconds / max(seconds, 1e-9))))


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("smoke", repetitions=3, sample_seconds=0.0, series_seconds=0.0),
        Preset("quick", repetitions=15, sample_seconds=0.01, series_seconds=5.0),
        Preset("full", repetitions=50, sample_seconds=0.05, series_seconds=30.0),
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
    failure: str | None = None
    """The check that did not pass; then there are no rows and no bars."""


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
