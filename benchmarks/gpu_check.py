"""One command for a machine with a GPU: correctness of the engines for it, then their speed.

    python -m benchmarks.gpu_check OUT --engine cuda

Needs no network and nothing but torch, this repository and, for the engine, Triton or nvcc. Every
step runs in a process of its own, the most important ones first, and writes ``OUT/<step>.json`` and
``OUT/<step>.log``; after each, ``OUT/summary.json`` and ``OUT/table.txt`` are written anew, so that
a run that is cut off leaves what it has. It ends in under nine minutes; both engines are more than
fits well, so that two runs, one for each, find more. Every promise of `benchmarks.gpu_bars` is
listed, measured or not. What benchmarks found is in ``OUT/results.json`` as well, which ``python -m
benchmarks.readme`` takes for the record, and ``OUT/suites`` has the suites that run on a GPU (both
need rich). ``python -m xattn_kernels.measured OUT/summary.json`` takes the times of the step
``engines`` into the table that ``auto`` chooses by.

The CUDA module is built first, for the GPU at hand (`benchmarks.gpu_module`); ``--module FILE``
gives one that is built. ``--device cpu`` runs the steps that need no GPU, Triton's in its
interpreter (TRITON_INTERPRET=1), and those of ``cuda`` with a module built for the CPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from . import gpu_module
from .core import PRESETS, Result
from .gpu_bars import BARS
from .gpu_module import ROOT
from .gpu_problems import NAMES, OPERATORS

BUDGET_S = 520.0


class Step(NamedTuple):
    """A function of one of `FUNCTIONS` and its argument."""

    name: str
    function: str
    argument: str = ""
    limit_s: float = 100.0
    needs_gpu: bool = True
    command: tuple[str, ...] = ()
    """What the process is run under; without a function, what is run."""
    suite: str = ""
    """The suite of `benchmarks.suites` that asks the same questions on the CPU."""
    engine: str = "triton"
    about: tuple[str, str] | None = None
    """The operator and element type that a step of correctness judges."""
    environment: tuple[tuple[str, str], ...] = ()


#: Modules that have the functions of steps.
FUNCTIONS = ("gpu_steps", "gpu_bench", "gpu_engines", "gpu_module")
ENGINES = ("cuda", "triton")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


def stages(engine: str = "all") -> list[list[Step]]:
    """Steps in order; those of one stage run side by side (they mostly compile).

    Args:
        engine: one of `ENGINES`, or "all".
    """
    chosen = [name for name in ENGINES if engine in (name, "all")]
    environment = Step("environment", "environment", limit_s=60.0, needs_gpu=False)
    found = [[environment]]
    if "cuda" in chosen:
        found.append([Step("module", "module", limit_s=150.0, engine="cuda")])
    found += [_correctness(name) for name in chosen]
    measured = [_measured(name) for name in chosen]
    found += [[step] for steps in measured for step in steps[:4]]
    if "cuda" in chosen:
        found.append(_sanitizers("cuda"))
        found += [[step] for step in _sm90a()]
    found.append([Step("engines", "engines", limit_s=110.0, engine=chosen[0])])
    found += [[step] for steps in measured for step in steps[4:]]
    if "triton" in chosen:
        found.append(_sanitizers("triton")[:1])
    found += [[_suites(name)] for name in chosen]
    return [*found, [Step("package", "package", limit_s=100.0, needs_gpu=False)]]


def _correctness(engine: str) -> list[Step]:
    """Of all operators in all types, and what does not depend on them, the slowest first."""
    found = [
        Step(
            f"{engine}_correct_{op}_{dtype}",
            f"correct_{op}",
            dtype,
            120.0,
            needs_gpu=False,
            engine=engine,
            about=(op, dtype),
        )
        for dtype in ("bfloat16", "float16", "float32")
        for op in OPERATORS[engine]
    ]
    races = {"repeats": "repeats", "graphs": "graphs", "offsets": "offsets", "widths_tf32": "tf32"}
    return found + [
        Step(f"{engine}_{name}", function, limit_s=120.0, engine=engine)
        for name, function in races.items()
    ]


def _measured(engine: str) -> list[Step]:
    """Benchmarks, those of most promises first."""
    planned = [
        ("bench_cam", "cam", 60.0, "cam"),
        ("bench_training", "training", 60.0, "recompute"),
        ("bench_linear", "linear_core", 40.0, "linear"),
        ("bench_softmax", "softmax_core", 70.0, "softmax"),
        ("bench_head", "head", 50.0, "head"),
        ("bench_compiled_cam", "compiled_cam", 110.0, "cam"),
        ("bench_compiled_linear", "compiled_linear", 50.0, "linear"),
        ("bench_compiled_training", "compiled_training", 110.0, "recompute"),
    ]
    return [
        Step(f"{engine}_{name}", function, limit_s=limit, suite=suite, engine=engine)
        for name, function, limit, suite in planned
        if suite != "recompute" or "training" in OPERATORS[engine]
    ]


def _sanitizers(engine: str) -> list[Step]:
    """compute-sanitizer's tools on small calls; each tensor is an allocation that they know of."""
    return [
        Step(
            f"{engine}_{tool}",
            "sanitized",
            limit_s=100.0,
            command=("{sanitizer}", "--tool", tool, "--error-exitcode", "9"),
            engine=engine,
            environment=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
        )
        for tool in SANITIZERS
    ]


def _sm90a() -> list[Step]:
    """The block's kernels for sm_90a alone, which nobody uses who does not ask for them."""
    asked = (("XATTN_CUDA_SM90A", "1"),)
    correct = Step("cuda_correct_block_sm90a", "correct_block", "bfloat16", 60.0, engine="cuda")
    return [
        correct._replace(environment=asked),
        Step("cuda_bench_sm90a", "sm90a", limit_s=40.0, engine="cuda"),
    ]


