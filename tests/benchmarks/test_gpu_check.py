"""The command for machines with a GPU, as far as it goes without one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from benchmarks import gpu_bars, gpu_bench, gpu_check, gpu_problems, gpu_steps, report
from benchmarks.core import PRESETS
from benchmarks.problems import Scale
from benchmarks.suites import SUITES

ROOT = Path(gpu_check.__file__).parents[1]


def steps() -> list[gpu_check.Step]:
    return [step for stage in gpu_check.stages() for step in stage]


def test_steps() -> None:
    names = [step.name for step in steps()]
    assert len(set(names)) == len(names)
    for step in steps():
        assert step.function or step.command
        if step.function:
            assert callable(getattr(gpu_steps, step.function, None)) is not callable(
                getattr(gpu_bench, step.function, None)
            )
        assert not step.suite or step.suite in SUITES
    functions = {step.function for step in steps()}
    for operator in ("block", "linear", "softmax", "training", "pyramid"):
        assert f"correct_{operator}" in functions
    for dtype in ("bfloat16", "float16", "float32"):
        assert f"correct_pyramid_{dtype}" in names


def test_time_is_kept() -> None:
    """Correctness and the figures of most promises fit; what is last may be cut off."""
    limits = [max(step.limit_s for step in stage) for stage in gpu_check.stages()]
    assert gpu_check.BUDGET_S + 10 < 9 * 60
    assert sum(limits[:7]) <= gpu_check.BUDGET_S


class SmallScale(Scale):
    """A scale of which everything takes no time."""

    width = 8
    shape = (6, 8)


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another engine on small problems on the CPU; calls are made and not timed."""

    def timed(calls: Any, seconds: float = 1.0, graph: bool = True) -> dict[str, float]:
        for call in calls.values():
            call()
        names = [*calls, *(f"{name}, graph" for name in calls if graph)]
        return {name: 1e-3 * (1 + number) for number, name in enumerate(names)}

    monkeypatch.setattr(gpu_problems, "ENGINE", "cpu")
    for name, value in {
        "DEVICE": "cpu",
        "BATCH": 2,
        "Scale": SmallScale,
        "SCALES": (0, 1, 2, 3),
        "medians": timed,
        "launches_of": lambda call: 3,
        "BACKENDS": (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION),
        "_compiled": lambda run: run,
    }.items():
        monkeypatch.setattr(gpu_bench, name, value)
    core = gpu_bench._core
    monkeypatch.setattr(gpu_bench, "_core", lambda number, tokens=None: core(number, tokens and 40))


@pytest.mark.usefixtures("without_gpu")
def test_every_promise_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    widths = {0: 36, 1: 72, 2: 144, 3: 288}
    core = gpu_bench._core

    def named_by_width(report: gpu_problems.Report, *arguments: str) -> None:
        """The softmax step with the widths that its promises name, and hardly any tokens."""
        monkeypatch.setattr(SmallScale, "width", property(lambda self: widths[self.number]))
        monkeypatch.setattr(gpu_bench, "_core", lambda number, tokens=None: core(number, 40))
        gpu_bench.softmax_core(report, *arguments)

    names: list[str] = []
    summary: dict[str, Any] = {}
    for step in sorted(steps(), key=lambda step: step.function == "softmax_core"):
        if not step.suite:
            continue
        found = gpu_problems.Report(tmp_path / f"{step.name}.json")
        function = getattr(gpu_bench, step.function)
        if step.function == "head":
            continue
        (named_by_width if step.function == "softmax_core" else function)(found, "cpu", "")
        names += found.bars
        assert found.rows
        result = json.loads(found.path.read_text())
        summary[step.name] = {"state": "passed", "code": 0, "seconds": 1.0, "result": result}
    assert len(set(names)) == len(names)
    assert set(names) == {bar.name for bar in gpu_bars.BARS}
    results = gpu_check.results_of(summary)
    assert set(results) == {"cam", "recompute", "linear", "softmax"}
    assert sum(len(result.bars) for result in results.values()) == len(gpu_bars.BARS)
    facts = {"environment": {"result": {"rows": [{"card": "NVIDIA H200"}]}}}
    options = gpu_check._parse([str(tmp_path)])
    gpu_check._write_results(options, {**facts, **summary}, 12.0)
    written = report.read(tmp_path / "results.json")
    assert written["device"] == PRESETS["gpu"].device
    assert all(bar.value is not None for bar in gpu_bars.measured(written["suites"].values()))
    assert "not measured" not in gpu_check.to_text(summary)


