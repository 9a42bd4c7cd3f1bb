"""The command for machines with a GPU, as far as it goes without one."""

from __future__ import annotations

import contextlib
import importlib.util
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

from benchmarks import (
    gpu_bars,
    gpu_bench,
    gpu_check,
    gpu_engines,
    gpu_module,
    gpu_problems,
    gpu_steps,
    report,
)
from benchmarks.core import PRESETS
from benchmarks.problems import Scale
from benchmarks.suites import SUITES
from xattn_kernels import measured

ROOT = Path(gpu_check.__file__).parents[1]


def steps(engine: str = "all") -> list[gpu_check.Step]:
    return [step for stage in gpu_check.stages(engine) for step in stage]


@pytest.mark.parametrize("engine", ["cuda", "triton", "all"])
def test_steps(engine: str) -> None:
    names = [step.name for step in steps(engine)]
    assert len(set(names)) == len(names)
    for step in steps(engine):
        assert step.function or step.command
        if step.function:
            assert callable(gpu_check.function_of(step.function))
        assert not step.suite or step.suite in SUITES
        assert engine in ("all", step.engine) or step.name in ("environment", "package")
    assert measured.STEP in names
    for name in gpu_check.ENGINES if engine == "all" else [engine]:
        for operator in gpu_problems.OPERATORS[name]:
            for dtype in ("bfloat16", "float16", "float32"):
                assert f"{name}_correct_{operator}_{dtype}" in names
        assert {f"{name}_graphs", f"{name}_repeats", f"{name}_offsets"} <= set(names)
    if engine != "triton":
        assert names[1] == "module"
        assert {f"cuda_{tool}" for tool in gpu_check.SANITIZERS} <= set(names)


