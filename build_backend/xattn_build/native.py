"""setuptools command that has CMake build the native modules."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from setuptools import Distribution
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

from xattn_build.cuda import BuildError, CudaPlan, library_environment, make_plan

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "xattn_kernels"
MODULES = ("_core", "_cuda")
#: Written beside the modules; `python -m xattn_kernels info` reads it.
RECORD = "_build.json"
#: A compiler process at -O3 stays below this; nvcc needs about twice as much.
BYTES_PER_JOB = 1 << 30
BYTES_PER_CUDA_JOB = 2 << 30


class NativeDistribution(Distribution):
    """Tells setuptools that the wheel is for one platform, although it lists no extension."""

    def has_ext_modules(self) -> bool:
        return True


class BuildNative(build_ext):
    """Configure, build and install with CMake, into the build folder or beside the sources."""

    command_name = "build_ext"

    def run(self) -> None:
        try:
            check_host(os.environ)
            self._build(make_plan(os.environ))
        except BuildError as error:
            raise CompileError(f"{PACKAGE}: {error}") from error

    def get_outputs(self) -> list[str]:
        names = [*(module + sysconfig.get_config_var("EXT_SUFFIX") for module in MODULES), RECORD]
        paths = (self._destination() / name for name in names)
        return [str(path) for path in paths if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        if not self._in_place():
            return {}
        library = Path(self.build_lib) / PACKAGE
        return {str(library / Path(path).name): path for path in self.get_outputs()}

    def get_source_files(self) -> list[str]:
        return []

    def _in_place(self) -> bool:
        return bool(self.inplace or self.editable_mode)

    def _destination(self) -> Path:
        return ROOT / PACKAGE if self._in_place() else Path(self.build_lib).resolve() / PACKAGE

    def _work_folder(self) -> Path:
        """Where CMake works; kept between in-place builds, so that those compile what changed."""
        if self._in_place():
            return ROOT / "build" / f"inplace-{self.plat_name}-{sys.implementation.cache_tag}"
        return Path(self.build_temp).resolve() / "cmake"

    def _build(self, plan: CudaPlan) -> None:
        work = self._work_folder()
        for note in plan.notes:
            self.warn(note)
        if plan.build and plan.mode == "auto":
            try:
                self._configure(work, plan)
            except BuildError as error:
                reason = f"nvcc at {plan.nvcc} could not be used: {error}"
                plan = CudaPlan(plan.mode, reason=reason, worth_a_warning=True)
                self._configure(work, plan)
        else:
            self._configure(work, plan)
        if plan.worth_a_warning:
            self.warn(f"only the CPU module is built: {plan.reason}")
        jobs = parallel_jobs(os.environ, plan.build)
        _call([_tool("cmake"), "--build", str(work), "--parallel", str(jobs)], "compiling", plan)
        destination = self._destination()
        destination.mkdir(parents=True, exist_ok=True)
        for stale in map(Path, self.get_outputs()):
            stale.unlink()
        _call([_tool("cmake"), "--install", str(work), "--prefix", str(destination)], "installing")
        record = build_record(work, plan, self.distribution.get_version())
        (destination / RECORD).write_text(json.dumps(record, indent=2) + "\n")

    def _configure(self, work: Path, plan: CudaPlan) -> None:
        work.mkdir(parents=True, exist_ok=True)
        command = [
            _tool("cmake"),
            "-S",
            str(ROOT),
            "-B",
            str(work),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={_pybind11_dir()}",
            f"-DXATTN_VERSION={self.distribution.get_version()}",
            f"-DXATTN_CUDA={'ON' if plan.build else 'OFF'}",
        ]
        if plan.build:
            command += [
                f"-DCMAKE_CUDA_COMPILER={plan.nvcc}",
                f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(plan.archs)}",
            ]
        # What CMake once found it keeps; a build in another environment must look again. Objects
        # stay: ninja compiles those anew whose command differs.
        key = work / "configure.txt"
        current = "\n".join([*command, *(os.environ.get(name, "") for name in ("CXX", "CXXFLAGS"))])
        if not key.exists() or key.read_text() != current:
            (work / "CMakeCache.txt").unlink(missing_ok=True)
            for compilers_found in (work / "CMakeFiles").glob("[0-9]*"):
                shutil.rmtree(compilers_found)
        key.unlink(missing_ok=True)
        _call(command, "configuring", plan)
        key.write_text(current)


def check_host(env: Mapping[str, str]) -> None:
    """BuildError when there is no C++ compiler or no Python header."""
    if env.get("CXX"):
        wanted = shlex.split(env["CXX"])[0]
        if shutil.which(wanted, path=env.get("PATH")) is None:
            raise BuildError(f"CXX={env['CXX']!r}: {wanted} is not an executable")
    elif not any(shutil.which(name, path=env.get("PATH")) for name in ("c++", "g++", "clang++")):
        raise BuildError(
            "no C++ compiler was found (looked for c++, g++ and clang++ on PATH). Install one with "
            "C++17, for example `apt-get install g++`, or name it in CXX"
        )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        raise BuildError(
            f"{header} is missing. Install Python's development files, for example "
            "`apt-get install python3-dev`"
        )


def parallel_jobs(env: Mapping[str, str], cuda: bool) -> int:
    """Compiler processes at a time: as many as cores and free memory allow.

    MAX_JOBS and CMAKE_BUILD_PARALLEL_LEVEL override it.
    """
    for name in ("MAX_JOBS", "CMAKE_BUILD_PARALLEL_LEVEL"):
        if env.get(name):
            if not env[name].isdigit() or int(env[name]) < 1:
                raise BuildError(f"{name}={env[name]!r}: expected a positive integer")
            return int(env[name])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    free = free_memory()
    if free is None:
        return cores or 1
    return max(1, min(cores or 1, free // (BYTES_PER_CUDA_JOB if cuda else BYTES_PER_JOB)))


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can still be taken, within the machine and the control group; None if unknown."""
    limits: list[int] = []
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
    except OSError:
        pass
    group = root / "sys/fs/cgroup"
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            limits.append(int(limit) - int((group / "memory.current").read_text()))
    except OSError:
        pass
    return max(0, min(limits)) if limits else None


