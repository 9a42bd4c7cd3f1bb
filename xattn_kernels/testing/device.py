"""Time and peak memory of calls on a CUDA device, for what `measure` does on the CPU.

Two figures that must not be mixed: an eager call includes what launching its kernels costs where
that is not hidden behind them; a replayed CUDA graph does not. Both start with a cold L2 cache.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any

import torch

from xattn_kernels.testing.measure import PeakMemory, Timing

_WARMUP_OF_CAPTURE = 3


def device_error(device: str) -> str | None:
    """Why nothing can be measured on a type of device here; None if it can."""
    if device == "cpu":
        return None
    if device != "cuda":
        return f"device: got {device!r}, expected 'cpu' or 'cuda'"
    if torch.version.cuda is None:
        return f"device: 'cuda' needs a torch built for CUDA; this is {torch.__version__}"
    if not torch.cuda.is_available():
        return "device: 'cuda' needs an NVIDIA GPU and its driver; torch finds none"
    return None


def device_interleaved(
    calls: Mapping[str, Callable[[], Any]],
    *,
    repetitions: int,
    warmup: int = 1,
    flush: bool = True,
    progress: Callable[[], None] | None = None,
) -> dict[str, Timing]:
    """Time calls by turns, between two events on the current stream.

    Args:
        calls: what to time, by name.
        repetitions: samples of each, one call each.
        warmup: untimed calls of each beforehand.
        flush: overwrite the L2 cache before every call.
        progress: called after every repetition.

    Returns:
        The timing of each call. Nothing waits for the device between samples, so that launching
        overlaps with what ran before as it does in a program.
    """
    for call in calls.values():
        for _ in range(warmup):
            call()
    cache = _cache_sized_buffer() if flush else None
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in calls}
    order = list(calls)
    torch.cuda.synchronize()
    gc.collect()
    for _ in range(repetitions):
        for name in order:
            if cache is not None:
                cache.zero_()
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record()
            calls[name]()
            pair[1].record()
            events[name].append(pair)
        order.append(order.pop(0))
        if progress is not None:
            progress()
    torch.cuda.synchronize()
    return {
        name: Timing(tuple(1e-3 * start.elapsed_time(end) for start, end in pairs))
        for name, pairs in events.items()
    }


def graphed(call: Callable[[], Any]) -> Callable[[], Any]:
    """A call captured in a CUDA graph: what it returns replays the graph.

    Raises:
        RuntimeError: if the call cannot be captured, such as one that waits for the device.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARMUP_OF_CAPTURE):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def device_peak_memory(call: Callable[[], Any]) -> PeakMemory:
    """Run a call once; bytes that torch's allocator had given out before it, and at its peak."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del result
    return PeakMemory(before, peak, "torch.cuda.max_memory_allocated")


def device_available_bytes() -> int:
    """Memory of the current device that is free or cached by torch."""
    free, _ = torch.cuda.mem_get_info()
    return int(free) + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def _cache_sized_buffer() -> torch.Tensor:
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return torch.empty(max(2 * size, 2**20), dtype=torch.uint8, device="cuda")