@pytest.mark.parametrize("engine", ["cuda", "triton"])
def test_time_is_kept(engine: str) -> None:
    """Correctness and the figures of most promises fit; what is last may be cut off."""
    limits = [max(step.limit_s for step in stage) for stage in gpu_check.stages(engine)]
    assert gpu_check.BUDGET_S + 10 < 9 * 60
    assert sum(limits[:6]) <= gpu_check.BUDGET_S


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
    monkeypatch.setattr(gpu_problems, "rivals", lambda: {"Triton": "reference"})
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
@pytest.mark.parametrize("engine", ["triton", "cuda"])
def test_every_promise_is_measured_once(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promised = {b.name for b in gpu_bars.BARS if b.name.startswith("engine") == (engine == "cuda")}
    widths = {0: 36, 1: 72, 2: 144, 3: 288}
    core = gpu_bench._core

    def named_by_width(report: gpu_problems.Report, *arguments: str) -> None:
        """The softmax step with the widths that its promises name, and hardly any tokens."""
        monkeypatch.setattr(SmallScale, "width", property(lambda self: widths[self.number]))
        monkeypatch.setattr(gpu_bench, "_core", lambda number, tokens=None: core(number, 40))
        gpu_bench.softmax_core(report, *arguments)

    names: list[str] = []
    summary: dict[str, Any] = {}
    for step in sorted(steps(engine), key=lambda step: step.function == "softmax_core"):
        if not step.suite:
            continue
        found = gpu_problems.Report(tmp_path / f"{step.name}.json", engine)
        function = getattr(gpu_bench, step.function)
        if step.function == "head":
            continue
        (named_by_width if step.function == "softmax_core" else function)(found, "cpu", "")
        names += found.bars
        assert found.rows
        result = json.loads(found.path.read_text())
        summary[step.name] = {"state": "passed", "code": 0, "seconds": 1.0, "result": result}
    assert len(set(names)) == len(names)
    assert set(names) == promised
    results = gpu_check.results_of(summary)
    assert set(results) | {"recompute"} == {"cam", "recompute", "linear", "softmax"}
    assert sum(len(result.bars) for result in results.values()) == len(promised)
    facts = {"environment": {"result": {"rows": [{"card": "NVIDIA H200"}]}}}
    options = gpu_check._parse([str(tmp_path)])
    gpu_check._write_results(options, {**facts, **summary}, 12.0)
    written = report.read(tmp_path / "results.json")
    assert written["device"] == PRESETS["gpu"].device
    known = {bar.name: bar for bar in gpu_bars.measured(written["suites"].values())}
    assert {name for name, bar in known.items() if bar.value is not None} == promised
    text = gpu_check.to_text(summary)
    assert text.count("not measured") == len(gpu_bars.BARS) - len(promised)


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
    wrong = lambda case, x, engine: [1.1 * y for y in x[:12]] * 2  # noqa: E731
    monkeypatch.setattr(gpu_bench, "linear", wrong)
    with pytest.raises(AssertionError, match="relative L2"):
        gpu_bench.linear_core(gpu_problems.Report(tmp_path / "x.json"), "cpu", "")


def test_unknown_promise(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected that of a bar"):
        gpu_problems.Report(tmp_path / "x.json").bar("faster", 2.0)


def test_promises_of_engines(tmp_path: Path) -> None:
    """What only the other engine promises is not noted."""
    found = {
        engine: gpu_problems.Report(tmp_path / "x.json", engine) for engine in ("cuda", "triton")
    }
    for one in found.values():
        one.bar("CTAM CAM set, four scales, Triton / fused", 1.5)
        one.bar("kernel launches for one CTAM in inference", 3)
        one.bar("CTAM CAM set, four scales, op by op / fused", 16.0)
    assert found["triton"].bars == {
        "kernel launches for one CTAM in inference": 3,
        "CTAM CAM set, four scales, op by op / fused": 16.0,
    }
    assert found["cuda"].bars == {
        "engine cuda: CTAM CAM set, four scales, Triton / fused": 1.5,
        "engine cuda: CTAM CAM set, four scales, op by op / fused": 16.0,
    }


@pytest.mark.usefixtures("without_gpu")
def test_rivals_are_timed_too(tmp_path: Path) -> None:
    for step, count in (
        (gpu_bench.cam, 4),
        (gpu_bench.linear_core, 5),
        (gpu_bench.softmax_core, 6),
    ):
        found = gpu_problems.Report(tmp_path / "x.json", "cuda")
        with contextlib.suppress(ValueError):  # a width of which nothing is promised
            step(found, "cpu", "")
        rows = [row for row in found.rows if row.get("scale") != "CSAM"]
        assert rows and all({"Triton ms", "Triton_ms"} & set(row) for row in rows[:count])


# Engines against each other.


@pytest.mark.usefixtures("without_gpu")
def test_engines_for_the_table_of_auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every problem has one row; an engine that is wrong has no figure, and it is said."""
    monkeypatch.setattr(gpu_engines, "ENGINES", ("triton", "cpu", "reference"))
    monkeypatch.setattr(gpu_engines, "DTYPES", (torch.float32,))
    correct = gpu_engines.softmax
    monkeypatch.setattr(
        gpu_engines,
        "softmax",
        lambda case, x, engine: [
            y * (1.1 if engine == "cpu" else 1) for y in correct(case, x, engine)
        ],
    )
    found = gpu_problems.Report(tmp_path / "engines.json", "cuda")
    gpu_engines.engines(found, "cpu", "")
    keys = [(row["op"], row["gradient"]) for row in found.rows]
    assert sorted(set(keys)) == [
        ("cross_attention_block", False),
        ("cross_attention_block_training", True),
        ("linear_cross_attention", False),
        ("linear_cross_attention", True),
        ("pyramid_projection", False),
        ("pyramid_projection", True),
        ("softmax_cross_attention", False),
        ("softmax_cross_attention", True),
    ]
    assert len(found.rows) == 4 * 6 + 2
    for row in found.rows:
        expected = {"reference"} if row["op"].startswith("softmax") else {"cpu", "reference"}
        assert set(row["microseconds"]) == expected
    assert len(found.failures) == 8 and all("cpu, softmax" in line for line in found.failures)
    result = json.loads(found.path.read_text())
    entries = measured.of_summary({measured.STEP: {"state": "failed", "result": result}})
    assert len(entries) == 8  # the small scales have one width


# The module.


def test_package_with_a_module(tmp_path: Path) -> None:
    """A copy of this package that imports the given module, from any folder but the checkout."""
    given = tmp_path / "built.so"
    given.write_text("no module")
    target = gpu_module.install(tmp_path, given)
    assert target.read_text() == "no module"
    assert target.parent.parent == gpu_module.site(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", "import xattn_kernels; print(xattn_kernels.__file__)"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(gpu_module.site(tmp_path))},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(target.parent / "__init__.py"), done.stderr
    assert not (target.parent / "_build.json").exists()
    other = gpu_module.install(tmp_path, given)
    assert other == target


def test_module_of_an_earlier_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Single steps, asked for later, have it, with the package as it is now."""
    monkeypatch.setattr(gpu_check, "stages", lambda engine="all": [])
    assert gpu_module.built(tmp_path) is None
    assert gpu_check.main([str(tmp_path), "--only", "cuda_graphs"]) == 0
    assert not gpu_module.site(tmp_path).exists()
    (tmp_path / "module").mkdir()
    (tmp_path / "module" / "_cuda.cpython-3-x.so").write_text("built before")
    assert gpu_check.main([str(tmp_path), "--only", "cuda_graphs"]) == 0
    [installed] = gpu_module.site(tmp_path).glob("xattn_kernels/_cuda.*")
    assert installed.read_text() == "built before"
    assert gpu_check.main([str(tmp_path), "--only", "module"]) == 0
    assert not gpu_module.site(tmp_path).exists()


def test_module_is_built_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that the compiler is asked for; what it makes does not load here."""
    asked: list[Any] = []

    def build(nvcc: str, archs: Any, folder: Path, version: str, includes: Any, jobs: int) -> Path:
        asked.extend((archs, version))
        assert (includes[0] / "pybind11" / "pybind11.h").exists()
        folder.mkdir()
        (folder / "m.so").write_text("not a module")
        return folder / "m.so"

    monkeypatch.setattr(gpu_module._backend("nvcc"), "build_module", build)
    found = gpu_problems.Report(tmp_path / "module.json", "cuda")
    gpu_module.module(found, "cpu", "")
    assert asked == [["90a-real"], gpu_module.__version__]
    assert "does not load" in found.failures[0]
    monkeypatch.setattr(gpu_module._backend("cuda"), "find_nvcc", lambda env: None)
    with pytest.raises(FileNotFoundError, match="no nvcc"):
        gpu_module.module(found, "cpu", "")


def test_headers_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pybind11" else find(name)
    )
    assert gpu_module.headers().parts[-2:] == ("torch", "include")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pybind11"):
        gpu_module.headers()


def test_build_backend_without_setuptools(tmp_path: Path) -> None:
    """What gpu-check needs of it: the search for nvcc, and calling it."""
    code = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "setuptools" else find(name, *a)
sys.modules["setuptools"] = None
from benchmarks import gpu_module
print(gpu_module._backend("nvcc").flags()[0], gpu_module._backend("cuda").OLDEST_ARCH)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["-std=c++17", "80"], done.stderr


def test_package_without_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_module, "TOOLS", ("setuptools", "no_such_tool"))
    found = gpu_problems.Report(tmp_path / "package.json")
    gpu_module.package(found, "cpu", "")
    assert found.rows == [{"built": False, "why": "no_such_tool: not on this machine"}]
    assert found.failures == []


@pytest.mark.parametrize("name", ["linear", "softmax", "block", "pyramid", "training"])
def test_far_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """On another engine, with samples less far apart; and that a wrong offset is noticed."""
    monkeypatch.setattr(gpu_problems, "ENGINE", "cpu")
    monkeypatch.setattr(gpu_steps, "FAR", 100_000)
    every = gpu_steps._all
    monkeypatch.setattr(gpu_steps, "_all", lambda *a: {name: every(*a)[name]})
    found = gpu_problems.Report(tmp_path / "x.json")
    gpu_steps.offsets(found, "cpu", "")
    assert not found.failures and len(found.rows) == 1 + (name == "block")
    monkeypatch.setattr(gpu_steps, "_far", lambda x: torch.cat([x[:1], x[:1]]))
    gpu_steps.offsets(found, "cpu", "")
    assert "relative L2" in found.failures[0]


def test_text_and_results_of_a_run_that_was_cut_off() -> None:
    bar = gpu_bars.BARS[0]
    rows = [{"scale": "0", "fused_ms": 0.5}]
    passed = {"rows": rows, "failures": [], "bars": {bar.name: 12.0}}
    wrong = {"rows": rows, "failures": ["scale 0: error"], "bars": {gpu_bars.BARS[4].name: 70.0}}
    entry = {"state": "passed", "code": 0, "seconds": 3.0}
    summary = {
        "triton_bench_cam": {**entry, "result": passed},
        "triton_bench_linear": {**entry, "state": "failed", "code": 1, "result": wrong},
        "triton_bench_training": {**entry, "state": "failed", "code": -9, "result": None},
        "cuda_bench_softmax": {"state": "not run", "why": "no time left"},
    }
    text = gpu_check.to_text(summary)
    assert f"  {bar.name}: 12 x (>= 10 x) met" in text
    assert text.count("not measured") == len(gpu_bars.BARS) - 1
    assert "cuda_bench_softmax: not run no time left" in text
    results = gpu_check.results_of(summary)
    assert results["cam"].bars[0].value == 12.0 and results["cam"].columns == [
        "step",
        "scale",
        "fused_ms",
    ]
    assert results["linear"].failure == "triton_bench_linear: scale 0: error"
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
    chosen = ("environment", "triton_correct_block_float32", "triton_graphs")
    done = run(tmp_path / "out", *(word for name in chosen for word in ("--only", name)))
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {name: entry["state"] for name, entry in summary.items()} == dict.fromkeys(
        chosen[:2], "passed"
    )
    assert summary["environment"]["result"]["rows"][0]["torch"] == torch.__version__
    assert summary[chosen[1]]["about"] == {
        "engine": "triton",
        "op": "cross_attention_block",
        "dtype": "float32",
    }
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
    monkeypatch.setattr(gpu_check, "stages", lambda engine="all": [planned])
    assert gpu_check.main([str(tmp_path), "--device", "cpu"]) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["raises"]["state"] == "failed"
    assert "no_such_dtype" in summary["raises"]["result"]["failures"][0]
    assert summary["missing"]["state"] == "not run"
    assert summary["slow"]["state"] == "failed" and summary["slow"]["code"] == -9


def test_without_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs it is not run, and says why; what times all engines goes on with the others."""
    sleep = shutil.which("sleep")
    assert sleep is not None
    planned = [
        [gpu_check.Step("module", "correct_block", "no_such", needs_gpu=False, engine="cuda")],
        [
            gpu_check.Step(
                "judged", "x", engine="cuda", needs_gpu=False, about=("linear", "float16")
            ),
            gpu_check.Step("others", "", command=(sleep, "0"), needs_gpu=False),
        ],
    ]
    monkeypatch.setattr(gpu_check, "stages", lambda engine="all": planned)
    assert gpu_check.main([str(tmp_path), "--device", "cpu", "--engine", "cuda"]) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["others"]["state"] == "passed"
    assert summary["judged"] == {
        "state": "not run",
        "why": "the CUDA module was not built",
        "about": {"engine": "cuda", "op": "linear_cross_attention", "dtype": "float16"},
    }
    assert "judged: not run the CUDA module was not built" in (tmp_path / "table.txt").read_text()
