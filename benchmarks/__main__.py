"""Command line: ``python -m benchmarks [--preset quick] [--only SUITE ...] [--json PATH]``."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from . import environment, report
from .core import PRESETS, Preset, Result, Suite
from .suites import SUITES

WIDTH = 120
"""Columns that the tables need; a narrower terminal wraps them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run suites and print what they found.

    Returns:
        0; 1 if a check failed, or with ``--strict`` if a bar is not met or not measured.
    """
    options = _parse(arguments)
    console = Console()
    console.width = max(console.width, WIDTH)
    facts = environment.collect()
    start = time.perf_counter()
    preset = PRESETS[options.preset]
    names = [name for name in SUITES if name in (options.only or preset.suites)]
    results = {name: run_suite(name, preset, console) for name in names}
    found = report.to_json(facts, options.preset, results, time.perf_counter() - start)
    report.show(console, found)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=2) + "\n")
        console.print(f"Written: {options.json}")
    failed = any(result.failure is not None for result in results.values())
    missed = any(bar.met is not True for result in results.values() for bar in result.bars)
    return int(failed or (options.strict and missed))


def run_suite(name: str, preset: Preset, console: Console) -> Result:
    """Run one suite; a failed check becomes its `failure`, in place of all figures."""
    suite: Suite = importlib.import_module(f"{__package__}.suites.{name}")
    with console.status(name) as status:
        try:
            return suite.run(preset, lambda text: status.update(f"{name}: {text}"))
        except AssertionError as error:
            return Result(name, failure=str(error))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time and memory against the alternatives, correctness checked first.",
    )
    parser.add_argument("--preset", choices=PRESETS, default="quick", help="default: %(default)s")
    parser.add_argument(
        "--only", nargs="+", choices=SUITES, metavar="SUITE", help=", ".join(SUITES)
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write what was found")
    parser.add_argument(
        "--strict", action="store_true", help="exit with 1 if a bar is not met or not measured"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
