"""Runs the tests in `on_host/`: each file in a process with the CUDA engine built for the CPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from twin import build, run

FOLDER = Path(__file__).with_name("on_host")

#: The files there, and how many tests each has: one that disappears is noticed here.
FILES: dict[str, int] = {
    "linear.py": 175,
    "linear_edges.py": 102,
    "pyramid.py": 250,
    "block.py": 51,
}


@pytest.fixture(scope="module")
def module() -> Path:
    return build.build()


def test_all_files_are_listed() -> None:
    assert {path.name for path in FOLDER.glob("*.py")} == {*FILES, "conftest.py"}


@pytest.mark.parametrize("name", FILES)
def test_file(name: str, module: Path) -> None:
    done = run.run(module, [str(FOLDER / name)])
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-20_000:]
    last = done.stdout.strip().splitlines()[-1]
    assert re.match(rf"{FILES[name]} passed", last), last
