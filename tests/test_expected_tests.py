"""The guard over the number of tests: it must fail when tests vanish or are skipped in silence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

GUARD = Path(__file__).with_name("expected_tests.py")
TESTS = """
import pytest

def test_runs():
    pass

@pytest.mark.skip(reason="needs a card")
def test_skipped():
    pass

@pytest.mark.xfail(reason="broken")
def test_broken():
    assert False
"""
SKIPS = {"needs a card": 1, "xfail: broken": 1}


def run(folder: Path, mode: str, workers: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", f"--expected-tests={mode}"]
    if workers:
        command += ["-p", "xdist", "-n", str(workers)]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(GUARD, tmp_path / "conftest.py")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_one.py").write_text(TESTS)
    return tmp_path


def expect(folder: Path, tests: dict[str, int], skips: dict[str, int]) -> None:
    content = {"tests": tests, "skips": {"test_one.py": skips}}
    (folder / "expected_tests.json").write_text(json.dumps(content))


@pytest.mark.parametrize("workers", [0, 2])
def test_written_file_passes(folder: Path, workers: int) -> None:
    assert run(folder, "write", workers).returncode == 0
    written = json.loads((folder / "expected_tests.json").read_text())
    assert written == {"tests": {"test_one.py": 3}, "skips": {"test_one.py": SKIPS}}
    assert run(folder, "check", workers).returncode == 0


def test_allowed_skips_may_run(folder: Path) -> None:
    expect(folder, {"test_one.py": 3}, {**SKIPS, "needs a card": 2, "needs two cards": 1})
    assert run(folder, "check").returncode == 0


@pytest.mark.parametrize(
    ("tests", "skips", "message"),
    [
        ({"test_one.py": 4}, SKIPS, "test_one.py: 4 tests expected, 3 run"),
        ({"test_one.py": 3, "test_two.py": 1}, SKIPS, "test_two.py: 1 tests expected, 0 run"),
        ({"test_one.py": 3}, {"xfail: broken": 1}, "1 skipped, 0 allowed: needs a card"),
    ],
)
def test_difference_fails(
    folder: Path, tests: dict[str, int], skips: dict[str, int], message: str
) -> None:
    expect(folder, tests, skips)
    result = run(folder, "check")
    assert result.returncode == 1
    assert message in result.stdout


def test_uninitialised_memory_is_nan() -> None:
    assert torch.empty(3).isnan().all()
