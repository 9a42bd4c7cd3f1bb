"""Measuring on a GPU, as far as it can be tried with a stand-in for one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from xattn_kernels.testing import device


def test_why_a_device_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.device_error("cpu") is None
    assert "expected 'cpu' or 'cuda'" in str(device.device_error("tpu"))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "a torch built for CUDA" in str(device.device_error("cuda"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "an NVIDIA GPU and its driver" in str(device.device_error("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.device_error("cuda") is None


def test_order_and_events(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.time = clock[0]

        def elapsed_time(self, end: Any) -> float:
            return float(end.time - self.time)

    def call(name: str, milliseconds: float) -> Any:
        def run() -> None:
            log.append(name)
            clock[0] += milliseconds

        return run

    buffer = SimpleNamespace(zero_=lambda: log.append("flush"))
    monkeypatch.setattr(device, "_cache_sized_buffer", lambda: buffer)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    calls = {"a": call("a", 2.0), "b": call("b", 3.0)}
    timings = device.device_interleaved(calls, repetitions=2, warmup=1)
    assert timings["a"].samples == pytest.approx((2e-3, 2e-3))
    assert timings["b"].median == pytest.approx(3e-3)
    flushed = ["flush", "a", "flush", "b", "flush", "b", "flush", "a"]
    assert log == ["a", "b", "wait", *flushed, "wait"]
