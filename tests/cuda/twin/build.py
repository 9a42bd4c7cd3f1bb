"""Builds the CUDA engine's sources for the host: the module that tests load as ``_cuda``.

Every source is compiled to an object of its own, named by a hash of its text, of all headers it
includes, and of the command: what did not change is not compiled again. By hand::

    python tests/cuda/twin/build.py                # prints the module's path
    python tests/cuda/twin/build.py --asan 0       # without AddressSanitizer
    python tests/cuda/twin/build.py --races        # errors where two threads race, see races.h
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[3]
CSRC = ROOT / "csrc"
TWIN = ROOT / "tests" / "cuda" / "twin"
BUILD = ROOT / "build" / "twin"

#: Of csrc/cuda, what only a GPU or its driver can run.
NOT_ON_HOST = {"probe.cu", "launch.cu"}

#: -O1 takes half the time of -O2 to compile, and the tests run as fast.
KERNEL_FLAGS = ("-O1", "-g1", "-fno-omit-frame-pointer", "-fno-strict-aliasing")
HOST_FLAGS = ("-O1", "-g1")
LAYER_FLAGS = ("-O3", "-g1", "-fno-omit-frame-pointer")
#: Of what else is watched, addresses that are not aligned are a fault on GPUs and not on most CPUs.
ASAN_FLAGS = (
    "-fsanitize=address",
    "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero",
    "-fno-sanitize-recover=all",
)
#: Calls of races.cpp before every access; the sanitizer's own library is not linked.
RACE_FLAGS = ("-fsanitize=thread",)


@dataclass(frozen=True)
class Source:
    path: Path
    flags: tuple[str, ...]


def compiler() -> list[str]:
    """The C++ compiler: CXX, or g++, or clang++."""
    named = os.environ.get("CXX")
    if named:
        return shlex.split(named)
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise RuntimeError("no C++ compiler: set CXX")


@functools.cache
def _version(command: tuple[str, ...]) -> str:
    return subprocess.run(
        [*command, "--version"], capture_output=True, text=True, check=True
    ).stdout


def is_clang() -> bool:
    """Whether the compiler is clang."""
    return "clang" in _version(tuple(compiler()))


def preload() -> list[str]:
    """Libraries that a process needs from its start, for a module with AddressSanitizer.

    The C++ library is one of them: the sanitizer looks for what throws exceptions when it starts.
    """
    asan = f"libclang_rt.asan-{os.uname().machine}.so" if is_clang() else "libasan.so"
    found = []
    for name in (asan, "libstdc++.so.6"):
        command = [*compiler(), f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not os.path.isabs(path):
            raise RuntimeError(f"{shlex.join(compiler())} has no {name}")
        found.append(os.path.realpath(path))
    return found


def environment(asan: bool = True) -> dict[str, str]:
    """Variables of processes that load the module, instead of this one's."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    if asan:
        # Python keeps memory until it exits. The quarantine is for what is freed and still used.
        variables["ASAN_OPTIONS"] = (
            "detect_leaks=0:detect_stack_use_after_return=0:quarantine_size_mb=16:"
            "allocator_may_return_null=1:handle_segv=1:abort_on_error=0"
        )
        variables["UBSAN_OPTIONS"] = "print_stacktrace=1"
        variables["LD_PRELOAD"] = " ".join(preload())
    return variables


def _includes(path: Path, folders: Sequence[Path], seen: dict[Path, bytes]) -> None:
    """Collect a file and all it includes by ``#include "..."``."""
    if path in seen:
        return
    seen[path] = path.read_bytes()
    for name in re.findall(rb'^\s*#\s*include\s*"([^"]+)"', seen[path], re.MULTILINE):
        for folder in (path.parent, *folders):
            candidate = (folder / name.decode()).resolve()
            if candidate.is_file():
                _includes(candidate, folders, seen)
                break


