"""Bugs planted in the block's path for sm_90a: the tests on the host must see each of them.

As test_planted.py has it for the linear operator: no GPU has run this path, so that all the more
depends on what these tests see.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from twin import build

SOURCES = ("cuda/block_source_sm90.cu", "cuda/block_target_sm90.cu", "cuda/sm90_tile.h")
#: Waits, by what twin_drop calls them.
CALLS = {
    "barrier": r"sync_threads\(",
    "some": r"sync_some\(",
    "fence": r"fence_async\(",
    "phase": r"wait_phase\(",
    "product": r"wait_products<",
    "wait": r"wait_copies<",
}


@dataclass(frozen=True)
class Bug:
    """A change of ``file``, with which ``source`` is compiled; a problem of twin/block_sm90.py."""

    name: str
    file: str
    old: str
    new: str
    source: str
    problem: str = "own"
    words: str = "wrong"


BUGS = [
    Bug(
        "steps of a matrix are swapped",
        "cuda/sm90_tile.h",
        "describe(b, kCore, 2 * kSteps * kCore);\n  hold(d);\n  a.hold_all();",
        "describe(b, 2 * kSteps * kCore, kCore);\n  hold(d);\n  a.hold_all();",
        "block_target_sm90.cu",
        words="",
    ),
    Bug(
        "a matrix is read as its transpose",
        "cuda/sm90_tile.h",
        "multiply_wide<true, false>(d,",
        "multiply_wide<false, false>(d,",
        "block_source_sm90.cu",
    ),
    Bug(
        "slabs are given up before all warps have read them",
        "cuda/block_target_sm90.cu",
        "start_mbarrier(memory.empty(slot), S::kGroups * 4);",
        "start_mbarrier(memory.empty(slot), S::kGroups);",
        "block_target_sm90.cu",
        "stream",
        words="",
    ),
    Bug(
        "a token beyond the last one counts",
        "cuda/block_source_sm90.cu",
        "k.clear_rows_from(tokens);",
        "k.clear_rows_from(tokens + 1);",
        "block_source_sm90.cu",
        "few",
    ),
]


@pytest.fixture(scope="module")
def module() -> Path:
    return build.build()


def start(module: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(build.TWIN / "block_sm90.py"), *arguments],
        cwd=build.ROOT,
        env={**build.environment(), "XATTN_TWIN_MODULE": str(module)},
        capture_output=True,
        text=True,
    )


def test_without_a_bug(module: Path) -> None:
    done = start(module, "right")
    assert done.stdout == "right\n", done.stdout + done.stderr[-5000:]


def test_all_waits_are_needed(module: Path) -> None:
    done = start(module, "places")
    assert done.returncode == 0, done.stderr[-5000:]
    passed, not_needed = json.loads(done.stdout)
    ours = [place for place in not_needed if place[1].endswith(SOURCES)]
    assert ours == []
    for source in SOURCES:
        found = {
            (kind, i + 1)
            for i, line in enumerate((build.CSRC / source).read_text().splitlines())
            for kind, call in CALLS.items()
            if re.search(rf"^[^/]*\b{call}.*\);", line)
        }
        assert {(kind, line) for kind, file, line in passed if file.endswith(source)} == found
        assert found


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_is_seen(bug: Bug) -> None:
    module = build.build(changes={bug.file: (bug.old, bug.new)}, only=[bug.source])
    done = start(module, "right", bug.problem)
    assert done.stdout != "right\n"
    assert bug.words in done.stdout + done.stderr, done.stdout + done.stderr[-5000:]
