"""Runs the tests in `interpreted/`: each file in a process in which Triton interprets kernels."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).with_name("interpreted")
ROOT = FOLDER.parents[2]

#: The files there, and how many tests each has: one that disappears is noticed here.
FILES = {
    "shared.py": 15,
    "linear.py": 83,
    "linear_edges.py": 38,
    "block.py": 46,
    "softmax.py": 68,
    "pyramid.py": 45,
    "library.py": 31,
    "tuning.py": 23,
    "training.py": 133,
}


def test_all_files_are_listed() -> None:
    assert {path.name for path in FOLDER.glob("*.py")} == {*FILES, "conftest.py"}


@pytest.mark.parametrize("name", FILES)
def test_file(name: str) -> None:
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "--tb=short", str(FOLDER / name)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
    last = done.stdout.strip().splitlines()[-1]
    assert re.match(rf"{FILES[name]} passed", last), last