@pytest.mark.usefixtures("without_gpu")
def test_head(tmp_path: Path) -> None:
    found = gpu_problems.Report(tmp_path / "head.json")
    gpu_bench.head(found, "cpu", "")
    assert [row["head"] for row in found.rows] == ["inference", "training"] * 2


@pytest.mark.usefixtures("without_gpu")
def test_wrong_results_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(*_: Any, **__: Any) -> None:
        raise RuntimeError("timed")

    monkeypatch.setattr(gpu_bench, "medians", timed)
    monkeypatch.setattr(gpu_bench, "linear", lambda case, x: [1.1 * y for y in x[:12]] * 2)
    with pytest.raises(AssertionError, match="relative L2"):
        gpu_bench.linear_core(gpu_problems.Report(tmp_path / "x.json"), "cpu", "")


def test_unknown_promise(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected that of a bar"):
        gpu_problems.Report(tmp_path / "x.json").bar("faster", 2.0)


def test_text_and_results_of_a_run_that_was_cut_off() -> None:
    bar = gpu_bars.BARS[0]
    rows = [{"scale": "0", "fused_ms": 0.5}]
    passed = {"rows": rows, "failures": [], "bars": {bar.name: 12.0}}
    wrong = {"rows": rows, "failures": ["scale 0: error"], "bars": {gpu_bars.BARS[4].name: 70.0}}
    entry = {"state": "passed", "code": 0, "seconds": 3.0}
    summary = {
        "bench_cam": {**entry, "result": passed},
        "bench_linear": {**entry, "state": "failed", "code": 1, "result": wrong},
        "bench_training": {**entry, "state": "failed", "code": -9, "result": None},
        "bench_softmax": {"state": "not run", "why": "no time left"},
    }
    text = gpu_check.to_text(summary)
    assert f"  {bar.name}: 12 x (>= 10 x) met" in text
    assert text.count("not measured") == len(gpu_bars.BARS) - 1
    assert "bench_softmax: not run no time left" in text
    results = gpu_check.results_of(summary)
    assert results["cam"].bars[0].value == 12.0 and results["cam"].columns == [
        "step",
        "scale",
        "fused_ms",
    ]
    assert results["linear"].failure == "bench_linear: scale 0: error"
    assert not results["linear"].bars and not results["linear"].rows
    assert results["recompute"].failure is None and "cut off" in results["recompute"].notes[0]
    assert "softmax" not in results


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", str(out), "--device", "cpu", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_command(tmp_path: Path) -> None:
    """Versions, and one operator in the interpreter; steps that need a GPU are left out."""
    chosen = ("environment", "correct_block_float32", "graphs")
    done = run(tmp_path / "out", *(word for name in chosen for word in ("--only", name)))
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {name: entry["state"] for name, entry in summary.items()} == dict.fromkeys(
        chosen[:2], "passed"
    )
    assert summary["environment"]["result"]["rows"][0]["torch"] == torch.__version__
    text = (tmp_path / "out" / "table.txt").read_text()
    assert text.count("not measured") == len(gpu_bars.BARS)


def test_failures_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that raises, one that is not there to run, and one that is too slow."""
    sleep = shutil.which("sleep")
    assert sleep is not None
    planned = [
        gpu_check.Step("raises", "correct_block", "no_such_dtype", 60.0, needs_gpu=False),
        gpu_check.Step("missing", "", command=("no-such-command",), needs_gpu=False),
        gpu_check.Step("slow", "", limit_s=5.0, command=(sleep, "60"), needs_gpu=False),
    ]
    monkeypatch.setattr(gpu_check, "stages", lambda: [planned])
    assert gpu_check.main([str(tmp_path), "--device", "cpu"]) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["raises"]["state"] == "failed"
    assert "no_such_dtype" in summary["raises"]["result"]["failures"][0]
    assert summary["missing"]["state"] == "not run"
    assert summary["slow"]["state"] == "failed" and summary["slow"]["code"] == -9
