"""What this installation can do, and why it cannot do the rest."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from xattn_kernels import build_record, measured, registry
from xattn_kernels._version import __version__
from xattn_kernels.compat import torchvision_ops_error
from xattn_kernels.engines import native
from xattn_kernels.problem import MEASURED_ENGINES

#: Packages whose versions decide what works; those that are missing are reported as None.
PACKAGES = ("torch", "numpy", "triton", "torchvision", "timm")


def collect() -> dict[str, Any]:
    """Return everything ``python -m xattn_kernels info`` tells, as plain JSON values."""
    build, build_error = None, None
    try:
        build = build_record.read()
    except RuntimeError as error:
        build_error = str(error)
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _package_version(name) for name in PACKAGES}
        | {"torch": torch.__version__},  # with its build, as in 2.14.1+cu130
        "torchvision_ops_error": torchvision_ops_error(),
        "engines": [
            {"name": engine.name, "available": engine.available, "reason": engine.reason}
            for engine in registry.list_backends()
        ],
        "cpu": {
            "model": _cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "native": native.core().cpu_info() if native.load_error() is None else None,
        },
        "gpu": {"torch_cuda": torch.version.cuda, "devices": _gpus()},
        "measured": measured.capabilities(),
        "build": build,
        "build_error": build_error,
    }


def to_text(facts: dict[str, Any]) -> str:
    """Lay out the result of :func:`collect` for reading."""
    versions = (f"{name} {version or '-'}" for name, version in facts["packages"].items())
    lines = [
        f"xattn_kernels {facts['version']}",
        f"  Python {facts['python']} on {facts['platform']}",
        f"  {', '.join(versions)}",
        *_torchvision_lines(facts),
        "",
        "Engines",
    ]
    for engine in facts["engines"]:
        verdict = "available" if engine["available"] else f"no: {engine['reason']}"
        lines.append(f"  {engine['name']:<10} {verdict}")
    lines += _auto_lines(facts)
    return "\n".join(
        [*lines, "", *_cpu_lines(facts), "", *_gpu_lines(facts), "", *_build_lines(facts)]
    )


def _torchvision_lines(facts: dict[str, Any]) -> list[str]:
    error = facts["torchvision_ops_error"]
    if facts["packages"]["torchvision"] is None or error is None:
        return []
    return [f"  torchvision.ops cannot be used, xattn_models goes without: {error}"]


def _auto_lines(facts: dict[str, Any]) -> list[str]:
    """How "auto" chooses, and on which of this machine's GPUs it has measurements to go by."""
    others = [name for name in registry.ENGINES if name not in MEASURED_ENGINES]
    lines = [
        f'"auto" takes the first of {", ".join(others)} that can, and '
        f"{' or '.join(MEASURED_ENGINES)} where measured to be the fastest"
    ]
    measured_on = facts["measured"]
    for capability in sorted({device["capability"] for device in facts["gpu"]["devices"]}):
        count = measured_on.get(capability, 0)
        what = f"{count} problems measured" if count else "nothing measured: ask for them by name"
        lines.append(f"  compute capability {capability}: {what}")
    return lines


def _cpu_lines(facts: dict[str, Any]) -> list[str]:
    cpu = facts["cpu"]
    lines = [
        "CPU",
        f"  {cpu['model']}",
        f"  {cpu['cores']} cores, {cpu['threads']} threads (torch.get_num_threads)",
    ]
    if cpu["native"] is not None:
        isas = cpu["native"]
        lines.append(
            f"  kernels run as {isas['isa']}; this CPU can: {', '.join(isas['available'])}; "
            f"compiled: {', '.join(isas['compiled'])}"
        )
    return lines


def _gpu_lines(facts: dict[str, Any]) -> list[str]:
    gpu = facts["gpu"]
    cuda = gpu["torch_cuda"]
    lines = ["GPU", f"  torch is built {f'with CUDA {cuda}' if cuda else 'without CUDA'}"]
    if not gpu["devices"]:
        lines.append("  none visible to torch")
    lines += [
        f"  {index}: {device['name']}, compute capability {device['capability']}, "
        f"{device['memory_bytes'] / 2**30:.0f} GiB"
        for index, device in enumerate(gpu["devices"])
    ]
    return lines


def _build_lines(facts: dict[str, Any]) -> list[str]:
    build = facts["build"]
    if build is None:
        return ["Build", f"  {facts['build_error'] or 'no record of a native build'}"]
    cuda = build["cuda"]
    lines = [
        "Build",
        f"  CPU module: {build['cpu']['compiler']}; {', '.join(build['cpu']['isas'])}",
    ]
    if cuda["built"]:
        archs = ", ".join(cuda["architectures"])
        lines.append(f"  CUDA module: toolkit {cuda['toolkit']}; {archs}")
    else:
        lines.append(f"  CUDA module not built (XATTN_CUDA={cuda['requested']}): {cuda['reason']}")
    if build["version"] != facts["version"]:
        lines.append(
            f"  the modules are of version {build['version']}, the Python code of "
            f"{facts['version']}: install again"
        )
    return lines


def _package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
            }
        )
    return found
