"""Decide whether the CUDA module is built, with which compiler and for which architectures.

Nothing here imports torch or needs a GPU; every fact about the machine comes from one function
each, so that the decision itself can be tested anywhere.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

#: Compiled when no GPU is visible and no list was asked for; the last one also as PTX.
DEFAULT_ARCHS = ("80", "86", "89", "90a", "100", "120")
#: The oldest architecture the kernels support (bfloat16 arithmetic, asynchronous copies).
OLDEST_ARCH = 80
#: nvcc from PyPI exists from CUDA 13 on; earlier wheels leave the compiler driver out.
NVCC_WHEELS = ("nvidia-cuda-nvcc>=13,<14", "nvidia-cuda-runtime>=13,<14")
WHEEL_CUDA_MAJOR = 13

_DRIVER_FILES = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg")
_ARCH = re.compile(r"^(\d+)(?:\.(\d))?([af]?)(-real|-virtual|\+PTX)?$", re.IGNORECASE)
_CMAKE_ARCH_WORDS = ("native", "all", "all-major")


class BuildError(Exception):
    """The build cannot go on; the message says what to change."""


@dataclass(frozen=True)
class CudaPlan:
    """What the build does about CUDA.

    ``nvcc`` and ``archs`` (CMake's notation) are set when the module is built; ``reason`` says why
    it is not. ``worth_a_warning`` is set when a user would have expected the module.
    """

    mode: str
    nvcc: str | None = None
    archs: tuple[str, ...] = ()
    reason: str | None = None
    worth_a_warning: bool = False
    notes: tuple[str, ...] = ()

    @property
    def build(self) -> bool:
        return self.reason is None


def requested_mode(env: Mapping[str, str]) -> str:
    """``XATTN_CUDA``: ``auto`` (when unset), ``1`` or ``0``."""
    mode = env.get("XATTN_CUDA") or "auto"
    if mode not in ("auto", "1", "0"):
        raise BuildError(f"XATTN_CUDA={mode!r}: expected auto, 1 or 0")
    return mode


def driver_present() -> bool:
    """Whether an NVIDIA kernel driver is loaded (the second case is a container, the third WSL)."""
    return any(os.path.exists(path) for path in _DRIVER_FILES)


def driver_cuda_version() -> tuple[int, int] | None:
    """Newest CUDA version the driver runs, or None when it does not say."""
    for name in ("libcuda.so.1", "/usr/lib/wsl/lib/libcuda.so.1"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        version = ctypes.c_int(0)
        if library.cuDriverGetVersion(ctypes.byref(version)) == 0:
            return version.value // 1000, version.value % 1000 // 10
    return None


def detected_archs() -> tuple[str, ...]:
    """Compute capabilities of the visible GPUs ("90"), sorted; empty when none can be asked."""
    smi = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path="/usr/lib/wsl/lib")
    if smi is None:
        return ()
    try:
        listing = subprocess.run(
            [smi, "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    found = {line.strip().replace(".", "") for line in listing.splitlines()}
    return tuple(sorted((arch for arch in found if arch.isdigit()), key=int))


def find_nvcc(env: Mapping[str, str]) -> str | None:
    """The CUDA compiler: CUDACXX, CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda, then nvcc wheels."""
    if env.get("CUDACXX"):
        chosen = shutil.which(env["CUDACXX"], path=env.get("PATH"))
        if chosen is None:
            raise BuildError(f"CUDACXX={env['CUDACXX']!r} is not an executable")
        return chosen
    homes = [Path(env[name]) for name in ("CUDA_HOME", "CUDA_PATH") if env.get(name)]
    for home in homes:
        if os.access(home / "bin" / "nvcc", os.X_OK):
            return str(home / "bin" / "nvcc")
    on_path = shutil.which("nvcc", path=env.get("PATH"))
    if on_path is not None:
        return on_path
    candidates = [Path("/usr/local/cuda/bin/nvcc")]
    for entry in sys.path:
        candidates += sorted(Path(entry).glob("nvidia/cu*/bin/nvcc"), reverse=True)
    return next((str(path) for path in candidates if os.access(path, os.X_OK)), None)


def library_environment(nvcc: str, env: Mapping[str, str]) -> dict[str, str]:
    """The environment in which ``nvcc`` finds its own libraries.

    The wheels of CUDA 13.0 have them in ``lib``, and their nvcc looks into ``lib64``.
    """
    home = Path(nvcc).resolve().parents[1]
    if (home / "lib64").is_dir() or not (home / "lib" / "libcudart_static.a").exists():
        return dict(env)
    known = [env["LIBRARY_PATH"]] if env.get("LIBRARY_PATH") else []
    return {**env, "LIBRARY_PATH": os.pathsep.join([str(home / "lib"), *known])}


def nvcc_archs(nvcc: str) -> tuple[int, ...]:
    """Architectures the compiler knows, as integers (80, 86, ...)."""
    try:
        listing = subprocess.run(
            [nvcc, "--list-gpu-arch"], capture_output=True, text=True, timeout=60, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{nvcc} --list-gpu-arch failed: {error}") from error
    return tuple(int(number) for number in re.findall(r"compute_(\d+)\s", listing + "\n"))


def parse_archs(text: str, variable: str) -> tuple[str, ...]:
    """A list such as ``80,90a``, ``8.0;8.6+PTX`` or ``80-real;120`` in CMake's notation.

    Entries are parted by commas, semicolons or blanks. A plain number (``80``, ``8.0``) is machine
    code only, ``+PTX`` adds PTX, ``-real`` and ``-virtual`` are CMake's.
    """
    archs: list[str] = []
    for word in re.split(r"[\s,;]+", text.strip()):
        match = _ARCH.match(word)
        if match is None:
            raise BuildError(
                f"{variable}={text!r}: {word!r} is not an architecture such as 80, 9.0a, 12.0+PTX"
            )
        major, minor, variant, suffix = match.groups()
        number = major + (minor or "")
        if int(number) < 20:
            raise BuildError(f"{variable}={text!r}: {word!r} is too small; write 80 or 8.0")
        kind = {None: "-real", "+ptx": "", "-real": "-real", "-virtual": "-virtual"}
        archs.append(number + variant.lower() + kind[suffix.lower() if suffix else None])
    return tuple(dict.fromkeys(archs))


def choose_archs(
    env: Mapping[str, str], gpus: tuple[str, ...], known: tuple[int, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Architectures to compile for, in CMake's notation, and notes on what was left out.

    Args:
        env: Environment; XATTN_CUDA_ARCHS, TORCH_CUDA_ARCH_LIST and CMAKE_CUDA_ARCHITECTURES, the
            first that is set.
        gpus: Compute capabilities of the visible GPUs.
        known: What the compiler can generate.
    """
    if env.get("XATTN_CUDA_ARCHS"):
        archs = parse_archs(env["XATTN_CUDA_ARCHS"], "XATTN_CUDA_ARCHS")
        too_old = [arch for arch in archs if _number(arch) < OLDEST_ARCH]
        if too_old:
            raise BuildError(
                f"XATTN_CUDA_ARCHS: {too_old[0]} is older than {OLDEST_ARCH}, the oldest supported"
            )
        return archs, ()
    if env.get("TORCH_CUDA_ARCH_LIST"):
        # This list is meant for torch; what it names beyond our reach is no mistake of the user's.
        wanted = parse_archs(env["TORCH_CUDA_ARCH_LIST"], "TORCH_CUDA_ARCH_LIST")
        archs = tuple(
            arch for arch in wanted if _number(arch) >= OLDEST_ARCH and _number(arch) in known
        )
        left_out = [arch for arch in wanted if arch not in archs]
        if not archs:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST={env['TORCH_CUDA_ARCH_LIST']!r} names no architecture from "
                f"{OLDEST_ARCH} on that nvcc knows; set XATTN_CUDA_ARCHS"
            )
        return _specialised(archs), tuple(f"architecture {arch} left out" for arch in left_out)
    if env.get("CMAKE_CUDA_ARCHITECTURES"):
        text = env["CMAKE_CUDA_ARCHITECTURES"].strip()
        if text in _CMAKE_ARCH_WORDS:
            return (text,), ()
        return tuple(word for word in re.split(r"[\s,;]+", text) if word), ()
    visible = [gpu for gpu in gpus if int(gpu) >= OLDEST_ARCH and int(gpu) in known]
    if visible:
        return _specialised(tuple(f"{gpu}-real" for gpu in visible)), ()
    possible = [arch for arch in DEFAULT_ARCHS if _number(arch) in known]
    if not possible:
        raise BuildError(
            f"nvcc knows none of {', '.join(DEFAULT_ARCHS)}; a newer CUDA toolkit is needed"
        )
    notes = tuple(
        f"architecture {arch} left out: this nvcc does not know it"
        for arch in DEFAULT_ARCHS
        if arch not in possible
    )
    return (*(f"{arch}-real" for arch in possible[:-1]), possible[-1]), notes