def _suites(engine: str) -> Step:
    command = ["-m", "benchmarks", "--preset", "gpu", "--engine", engine]
    command += ["--out", f"{{out}}/suites/{engine}"]
    # What counts operations does so on the CPU, where the engine is not; most suites train the
    # block, which cuda has for inference alone.
    names = {"cuda": ("alternatives",)}.get(engine, PRESETS["gpu"].suites)
    command += ["--only", *(name for name in names if name != "complexity")]
    return Step(
        f"{engine}_suites", "", limit_s=100.0, command=(sys.executable, *command), engine=engine
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all steps, or one; returns 1 if a step that ran failed."""
    options = _parse(arguments)
    if options.function:
        return _run_here(options)
    options.out.mkdir(parents=True, exist_ok=True)
    options.out = options.out.resolve()
    shutil.rmtree(gpu_module.site(options.out), ignore_errors=True)
    if options.module is None and options.only and "module" not in options.only:
        options.module = gpu_module.built(options.out)
    if options.module is not None:
        gpu_module.install(options.out, options.module)
    start = time.monotonic()
    deadline = start + BUDGET_S
    summary: dict[str, dict[str, Any]] = {}
    for stage in stages(options.engine):
        chosen = [
            step
            for step in stage
            if (options.device == "cuda" or not step.needs_gpu)
            and (not options.only or step.name in options.only)
            and not (step.function == "module" and options.module is not None)
        ]
        _run_stage(chosen, options, deadline, summary)
        _write_results(options, summary, time.monotonic() - start)
    return 1 if any(entry["state"] == "failed" for entry in summary.values()) else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check")
    parser.add_argument("out", type=Path, help="folder for results")
    parser.add_argument("--engine", choices=(*ENGINES, "all"), default="all")
    parser.add_argument("--module", type=Path, help="a CUDA module that is built, for this Python")
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
            summary[step.name] = _not_run(step, "no time left")
            continue
        if _lacks_module(step, summary):
            summary[step.name] = _not_run(step, "the CUDA module was not built")
            continue
        result, log = options.out / f"{step.name}.json", options.out / f"{step.name}.log"
        result.unlink(missing_ok=True)
        command = [part.replace("{out}", str(options.out)) for part in step.command]
        command = [gpu_module.sanitizer() if part == "{sanitizer}" else part for part in command]
        if step.function:
            command += [sys.executable, "-m", "benchmarks.gpu_check", str(options.out)]
            command += ["--device", options.device, "--function", step.function]
            command += ["--argument", step.argument, "--result", str(result)]
            command += ["--engine", step.engine]
        # The package that a CUDA module was built into comes before that of the checkout, which
        # must not be the current folder.
        path = os.pathsep.join(map(str, (gpu_module.site(options.out), ROOT)))
        environment = {**os.environ, "PYTHONPATH": path, **dict(step.environment)}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(steps))))
        if options.device == "cpu" and step.engine == "triton":
            environment["TRITON_INTERPRET"] = "1"
        with log.open("w") as stream:
            try:
                process = subprocess.Popen(
                    command,
                    cwd=options.out,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env=environment,
                )
            except OSError as error:
                summary[step.name] = _not_run(step, str(error))
                continue
        running.append((step, process, time.monotonic(), limit, result))
    for step, process, start, limit, result in running:
        try:
            code = process.wait(timeout=max(0.1, start + limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        entry: dict[str, Any] = {"seconds": round(time.monotonic() - start, 1), "code": code}
        entry |= _about(step)
        found = _read(result)
        entry["state"] = "passed" if code == 0 else "failed"
        entry["result"] = found
        summary[step.name] = entry
        print(f"{step.name}: {entry['state']} in {entry['seconds']} s", flush=True)
    (options.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (options.out / "table.txt").write_text(to_text(summary))


def _not_run(step: Step, why: str) -> dict[str, Any]:
    return {"state": "not run", "why": why, **_about(step)}


def _about(step: Step) -> dict[str, Any]:
    """What `xattn_kernels.measured` must know of a step that judges."""
    if step.about is None:
        return {}
    operator, dtype = step.about
    return {"about": {"engine": step.engine, "op": NAMES[operator], "dtype": dtype}}


def _lacks_module(step: Step, summary: dict[str, Any]) -> bool:
    """Whether a step of the engine cuda is to go without the module that was to be built."""
    built = summary.get("module", {"state": "passed"})
    return (
        step.engine == "cuda"
        and step.function not in ("module", "engines")
        and built["state"] != "passed"
    )


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
    for step in (step for stage in stages() for step in stage):  # of all engines
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
        command=f"make gpu-check OUT={options.out.name} ENGINE={options.engine}",
    )
    report.write(options.out / "results.json", found)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def function_of(name: str) -> Any:
    """The function of a step."""
    modules = (importlib.import_module(f"{__package__}.{module}") for module in FUNCTIONS)
    [function] = {
        id(found): found
        for found in (vars(module).get(name) for module in modules)
        if callable(found) and found.__module__.startswith(f"{__package__}.gpu_")
    }.values()
    return function


def _run_here(options: argparse.Namespace) -> int:
    from . import gpu_problems

    gpu_problems.ENGINE = options.engine
    report = gpu_problems.Report(options.result, options.engine)
    try:
        function_of(options.function)(report, options.device, options.argument)
    except Exception:
        report.failures.append(traceback.format_exc(limit=-3))
        traceback.print_exc()
    report.write()
    return 1 if report.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
