"""Time and peak memory of calls, measured so that they can be compared.

Times are taken by turns: every repetition runs each of the compared calls once, in an order that
rotates, so that whatever else the machine does falls on all of them alike. Memory is the rise of
the resident set during one call, as the kernel counts it: pages that are touched, whoever allocated
them, and nothing that was there before.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import multiprocessing
import re
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_MEMORY = Path("/proc/meminfo")
_CONTROL_GROUP = Path("/sys/fs/cgroup")
_SAMPLING_INTERVAL_S = 0.0005


class Timing(NamedTuple):
    """Seconds per call over the repetitions."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds; half of the repetitions were faster."""
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Seconds below which a quarter and three quarters of the repetitions lie."""
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    *,
    repetitions: int,
    warmup: int = 1,
    min_sample_s: float = 0.0,
    progress: Callable[[], None] | None = None,
) -> dict[str, Timing]:
    """Time calls by turns.

    Args:
        calls: what to time, by name.
        repetitions: samples of each.
        warmup: untimed calls of each beforehand.
        min_sample_s: seconds a sample should last at least: shorter calls are repeated within it.
        progress: called after every repetition.

    Returns:
        The timing of each call, per single call.
    """
    counts = {}
    for name, call in calls.items():
        for _ in range(warmup):
            call()
        counts[name] = _calls_per_sample(call, min_sample_s)
    order = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in order}
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(repetitions):
            for name in order:
                samples[name].append(_sample(calls[name], counts[name]))
            order.append(order.pop(0))
            if progress is not None:
                progress()
    finally:
        if was_enabled:
            gc.enable()
    return {name: Timing(tuple(seconds)) for name, seconds in samples.items()}


def _sample(call: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def _calls_per_sample(call: Callable[[], Any], min_sample_s: float) -> int:
    if min_sample_s <= 0:
        return 1
    count = 1
    while (seconds := _sample(call, count)) * count < min_sample_s / 4:
        count *= 4
    return max(1, math.ceil(min_sample_s / seconds))


class PeakMemory(NamedTuple):
    """Resident bytes of this process around one call."""

    before: int
    peak: int
    method: str
    """"VmHWM" (the kernel's own high-water mark, reset before the call) or "sampled"."""

    @property
    def rise(self) -> int:
        """Bytes at the peak that were not there before."""
        return self.peak - self.before


def peak_memory(call: Callable[[], Any]) -> PeakMemory:
    """Run a call once and return the resident set before it and at its peak.

    What an earlier call left with the allocator is given back first; what it keeps for good
    (thread pools, workspaces) counts as being there before. For a figure that hides nothing, call
    this in a :func:`fresh_process`, after a warm-up that is small in every dimension that counts.

    Raises:
        RuntimeError: where /proc does not tell, that is, not on Linux.
    """
    gc.collect()
    _return_freed_memory()
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return _sampled(call)
    before = _kilobytes(_STATUS, "VmHWM")
    result = call()
    peak = _kilobytes(_STATUS, "VmHWM")
    del result
    return PeakMemory(before, peak, "VmHWM")


def fresh_process() -> ProcessPoolExecutor:
    """A new Python process to submit functions of importable modules to, one after the other.

    It has this process's number of torch threads and nothing else in common with it. Close it, or
    use it as a context manager.
    """
    return ProcessPoolExecutor(
        max_workers=1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(torch.get_num_threads(),),
    )


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """Return ``function(*args)``, run in a process of its own; its exceptions are raised here."""
    with fresh_process() as process:
        return process.submit(function, *args).result()


def resident_bytes() -> int:
    """Resident set of this process, after what was freed has been given back.

    Raises:
        RuntimeError: where /proc does not tell, that is, not on Linux.
    """
    gc.collect()
    _return_freed_memory()
    return _kilobytes(_STATUS, "VmRSS")


def available_bytes() -> int:
    """Memory that this process could still take, the limits of its control group included.

    Raises:
        RuntimeError: where /proc does not tell, that is, not on Linux.
    """
    limits = [_kilobytes(_MEMORY, "MemAvailable")]
    # No control group is an OSError; one without a limit says "max", a ValueError.
    with contextlib.suppress(OSError, ValueError):
        limits.append(
            int((_CONTROL_GROUP / "memory.max").read_text())
            - int((_CONTROL_GROUP / "memory.current").read_text())
        )
    return max(0, min(limits))


def tensor_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of the distinct memory blocks that tensors lie in."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def _return_freed_memory() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _kilobytes(file: Path, field: str) -> int:
    try:
        match = re.search(rf"^{field}:\s+(\d+) kB$", file.read_text(), re.MULTILINE)
    except OSError as error:
        raise RuntimeError(f"memory is measured by {file}: {error}") from error
    if match is None:
        raise RuntimeError(f"memory is measured by {file}, which has no {field}")
    return int(match[1]) * 1024


def _sampled(call: Callable[[], Any]) -> PeakMemory:
    before = _kilobytes(_STATUS, "VmRSS")
    peak = before
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(_SAMPLING_INTERVAL_S):
            peak = max(peak, _kilobytes(_STATUS, "VmRSS"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        result = call()
        peak = max(peak, _kilobytes(_STATUS, "VmRSS"))
    finally:
        done.set()
        watcher.join()
    del result
    return PeakMemory(before, peak, "sampled")
