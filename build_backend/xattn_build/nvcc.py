"""nvcc without CMake: for what kernels take of a card, and for machines that have no CMake.

The flags are those of cmake/cuda.cmake: `cmake/nvcc_flags.txt` has what both give every kernel.
"""

from __future__ import annotations

import concurrent.futures
import os
import re
import shlex
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

from xattn_build.cuda import BuildError, library_environment

ROOT = Path(__file__).resolve().parents[2]
FLAGS_FILE = ROOT / "cmake" / "nvcc_flags.txt"
SYMBOLS = ROOT / "cmake" / "modules.map"
HOST_SOURCES = (ROOT / "csrc" / "bindings_cuda.cpp", ROOT / "csrc" / "edges.cpp")


def sources() -> list[Path]:
    """Files of kernels, those of 90a alone (``*_sm90.cu``) included."""
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def flags() -> list[str]:
    """What every kernel is compiled with, but for architectures."""
    lines = FLAGS_FILE.read_text().splitlines()
    return ["-std=c++17", *(line for line in lines if line and not line.startswith("#"))]


def code_of(archs: Sequence[str]) -> list[str]:
    """Flags for architectures in CMake's notation: ``90a-real``, ``120`` (with PTX).

    As in cmake/cuda.cmake, machine code of 86, 87 and 89 is made from the PTX of 80.
    """
    found: dict[str, list[str]] = {}
    for arch in archs:
        match = re.fullmatch(r"(\d+[af]?)(-real|-virtual)?", arch)
        if match is None:
            raise BuildError(f"{arch!r} is not an architecture such as 80-real, 90a-real, 120")
        number, kind = match.groups()
        ptx = "80" if kind == "-real" and number in ("86", "87", "89") else number
        kinds = {"-real": ["sm"], "-virtual": ["compute"], None: ["compute", "sm"]}[kind]
        found.setdefault(ptx, []).extend(f"{kind}_{number}" for kind in kinds)
    return [f"-gencode=arch=compute_{ptx},code=[{','.join(x)}]" for ptx, x in found.items()]


def kernel_command(
    nvcc: str, source: Path, output: Path, archs: Sequence[str], extra: Sequence[str] = ()
) -> list[str]:
    """The command that compiles a file of kernels, as CMake does."""
    specialised = [arch for arch in archs if arch.startswith("90a")]
    if source.stem.endswith("_sm90") and specialised:
        archs = specialised
    definitions = ["-DXATTN_HAVE_SM90A=1"] if specialised else []
    return [
        nvcc,
        *flags(),
        "-DNDEBUG",
        *definitions,
        f"-I{ROOT / 'csrc'}",
        *code_of(archs),
        "-Xcompiler=-fPIC,-fvisibility=hidden",
        *extra,
        "-c",
        str(source),
        "-o",
        str(output),
    ]


def build_module(
    nvcc: str,
    archs: Sequence[str],
    folder: Path,
    version: str,
    includes: Sequence[Path],
    jobs: int = 2,
    run: Callable[[list[str]], None] | None = None,
) -> Path:
    """Compile and link ``_cuda`` into a folder; returns its path.

    Args:
        nvcc: the compiler.
        archs: in CMake's notation.
        folder: for the module and the objects.
        version: what the module says its version is.
        includes: where pybind11's headers are.
        jobs: compilers at a time.
        run: has a command run, for tests.

    Raises:
        BuildError: if a command fails; the message has what it said.
    """
    run = run or (lambda command: _run(command, library_environment(nvcc, os.environ)))
    folder.mkdir(parents=True, exist_ok=True)
    objects, commands = [], []
    for source in sources():
        objects.append(folder / f"{source.stem}.cu.o")
        commands.append(kernel_command(nvcc, source, objects[-1], archs))
    headers = [ROOT / "csrc", sysconfig.get_path("include"), *includes]
    definitions = [f'-DXATTN_VERSION="{version}"', f'-DXATTN_CUDA_ARCHS="{" ".join(archs)}"']
    for source in HOST_SOURCES:
        objects.append(folder / f"{source.stem}.cpp.o")
        commands.append(
            [
                nvcc,
                "-std=c++17",
                "-O3",
                "-DNDEBUG",
                *definitions,
                *(f"-I{folder}" for folder in headers),
                "-Xcompiler=-fPIC,-fvisibility=hidden",
                "-c",
                str(source),
                "-o",
                str(objects[-1]),
            ]
        )
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, commands))
    module = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    link = [nvcc, "-shared", "-cudart=static", f"-Xlinker=--version-script={SYMBOLS}"]
    run([*link, *map(str, objects), "-o", str(module)])
    return module


def _run(command: list[str], env: dict[str, str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise BuildError(f"{shlex.join(command)}\nfailed ({done.returncode}):\n{said}")
