"""Results as JSON values, tables for a terminal, and tables for Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import environment
from .core import Result

FORMAT = 1
VERDICTS = {True: "met", False: "NOT MET", None: "not measured"}


def to_json(
    facts: dict[str, Any], preset: str, results: dict[str, Result], seconds: float
) -> dict[str, Any]:
    """Everything a run found, as plain JSON values."""
    return {
        "format": FORMAT,
        "environment": facts,
        "preset": preset,
        "seconds": round(seconds, 1),
        "suites": {
            name: {
                **asdict(result),
                "bars": [{**asdict(bar), "met": bar.met} for bar in result.bars],
            }
            for name, result in results.items()
        },
    }


def show(console: Console, report: dict[str, Any]) -> None:
    """Print every suite's table, then all bars."""
    for result in report["suites"].values():
        console.print()
        if result["failure"] is not None:
            console.print(f"[bold]{escape(result['title'])}[/bold]")
            console.print(
                f"[red]check failed, so nothing is shown:[/red] {escape(result['failure'])}"
            )
            continue
        console.print(_table(result["title"], *suite_cells(result)))
        for note in result["notes"]:
            console.print(note, style="dim", highlight=False, markup=False)
    headings, rows = bar_cells(report)
    console.print()
    console.print(_table("Bars", headings, rows))
    console.print(environment.to_text(report["environment"]), highlight=False, markup=False)
    for warning in environment.warnings(report["environment"]):
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}")
    console.print(f"{report['seconds']:.0f} s in all.", highlight=False)


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
            cells.append([f"{name}: all bars", "check failed", "", VERDICTS[False]])
        for bar in result["bars"]:
            value = bar["note"] if bar["value"] is None else _quantity(bar["value"], bar["unit"])
            target = f"{bar['relation']} {_quantity(bar['target'], bar['unit'])}"
            cells.append([bar["name"], value, target, VERDICTS[bar["met"]]])
    return ["bar", "measured", "target", ""], cells


def markdown(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, numbers to the right."""
    names = list(headings)
    body = [list(row) for row in rows]
    right = [all(_is_number(row[i]) for row in body) for i in range(len(names))]
    lines = [names, ["---:" if number else "---" for number in right], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _table(title: str, headings: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=escape(title), title_justify="left")
    for number, heading in enumerate(headings):
        right = number and all(_is_number(row[number]) for row in rows)
        table.add_column(escape(heading), justify="right" if right else "left", overflow="fold")
    for row in rows:
        style = "red" if VERDICTS[False] in row else ""
        table.add_row(*map(escape, row), style=style)
    return table


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        median, low, high = value
        digits = _digits(median)
        return f"{median:.{digits}f} ±{(high - low) / 2:.{digits}f}"
    if isinstance(value, float):
        return f"{value:,.{_digits(value)}f}"
    return str(value)


def _quantity(value: float, unit: str) -> str:
    number = f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{number}{'' if unit in ('', 'x') else ' '}{unit}"


def _digits(value: float) -> int:
    return 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0


def _is_number(cell: str) -> bool:
    return cell in ("", "-") or cell.lstrip("~<>= ")[:1].isdigit()
