"""Command line: ``python -m xattn_kernels bench``, or ``python -m benchmarks`` in a checkout."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from xattn_kernels import registry

from . import environment, html, plots, report
from .core import PRESETS, Preset, Result, Suite
from .suites import SUITES

WIDTH = 120
"""Columns that the tables need; a narrower terminal wraps them."""
COMMAND = "python -m xattn_kernels bench"
RESULTS, PAGE = "results.json", "report.html"
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


class UsageError(Exception):
    """What was asked for cannot be done here."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run suites, print what they found and write it to a folder.

    Returns:
        0; 1 if a suite failed, or with ``--strict`` if a bar is not met or not measured; 2 if what
        was asked for cannot be done here; 130 after Ctrl-C, with the finished suites kept.
    """
    options = _parse(arguments)
    console = Console()
    console.width = max(console.width, WIDTH)
    preset = PRESETS[options.preset]
    out: Path = options.out or Path("out", "bench", preset.name)
    try:
        _check_device(preset)
        _choose_engine(options.engine)
        _make_writable(out)
    except UsageError as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        return 2
    names = [name for name in SUITES if name in (options.only or preset.suites)]
    run = Run(preset, _command(options), out, console)
    interrupted = False
    try:
        run(names)
    except KeyboardInterrupt:
        interrupted = True
        console.print("[yellow]interrupted:[/yellow] the finished suites are kept")
    found = run.found()
    report.show(console, found)
    console.print(f"Written: {', '.join(map(str, _write_all(out, found, options.html)))}")
    if interrupted:
        return INTERRUPTED
    failed = any(result.failure is not None for result in run.results.values())
    missed = any(bar.met is not True for result in run.results.values() for bar in result.bars)
    return int(failed or (options.strict and missed))


class Run:
    """Suites one after the other, their results written after each."""

    def __init__(self, preset: Preset, command: str, out: Path, console: Console) -> None:
        self.preset = preset
        self.command = command
        self.out = out
        self.console = console
        self.results: dict[str, Result] = {}
        self.left: list[str] = []
        self._facts = environment.collect()
        self._start = time.perf_counter()

    def __call__(self, names: Sequence[str]) -> None:
        """Run suites by name."""
        self.left = list(names)
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task("", total=len(names))
            for name in names:
                start = time.perf_counter()

                def say(text: str, name: str = name) -> None:
                    progress.update(task, description=escape(f"{name}: {text}"))

                say("")
                result = self.results[name] = run_suite(name, self.preset, say)
                self.left.remove(name)
                report.write(self.out / RESULTS, self.found())
                verdict = "done" if result.failure is None else "[red]failed[/red]"
                seconds = time.perf_counter() - start
                self.console.print(f"{name}: {verdict}, {seconds:.0f} s", highlight=False)
                progress.advance(task)

    def found(self) -> dict[str, Any]:
        """Everything so far, as plain JSON values."""
        seconds = time.perf_counter() - self._start
        return report.to_json(
            self._facts,
            self.preset,
            self.results,
            seconds,
            command=self.command,
            unfinished=self.left,
        )


def run_suite(name: str, preset: Preset, say: Callable[[str], None]) -> Result:
    """Run one suite; an error becomes its `failure`, in place of all figures."""
    suite: Suite = importlib.import_module(f"{__package__}.suites.{name}")
    try:
        return suite.run(preset, say)
    except AssertionError as error:
        return Result(name, failure=f"check failed: {error}")
    except Exception as error:
        traceback.print_exc()
        return Result(name, failure=f"{type(error).__name__}: {error}")


def _write_all(out: Path, found: dict[str, Any], page: bool) -> list[Path]:
    """Write pictures and page; returns all files of a run."""
    pictures = [
        (out / f"{name}-{number}.png", plot)
        for name, result in found["suites"].items()
        for number, plot in enumerate(result["plots"], 1)
    ]
    for path, plot in pictures:
        path.write_bytes(plots.png(plot))
    files = [out / RESULTS, *(path for path, _ in pictures)]
    if page:
        (out / PAGE).write_text(html.page(found))
        files.append(out / PAGE)
    return files


def _check_device(preset: Preset) -> None:
    if preset.device == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda
        why = "torch sees none" if built else "torch is built without CUDA"
        raise UsageError(f"preset {preset.name!r}: expected an NVIDIA GPU, but {why}")


def _choose_engine(name: str | None) -> None:
    """Ask for an engine in this process and those it starts."""
    if name is None:
        return
    reason = registry.unavailable(name)
    if reason is not None:
        raise UsageError(f"--engine: got {name!r}, which is not available here: {reason}")
    registry.set_backend(name)
    os.environ["XATTN_BACKEND"] = name


def _make_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UsageError(
            f"--out: expected a folder to write to, got {out} ({error.strerror})"
        ) from error


def _command(options: argparse.Namespace) -> str:
    """What makes such a run again, but for the folder."""
    words = [COMMAND, "--preset", options.preset]
    if options.only:
        words += ["--only", *options.only]
    if options.engine:
        words += ["--engine", options.engine]
    return " ".join(words)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="Time and memory against the alternatives, correctness checked first. Writes "
        f"{RESULTS}, pictures and {PAGE}, which explains what was found.",
    )
    parser.add_argument("--preset", choices=PRESETS, default="quick", help="default: %(default)s")
    parser.add_argument(
        "--only", nargs="+", choices=SUITES, metavar="SUITE", help=", ".join(SUITES)
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the files; default: out/bench/PRESET"
    )
    parser.add_argument(
        "--html",
        action=argparse.BooleanOptionalAction,
        default=True,
        help=f"whether to write {PAGE}; default: yes",
    )
    parser.add_argument(
        "--engine", choices=registry.ENGINES, help="engine of this library; default: its choice"
    )
    parser.add_argument(
        "--strict", action="store_true", help="exit with 1 if a bar is not met or not measured"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
