"""CUDA kernels compiled for GPUs that are not here: registers, spills, instructions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.resources import cuda_table as resources
from xattn_build import cuda as build
from xattn_build import nvcc as direct

FILE = resources.ROOT / "docs" / "cuda_resources.json"
KERNELS = [path for path in direct.sources() if "XATTN_KERNEL(" in path.read_text()]
#: Kernels that spill, and how many bytes at most: two registers, stored and loaded.
KNOWN = {
    "sm_100 block_source.cu source_kernel<Plan<40, 25, 4, 3, false, 1, 1> >": 16,
    "sm_120 block_source.cu source_kernel<Plan<40, 25, 4, 3, false, 1, 1> >": 16,
}


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    written: dict[str, Any] = json.loads(FILE.read_text())
    return written


@pytest.fixture(scope="module")
def nvcc() -> str:
    return resources.compiler()


def is_known(row: dict[str, Any]) -> bool:
    """Whether all that is wrong with a row are spills that are known."""
    spilled = row["spill_stores"] + row["spill_loads"]
    quiet = {"spill_stores": 0, "spill_loads": 0, "stack": 0}
    quiet["instructions"] = {**row["instructions"], "local": 0}
    known = KNOWN.get(resources.identity(row), 0)
    return 0 < spilled <= known and not resources.problems({**row, **quiet})


def test_all_rows_are_acceptable(table: dict[str, Any]) -> None:
    bad = [row for row in table["kernels"] if resources.problems(row)]
    found = {resources.identity(row): resources.problems(row) for row in bad}
    assert all(map(is_known, bad)), found
    assert set(found) == set(KNOWN), found


def test_all_files_and_architectures_are_there(table: dict[str, Any]) -> None:
    assert tuple(resources.SHARED_LIMITS) == build.DEFAULT_ARCHS
    wanted = set()
    for path in KERNELS:
        archs = ["90a"] if path.stem.endswith("_sm90") else list(resources.SHARED_LIMITS)
        wanted |= {(path.name, arch) for arch in archs}
    seen = {(row["file"], row["sm"]) for row in table["kernels"] if row["file"] != "probe.cu"}
    assert seen == wanted
    names = [resources.identity(row) for row in table["kernels"]]
    assert len(set(names)) == len(names)


def test_tensor_cores_are_used(table: dict[str, Any]) -> None:
    """By kernels of 16 bits and tf32 alone; warp-group products by those for 90a alone."""
    for row in table["kernels"]:
        counts = row["instructions"]
        if row["file"].endswith("_sm90.cu"):
            continue
        assert counts["wgmma"] == counts["bulk"] == 0, resources.identity(row)
        if re.search(r"Ieee", row["kernel"]):
            assert counts["mma"] == 0, resources.identity(row)
        if re.search(r"^(?!pack_|prepare_).*(BFloat16Products|Tf32Products)", row["kernel"]):
            assert counts["mma"] > 0, resources.identity(row)
    special = [row for row in table["kernels"] if row["file"].endswith("_sm90.cu")]
    assert bool(special) == any(path.stem.endswith("_sm90") for path in KERNELS)
    for file in {row["file"] for row in special}:
        assert any(row["instructions"]["wgmma"] for row in special if row["file"] == file)


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("linear_fwd", "90a"),
        ("linear_states", "80"),
        ("states", "120"),
        ("block_source_sm90", "90a"),
    ],
)
def test_compiled_again(name: str, arch: str, table: dict[str, Any], nvcc: str) -> None:
    source = direct.ROOT / "csrc" / "cuda" / f"{name}.cu"
    compiled = resources.rows(source, arch, nvcc)
    written = [row for row in table["kernels"] if (row["file"], row["sm"]) == (source.name, arch)]
    assert all(map(is_known, (row for row in compiled if resources.problems(row))))
    assert list(map(resources.identity, compiled)) == list(map(resources.identity, written))
    if resources.version(nvcc) == table["nvcc"]:
        how = f"python -m benchmarks.resources.cuda_table docs/{FILE.name} --only {name}"
        assert compiled == written, f"the kernels have changed; run {how}"


def test_this_environment_has_the_compiler_of_the_table(table: dict[str, Any], nvcc: str) -> None:
    """constraints.txt fixes it, so that the comparison above is one."""
    pinned = dict(
        line.split("==")
        for line in (resources.ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    assert pinned["nvidia-cuda-nvcc"] == table["nvcc"] == resources.version(nvcc)


REPORT = """
ptxas info    : 24 bytes gmem
ptxas info    : Compiling entry function '_Z1aPi' for 'sm_90a'
ptxas info    : Function properties for _Z1aPi
    32 bytes stack frame, 16 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 98 registers, used 1 barriers, 32 bytes cumulative stack size, 512 bytes smem
