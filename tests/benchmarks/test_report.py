"""Bars are judged and figures laid out as they should be."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from benchmarks import __main__, environment, report
from benchmarks.core import PRESETS, Bar, Preset, Result
from xattn_kernels.testing.measure import Timing


def test_bars_are_met_on_the_right_side() -> None:
    assert Bar("", 2.0, ">=", 2.0).met is True
    assert Bar("", 2.0, ">=", 1.99).met is False
    assert Bar("", 2.0, "<=", 1.99).met is True
    assert Bar("", 2.0, "<=", None, note="why").met is None


def test_slow_calls_are_repeated_less() -> None:
    preset = Preset("", repetitions=10, sample_seconds=0.0, series_seconds=5.0)
    assert [preset.repetitions_of(s) for s in (0.0, 0.1, 1.0, 60.0)] == [10, 10, 5, 3]


def make_report(**results: Result) -> dict[str, Any]:
    made = report.to_json(environment.collect(), "quick", results, 1.23)
    again: dict[str, Any] = json.loads(json.dumps(made))
    assert again == made
    return again


RESULT = Result(
    "things",
    ["way", "time", "gain", "never measured"],
    rows=[
        {"way": "a", "time": [12.34, 12.0, 13.0], "gain": 1234.5},
        {"way": "b", "time": [1, 1, 1]},
    ],
    bars=[Bar("speed", 2.0, ">=", 1.5, "x"), Bar("compiled", 1.0, ">=", None, "x", "no compiler")],
    notes=["a [note]"],
)


def test_cells() -> None:
    made = make_report(things=RESULT)
    headings, cells = report.suite_cells(made["suites"]["things"])
    assert headings == ["way", "time", "gain"]
    assert cells == [["a", "12.3 ±0.5", "1,234"], ["b", "1.00 ±0.00", ""]]
    assert report.bar_cells(made)[1] == [
        ["speed", "1.5x", ">= 2x", "NOT MET"],
        ["compiled", "no compiler", ">= 1x", "not measured"],
    ]


def test_markdown_aligns_numbers_to_the_right() -> None:
    assert report.markdown(["a", "b"], [["x", "~1.5"], ["y", ""]]).splitlines() == [
        "| a | b |",
        "| --- | ---: |",
        "| x | ~1.5 |",
        "| y |  |",
    ]


def shown(made: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=120)
    report.show(console, made)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_show() -> None:
    text = shown(make_report(things=RESULT))
    for part in ("things", "12.3 ±0.5", "a [note]", "NOT MET", "no compiler", "cores"):
        assert part in text


def test_failed_check_hides_figures() -> None:
    made = make_report(things=Result("things", failure="result 0: wrong"))
    assert "check failed, so nothing is shown: result 0: wrong" in shown(made)
    assert report.bar_cells(made)[1] == [["things: all bars", "check failed", "", "NOT MET"]]


class Wrong:
    """Stands for a suite whose results are not accepted."""

    @staticmethod
    def run(preset: Preset, say: object) -> Result:
        raise AssertionError("output 3: off")


def test_suite_with_a_failed_check_has_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(__main__.importlib, "import_module", lambda name: Wrong)
    console = Console(file=io.StringIO())
    result = __main__.run_suite("wrong", PRESETS["smoke"], console)
    assert result.failure == "output 3: off"
    assert result.rows == [] and result.bars == []


@pytest.mark.parametrize(
    ("result", "strict", "status"),
    [
        (Result("", bars=[Bar("", 1.0, ">=", 1.0)]), True, 0),
        (Result("", bars=[Bar("", 1.0, ">=", 0.5)]), False, 0),
        (Result("", bars=[Bar("", 1.0, ">=", 0.5)]), True, 1),
        (Result("", bars=[Bar("", 1.0, ">=", None)]), True, 1),
        (Result("", failure="wrong"), False, 1),
    ],
)
def test_exit_status(
    result: Result, strict: bool, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(__main__, "run_suite", lambda *_: result)
    assert __main__.main(["--only", "linear", *(["--strict"] if strict else [])]) == status


def test_commit_and_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    error = environment.compiler_error()
    assert error is not None and "no-such-compiler" in error
    monkeypatch.setenv("PATH", "")
    assert environment.collect()["commit"] is None


def test_busy_machine_is_warned_about() -> None:
    facts = environment.collect()
    facts["load"] = 3.0
    assert any("busy" in line for line in environment.warnings(facts))
    facts["load"] = 0.1
    facts["engines"] = ["reference"]
    assert any("native module" in line for line in environment.warnings(facts))


def test_timing_in_milliseconds() -> None:
    from benchmarks.core import milliseconds

    assert milliseconds(Timing((0.001, 0.002, 0.003))) == pytest.approx([2.0, 1.5, 2.5])