def archs_requested(env: Mapping[str, str]) -> bool:
    names = ("XATTN_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "CMAKE_CUDA_ARCHITECTURES")
    return any(env.get(name) for name in names)


def make_plan(env: Mapping[str, str]) -> CudaPlan:
    """Decide about CUDA from the environment and the machine.

    ``0``: no. ``1``: yes, or BuildError without nvcc. ``auto``: yes when there is an nvcc and
    somebody will use the result, that is, a GPU driver is present or architectures were asked for.
    """
    mode = requested_mode(env)
    if mode == "0":
        return CudaPlan(mode, reason="switched off by XATTN_CUDA=0")
    driver = driver_present()
    nvcc = find_nvcc(env)
    if nvcc is None:
        if mode == "1":
            raise BuildError(
                "XATTN_CUDA=1, but no nvcc was found (looked at CUDACXX, CUDA_HOME, CUDA_PATH, "
                "PATH, /usr/local/cuda and the nvidia-cuda-nvcc wheels). Install a CUDA toolkit "
                "or set CUDA_HOME; XATTN_CUDA=0 builds without CUDA"
            )
        reason = "no GPU driver and no nvcc were found"
        if driver:
            reason = "a GPU driver is present, but no nvcc was found"
            if _driver_too_old_for_wheels():
                reason += f" (the driver is too old for nvcc {WHEEL_CUDA_MAJOR} from PyPI)"
        return CudaPlan(mode, reason=reason, worth_a_warning=driver)
    if mode == "auto" and not driver and not archs_requested(env):
        reason = f"no GPU driver was found (nvcc is at {nvcc}); XATTN_CUDA=1 builds it all the same"
        return CudaPlan(mode, reason=reason, worth_a_warning=True)
    gpus = detected_archs() if driver else ()
    try:
        archs, notes = choose_archs(env, gpus, nvcc_archs(nvcc))
    except BuildError as error:
        if mode == "1" or archs_requested(env):
            raise
        return CudaPlan(mode, reason=str(error), worth_a_warning=True)
    return CudaPlan(mode, nvcc=nvcc, archs=archs, notes=notes)


def extra_build_requirements(env: Mapping[str, str]) -> list[str]:
    """The nvcc wheels, when CUDA is wanted, a driver is there to run the result and no nvcc is."""
    if requested_mode(env) == "0" or not driver_present() or find_nvcc(env) is not None:
        return []
    return [] if _driver_too_old_for_wheels() else list(NVCC_WHEELS)


def _driver_too_old_for_wheels() -> bool:
    """A static CUDA 13 runtime does not start on a driver made for CUDA 12."""
    version = driver_cuda_version()
    return version is not None and version[0] < WHEEL_CUDA_MAJOR


def _number(arch: str) -> int:
    match = re.match(r"\d+", arch)
    return int(match.group()) if match else 0


def _specialised(archs: tuple[str, ...]) -> tuple[str, ...]:
    """Hopper as 90a: its warp-group instructions exist in no other variant, and 90a has no
    portable PTX, which therefore stays 90."""
    replacement = {"90-real": ("90a-real",), "90": ("90a-real", "90-virtual")}
    return tuple(new for arch in archs for new in replacement.get(arch, (arch,)))
