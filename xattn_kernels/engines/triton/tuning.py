# mypy: disable-error-code="import-untyped"
"""Which tiles a kernel runs with: shipped ones, or by measurement on the GPU at hand.

By default nothing is measured: a kernel has the tiles of the shipped table (``tiles.json``), or for
widths that it lacks those of the rules in the ``*_tiles`` modules. With tuning on
(:func:`set_tuning`, or ``XATTN_TUNE=1`` in the environment) the first call of a kernel with a new
combination of types, widths, layouts and rough size runs it with a few variations of these tiles
and keeps the fastest, for this process and on disk for later ones.

What is chosen stays for the life of the process, so that its results repeat bit for bit; other
tiles add in another order and may differ in the last bits. The first call ends with a run with
the chosen tiles, as later ones. While a CUDA graph is captured nothing is measured.

On disk every choice is a file of its own in ``$XDG_CACHE_HOME/xattn_kernels/tiles`` (by default
``~/.cache``), in a folder for the GPU, Triton, this package and the source of its kernels. Of
processes that choose at once the first to write decides for all. What cannot be read or written,
or is not one of the variations, counts as absent: then this process measures for itself.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch

from xattn_kernels._version import __version__
from xattn_kernels.engines.triton.launch import recording

T = TypeVar("T", bound=tuple[Any, ...])

#: Fields of tiles that say how many tokens are taken at once.
_TOKENS = ("tokens", "queries", "keys")
_MAX_TOKENS = 128
#: Runs whose median is the time of a kernel, after one that may compile it.
_REPEATS = 5

_enabled: bool | None = None
_chosen: dict[tuple[Any, ...], Any] = {}
_lock = threading.RLock()


class Task(NamedTuple):
    """What tiles are chosen for: one kernel on arguments of one kind and rough size."""

    kernel: str
    widths: tuple[int, ...]
    dot: str
    details: tuple[str | int | bool, ...]
    """Whatever else matters to the kernel, such as the types and layouts of its arguments."""
    tokens: int
    """Of the longest slot."""
    rows: int
    """Slots times samples."""

    def key(self) -> tuple[Any, ...]:
        """The task with its size rounded up to powers of two."""
        size = (self.tokens - 1).bit_length(), (self.rows - 1).bit_length()
        return (self.kernel, *self.widths, self.dot, *self.details, *size)


def set_tuning(enabled: bool | None) -> None:
    """Turn measuring on or off; None leaves it to ``XATTN_TUNE``. Choices made already stay."""
    global _enabled
    if enabled is not None and not isinstance(enabled, bool):
        raise TypeError(f"enabled: expected True, False or None, got {enabled!r}")
    _enabled = enabled


def is_tuning() -> bool:
    """Whether kernels are measured at their first use."""
    if _enabled is not None:
        return _enabled
    value = os.environ.get("XATTN_TUNE", "0")
    if value not in ("0", "1"):
        raise ValueError(f"XATTN_TUNE: expected 0 or 1, got {value!r}")
    return value == "1"


def architecture(device: torch.device) -> int:
    """Whose tiles a device has: 80 for compute capabilities 8 and 12, else 90."""
    capability = recording()
    if capability is None:
        if device.type != "cuda":
            return 90
        capability = 10 * torch.cuda.get_device_capability(device)[0]
    return 90 if capability // 10 in (9, 10, 11) else 80


def shipped(task: Task, arch: int, rule: Callable[..., T]) -> T:
    """Tiles from the table, or by a rule for widths that it lacks."""
    by_rule = rule(*task.widths, task.dot, arch)
    entry = _table()[f"sm_{arch}"].get(entry_name(task.kernel, task.widths, task.dot))
    return by_rule if entry is None else _decoded(entry, by_rule)


def run(
    task: Task, rule: Callable[..., T], start: Callable[[T], Any], device: torch.device
) -> None:
    """Run a kernel with the tiles for a task.

    Args:
        task: what it is about.
        rule: from widths, precision and architecture to tiles, for widths not in the table.
        start: launches the kernel with tiles, any number of times with the same result, and
            returns the compiled kernel, or None.
        device: the device it runs on.
    """
    if recording() is not None:
        start(shipped(task, architecture(device), rule))
        return
    key = (device.type, device.index, *task.key())
    chosen = _chosen.get(key)
    if chosen is None:
        with _lock:
            chosen = _chosen.get(key)
            if chosen is None:
                candidates = variations(shipped(task, architecture(device), rule))
                if is_tuning():
                    chosen = _choose(task, candidates, start, device)
                else:
                    _chosen[key] = _start_first(candidates, start)
                    return
                _chosen[key] = chosen
    start(chosen)


def variations(default: T) -> list[T]:
    """The default, and tiles with half or twice as many tokens, or warps."""
    found = [default]
    values = default._asdict()  # type: ignore[attr-defined]
    for name in (*_TOKENS, "warps"):
        low, high = (4, 8) if name == "warps" else (16, _MAX_TOKENS)
        for value in (values.get(name, 0) // 2, values.get(name, 0) * 2):
            if low <= value <= high:
                found.append(default._replace(**{name: value}))  # type: ignore[attr-defined]
    return found


def measure(start: Callable[[], Any], device: torch.device) -> float:
    """Seconds that a launch takes: the median of some, after one to warm up."""
    start()
    times: list[float] = []
    for _ in range(_REPEATS):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            start()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1000)
        else:
            before = time.perf_counter()
            start()
            times.append(time.perf_counter() - before)
    return sorted(times)[len(times) // 2]


def _choose(
    task: Task, candidates: Sequence[T], start: Callable[[T], Any], device: torch.device
) -> T:
    """The tiles for a task, from disk or by measurement."""
    folder = _folder(_fingerprint(device))
    written = _read(folder, task, candidates)
    if written is not None:
        return written
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return candidates[0]
    times: dict[T, float] = {}
    for tiles in candidates:
        if _usable(tiles, start):
            times[tiles] = measure(functools.partial(start, tiles), device)
    best = min(times, key=lambda tiles: times[tiles], default=candidates[0])
    return _write(folder, task, candidates, best)


def _start_first(candidates: Sequence[T], start: Callable[[T], Any]) -> T:
    """Run with the first tiles that the GPU has enough shared memory for; returns them."""
    from triton.runtime.errors import OutOfResources

    for tiles in candidates[:-1]:
        try:
            start(tiles)
        except OutOfResources:
            continue
        return tiles
    start(candidates[-1])
    return candidates[-1]


def _usable(tiles: T, start: Callable[[T], Any]) -> bool:
    """Whether the kernel fits the GPU and keeps what it computes in registers."""
    from triton.runtime.errors import OutOfResources

    try:
        compiled = start(tiles)
    except OutOfResources:
        return False
    return not getattr(compiled, "n_spills", 0)


@functools.cache
def _table() -> dict[str, dict[str, dict[str, Any]]]:
    file = Path(__file__).with_name("tiles.json")
    return cast("dict[str, dict[str, dict[str, Any]]]", json.loads(file.read_text()))


def entry_name(kernel: str, widths: Sequence[int], dot: str) -> str:
    """What the table has the tiles of a kernel under."""
    return f"{kernel} {'x'.join(map(str, widths))} {dot}"


def _decoded(entry: dict[str, Any], like: T) -> T:
    values = {name: tuple(x) if isinstance(x, list) else x for name, x in entry.items()}
    return type(like)(**values)


@functools.cache
def _fingerprint(device: torch.device) -> str:
    """A name for all that a choice depends on but the task."""
    import triton

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    sources = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        sources.update(file.read_bytes())
    parts = (gpu, triton.__version__, torch.__version__, __version__, sources.hexdigest())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _folder(fingerprint: str) -> Path | None:
    """Where choices are kept; None if there is no home."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = Path(cache) if Path(cache).is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        return None
    return base / "xattn_kernels" / "tiles" / fingerprint