def _command(source: Source, csrc: Path, twin: Path) -> list[str]:
    version = re.search(
        r'__version__ = "(.+)"', (ROOT / "xattn_kernels" / "_version.py").read_text()
    )
    assert version is not None
    includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    return [
        *compiler(),
        *("-x", "c++", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
        *source.flags,
        "-DXATTN_TWIN",
        f'-DXATTN_VERSION="{version[1]}"',
        '-DXATTN_CUDA_ARCHS="host"',
        f"-I{csrc}",
        f"-I{twin}",
        f"-fmacro-prefix-map={csrc.parent}/=",
        *(f"-isystem{path}" for path in includes),
    ]


@contextlib.contextmanager
def _lock(name: str) -> Iterator[None]:
    """One process at a time; the lock goes with the process."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(source: Source, csrc: Path = CSRC) -> Path:
    """Return the object of a source; ``csrc`` is a copy of the folder where it has been changed."""
    command = _command(source, csrc, TWIN)
    files: dict[Path, bytes] = {}
    _includes(source.path, (csrc, TWIN), files)
    key = hashlib.sha256(_version(tuple(compiler())).encode())
    key.update("\0".join(_command(source, CSRC, TWIN)).encode())
    for content in files.values():
        key.update(hashlib.sha256(content).digest())
    result = BUILD / "objects" / f"{source.path.stem}-{key.hexdigest()[:20]}.o"
    if result.exists():
        os.utime(result)
        return result
    # What did not compile is not tried again as it is.
    failure = result.with_suffix(".txt")
    if failure.exists():
        raise RuntimeError(failure.read_text())
    result.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=result.parent) as folder:
        fresh = Path(folder) / result.name
        done = subprocess.run(
            [*command, "-c", str(source.path), "-o", str(fresh)], capture_output=True, text=True
        )
        if done.returncode > 0:
            errors = [line for line in done.stderr.splitlines() if "error:" in line]
            text = "\n".join([f"{source.path} does not compile", *errors[:10]])
            text += f"\n{shlex.join(command)}\n{done.stderr[:10_000]}"
            if csrc == CSRC:
                failure.write_text(text)
            raise RuntimeError(text)
        done.check_returncode()
        if done.stderr:
            print(done.stderr, file=sys.stderr)
        fresh.replace(result)
    return result


def _link(name: str, objects: Sequence[Path], flags: Sequence[str]) -> Path:
    key = hashlib.sha256("\0".join([*map(str, objects), *flags]).encode()).hexdigest()[:20]
    result = BUILD / f"{name}-{key}" / f"{name}.so"
    if result.exists():
        os.utime(result.parent)
        return result
    result.parent.mkdir(parents=True, exist_ok=True)
    fresh = result.with_suffix(f".{os.getpid()}")
    shared = ["-shared-libasan"] if "-fsanitize=address" in flags and is_clang() else []
    command = [*compiler(), "-shared", *flags, *shared, *map(str, objects), "-o", str(fresh)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr[-20_000:]}")
    fresh.replace(result)
    return result


def _prune(days: int = 7) -> None:
    """Forget what has not been used for long."""
    newest = max((path.stat().st_mtime for path in BUILD.glob("objects/*.*")), default=0.0)
    for path in (*BUILD.glob("objects/*.*"), *BUILD.glob("*-*/")):
        if path.stat().st_mtime < newest - days * 86_400:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _sources(name: str, asan: bool, races: bool) -> list[Source]:
    kernels = (*KERNEL_FLAGS, *(ASAN_FLAGS if asan else RACE_FLAGS if races else ()))
    layer = ("twin.cpp", "fiber.cpp", "values.cpp", "races.cpp", "sm90_twin.cpp")
    sources = [Source(TWIN / file, LAYER_FLAGS) for file in layer]
    sources.append(Source(TWIN / "bind.cpp", HOST_FLAGS))
    if name == "_cuda":
        cuda = sorted(path for path in (CSRC / "cuda").glob("*.cu") if path.name not in NOT_ON_HOST)
        sources += [Source(CSRC / file, HOST_FLAGS) for file in ("bindings_cuda.cpp", "edges.cpp")]
    else:
        cuda = [TWIN / "selftest.cu"]
        sources.append(Source(TWIN / "selftest.cpp", HOST_FLAGS))
    # The largest first: two compilers end at about the same time.
    cuda.sort(key=lambda path: -path.stat().st_size)
    return [Source(path, kernels) for path in cuda] + sources


def build(
    name: str = "_cuda",
    asan: bool = True,
    races: bool = False,
    changes: Mapping[str, tuple[str, str]] | None = None,
    only: Sequence[str] = (),
    jobs: int = 2,
    lenient: bool = False,
) -> Path:
    """Build a module, or find it built, and return its path.

    Args:
        name: ``"_cuda"``, the engine; ``"_selftest"``, small kernels that try the layer.
        asan: whether AddressSanitizer and others watch the kernels.
        races: whether races.h does; without ``asan``.
        changes: files under csrc/ to be changed first: a text that occurs exactly once there, and
            what stands in its place.
        only: the sources (``"linear_fwd.cu"``) that see the changes.
        jobs: compilers at a time.
        lenient: leave out what does not compile, and say so; for work on one of several sources.
            The module then loads where functions are looked up when they are first called.

    Raises:
        RuntimeError: with the compiler's words.
        ValueError: if a text to be changed does not occur exactly once.
    """
    if asan and races:
        raise ValueError("asan, races: expected one of them")
    with _lock(name), contextlib.ExitStack() as stack:
        csrc = CSRC
        if changes:
            csrc = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "csrc"
            shutil.copytree(CSRC, csrc)
            for file, (old, new) in changes.items():
                text = (csrc / file).read_text()
                if text.count(old) != 1:
                    raise ValueError(
                        f"{file}: expected once, found {text.count(old)} times: {old!r}"
                    )
                (csrc / file).write_text(text.replace(old, new))

        def compile(source: Source) -> Path | None:
            try:
                if source.path.name in only:
                    changed = Source(csrc / source.path.relative_to(CSRC), source.flags)
                    return _compile(changed, csrc)
                return _compile(source)
            except RuntimeError as error:
                if not lenient:
                    raise
                print(f"LEFT OUT: {str(error)[:1000]}", file=sys.stderr)
                return None

        # Of a function in several objects, the linker takes the first: the changed one.
        sources = sorted(
            _sources(name, asan, races), key=lambda source: source.path.name not in only
        )
        with ThreadPoolExecutor(jobs) as pool:
            objects = list(pool.map(compile, sources))
        there = [path for path in objects if path is not None]
        flags = (*(ASAN_FLAGS if asan else ()), *(() if lenient else ("-Wl,-z,now",)))
        result = _link(name, there, flags)
        _prune()
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--name", default="_cuda", choices=("_cuda", "_selftest"))
    parser.add_argument("--asan", type=int, default=1, choices=(0, 1))
    parser.add_argument("--lenient", action="store_true", help="leave out what does not compile")
    parser.add_argument("--races", action="store_true", help="watch for races, not with ASan")
    options = parser.parse_args()
    asan = bool(options.asan) and not options.races
    try:
        print(build(options.name, asan, options.races, lenient=options.lenient))
    except RuntimeError as error:
        sys.exit(f"{error}\nTo go on without: --lenient")
