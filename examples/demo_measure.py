"""The demo's measurements: times by turns, memory in other processes, the rest by formula."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from demo_ways import Call, Features, Fused, OpByOp, formula, measured_call, sizes_of
from rich.progress import Progress

from xattn_kernels.testing.compare import Truth, check
from xattn_kernels.testing.measure import available_bytes, fresh_process, interleaved

OP_BY_OP, FUSED, NAIVE = "op by op", "fused", "naive all-pairs"
TIMING_SECONDS = 2.0
COARSE_SECONDS = 8.0
"""Time that the naive way always has for the coarse scales of the largest resolution."""
MEMORY_SHARE = 0.7
"""Part of the available memory that the naive way may take."""


@dataclass
class Point:
    """One way at one resolution."""

    way: str
    size: tuple[int, int]
    scales: tuple[int, int]
    """First and last scale, 0 the finest."""
    pairs: int
    gflop: float
    seconds: float
    peak_bytes: int
    measured: bool
    error: float | None = None
    """Largest difference from float64, relative to the largest value."""
    quartiles: tuple[float, float] | None = None
    """Seconds."""


class Run:
    """The measurements, in the order in which the demo takes them."""

    def __init__(self, progress: Progress, sizes: int, folder: Path, naive_seconds: float) -> None:
        self.points: list[Point] = []
        self.memory_method = ""
        self.folded_bytes = 0
        self._folder = folder
        self._naive_seconds = naive_seconds
        self._features: dict[tuple[int, int], Features] = {}
        self._progress = progress
        steps = ("features", "check and time", "peak memory", "naive all-pairs")
        counts = (sizes, sizes, 2 * sizes, sizes)
        self._steps = {
            name: progress.add_task(name, total=n) for name, n in zip(steps, counts, strict=True)
        }

    def features(self, size: tuple[int, int], features: Features) -> None:
        """Keep the features of one resolution, for this process and for others."""
        self._features[size] = features
        torch.save(features, self._file(size))
        self._progress.advance(self._steps["features"])

    def verify_and_time(self) -> None:
        """Accept the fused outputs, then time both ways by turns.

        Raises:
            AssertionError: if an output is not accepted.
        """
        for size, features in self._features.items():
            widths = [s.width for s in sizes_of(features)]
            by_op, fused = OpByOp(widths), Fused(widths)
            errors = _verify(by_op, fused, features)
            calls = {OP_BY_OP: partial(by_op, features), FUSED: partial(fused, features)}
            seconds = sum(map(_seconds, calls.values()))
            repetitions = max(3, min(15, int(TIMING_SECONDS / seconds)))
            timings = interleaved(calls, repetitions=repetitions)
            for way, timing in timings.items():
                point = self._point(way, size, timing.median, 0, measured=True)
                point.error, point.quartiles = errors[way], timing.quartiles
            self._progress.advance(self._steps["check and time"])

    def measure_memory(self) -> None:
        """Peak memory of op by op and fused, each in a process of its own."""
        for way in (OP_BY_OP, FUSED):
            with fresh_process() as process:
                for point in [point for point in self.points if point.way == way]:
                    work = process.submit(measured_call, way, self._file(point.size), 0)
                    call: Call = work.result()
                    point.peak_bytes, self.memory_method = call.rise_bytes, call.method
                    if way == FUSED:
                        self.folded_bytes = call.folded_bytes
                    self._progress.advance(self._steps["peak memory"])

    def measure_naive(self) -> None:
        """The naive way, where memory and the time set aside for it allow; else by formula.

        At the largest resolution, scales that do fit are measured by themselves.
        """
        largest = list(self._features)[-1]
        left = self._naive_seconds
        last: Point | None = None
        for size in self._features:
            model = self._modelled(size, last)
            call = self._call_naive(size, 0) if self._fits(size, 0, model, left) else None
            if call is not None:
                last = self._point(NAIVE, size, call.seconds, call.rise_bytes, measured=True)
                left -= call.seconds
            elif model is not None:
                if size == largest:
                    self._measure_coarse(size, model, max(left, COARSE_SECONDS))
                self._point(NAIVE, size, *model, measured=False)
            self._progress.advance(self._steps["naive all-pairs"])

    def _measure_coarse(self, size: tuple[int, int], model: tuple[float, int], left: float) -> None:
        sizes = sizes_of(self._features[size])
        whole = formula(NAIVE, sizes)
        for scale in range(1, len(sizes)):
            part = formula(NAIVE, sizes[scale:])
            guess = (model[0] * part.flops / whole.flops, part.peak_bytes)
            call = self._call_naive(size, scale) if self._fits(size, scale, guess, left) else None
            if call is not None:
                self._point(NAIVE, size, call.seconds, call.rise_bytes, True, scale)
                return

    def _modelled(self, size: tuple[int, int], last: Point | None) -> tuple[float, int] | None:
        """Seconds and bytes of the naive way, scaled by formula from the last measured one."""
        if last is None:
            return None
        here, there = (formula(NAIVE, sizes_of(self._features[s])) for s in (size, last.size))
        return (
            last.seconds * here.flops / there.flops,
            round(last.peak_bytes * here.peak_bytes / there.peak_bytes),
        )

    def _fits(
        self, size: tuple[int, int], scale: int, guess: tuple[float, int] | None, left: float
    ) -> bool:
        needed = formula(NAIVE, sizes_of(self._features[size])[scale:]).peak_bytes
        seconds = 0.0 if guess is None else guess[0]
        return needed < MEMORY_SHARE * available_bytes() and seconds < left

    def _call_naive(self, size: tuple[int, int], scale: int) -> Call | None:
        """The naive way in a process of its own; None if it ran out of memory there."""
        with fresh_process() as process:
            work: Future[Call] = process.submit(measured_call, NAIVE, self._file(size), scale)
            try:
                return work.result()
            except (BrokenProcessPool, MemoryError, RuntimeError) as error:
                if not isinstance(error, BrokenProcessPool) and "memory" not in str(error):
                    raise
                return None

    def _point(
        self,
        way: str,
        size: tuple[int, int],
        seconds: float,
        peak_bytes: int,
        measured: bool,
        scale: int = 0,
    ) -> Point:
        sizes = sizes_of(self._features[size])
        model = formula(way, sizes[scale:])
        scales = (scale, len(sizes) - 1)
        point = Point(
            way, size, scales, model.pairs, model.flops / 1e9, seconds, peak_bytes, measured
        )
        self.points.append(point)
        return point

    def _file(self, size: tuple[int, int]) -> Path:
        return self._folder / f"{size[0]}x{size[1]}.pt"


def _verify(by_op: OpByOp, fused: Fused, features: Features) -> dict[str, float]:
    """Check every output; return the largest relative error of both ways.

    How much an output may differ is told by op by op in both memory formats: torch's convolutions
    of the fuse blocks, which the fused way has in channels_last, add ten thousand terms in another
    order in each, and are several times farther off in one of them than in the other.
    """
    widths = [s.width for s in sizes_of(features)]
    exact = OpByOp(widths).double()
    channels_last = OpByOp(widths).to(memory_format=torch.channels_last)
    doubles = {task: [x.double() for x in pyramid] for task, pyramid in features.items()}
    errors = {OP_BY_OP: 0.0, FUSED: 0.0}
    results = (exact(doubles), by_op(features), channels_last(features), fused(features))
    for number, (r, e, other, x) in enumerate(zip(*results, strict=True)):
        rounding = torch.maximum((e - r).abs(), (other - r).abs()).flatten(2)
        truth = Truth(r.flatten(2), rounding, rounding)
        check(f"output {number}", x.flatten(2), truth)
        for way, y in ((OP_BY_OP, e), (FUSED, x)):
            error = ((y - r).abs().max() / r.abs().max()).item()
            errors[way] = max(errors[way], error)
    return errors


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
