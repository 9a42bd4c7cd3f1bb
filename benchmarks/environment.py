"""Where figures come from."""

from __future__ import annotations

import datetime
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from xattn_kernels import info

BUSY = 0.7
"""Load average from which times are not to be trusted."""
ROOT = Path(__file__).resolve().parent.parent


def collect() -> dict[str, Any]:
    """Versions, processor, threads, load and commit, as plain JSON values."""
    facts = info.collect()
    native = facts["cpu"]["native"]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "version": facts["version"],
        "commit": _commit(),
        "python": facts["python"],
        "torch": torch.__version__,
        "triton": facts["packages"]["triton"],
        "platform": facts["platform"],
        "processor": facts["cpu"]["model"],
        "mhz": _megahertz(),
        "cores": facts["cpu"]["cores"],
        "threads": torch.get_num_threads(),
        "isa": native and native["isa"],
        "engines": [engine["name"] for engine in facts["engines"] if engine["available"]],
        "load": os.getloadavg()[0],
        "gpu": facts["gpu"]["devices"][0]["name"] if facts["gpu"]["devices"] else None,
        "gpu_driver_and_clocks": _gpu_state(),
    }


def to_text(environment: dict[str, Any]) -> str:
    """One line for people."""
    gpu = f"{environment['gpu']}, " if environment.get("gpu") else ""
    return (
        f"{gpu}{environment['processor']} ({environment['isa']}), {environment['threads']} of "
        f"{environment['cores']} cores, torch {environment['torch']}, "
        f"xattn_kernels {environment['version']} ({environment['commit'] or 'no commit'})"
    )


def warnings(environment: dict[str, Any]) -> list[str]:
    """What makes figures of this run worth less."""
    found = []
    if environment["load"] > BUSY:
        found.append(f"the machine is busy: load average {environment['load']:.1f}")
    if "cpu" not in environment["engines"]:
        found.append("the native module is not there, so the reference engine is measured")
    return found


def compiler_error() -> str | None:
    """Why torch.compile cannot work on the CPU here; None if it can."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler at run time, and {compiler} is not there"
    return None


def _megahertz() -> float | None:
    """Clock of the first core now; None where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(float(x.partition(":")[2]) for x in lines if x.startswith("cpu MHz"))
    except (OSError, StopIteration, ValueError):
        return None


def _gpu_state() -> str | None:
    """Driver, and clocks of multiprocessors and memory now; None without a GPU or its tool."""
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[2] or None


def _commit() -> str | None:
    """Short hash, with a + if files differ from it."""
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
