"""The CUDA module of this checkout, built on the machine that `benchmarks.gpu_check` runs on.

``OUT/site`` gets a copy of the package with the module in it, which the steps import; the checkout
stays as it is. nvcc is called by hand: neither CMake nor a network is needed. What the package's
own build makes of this machine is asked at the end, by the step ``package``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xattn_kernels._version import __version__

if TYPE_CHECKING:
    from .gpu_problems import Report

ROOT = Path(__file__).resolve().parents[1]
#: What the package's own build needs of an environment.
TOOLS = ("setuptools", "pybind11")
PROGRAMS = ("cmake", "ninja")


def site(out: Path) -> Path:
    """Where the package with the module is, for `PYTHONPATH`."""
    return out / "site"


def built(out: Path) -> Path | None:
    """The module that an earlier run built; None if none did."""
    return next(iter(sorted((out / "module").glob("_cuda.*.so"))), None)


def install(out: Path, module: Path) -> Path:
    """Copy the package beside a module; returns where the module is now."""
    target = site(out) / "xattn_kernels"
    shutil.rmtree(target, ignore_errors=True)
    # Other builds of this module, and the record of what was built with it, stay behind.
    ignored = shutil.ignore_patterns("__pycache__", "_cuda.*", "_build.json")
    shutil.copytree(ROOT / "xattn_kernels", target, ignore=ignored)
    copied = target / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    shutil.copyfile(module, copied)
    return copied


def _backend(name: str) -> Any:
    """A module of the build backend; without the rest of it, which needs setuptools."""
    folder = ROOT / "build_backend"
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    if importlib.util.find_spec("setuptools") is None:
        parent = types.ModuleType("xattn_build")
        parent.__path__ = [str(folder / parent.__name__)]
        sys.modules.setdefault(parent.__name__, parent)
    return importlib.import_module(f"xattn_build.{name}")


def headers() -> Path:
    """pybind11's headers: its own package's, or those that torch brings along.

    Raises:
        FileNotFoundError: if there are neither.
    """
    if importlib.util.find_spec("pybind11") is not None:
        return Path(importlib.import_module("pybind11").get_include())
    torch = importlib.util.find_spec("torch")
    if torch is not None and torch.origin is not None:
        folder = Path(torch.origin).parent / "include"
        if (folder / "pybind11" / "pybind11.h").exists():
            return folder
    raise FileNotFoundError("no headers of pybind11 were found: neither its package nor torch's")


def architectures(device: str) -> list[str]:
    """Of this machine's GPUs, in CMake's notation; 90a without one."""
    if device != "cuda":
        return ["90a-real"]
    import torch

    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    numbers = sorted(10 * major + minor for major, minor in found)
    return [f"{'90a' if number == 90 else number}-real" for number in numbers]


def module(report: Report, device: str, _: str) -> None:
    """Build the CUDA module for this machine's GPUs, and have one run a kernel."""
    start = time.monotonic()
    nvcc = _backend("cuda").find_nvcc(os.environ)
    if nvcc is None:
        raise FileNotFoundError("no nvcc was found; MODULE=file gives a module that is built")
    out = report.path.parent
    archs = architectures(device)
    jobs = len(os.sched_getaffinity(0))
    made = _backend("nvcc").build_module(
        nvcc, archs, out / "module", __version__, [headers()], jobs
    )
    target = install(out, made)
    report.add(
        nvcc=nvcc,
        architectures=" ".join(archs),
        seconds=round(time.monotonic() - start, 1),
        mib=round(made.stat().st_size / 2**20, 1),
    )
    check = "import sys, xattn_kernels._cuda as m; print(m.__file__, m.compiled_archs())"
    if device == "cuda":
        check += "; print('runs code for', m.probe(0))"
    done = subprocess.run(
        [sys.executable, "-c", check],
        env={**os.environ, "PYTHONPATH": str(site(out))},
        cwd=out,
        capture_output=True,
        text=True,
    )
    print(done.stdout, done.stderr, flush=True)
    if done.returncode or str(target) not in done.stdout:
        report.failures.append(f"the module does not load: {done.stdout}{done.stderr[-800:]}")


def package(report: Report, device: str, _: str) -> None:
    """The package builds with what is there, the CUDA module included if there is an nvcc."""
    missing = [name for name in TOOLS if importlib.util.find_spec(name) is None]
    missing += [
        name
        for name in PROGRAMS
        if importlib.util.find_spec(name) is None and shutil.which(name) is None
    ]
    if missing:
        report.add(built=False, why=f"{', '.join(missing)}: not on this machine")
        return
    target = report.path.parent / "package"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    wanted = "0" if device == "cpu" or _backend("cuda").find_nvcc(os.environ) is None else "1"
    start = time.monotonic()
    done = subprocess.run(
        [*command, "--no-index", "--target", str(target), str(ROOT)],
        env={**os.environ, "XATTN_CUDA": wanted},
        capture_output=True,
        text=True,
    )
    print(done.stdout, done.stderr)
    seconds = round(time.monotonic() - start, 1)
    report.add(built=done.returncode == 0, XATTN_CUDA=wanted, seconds=seconds)
    if done.returncode:
        report.failures.append(done.stderr[-800:])


def sanitizer() -> str:
    """compute-sanitizer: on PATH, or beside nvcc."""
    found = shutil.which("compute-sanitizer")
    nvcc = _backend("cuda").find_nvcc(os.environ) if found is None else None
    beside = Path(nvcc).parent / "compute-sanitizer" if nvcc is not None else None
    if beside is not None and beside.exists():
        return str(beside)
    return found or "compute-sanitizer"
