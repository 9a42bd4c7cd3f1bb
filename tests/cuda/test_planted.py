"""Bugs planted in the CUDA engine's kernels: the tests on the host must see each of them.

Barriers and waits are dropped while the kernels run; the other bugs are changes of the sources, of
which one object is compiled again. A caught bug is a wrong number, an error of the layer, a report
of AddressSanitizer or the end of the process; the same run without the bug is right.
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

#: Of the linear operator's forward pass.
SOURCES = ("cuda/linear_fwd.cu", "cuda/linear_states.cu")


@dataclass(frozen=True)
class Bug:
    """A change of ``file``: ``source`` is compiled with it, ``problems`` of twin/linear.py run."""

    name: str
    file: str
    old: str
    new: str
    source: str
    problems: tuple[str, ...] = ("bfloat16",)
    words: str = "wrong"


BUGS = [
    Bug(
        "one channel too many is copied",
        "cuda/tile.h",
        "const int left = row < rows ? columns",
        "const int left = row <= rows ? columns",
        "linear_fwd.cu",
        words="copy_async",
    ),
    Bug(
        "one token too many is loaded",
        "cuda/tile.h",
        "channel < place.channels && token < place.tokens",
        "channel < place.channels && token <= place.tokens",
        "linear_states.cu",
        ("float16",),
        words="AddressSanitizer: heap-buffer-overflow",
    ),
    Bug(
        "one row too many is stored",
        "cuda/tile.h",
        "for_rows(rows, (columns + kPer - 1) / kPer,",
        "for_rows(rows + 1, (columns + kPer - 1) / kPer,",
        "linear_fwd.cu",
        words="AddressSanitizer: heap-buffer-overflow",
    ),
    Bug(
        "a token too many has a part in Z",
        "cuda/linear_states.cu",
        "begin_ + number * Plan::kTokens + n < end_ ?",
        "begin_ + number * Plan::kTokens + n <= end_ ?",
        "linear_states.cu",
        ("float32",),
    ),
    Bug(
        "halves of a fragment are swapped",
        "cuda/product.h",
        "multiply_bfloat16(sum.v[m][2 * n], left, {right[n][0], right[n][1]});",
        "multiply_bfloat16(sum.v[m][2 * n], left, {right[n][1], right[n][0]});",
        "linear_fwd.cu",
    ),
    Bug(
        "matrices of the left operand are swapped",
        "cuda/product.h",
        "load_matrices(left, a.at(i + matrix % 2 * 8 + r, k + matrix / 2 * 8));",
        "load_matrices(left, a.at(i + matrix / 2 * 8 + r, k + matrix % 2 * 8));",
        "linear_fwd.cu",
    ),
    Bug(
        "a transposed load is not transposed",
        "cuda/product.h",
        "load_matrices_transposed(right[n], b.at(i + matrix / 2 * 8, k + matrix % 2 * 8 + r));",
        "load_matrices(right[n], b.at(i + matrix / 2 * 8, k + matrix % 2 * 8 + r));",
        "linear_fwd.cu",
    ),
    Bug(
        "rows of a tf32 fragment are swapped",
        "cuda/product.h",
        "left[i] = float_to_tf32(*a.at(row + 16 * m + g + i % 2 * 8, k + t + i / 2 * 4));",
        "left[i] = float_to_tf32(*a.at(row + 16 * m + g + i / 2 * 8, k + t + i % 2 * 4));",
        "linear_states.cu",
        ("float16",),
    ),
    Bug(
        "alignment of rows is not looked at",
        "cuda/tile.h",
        "reinterpret_cast<int64_t>(view.data) | row * element_bytes |",
        "reinterpret_cast<int64_t>(view.data) | row * 16 |",
        "linear_fwd.cu",
        ("float32",),
        words="an address that is not a multiple of 16",
    ),
    Bug(
        "vectors are wider than alignment allows",
        "cuda/tile.h",
        "return write_tile<4, E>(view, place, from);",
        "return write_tile<16, E>(view, place, from);",
        "linear_fwd.cu",
        ("float32",),
        words="misaligned address",
    ),
    Bug(
        "an offset of 32 bits",
        "cuda/tile.h",
        "return place.batch * view.batch_stride +",
        "return static_cast<int>(place.batch * view.batch_stride) +",
        "linear_fwd.cu",
        ("far",),
        words="",
    ),
]


@pytest.fixture(scope="module")
def module() -> Path:
    return build.build()


def start(module: Path, *arguments: str, asan: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(build.TWIN / "linear.py"), *arguments],
        cwd=build.ROOT,
        env={**build.environment(asan), "XATTN_TWIN_MODULE": str(module)},
        capture_output=True,
        text=True,
    )


def test_runs_without_a_bug_are_right(module: Path) -> None:
    done = start(module, "result")
    assert done.stdout.strip() == "right", done.stdout + done.stderr[-5000:]


def test_every_barrier_and_every_wait_is_needed() -> None:
    """Without it results change or threads race; with all of them there is no race."""
    done = start(build.build(asan=False, races=True), "places", asan=False)
    assert done.returncode == 0, done.stderr[-5000:]
    passed, not_needed = json.loads(done.stdout)
    assert not_needed == []
    for source in SOURCES:
        lines = (build.CSRC / source).read_text().splitlines()
        found = {
            (kind, i + 1)
            for i, line in enumerate(lines)
            for kind, call in (("barrier", "sync_threads"), ("wait", "wait_copies<"))
            if re.search(rf"\b{call}.*\(\);", line)
        }
        assert {(kind, line) for kind, file, line in passed if file.endswith(source)} == found
        assert found


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_bug_is_seen(bug: Bug) -> None:
    if bug.words == "misaligned address" and build.is_clang():
        pytest.skip("clang does not check the addresses of structs that are copied")
    module = build.build(changes={bug.file: (bug.old, bug.new)}, only=(bug.source,))
    done = start(module, "result", *bug.problems)
    assert "right" not in done.stdout
    assert bug.words in done.stdout + done.stderr
