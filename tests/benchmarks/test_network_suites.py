"""Suites on heads and networks fill their tables, on images of hardly any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import environment, networks
from benchmarks.core import PRESETS, Result
from benchmarks.suites import (
    SUITES,
    head,
    network,
    network_compiled,
    network_scaling,
    network_training,
)

SMOKE = PRESETS["smoke"]
SIZE = (32, 64)
TRAINING_SIZE = (128, 160)  # batch norms of a few values have large rounding errors


def quiet(text: str) -> None:
    assert text


def complete(result: Result) -> None:
    assert result.failure is None and result.notes
    assert {name for row in result.rows for name in row} == set(result.columns)
    assert all(bar.value is not None or bar.note for bar in result.bars)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "compiler_error", lambda: "no compiler today")
    for suite in (head, network_training):
        monkeypatch.setattr(suite, "in_fresh_process", lambda *_: 2**20)
    monkeypatch.setattr(network, "in_fresh_process", lambda *_: (2**20, 2**20))


def test_registered() -> None:
    assert SUITES[-5:] == (
        "head",
        "network",
        "network_training",
        "network_compiled",
        "network_scaling",
    )


def test_head() -> None:
    result = head.run(SMOKE, quiet, SIZE)
    complete(result)
    assert "Without compiled: no compiler today." in result.notes
    assert result.bars[1].value is None


def test_network() -> None:
    result = network.run(SMOKE, quiet, SIZE)
    complete(result)
    ways = ["op by op", "ours", "ours, frozen", "converted"]
    assert [row["way"] for row in result.rows] == ways


def test_network_training() -> None:
    complete(network_training.run(SMOKE, quiet, TRAINING_SIZE))


def test_network_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    result = network_compiled.run(SMOKE, quiet)
    complete(Result("", notes=result.notes, bars=result.bars))
    assert not result.rows and {bar.note for bar in result.bars} == {"no compiler today"}
    monkeypatch.setattr(environment, "compiler_error", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda model: model)
    result = network_compiled.run(SMOKE, quiet, [SIZE, TRAINING_SIZE])
    complete(result)
    modes = [(row["mode"], row["size"]) for row in result.rows]
    assert modes == [("eval", "32x64"), ("eval", "128x160"), ("train", "32x64")]


def test_a_compiled_network_that_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "compiler_error", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda model: lambda x: model(1.01 * x))
    with pytest.raises(AssertionError, match="compiled: relative L2 error"):
        network_compiled.run(SMOKE, quiet, [SIZE])


def test_network_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_scaling, "in_fresh_process", lambda *_: 2**20)
    setting = network_scaling.Setting("batch", 2, batch=2, tasks=5, size=SIZE)
    again = network_scaling.Setting("tasks", 5, batch=2, tasks=5, size=SIZE)
    result = network_scaling.run(SMOKE, quiet, [setting, again])
    complete(result)
    first, second = result.rows
    assert first["gain"] == second["gain"]  # the same network is measured once
    assert [plot.title for plot in result.plots] == [
        "Whole network by batch",
        "Whole network by tasks",
    ]
    assert result.answers and "images a second" in result.answers[0]


def test_settings_of_the_network() -> None:
    varied = {setting.varied for setting in network_scaling.settings()}
    assert varied == {"batch", "tasks", "resolution", "backbone"}


def test_memory() -> None:
    assert head.rise_bytes(head.OURS, SIZE) >= 0
    assert min(network.rise_bytes(network.OURS, SIZE)) >= 0


def test_wrong_operations_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network.flops, "count", lambda call: 5)
    with pytest.raises(AssertionError, match="ours: 5 FLOP counted"):
        network.count(network.OURS, SIZE)


def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = networks.make

    def wrong(way: str, *args: Any, **options: Any) -> torch.nn.Module:
        model = original(way, *args, **options)
        if way == networks.OURS:
            with torch.no_grad():
                model.heads["depth"].last_layer[3].bias += 1
        return model

    for suite in (network, network_training):
        monkeypatch.setattr(suite, "make", wrong)
        monkeypatch.setattr(suite, "measured", None)
        size = SIZE if suite is network else TRAINING_SIZE
        with pytest.raises(AssertionError, match="ours, depth: relative L2 error"):
            suite.run(SMOKE, quiet, size)
