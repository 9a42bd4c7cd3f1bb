"""Runs that were never made, for the tests of what is made from runs."""

from __future__ import annotations

import json
from typing import Any

from benchmarks import report
from benchmarks.core import PRESETS, Bar, Plot, Result, Series

FACTS: dict[str, Any] = {
    "date": "2026-01-02T03:04:05+00:00",
    "version": "0.1.0",
    "commit": "abcdef0",
    "python": "3.11.7",
    "torch": "2.13.0",
    "platform": "Linux",
    "processor": "A <fast> CPU",
    "cores": 2,
    "threads": 2,
    "isa": "avx2",
    "engines": ["cpu", "reference"],
    "load": 0.1,
    "gpu": None,
}

LINES = Plot(
    "lines",
    "Time over tokens",
    "tokens",
    "ms",
    [
        Series(
            "all pairs", [10, 20, 40, 80], [1.0, 4.0, 16.0, 64.0], modelled=[False] * 3 + [True]
        ),
        Series("ours", [10, 20, 40], [1.0, 2.0, 4.0], [0.9, 1.9, 3.9], [1.1, 2.1, 4.1]),
    ],
    x_log=True,
    y_log=True,
    note="Hollow: by the <model>.",
)
BARS = Plot(
    "bars",
    "Memory",
    "",
    "MiB",
    [Series("MiB", ["op by op", "ours"], [30.0, 10.0], modelled=[True, False])],
)
ROOFLINE = Plot(
    "roofline",
    "Limits",
    "FLOP per byte",
    "GFLOP/s",
    [
        Series("copy and FMA", [0.1, 10, 1000], [4.0, 400.0, 400.0]),
        Series("fused", [33], [283.0], [280.0], [290.0]),
    ],
    x_log=True,
    y_log=True,
)

RESULT = Result(
    "things",
    ["way", "size", "time", "gain", "never measured"],
    rows=[
        {"way": "a", "size": "big", "time": [12.34, 12.0, 13.0], "gain": 1234.5},
        {"way": "b", "time": [1, 1, 1]},
    ],
    bars=[Bar("speed", 2.0, ">=", 1.5, "x"), Bar("compiled", 1.0, ">=", None, "x", "no compiler")],
    notes=["a [note]"],
    question=2,
    answers=["Fused is 1.5 times as fast & no less."],
    plots=[LINES],
)


def make_run(
    preset: str = "quick", facts: dict[str, Any] | None = None, **results: Result
) -> dict[str, Any]:
    """A run with these results, as it is read from its file."""
    facts = {**FACTS, **(facts or {})}
    made = report.to_json(facts, PRESETS[preset], results, 1.23, command="run <it>")
    again: dict[str, Any] = json.loads(json.dumps(made))
    assert again == made
    return again
