"""What got faster or slower between runs: ``python -m benchmarks.compare A.json B.json``.

A case is one time (in ms) or rate in a table. Its ratio is that of the medians, of the time in B
over that in A; it lies beyond the noise if the medians are further apart than the half
interquartile ranges of both together, and than a floor: from one run to the next, clocks and memory
layout move times by more than their spread within a run shows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from math import exp, log
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import report

FLOOR = 0.05
"""Relative difference that two runs of the same code may have."""
WIDTH = 120
NAMED = 3
"""Cases of one run alone that are named, and not only counted."""
MATTERS = ("processor", "cores", "threads", "isa", "torch")
"""Facts of the environment without which runs cannot be compared."""


class Case(NamedTuple):
    """A time in both runs."""

    suite: str
    name: str
    before: list[float]
    """Median and quartiles; ms, or a rate."""
    after: list[float]
    noise: float
    """Relative difference that means nothing."""
    rate: bool = False

    @property
    def ratio(self) -> float:
        """Time after over time before."""
        ratio = self.after[0] / self.before[0]
        return 1 / ratio if self.rate else ratio

    @property
    def verdict(self) -> str:
        """ "slower", "faster" or "same"."""
        if abs(log(self.ratio)) <= log(1 + self.noise):
            return "same"
        return "slower" if self.ratio > 1 else "faster"


class Comparison(NamedTuple):
    """What two runs have in common, and what not."""

    cases: list[Case]
    missing: list[tuple[str, str]]
    """Suite and name of cases of the first run that the second lacks."""
    added: list[tuple[str, str]]
    failed: list[str]
    """Suites that failed in the second run and not in the first, with the reason."""
    differences: list[str]
    """What makes the runs hard to compare."""

    @property
    def worse(self) -> bool:
        """Whether anything got slower or fails."""
        return bool(self.failed) or any(case.verdict == "slower" for case in self.cases)


def compare(before: dict[str, Any], after: dict[str, Any], floor: float = FLOOR) -> Comparison:
    """Match the cases of two runs, of `report.read`."""
    old, new = _timings(before), _timings(after)
    cases = []
    for key in (key for key in old if key in new):
        noise = max(floor, report.spread(old[key]) + report.spread(new[key]))
        cases.append(Case(*key, old[key], new[key], noise, report.is_rate(key[1])))
    failed = [
        f"{name}: {result['failure']}"
        for name, result in after["suites"].items()
        if result["failure"] is not None
        and before["suites"].get(name, {"failure": ""})["failure"] is None
    ]
    return Comparison(
        cases,
        [key for key in old if key not in new],
        [key for key in new if key not in old],
        failed,
        _differences(before, after),
    )


def _timings(found: dict[str, Any]) -> dict[tuple[str, str], list[float]]:
    return {
        (suite, f"{case}; {column}"): timing
        for suite, result in found["suites"].items()
        for case, column, timing in report.timings(result)
        if timing[0] > 0
    }


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    a, b = before["environment"], after["environment"]
    found = [
        f"{name}: {a.get(name)} and {b.get(name)}" for name in MATTERS if a.get(name) != b.get(name)
    ]
    if before["preset"] != after["preset"]:
        found.append(f"preset: {before['preset']} and {after['preset']}")
    for which, run in (("first", before), ("second", after)):
        found += [f"{which} run: {warning}" for warning in report.warnings(run)]
    return found


def show(console: Console, found: Comparison) -> None:
    """Print the table and what it comes to."""
    table = Table("suite", "case", "A", "B", "time B / A", "noise", "")
    for column in table.columns[2:6]:
        column.justify = "right"
    styles = {"slower": "red", "faster": "green", "same": ""}
    for case in found.cases:
        table.add_row(
            case.suite,
            escape(case.name),
            f"{case.before[0]:.4g}",
            f"{case.after[0]:.4g}",
            f"{case.ratio:.3f}",
            f"±{100 * case.noise:.1f} %",
            case.verdict,
            style=styles[case.verdict],
        )
    console.print(table)
    for title, lines in (
        ("hard to compare", found.differences),
        ("only in A", _by_suite(found.missing)),
        ("only in B", _by_suite(found.added)),
        ("fails in B", found.failed),
    ):
        for line in lines:
            console.print(f"{title}: {line}", highlight=False, markup=False)
    console.print(summary(found), highlight=False, markup=False)


def _by_suite(keys: Sequence[tuple[str, str]]) -> list[str]:
    """One line for each suite, with the names of its cases if they are few."""
    names: dict[str, list[str]] = {}
    for suite, name in keys:
        names.setdefault(suite, []).append(name)
    return [
        f"{suite}: {len(own)} cases" if len(own) > NAMED else f"{suite}: {' | '.join(own)}"
        for suite, own in names.items()
    ]


def summary(found: Comparison) -> str:
    """One or two sentences."""
    if not found.cases:
        return "No case is in both runs."
    count = dict.fromkeys(("slower", "faster", "same"), 0)
    for case in found.cases:
        count[case.verdict] += 1
    logs = [log(case.ratio) for case in found.cases]
    apart = exp(median(map(abs, logs))) - 1
    return (
        f"{len(found.cases)} cases: {count['slower']} slower, {count['faster']} faster, "
        f"{count['same']} the same within the noise. B / A is {exp(median(logs)):.3f} at the "
        f"median; half of the cases differ by less than {100 * apart:.1f} %."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare two files.

    Returns:
        0 if nothing got slower beyond the noise; 1 if something did, or fails now; 2 if a file
        cannot be read, or the runs have no case in common.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description="What got faster or slower from run A to run B, beyond the noise. Exit status: "
        "0 nothing slower, 1 something slower, 2 files that cannot be compared.",
    )
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument(
        "--floor",
        type=float,
        default=FLOOR,
        help="relative difference that counts as noise in any case; default: %(default)g",
    )
    options = parser.parse_args(arguments)
    console = Console()
    console.width = max(console.width, WIDTH)
    try:
        found = compare(report.read(options.before), report.read(options.after), options.floor)
    except report.ReportError as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        return 2
    show(console, found)
    if found.worse:
        return 1
    return 0 if found.cases else 2


if __name__ == "__main__":
    sys.exit(main())