def build_record(work: Path, plan: CudaPlan, version: str) -> dict[str, Any]:
    """What was built, with what, and why CUDA was not."""
    compiler, isas = (work / "cpu.txt").read_text().splitlines()
    toolkit = (work / "cuda.txt").read_text().strip() if plan.build else None
    return {
        "version": version,
        "python": platform.python_version(),
        "cpu": {"compiler": compiler, "isas": isas.split()},
        "cuda": {
            "built": plan.build,
            "requested": plan.mode,
            "reason": plan.reason,
            "toolkit": toolkit,
            "architectures": list(plan.archs),
        },
    }


def _tool(name: str) -> str:
    """cmake or ninja: the wheel in this environment first, then PATH."""
    spec = importlib.util.find_spec(name)
    if spec is not None:
        folder = getattr(importlib.import_module(name), f"{name.upper()}_BIN_DIR", None) or getattr(
            importlib.import_module(name), "BIN_DIR", None
        )
        if folder is not None and (Path(folder) / name).exists():
            return str(Path(folder) / name)
    found = shutil.which(name)
    if found is None:
        raise BuildError(f"{name} was not found; `pip install {name}` or drop --no-build-isolation")
    return found


def _pybind11_dir() -> str:
    try:
        import pybind11
    except ImportError as error:
        raise BuildError(
            "pybind11 was not found; `pip install pybind11` or drop --no-build-isolation"
        ) from error
    return str(pybind11.get_cmake_dir())


def _call(command: list[str], doing: str, plan: CudaPlan | None = None) -> None:
    env = library_environment(plan.nvcc, os.environ) if plan and plan.nvcc else None
    print("+", shlex.join(command), flush=True)
    status = subprocess.run(command, check=False, env=env).returncode
    if status != 0:
        raise BuildError(f"{doing} failed (exit status {status})")
