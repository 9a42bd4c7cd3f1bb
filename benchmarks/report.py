"""Results as JSON values and files, tables for a terminal, and tables for Markdown."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import environment
from .core import Preset, Result

FORMAT = 2
BAR_HEADINGS = ["bar", "measured", "target", ""]
VERDICTS = {True: "met", False: "NOT MET", None: "not measured"}


class ReportError(ValueError):
    """A file that cannot be used; the message names it and says why."""


def to_json(
    facts: dict[str, Any],
    preset: Preset,
    results: dict[str, Result],
    seconds: float,
    *,
    command: str = "",
    unfinished: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything a run found, as plain JSON values.

    Args:
        facts: of `environment.collect`.
        preset: how thorough the run was.
        results: what each suite found.
        seconds: that the run took.
        command: that starts such a run.
        unfinished: suites that were to run and have not.
    """
    return {
        "format": FORMAT,
        "command": command,
        "environment": facts,
        "preset": preset.name,
        "device": preset.device,
        "seconds": round(seconds, 1),
        "unfinished": list(unfinished),
        "suites": {
            name: {
                **asdict(result),
                "bars": [{**asdict(bar), "met": bar.met} for bar in result.bars],
            }
            for name, result in results.items()
        },
    }


def write(path: Path, report: dict[str, Any]) -> None:
    """Write a run's file, which is whole at any time.

    Raises:
        OSError: if it cannot be written.
    """
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(new, path)


def read(path: Path) -> dict[str, Any]:
    """The run of a file.

    Raises:
        ReportError: if it cannot be read, is not JSON, or is not of the format of this version.
    """
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise ReportError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ReportError(
            f"{path}: expected a benchmark's results, got no JSON ({error})"
        ) from error
    if not isinstance(found, dict) or "suites" not in found or "format" not in found:
        raise ReportError(f"{path}: expected the results of a benchmark, got other JSON")
    if found["format"] != FORMAT:
        raise ReportError(
            f"{path}: expected results of format {FORMAT}, got format {found['format']}, which "
            "another version of the benchmarks wrote; measure again with this one"
        )
    return found


def show(console: Console, report: dict[str, Any]) -> None:
    """Print every suite's table and answers, then all bars."""
    for result in report["suites"].values():
        console.print()
        if result["failure"] is not None:
            console.print(f"[bold]{escape(result['title'])}[/bold]")
            console.print(f"[red]nothing is shown:[/red] {escape(result['failure'])}")
            continue
        console.print(_table(result["title"], *suite_cells(result)))
        for answer in result["answers"]:
            console.print(answer, highlight=False, markup=False)
        for note in result["notes"]:
            console.print(note, style="dim", highlight=False, markup=False)
    headings, rows = bar_cells(report)
    if rows:
        console.print()
        console.print(_table("Bars", headings, rows))
    console.print(environment.to_text(report["environment"]), highlight=False, markup=False)
    for warning in warnings(report):
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}")
    console.print(f"{report['seconds']:.0f} s in all.", highlight=False)


def warnings(report: dict[str, Any]) -> list[str]:
    """What makes this run worth less."""
    found = environment.warnings(report["environment"])
    if report["unfinished"]:
        found.append(f"the run was cut off before {', '.join(report['unfinished'])}")
    return found


def suite_cells(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of a suite, without the columns in which nothing was measured."""
    headings = [name for name in result["columns"] if any(name in row for row in result["rows"])]
    cells = [[_cell(row.get(name)) for name in headings] for row in result["rows"]]
    return headings, cells


def bar_cells(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of all bars."""
    cells = []
    for name, result in report["suites"].items():
        if result["failure"] is not None:
            cells.append([f"{name}: all bars", "failed", "", VERDICTS[False]])
        cells += map(_bar_cells, result["bars"])
    return BAR_HEADINGS, cells


def bar_cells_of(bars: Iterable[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of some bars."""
    return BAR_HEADINGS, [_bar_cells(bar) for bar in bars]


def _bar_cells(bar: dict[str, Any]) -> list[str]:
    value = bar["note"] if bar["value"] is None else _quantity(bar["value"], bar["unit"])
    target = f"{bar['relation']} {_quantity(bar['target'], bar['unit'])}"
    return [bar["name"], value, target, VERDICTS[bar["met"]]]


def timings(result: dict[str, Any]) -> Iterator[tuple[str, str, list[float]]]:
    """Name of the case, column, and median and quartiles of every time (ms) or rate of a suite.

    A case goes by the columns before its first measured value: those of text and whole numbers.
    """
    for row in result["rows"]:
        cells = [(name, row[name]) for name in result["columns"] if name in row]
        named = itertools.takewhile(lambda cell: isinstance(cell[1], str | int), cells)
        case = ", ".join(str(value) for _, value in named)
        for name, value in cells:
            if is_timing(value):
                yield case, name, value


def is_timing(value: Any) -> bool:
    """Whether a cell holds a median and two quartiles."""
    return isinstance(value, list) and len(value) == 3


def is_rate(column: str) -> bool:
    """Whether the figures of a column are the better the larger they are."""
    return column.endswith("/s")


def spread(timing: Sequence[float]) -> float:
    """Half the interquartile range, relative to the median."""
    middle, low, high = timing
    return abs(high - low) / 2 / middle if middle else 0.0


def median_spread(report: dict[str, Any]) -> float | None:
    """The median over all times of a run; None without any."""
    found = [
        spread(timing) for result in report["suites"].values() for _, _, timing in timings(result)
    ]
    return median(found) if found else None


def markdown(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, numbers to the right."""
    names = list(headings)
    body = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    right = [all(is_number(row[i]) for row in body) for i in range(len(names))]
    lines = [names, ["---:" if number else "---" for number in right], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def is_number(cell: str) -> bool:
    """Whether a cell is to stand on the right."""
    return cell in ("", "-") or cell.lstrip("~<>= ")[:1].isdigit()


def _table(title: str, headings: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=escape(title), title_justify="left")
    for number, heading in enumerate(headings):
        right = number and all(is_number(row[number]) for row in rows)
        table.add_column(escape(heading), justify="right" if right else "left", overflow="fold")
    for row in rows:
        style = "red" if VERDICTS[False] in row else ""
        table.add_row(*map(escape, row), style=style)
    return table


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if is_timing(value):
        middle, low, high = value
        digits = _digits(middle)
        return f"{middle:.{digits}f} ±{(high - low) / 2:.{digits}f}"
    if isinstance(value, float):
        return f"{value:,.{_digits(value)}f}"
    return str(value)


def _quantity(value: float, unit: str) -> str:
    number = f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{number}{'' if unit in ('', 'x') else ' '}{unit.strip()}"


def _digits(value: float) -> int:
    return 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
