"""One command for a machine with a GPU: correctness of the Triton engine, then its speed.

    python -m benchmarks.gpu_check OUT

Needs no network and nothing but torch, Triton and this repository. Every step runs in a process of
its own, the most important ones first, and writes ``OUT/<step>.json`` and ``OUT/<step>.log``; after
each, ``OUT/summary.json`` and ``OUT/table.txt`` are written anew, so that a run that is cut off
leaves what it has. It ends in under nine minutes. Every promise of `benchmarks.gpu_bars` is listed,
measured or not. What benchmarks found is in ``OUT/results.json`` as well, which ``python -m
benchmarks.readme`` takes for the record, and ``OUT/suites`` has the suites that run on a GPU (both
need rich).

``--device cpu`` runs the steps that need no GPU in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from .core import PRESETS, Result
from .gpu_bars import BARS

ROOT = Path(__file__).resolve().parents[1]
BUDGET_S = 520.0


class Step(NamedTuple):
    """A function of `benchmarks.gpu_steps` or `benchmarks.gpu_bench` and its argument."""

    name: str
    function: str
    argument: str = ""
    limit_s: float = 100.0
    needs_gpu: bool = True
    command: tuple[str, ...] = ()
    """What the process is run under; without a function, what is run."""
    suite: str = ""
    """The suite of `benchmarks.suites` that asks the same questions on the CPU."""


def stages() -> list[list[Step]]:
    """Steps in order; those of one stage run side by side (they mostly compile)."""
    correct = [
        Step(f"correct_{op}_{dtype}", f"correct_{op}", dtype, 120.0, needs_gpu=False)
        for dtype in ("bfloat16", "float16", "float32")
        for op in ("block", "linear", "softmax", "training", "pyramid")
    ]
    races = [
        Step("repeats", "repeats", limit_s=120.0),
        Step("graphs", "graphs", limit_s=120.0),
        Step("widths_tf32", "tf32", limit_s=120.0),
    ]
    sanitizer = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9")
    suites = ["-m", "benchmarks", "--preset", "gpu", "--engine", "triton", "--out", "{out}/suites"]
    # What counts operations does so on the CPU, where the engine is not.
    suites += ["--only", *(name for name in PRESETS["gpu"].suites if name != "complexity")]
    measured = [
        Step("bench_cam", "cam", limit_s=60.0, suite="cam"),
        Step("bench_training", "training", limit_s=60.0, suite="recompute"),
        Step("bench_linear", "linear_core", limit_s=40.0, suite="linear"),
        Step("bench_softmax", "softmax_core", limit_s=70.0, suite="softmax"),
        Step("bench_compiled_cam", "compiled_cam", limit_s=110.0, suite="cam"),
        Step("bench_compiled_linear", "compiled_linear", limit_s=50.0, suite="linear"),
        Step("bench_compiled_training", "compiled_training", limit_s=110.0, suite="recompute"),
        Step("bench_head", "head", limit_s=50.0, suite="head"),
        Step("sanitizer", "sanitized", limit_s=60.0, command=sanitizer),
        Step("suites", "", limit_s=100.0, command=(sys.executable, *suites)),
        Step("build", "build", limit_s=60.0, needs_gpu=False),
    ]
    environment = Step("environment", "environment", limit_s=60.0, needs_gpu=False)
    return [[environment], [*correct, *races], *([step] for step in measured)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all steps, or one; returns 1 if a step that ran failed."""
    options = _parse(arguments)
    if options.function:
        return _run_here(options)
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    deadline = start + BUDGET_S
    summary: dict[str, dict[str, Any]] = {}
    for stage in stages():
        chosen = [
            step
            for step in stage
            if (options.device == "cuda" or not step.needs_gpu)
            and (not options.only or step.name in options.only)
        ]
        _run_stage(chosen, options, deadline, summary)
        _write_results(options, summary, time.monotonic() - start)
    return 1 if any(entry["state"] == "failed" for entry in summary.values()) else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check")
    parser.add_argument("out", type=Path, help="folder for results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", action="append", help="a step, by name; may be repeated")
    parser.add_argument("--function", help=argparse.SUPPRESS)
    parser.add_argument("--argument", default="", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _run_stage(
    steps: Sequence[Step], options: argparse.Namespace, deadline: float, summary: dict[str, Any]
) -> None:
    running = []
    for step in steps:
        limit = min(step.limit_s, deadline - time.monotonic())
        if limit < 5:
            summary[step.name] = {"state": "not run", "why": "no time left"}
            continue
        result, log = options.out / f"{step.name}.json", options.out / f"{step.name}.log"
        result.unlink(missing_ok=True)
        command = [part.replace("{out}", str(options.out)) for part in step.command]
        if step.function:
            command += [sys.executable, "-m", "benchmarks.gpu_check", str(options.out)]
            command += ["--device", options.device, "--function", step.function]
            command += ["--argument", step.argument, "--result", str(result)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        if options.device == "cpu":
            environment["TRITON_INTERPRET"] = "1"
        with log.open("w") as stream:
            try:
                process = subprocess.Popen(
                    command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, env=environment
                )
            except OSError as error:
                summary[step.name] = {"state": "not run", "why": str(error)}
                continue
        running.append((step, process, time.monotonic(), limit, result))
    for step, process, start, limit, result in running:
        try:
            code = process.wait(timeout=max(0.1, start + limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        entry: dict[str, Any] = {"seconds": round(time.monotonic() - start, 1), "code": code}
        found = _read(result)
        entry["state"] = "passed" if code == 0 else "failed"
        entry["result"] = found
        summary[step.name] = entry
        print(f"{step.name}: {entry['state']} in {entry['seconds']} s", flush=True)
    (options.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (options.out / "table.txt").write_text(to_text(summary))


def _read(path: Path) -> Any:
    """What a step has written so far; None if that is nothing whole."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def bars_of(summary: dict[str, Any]) -> dict[str, float]:
    """What steps measured of the promises, by name; nothing of a step that found a mistake."""
    found: dict[str, float] = {}
    for entry in summary.values():
        result = entry.get("result") or {}
        if not result.get("failures"):
            found |= result.get("bars", {})
    return found


def to_text(summary: dict[str, Any]) -> str:
    """The summary for people: all promises, then a line a step and those of measured tables."""
    values = bars_of(summary)
    lines = ["Promises for one H200:"]
    for bar in (replace(bar, value=values.get(bar.name)) for bar in BARS):
        value = "not measured" if bar.value is None else f"{_cell(bar.value)} {bar.unit}".strip()
        verdict = {True: "met", False: "NOT MET", None: ""}[bar.met]
        target = f"{bar.relation} {bar.target:g} {bar.unit}".strip()
        lines.append(f"  {bar.name}: {value} ({target}) {verdict}".rstrip())
    for name, entry in summary.items():
        seconds = f", {entry['seconds']} s" if "seconds" in entry else ""
        lines.append(f"{name}: {entry['state']}{seconds} {entry.get('why', '')}".rstrip())
        result = entry.get("result") or {}
        lines += [f"  {line}" for line in result.get("failures", [])[:20]]
        for row in result.get("rows", []):
            cells = (f"{key} {_cell(value)}" for key, value in row.items())
            lines.append("  " + ", ".join(cells))
    return "\n".join(lines) + "\n"


def results_of(summary: dict[str, Any]) -> dict[str, Result]:
    """What the steps measured, by the suite that asks the same; bars for all promises they know.

    A suite with a step that failed has no figures. One that was cut off has what was measured.
    """
    by_suite: dict[str, Result] = {}
    for step in (step for stage in stages() for step in stage):
        entry = summary.get(step.name)
        if not step.suite or entry is None or "code" not in entry:
            continue
        result = by_suite.setdefault(
            step.suite, Result(f"{step.suite} on one GPU, bf16, B=8, T=4", ["step"])
        )
        found = entry["result"] or {"rows": [], "failures": [], "bars": {}}
        if found["failures"]:
            result.failure = f"{step.name}: {found['failures'][0]}"
        elif entry["state"] == "failed":
            result.notes.append(f"{step.name} was cut off after {entry['seconds']} s.")
        for row in found["rows"]:
            row = {"step": step.name, **row}
            result.columns += [name for name in row if name not in result.columns]
            result.rows.append(row)
        values = found["bars"]
        result.bars += [replace(bar, value=values[bar.name]) for bar in BARS if bar.name in values]
    for result in by_suite.values():
        if result.failure is not None:
            result.rows, result.bars, result.notes = [], [], []
    return by_suite


def _write_results(options: argparse.Namespace, summary: dict[str, Any], seconds: float) -> None:
    """The benchmarks' results in the format of `benchmarks`, where that can be loaded."""
    results = results_of(summary)
    if not results:
        return
    try:
        from . import environment, report
    except ImportError as error:
        print(f"results.json: not written ({error})", flush=True)
        return
    [facts] = (summary.get("environment", {}).get("result") or {}).get("rows") or [{}]
    found = report.to_json(
        {**environment.collect(), "gpu": facts.get("card")},
        PRESETS["gpu"],
        results,
        seconds,
        command=f"make gpu-check OUT={options.out}",
    )
    report.write(options.out / "results.json", found)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _run_here(options: argparse.Namespace) -> int:
    from . import gpu_bench, gpu_problems, gpu_steps

    report = gpu_problems.Report(options.result)
    module = gpu_steps if hasattr(gpu_steps, options.function) else gpu_bench
    try:
        getattr(module, options.function)(report, options.device, options.argument)
    except Exception:
        report.failures.append(traceback.format_exc(limit=-3))
        traceback.print_exc()
    report.write()
    return 1 if report.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
