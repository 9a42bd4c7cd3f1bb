"""Tables of the README from the files they stand for: ``python -m benchmarks.readme [FILE ...]``.

A table lies between two comments, the first of which names its file::

    <!-- begin bars: benchmarks/results/name.json -->
    <!-- end bars -->

Without arguments every table is written anew from its file. With the file of another run, of
``python -m benchmarks --json`` or of the demo, that one takes the place of the named one; a demo's
picture and values are copied to docs/ first.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import environment, report

ROOT = environment.ROOT
README = ROOT / "README.md"
DOCS = ROOT / "docs"

_BLOCK = re.compile(
    r"<!-- begin (?P<name>[\w ]+): (?P<file>\S+) -->\n.*?<!-- end (?P=name) -->", re.DOTALL
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the tables; with ``--check`` only tell whether they are up to date."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.readme", description="Write the README's tables from results."
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a table is outdated")
    options = parser.parse_args(arguments)
    before = README.read_text()
    after = with_tables(before, dict(map(_adopt, options.files)))
    if options.check:
        return int(before != after)
    README.write_text(after)
    return 0


def with_tables(text: str, files: dict[str, Path], root: Path = ROOT) -> str:
    """The text with every table written from its file.

    Args:
        text: Markdown with the comments described above.
        files: files that replace the named ones, by kind: "demo" or "benchmarks".
        root: folder that names of files are relative to.

    Raises:
        ValueError: if a comment names a table that nobody makes, or there is none.
    """
    if not _BLOCK.search(text):
        raise ValueError("README: expected '<!-- begin NAME: FILE -->' comments, found none")

    def write(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"README: got a table {name!r}, expected one of {', '.join(TABLES)}")
        kind, table = TABLES[name]
        file = files.get(kind, root / match["file"])
        contents = table(json.loads(file.read_text()))
        relative = file.resolve().relative_to(root.resolve()).as_posix()
        return f"<!-- begin {name}: {relative} -->\n{contents}\n<!-- end {name} -->"

    return _BLOCK.sub(write, text)


def bars(found: dict[str, Any]) -> str:
    """All bars of a run."""
    return f"{report.markdown(*report.bar_cells(found))}\n\n{_source(found)}"


def suite(name: str) -> Callable[[dict[str, Any]], str]:
    """The table of one suite."""

    def table(found: dict[str, Any]) -> str:
        result = found["suites"][name]
        notes = "\n".join(result["notes"])
        return f"{result['title']}:\n\n{report.markdown(*report.suite_cells(result))}\n\n{notes}"

    return table


def demo(found: dict[str, Any]) -> str:
    """The demo's table."""
    notes = "\n".join(f"- {note}" for note in found["notes"])
    return f"{found['title']}:\n\n{report.markdown(found['columns'], found['rows'])}\n\n{notes}"


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "demo": ("demo", demo),
    "bars": ("benchmarks", bars),
    "CAM set": ("benchmarks", suite("cam")),
    "head": ("benchmarks", suite("head")),
    "network": ("benchmarks", suite("network")),
    "network training": ("benchmarks", suite("network_training")),
}
"""Kind of file and contents of each table, by its name in the comments."""


def _source(found: dict[str, Any]) -> str:
    facts = found["environment"]
    return f"{environment.to_text(facts)}, {facts['date'][:10]}."


def _adopt(file: Path) -> tuple[str, Path]:
    """The kind of a file, and where it lies in the repository."""
    if "points" not in json.loads(file.read_text()):
        return "benchmarks", file
    for part in (file, file.with_suffix(".png")):
        if part.resolve().parent != DOCS:
            shutil.copy(part, DOCS / part.name)
    return "demo", DOCS / file.name


if __name__ == "__main__":
    sys.exit(main())
