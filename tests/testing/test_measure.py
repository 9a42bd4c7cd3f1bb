"""Measuring: turns are taken, and memory is what was touched during a call."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from xattn_kernels.testing import measure

MIB = 2**20


def test_calls_take_turns_in_rotating_order() -> None:
    calls: list[str] = []
    done: list[None] = []
    timings = measure.interleaved(
        {name: lambda name=name: calls.append(name) for name in "abc"},
        repetitions=3,
        warmup=0,
        progress=lambda: done.append(None),
    )
    assert calls == list("abcbcacab")
    assert len(done) == 3
    assert all(len(timing.samples) == 3 for timing in timings.values())


def test_short_calls_are_repeated_within_a_sample() -> None:
    calls: list[None] = []
    [timing] = measure.interleaved(
        {"": lambda: calls.append(None)}, repetitions=2, warmup=0, min_sample_s=0.005
    ).values()
    assert len(calls) > 100
    assert 0 < timing.median < 0.001


def test_median_and_quartiles() -> None:
    timing = measure.Timing((5.0, 1.0, 2.0, 3.0, 4.0))
    assert timing.median == 3.0
    assert timing.quartiles == (2.0, 4.0)
    assert measure.Timing((7.0,)).quartiles == (7.0, 7.0)


def touch(megabytes: int) -> torch.Tensor:
    return torch.ones(megabytes * MIB // 4)


def peak_beside(held: int, used: int) -> measure.PeakMemory:
    """For another process: the peak of a call that touches `used` MiB, with `held` MiB there."""
    touch(1)
    before = touch(held)
    memory = measure.peak_memory(lambda: touch(used).sum())
    assert before.sum() == before.numel()
    return memory


@pytest.mark.parametrize("used", [1, 40])
def test_peak_counts_what_the_call_touches_and_frees(used: int) -> None:
    memory: measure.PeakMemory = measure.in_fresh_process(peak_beside, 60, used)
    assert used * MIB * 0.9 <= memory.rise <= (used + 4) * MIB
    assert memory.method == "VmHWM"


def test_peak_is_sampled_where_the_mark_cannot_be_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_CLEAR_REFS", Path("/proc/self/no_such_file"))
    memory = measure.peak_memory(lambda: touch(64))
    assert memory.method == "sampled"
    assert memory.rise >= 60 * MIB


@pytest.mark.parametrize(
    "read",
    [measure.available_bytes, measure.resident_bytes, lambda: measure.peak_memory(lambda: None)],
)
def test_without_proc(monkeypatch: pytest.MonkeyPatch, read: Callable[[], object]) -> None:
    for name in ("_STATUS", "_MEMORY", "_CLEAR_REFS"):
        monkeypatch.setattr(measure, name, Path("/proc/no_such_file"))
    with pytest.raises(RuntimeError, match="no_such_file"):
        read()


def test_available_memory_heeds_the_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_CONTROL_GROUP", tmp_path)
    free = measure.available_bytes()
    assert free > 100 * MIB
    (tmp_path / "memory.current").write_text(f"{10 * MIB}\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert measure.available_bytes() > 100 * MIB
    (tmp_path / "memory.max").write_text(f"{15 * MIB}\n")
    assert measure.available_bytes() == 5 * MIB


def test_fresh_process_has_the_same_threads_and_hands_over_errors() -> None:
    with measure.fresh_process() as process:
        assert process.submit(torch.get_num_threads).result() == torch.get_num_threads()
        assert process.submit(os.getpid).result() != os.getpid()
        with pytest.raises(ZeroDivisionError):
            process.submit(divmod, 1, 0).result()


def test_tensor_bytes_counts_memory_once() -> None:
    x = torch.empty(10, 100)
    assert measure.tensor_bytes([x, x[1:], x.t()]) == 4000
    assert measure.tensor_bytes([x, torch.empty(5)]) == 4020
