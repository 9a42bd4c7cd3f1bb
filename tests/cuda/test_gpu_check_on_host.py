"""``make gpu-check ENGINE=cuda`` on the CPU, with the engine's kernels compiled for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from twin import build

from benchmarks.gpu_problems import OPERATORS

#: Steps without a GPU: each operator that the engine has, in one type.
STEPS = tuple(f"cuda_correct_{name}_bfloat16" for name in OPERATORS["cuda"])


def test_steps(tmp_path: Path) -> None:
    """Judged as on a GPU, from the package that the module was put into."""
    arguments = [word for name in STEPS for word in ("--only", name)]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.gpu_check", str(tmp_path / "out")),
            *("--device", "cpu", "--engine", "cuda", "--module", str(build.build()), *arguments),
        ],
        cwd=build.ROOT,
        env=build.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {name: entry["state"] for name, entry in summary.items()} == dict.fromkeys(
        STEPS, "passed"
    )
    for entry in summary.values():
        assert entry["about"]["engine"] == "cuda"
        assert len(entry["result"]["rows"]) >= 3


def test_mistakes_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that cannot be loaded fails the step, and does not fall back to another engine."""
    broken = tmp_path / "broken.so"
    broken.write_text("no module")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.gpu_check", str(tmp_path / "out")),
            *("--device", "cpu", "--engine", "cuda", "--module", str(broken)),
            *("--only", STEPS[0]),
        ],
        cwd=build.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    [entry] = json.loads((tmp_path / "out" / "summary.json").read_text()).values()
    assert entry["state"] == "failed"
    assert "_cuda does not load" in entry["result"]["failures"][0]
