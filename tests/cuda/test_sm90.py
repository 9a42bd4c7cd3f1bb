"""What nvcc makes of the path for sm_90a: warpgroup products, bulk copies, nothing in local memory.

Compiled here, and never run: no test has a GPU.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.resources import cuda_table as resources
from xattn_build import nvcc as direct

FOLDER = direct.ROOT / "csrc" / "cuda"
#: Files, how many kernels each has, and products of a kernel at least: one for 16 of 40 channels,
#: three times, of values, hidden layer (of tiles that lie either way) and keys, or of S.
FILES = {"block_source_sm90": (5, 12), "block_target_sm90": (7, 12)}


@pytest.fixture(scope="module")
def nvcc() -> str:
    return resources.compiler()


@pytest.mark.parametrize("name", FILES)
def test_machine_code(name: str, nvcc: str) -> None:
    kernels, products = FILES[name]
    rows: list[dict[str, Any]] = resources.rows(FOLDER / f"{name}.cu", "90a", nvcc)
    assert len(rows) == kernels
    for row in rows:
        assert not resources.problems(row), resources.identity(row)
        counts = row["instructions"]
        assert counts["wgmma"] >= products, resources.identity(row)
        assert counts["bulk"] >= 2, resources.identity(row)
        assert counts["mma"] == 0, resources.identity(row)
        if name == "block_target_sm90":
            # Warpgroups exchange all that their number allows; with less at the start they would
            # wait for registers for ever.
            blocks = int(re.findall(r"\d+", row["kernel"])[-1])
            most = resources.REGISTERS // (row["threads"] * blocks) // 8 * 8
            assert row["registers"] == most, resources.identity(row)


def report(name: str, arch: str, nvcc: str, folder: Path) -> str:
    """What the assembler says of a file."""
    source, output = FOLDER / f"{name}.cu", folder / "kernels.o"
    command = direct.kernel_command(nvcc, source, output, [f"{arch}-real"], ["-Xptxas=-v"])
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", FILES)
def test_products_are_not_serialised(name: str, nvcc: str, tmp_path: Path) -> None:
    """Else the assembler says so, in notes of its own (C7510 to C7520)."""
    said = report(name, "90a", nvcc, tmp_path)
    assert said.count("Compiling entry function") == FILES[name][0]
    assert "C75" not in said and "serialized" not in said, said


@pytest.mark.parametrize("arch", ["80"])
@pytest.mark.parametrize("name", [*FILES, "block_sm90"])
def test_nothing_for_other_architectures(name: str, arch: str, nvcc: str, tmp_path: Path) -> None:
    assert "Compiling entry function" not in report(name, arch, nvcc, tmp_path)
