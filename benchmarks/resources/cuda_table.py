"""What the CUDA kernels take of a GPU, compiled for GPUs that need not be there.

``python -m benchmarks.resources.cuda_table FILE`` compiles every kernel of ``csrc/cuda`` for every
architecture and writes a table as JSON: one line a kernel with registers, spills, stack, static
shared memory, code size and what the machine code has of the instructions that matter. With
``--only NAME ...`` the rows of other files of kernels stay as they are. It needs a checkout, nvcc
and, of Triton or a CUDA toolkit, nvdisasm.

Shared memory is given at launch, so that a kernel's is not in its code; `SHARED_LIMITS` is what a
block can have of it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
#: Architectures of the table, and shared memory that a block can have there, in bytes.
SHARED_LIMITS = {
    "80": 163 * 1024,
    "86": 99 * 1024,
    "89": 99 * 1024,
    "90a": 227 * 1024,
    "100": 227 * 1024,
    "120": 99 * 1024,
}
#: 32-bit registers of a multiprocessor; given to warps in units of 8 for every thread.
REGISTERS = 65536
#: Instructions of the machine code that are counted, by how their names begin.
INSTRUCTIONS = {
    "mma": ("HMMA",),
    "wgmma": ("HGMMA",),
    "special": ("MUFU",),
    "bulk": ("UBLKCP", "UTMALDG", "UTMASTG"),
    "async": ("LDGSTS",),
    "local": ("LDL", "STL"),
}
_MAX_THREADS = 0x05  # an attribute of .nv.info


class Compiled(NamedTuple):
    """What the assembler says of a kernel, by its name in the object file."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


def backend() -> Any:
    """The module of the build backend that knows how kernels are compiled.

    Raises:
        RuntimeError: outside of a checkout.
    """
    folder = ROOT / "build_backend"
    if not folder.is_dir():
        raise RuntimeError(f"{ROOT} is no checkout of the sources: there is no {folder.name}")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return importlib.import_module("xattn_build.nvcc")


def compiler() -> str:
    """The nvcc that is used: the one of this environment's wheels first, for its fixed version.

    Raises:
        RuntimeError: if there is none.
    """
    backend()
    for entry in sys.path:
        for nvcc in sorted(Path(entry).glob("nvidia/cu*/bin/nvcc"), reverse=True):
            return str(nvcc)
    found = importlib.import_module("xattn_build.cuda").find_nvcc(os.environ)
    if found is None:
        raise RuntimeError("no nvcc was found: `pip install nvidia-cuda-nvcc nvidia-cuda-runtime`")
    return str(found)


def version(nvcc: str) -> str:
    """The compiler's version, such as ``13.0.88``."""
    match = re.search(r"V(\d+\.\d+\.\d+)", _run([nvcc, "--version"]))
    return match.group(1) if match else "unknown"


