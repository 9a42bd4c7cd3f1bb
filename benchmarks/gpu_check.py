"""One command for a machine with a GPU: correctness of the Triton engine, then its speed.

    python -m benchmarks.gpu_check OUT

Needs no network and nothing but torch, Triton and this repository. Every step runs in a process of
its own, the most important ones first, and writes ``OUT/<step>.json`` and ``OUT/<step>.log``; after
each, ``OUT/summary.json`` and ``OUT/table.txt`` are written anew, so that a run that is cut off
leaves what it has. It ends in under nine minutes.

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
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BUDGET_S = 520.0


class Step(NamedTuple):
    """A function of `benchmarks.gpu_steps` and its argument."""

    name: str
    function: str
    argument: str = ""
    limit_s: float = 100.0
    needs_gpu: bool = True
    command: tuple[str, ...] = ()
    """What the process is run under."""


def stages() -> list[list[Step]]:
    """Steps in order; those of one stage run side by side (they mostly compile)."""
    correct = [
        Step(f"correct_{op}_{dtype}", f"correct_{op}", dtype, 150.0, needs_gpu=False)
        for dtype in ("bfloat16", "float16", "float32")
        for op in ("block", "linear", "softmax")
    ]
    sanitizer = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9")
    return [
        [Step("environment", "environment", limit_s=30.0, needs_gpu=False)],
        correct,
        [Step("repeats", "repeats"), Step("graphs", "graphs"), Step("widths_tf32", "tf32")],
        [Step("bench_block", "bench_block", limit_s=60.0)],
        [Step("bench_linear", "bench_linear", limit_s=60.0)],
        [Step("bench_softmax", "bench_softmax", limit_s=60.0)],
        [Step("sanitizer", "sanitized", limit_s=60.0, command=sanitizer)],
        [Step("bench_compiled", "bench_compiled", limit_s=120.0)],
        [Step("build", "build", limit_s=60.0, needs_gpu=False)],
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all steps, or one; returns 1 if a step that ran failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check")
    parser.add_argument("out", type=Path, help="folder for results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", action="append", help="a step, by name; may be repeated")
    parser.add_argument("--function", help=argparse.SUPPRESS)
    parser.add_argument("--argument", default="", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.function:
        return _run_here(options)
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + BUDGET_S
    summary: dict[str, dict[str, Any]] = {}
    for stage in stages():
        chosen = [
            step
            for step in stage
            if (options.device == "cuda" or not step.needs_gpu)
            and (not options.only or step.name in options.only)
        ]
        _run_stage(chosen, options, deadline, summary)
    return 1 if any(entry["state"] == "failed" for entry in summary.values()) else 0


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
        command = [
            *step.command,
            *(sys.executable, "-m", "benchmarks.gpu_check", str(options.out)),
            *("--device", options.device, "--function", step.function),
            *("--argument", step.argument, "--result", str(result)),
        ]
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


def to_text(summary: dict[str, Any]) -> str:
    """The summary for people: one line a step, and the lines of measured tables."""
    lines = []
    for name, entry in summary.items():
        seconds = f", {entry['seconds']} s" if "seconds" in entry else ""
        lines.append(f"{name}: {entry['state']}{seconds} {entry.get('why', '')}".rstrip())
        result = entry.get("result") or {}
        lines += [f"  {line}" for line in result.get("failures", [])[:20]]
        for row in result.get("rows", []):
            cells = (f"{key} {_cell(value)}" for key, value in row.items())
            lines.append("  " + ", ".join(cells))
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _run_here(options: argparse.Namespace) -> int:
    from . import gpu_steps

    report = gpu_steps.Report(options.result)
    try:
        getattr(gpu_steps, options.function)(report, options.device, options.argument)
    except Exception:
        report.failures.append(traceback.format_exc(limit=-3))
        traceback.print_exc()
    report.write()
    return 1 if report.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
