"""Tables and pictures of the README from results: ``python -m benchmarks.readme [FILE ...]``.

What is generated lies between two comments, the first of which names where it comes from, a folder
of results or the demo's file::

    <!-- begin bars: benchmarks/results/cpu-2-cores -->
    <!-- end bars -->

Without arguments everything is written anew. The file of another run, ``results.json`` of a
benchmark or ``demo.json`` of the demo, becomes the one of record first:
``results/<machine>/<preset>.json``, or the demo's values and picture in docs/.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from . import environment, record, report
from . import gpu_bars as promises

ROOT = environment.ROOT
README = ROOT / "README.md"
DOCS = ROOT / "docs"

_BLOCK = re.compile(
    r"<!-- begin (?P<name>[\w ]+): (?P<source>\S+) -->\n.*?<!-- end (?P=name) -->", re.DOTALL
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write tables and pictures; with ``--check`` only tell whether they are up to date.

    Returns:
        0; 1 with ``--check`` if something is outdated; 2 if a file cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.readme",
        description="Write the README's tables and pictures from results of record.",
    )
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="runs that become those of record"
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if something is outdated"
    )
    options = parser.parse_args(arguments)
    try:
        if not options.check:
            for file in options.files:
                adopt(file)
            for folder in folders(README.read_text()):
                record.draw(folder)
        before = README.read_text()
        after = with_tables(before)
        outdated = [path for folder in folders(before) for path in record.outdated(folder)]
    except report.ReportError as error:
        Console().print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        return 2
    if options.check:
        return int(before != after or bool(outdated))
    README.write_text(after)
    return 0


def with_tables(text: str, root: Path | None = None) -> str:
    """The text with every table written from its source.

    Args:
        text: Markdown with the comments described above.
        root: folder that names of sources are relative to; default: the repository.

    Raises:
        ValueError: if a comment names a table that nobody makes, or there is none.
        ReportError: if a source cannot be read.
    """
    if not _BLOCK.search(text):
        raise ValueError("README: expected '<!-- begin NAME: SOURCE -->' comments, found none")

    base = root or ROOT

    def write(match: re.Match[str]) -> str:
        name, source = match["name"], match["source"]
        if name not in TABLES:
            raise ValueError(f"README: got a table {name!r}, expected one of {', '.join(TABLES)}")
        contents = TABLES[name](base / source, base)
        return f"<!-- begin {name}: {source} -->\n{contents}\n<!-- end {name} -->"

    return _BLOCK.sub(write, text)


def folders(text: str) -> list[Path]:
    """Folders of results that a text names, each once."""
    sources = dict.fromkeys(ROOT / match["source"] for match in _BLOCK.finditer(text))
    return [path for path in sources if path.is_dir()]


def adopt(file: Path) -> Path:
    """Make a run the one of record; returns its new place.

    Raises:
        ReportError: if the file cannot be read, or is of a run that was cut off or failed.
    """
    try:
        is_demo = "points" in json.loads(file.read_text())
    except (OSError, ValueError):
        is_demo = False
    if not is_demo:
        return record.adopt(file)
    for part in (file, file.with_suffix(".png")):
        if part.resolve().parent != DOCS:
            shutil.copy(part, DOCS / part.name)
    return DOCS / file.name


def bars(folder: Path, root: Path) -> str:
    """All bars of a machine."""
    runs = record.read(folder)
    if not runs:
        return NOT_MEASURED
    table = report.markdown(*report.bar_cells({"suites": record.suites(runs)}))
    return f"{table}\n\n{_sources(runs)}"


def gpu_bars_table(folder: Path, root: Path) -> str:
    """All bars of the GPU, measured or not."""
    runs = record.read(folder)
    found = promises.measured(result for run in runs for result in run["suites"].values())
    cells = report.bar_cells_of([{**asdict(bar), "met": bar.met} for bar in found])
    return "\n\n".join([report.markdown(*cells), *([_sources(runs)] if runs else [])])


def suite(name: str) -> Callable[[Path, Path], str]:
    """The table of one suite."""

    def table(folder: Path, root: Path) -> str:
        result = record.suites(record.read(folder)).get(name)
        if result is None:
            return NOT_MEASURED
        notes = "\n".join(result["notes"])
        return f"{result['title']}:\n\n{report.markdown(*report.suite_cells(result))}\n\n{notes}"

    return table


def answers(name: str) -> Callable[[Path, Path], str]:
    """What one suite found, in sentences and pictures."""

    def found(folder: Path, root: Path) -> str:
        result = record.suites(record.read(folder)).get(name)
        if result is None:
            return NOT_MEASURED
        lines = [f"- {answer}" for answer in result["answers"]]
        for path, plot in record.pictures(folder, {name: result}):
            lines += ["", f"![{plot['title']}]({path.relative_to(root).as_posix()})"]
        return "\n".join(lines)

    return found


def demo(file: Path, root: Path) -> str:
    """The demo's table."""
    found: dict[str, Any] = json.loads(file.read_text())
    notes = "\n".join(f"- {note}" for note in found["notes"])
    return f"{found['title']}:\n\n{report.markdown(found['columns'], found['rows'])}\n\n{notes}"


NOT_MEASURED = "Not measured."
TABLES: dict[str, Callable[[Path, Path], str]] = {
    "demo": demo,
    "bars": bars,
    "GPU bars": gpu_bars_table,
    "complexity": suite("complexity"),
    "scaling": answers("scaling"),
    "alternatives": suite("alternatives"),
    "alternatives in short": answers("alternatives"),
    "limits": suite("limits"),
    "limits in short": answers("limits"),
    "CAM set": suite("cam"),
    "recompute": suite("recompute"),
    "recompute in short": answers("recompute"),
    "head": suite("head"),
    "network": suite("network"),
    "network scaling": suite("network_scaling"),
    "network scaling in short": answers("network_scaling"),
    "network training": suite("network_training"),
}
"""What makes each table, by its name in the comments; from its source and the root folder."""


def _sources(runs: Sequence[dict[str, Any]]) -> str:
    """Where and how the runs of a machine were made."""
    return "\n".join(
        f"- `{run['command']}`: {environment.to_text(run['environment'])}, "
        f"{run['environment']['date'][:10]}."
        for run in runs
    )


if __name__ == "__main__":
    sys.exit(main())