def rows(source: Path, arch: str, nvcc: str) -> list[dict[str, Any]]:
    """Compile a file of kernels for an architecture; one row for each kernel, by name."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = backend().kernel_command(
            nvcc, source, cubin, [f"{arch}-real"], ["-cubin", "-Xptxas=-v"]
        )
        command.remove("-c")
        compiled = parse(_run(command))
        code = cubin.read_bytes() if cubin.exists() else b""
        counts = count_instructions(_run([disassembler(), str(cubin)])) if compiled else {}
    sections = sections_of(code) if compiled else {}
    names = demangled(list(compiled))
    found = []
    for mangled, kernel in compiled.items():
        found.append(
            {
                "sm": arch,
                "file": source.name,
                "kernel": names[mangled],
                "threads": max_threads(code, sections.get(f".nv.info.{mangled}")),
                **kernel._asdict(),
                "code": sections[f".text.{mangled}"][1],
                "instructions": counts.get(mangled, dict.fromkeys(INSTRUCTIONS, 0)),
            }
        )
    return sorted(found, key=lambda row: str(row["kernel"]))


def parse(report: str) -> dict[str, Compiled]:
    """What ``-Xptxas=-v`` printed, by kernel; functions that are no kernels are left out."""
    found: dict[str, Compiled] = {}
    entry = None
    frame = (0, 0, 0)
    for line in report.splitlines():
        started = re.search(r"Compiling entry function '(\w+)'", line)
        if started:
            entry = started.group(1)
        spilled = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        )
        if spilled:
            frame = (int(spilled[1]), int(spilled[2]), int(spilled[3]))
        used = re.search(r"Used (\d+) registers", line)
        if used and entry is not None:
            shared = re.search(r"(\d+) bytes smem", line)
            found[entry] = Compiled(int(used[1]), *frame, int(shared[1]) if shared else 0)
            entry = None
    return found


def demangled(names: Sequence[str]) -> dict[str, str]:
    """Readable names: without namespaces, parameters and what tells files apart."""
    if not names:
        return {}
    lines = _run(["c++filt", *names]).splitlines()
    return {name: _short(line) for name, line in zip(names, lines, strict=True)}


def _short(name: str) -> str:
    name = re.sub(r"\((anonymous namespace)\)::|xattn::cuda::|xattn::", "", name)
    name = re.sub(r"\([^()]*\)$", "", name)  # parameters
    name = re.sub(r"\((?:bool|int|unsigned int|long)\)", "", name)  # (int)48 is 48
    return name.removeprefix("void ").strip()


def sections_of(elf: bytes) -> dict[str, tuple[int, int]]:
    """Offset and size of every section of a 64-bit ELF file, by name."""
    start, size, count, names = (
        *struct.unpack_from("<Q", elf, 0x28),
        *struct.unpack_from("<HHH", elf, 0x3A),
    )
    headers = [struct.unpack_from("<IIQQQQ", elf, start + i * size) for i in range(count)]
    text = headers[names][4]
    found = {}
    for name, _, _, _, offset, length in headers:
        end = elf.index(b"\0", text + name)
        found[elf[text + name : end].decode()] = (offset, length)
    return found


def max_threads(elf: bytes, section: tuple[int, int] | None) -> int:
    """Threads of a block that a kernel is compiled for, of its ``.nv.info``; 0: any number."""
    if section is None:
        return 0
    offset, end = section[0], section[0] + section[1]
    while offset + 4 <= end:
        form, attribute, size = struct.unpack_from("<BBH", elf, offset)
        if attribute == _MAX_THREADS:
            x, y, z = struct.unpack_from("<III", elf, offset + 4)
            return int(x * y * z)
        offset += 4 + (size if form == 4 else 0)  # other forms have their value in the two bytes
    return 0


def count_instructions(listing: str) -> dict[str, dict[str, int]]:
    """How often each kernel of a disassembly has the instructions of `INSTRUCTIONS`."""
    found: dict[str, dict[str, int]] = {}
    counts: dict[str, int] | None = None
    for line in listing.splitlines():
        section = re.match(r"\s*\.section\s+\.text\.(\w+)", line)
        if section:
            counts = found.setdefault(section[1], dict.fromkeys(INSTRUCTIONS, 0))
        code = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", line)
        if code and counts is not None:
            for name, prefixes in INSTRUCTIONS.items():
                counts[name] += code[1] in prefixes
    return found


def disassembler() -> str:
    """nvdisasm: Triton's, or the one on PATH.

    Raises:
        RuntimeError: if there is neither.
    """
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        if tool.exists():
            return str(tool)
    found = shutil.which("nvdisasm")
    if found is None:
        raise RuntimeError("no nvdisasm was found: `pip install triton` has one")
    return found


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr or done.stdout}")
    return done.stdout + done.stderr


def problems(row: dict[str, Any]) -> list[str]:
    """Why a row is not acceptable."""
    found = []
    spilled = row["spill_stores"] + row["spill_loads"]
    if spilled:
        found.append(f"{spilled} bytes spilled")
    if row["stack"]:
        found.append(f"{row['stack']} bytes of stack")
    if row["shared"] > 0:
        found.append(f"{row['shared']} bytes of static shared memory, all is to be dynamic")
    threads = row["threads"] or 1024
    if -(-row["registers"] // 8) * 8 * threads > REGISTERS:
        found.append(f"{row['registers']} registers of {threads} threads are too many")
    if row["instructions"]["local"]:
        found.append(f"{row['instructions']['local']} accesses to local memory")
    return found


def identity(row: dict[str, Any]) -> str:
    """What a row is about, as text."""
    return f"sm_{row['sm']} {row['file']} {row['kernel']}"


def write(file: Path, table: Sequence[dict[str, Any]], nvcc: str) -> None:
    """Write rows as JSON, one a line, by file, architecture and kernel."""
    order = list(SHARED_LIMITS)
    ordered = sorted(table, key=lambda x: (x["file"], order.index(x["sm"]), x["kernel"]))
    lines = ",\n".join(f"    {json.dumps(row)}" for row in ordered)
    file.write_text(f'{{\n  "nvcc": "{version(nvcc)}",\n  "kernels": [\n{lines}\n  ]\n}}\n')


def fresh(sources: Sequence[Path], nvcc: str) -> Iterator[dict[str, Any]]:
    """Rows of files of kernels for all architectures; as many at a time as there are cores."""
    planned = [
        (source, arch)
        for source in sources
        for arch in SHARED_LIMITS
        if arch == "90a" or not source.stem.endswith("_sm90")
    ]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = pool.map(lambda pair: rows(pair[0], pair[1], nvcc), planned)
        for number, ((source, arch), found) in enumerate(zip(planned, compiled, strict=True), 1):
            print(f"{number}/{len(planned)} {source.name} sm_{arch}", flush=True)
            yield from found


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table; returns 1 if a row is not acceptable."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.resources.cuda_table", description="Compile all CUDA kernels."
    )
    parser.add_argument("file", type=Path, help="JSON file to write")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="compile these of csrc/cuda, such as linear_fwd"
    )
    options = parser.parse_args(arguments)
    nvcc = compiler()
    every = backend().sources()
    names = options.only or [source.stem for source in every]
    unknown = set(names) - {source.stem for source in every}
    if unknown:
        parser.error(f"--only: no {', '.join(sorted(unknown))} in csrc/cuda")
    chosen = [source for source in every if source.stem in names]
    table = list(fresh(chosen, nvcc))
    for row in table:
        for problem in problems(row):
            print(f"  {identity(row)}: {problem}", flush=True)
    kept: list[dict[str, Any]] = []
    if options.only:
        written = json.loads(options.file.read_text())
        if written["nvcc"] != version(nvcc):
            parser.error(f"--only: the file is of nvcc {written['nvcc']}, this is {version(nvcc)}")
        others = {source.name for source in every} - {source.name for source in chosen}
        kept = [row for row in written["kernels"] if row["file"] in others]
    write(options.file, [*kept, *table], nvcc)
    bad = sum(bool(problems(row)) for row in table)
    print(f"{options.file}: {len(table)} kernels compiled, {bad} not acceptable")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
