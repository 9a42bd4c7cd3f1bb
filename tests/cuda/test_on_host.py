"""Runs the tests in `on_host/`: each file in a process with the CUDA engine built for the CPU."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from twin import build, run

FOLDER = Path(__file__).with_name("on_host")

#: The files there, and how many tests each has: one that disappears is noticed here.
FILES: dict[str, int] = {
    "cards.py": 12,
    "linear.py": 175,
    "linear_edges.py": 102,
    "library.py": 92,
    "pyramid.py": 251,
    "block.py": 225,
    "block_sm90.py": 90,
    "softmax.py": 134,
    "softmax_edges.py": 118,
}

#: What runs once more where races of threads are errors: pytest's -k, and how many tests.
RACES = {
    "linear.py": ("test_cases", 45),
    "block.py": ("test_cases or test_widths or many_tiles", 75),
    "softmax.py": ("test_cases or test_wide", 60),
}


@pytest.fixture(scope="module")
def module() -> Path:
    return build.build()


@pytest.fixture(scope="module")
def watching() -> Path:
    return build.build(asan=False, races=True)


def test_all_files_are_listed() -> None:
    assert {path.name for path in FOLDER.glob("*.py")} == {*FILES, "conftest.py"}


def check(done: subprocess.CompletedProcess[str], count: int) -> None:
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-20_000:]
    last = done.stdout.strip().splitlines()[-1]
    assert re.match(rf"{count} passed", last), last


@pytest.mark.parametrize("name", FILES)
def test_file(name: str, module: Path) -> None:
    check(run.run(module, [str(FOLDER / name)]), FILES[name])


@pytest.mark.parametrize("name", RACES)
def test_threads_do_not_race(name: str, watching: Path) -> None:
    chosen, count = RACES[name]
    check(run.run(watching, [str(FOLDER / name), "-k", chosen], asan=False), count)