ptxas info    : Compile time = 1.544 ms
ptxas info    : Function properties for _Z5innerv
    8 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads
ptxas info    : Compiling entry function '_Z1bPi' for 'sm_90a'
ptxas info    : Function properties for _Z1bPi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""


def test_what_the_assembler_prints_is_read() -> None:
    assert resources.parse(REPORT) == {
        "_Z1aPi": resources.Compiled(98, 32, 16, 20, 512),
        "_Z1bPi": resources.Compiled(8, 0, 0, 0, 0),
    }


def test_instructions_are_counted() -> None:
    listing = """
        .section  .text._Z1a,"ax",@progbits
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0020*/             @!UP1 UBLKCP.S.G [UR4], [UR6], UR8 ;
        .section  .text._Z1b,"ax",@progbits
        /*0000*/                   STL [R1], R2 ;
        /*0010*/               @P1 MUFU.EX2 R4, R5 ;
    """
    none = dict.fromkeys(resources.INSTRUCTIONS, 0)
    assert resources.count_instructions(listing) == {
        "_Z1a": {**none, "mma": 1, "bulk": 1},
        "_Z1b": {**none, "local": 1, "special": 1},
    }


def test_names_are_readable() -> None:
    mangled = "_ZN5xattn4cuda12_GLOBAL__N_16kernelILi48ELb1EEEvNS1_9ArgumentsE"
    assert resources.demangled([mangled]) == {mangled: "kernel<48, true>"}
    assert resources.demangled([]) == {}


GOOD = {
    "registers": 128,
    "threads": 256,
    "stack": 0,
    "spill_stores": 0,
    "spill_loads": 0,
    "shared": 0,
    "instructions": {"local": 0},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"registers": 255}, None),
        ({"registers": 129, "threads": 512}, "129 registers of 512 threads"),
        ({"registers": 65, "threads": 0}, "65 registers of 1024 threads"),
        ({"spill_loads": 4}, "4 bytes spilled"),
        ({"stack": 8}, "8 bytes of stack"),
        ({"shared": 16}, "16 bytes of static shared memory"),
        ({"instructions": {"local": 2}}, "2 accesses to local memory"),
    ],
)
def test_what_is_not_acceptable(change: dict[str, Any], message: str | None) -> None:
    found = resources.problems({**GOOD, **change})
    assert len(found) == (message is not None)
    assert message is None or message in found[0]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One file of kernels anew, on all architectures; the others' rows stay."""
    file = tmp_path / "table.json"
    table = json.loads(FILE.read_text())
    wrong = [{**row, "registers": 1} for row in table["kernels"] if row["file"] == "probe.cu"]
    others = [row for row in table["kernels"] if row["file"] != "probe.cu"]
    gone = {**table["kernels"][0], "file": "gone.cu"}
    file.write_text(json.dumps({"nvcc": table["nvcc"], "kernels": [*wrong, *others, gone]}))
    assert resources.main([str(file), "--only", "probe"]) == 0
    assert "6 kernels compiled, 0 not acceptable" in capsys.readouterr().out
    assert file.read_text() == FILE.read_text()
    file.write_text(json.dumps({"nvcc": "12.0.0", "kernels": []}))
    for name in ("probe", "nothing"):
        with pytest.raises(SystemExit):
            resources.main([str(file), "--only", name])
    errors = capsys.readouterr().err
    assert "of nvcc 12.0.0, this is" in errors and "no nothing in csrc/cuda" in errors


def test_outside_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "ROOT", tmp_path)
    with pytest.raises(RuntimeError, match="no checkout"):
        resources.backend()