def _file(folder: Path, task: Task) -> Path:
    return folder / (hashlib.sha256(repr(task.key()).encode()).hexdigest()[:32] + ".json")


def _read(folder: Path | None, task: Task, candidates: Sequence[T]) -> T | None:
    """What is on disk for a task, if it is one of the candidates."""
    if folder is None:
        return None
    try:
        written = json.loads(_file(folder, task).read_bytes())
        if written["task"] != list(task.key()):
            return None
        tiles = _decoded(written["tiles"], candidates[0])
    except (OSError, ValueError, TypeError, KeyError, RecursionError, AttributeError):
        return None
    return tiles if tiles in candidates else None


def _write(folder: Path | None, task: Task, candidates: Sequence[T], best: T) -> T:
    """Keep a choice on disk; returns that of another process if it came first."""
    if folder is None:
        return best
    content = {"task": task.key(), "tiles": best._asdict()}  # type: ignore[attr-defined]
    file = _file(folder, task)
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder)
        with os.fdopen(handle, "w") as stream:
            json.dump(content, stream)
        try:
            os.link(temporary, file)
        except FileExistsError:
            theirs = _read(folder, task, candidates)
            if theirs is not None:
                return theirs
            Path(temporary).replace(file)
            temporary = None
    except OSError:
        pass  # a folder that cannot be written to: the choice is this process's alone
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    return best
