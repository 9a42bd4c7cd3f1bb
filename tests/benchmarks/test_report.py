"""Bars are judged and figures laid out as they should be; files are read or refused."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from report_support import RESULT, make_run
from rich.console import Console

from benchmarks import environment, report
from benchmarks.core import Bar, Preset, Result, milliseconds
from xattn_kernels.testing.measure import Timing


def test_bars_are_met_on_the_right_side() -> None:
    assert Bar("", 2.0, ">=", 2.0).met is True
    assert Bar("", 2.0, ">=", 1.99).met is False
    assert Bar("", 2.0, "<=", 1.99).met is True
    assert Bar("", 2.0, "<=", None, note="why").met is None


def test_slow_calls_are_repeated_less() -> None:
    preset = Preset("", repetitions=10, sample_seconds=0.0, series_seconds=5.0)
    assert [preset.repetitions_of(s) for s in (0.0, 0.1, 1.0, 60.0)] == [10, 10, 5, 3]


def test_cells() -> None:
    made = make_run(things=RESULT)
    headings, cells = report.suite_cells(made["suites"]["things"])
    assert headings == ["way", "size", "time", "gain"]
    assert cells == [["a", "big", "12.3 ±0.5", "1,234"], ["b", "", "1.00 ±0.00", ""]]
    assert report.bar_cells(made)[1] == [
        ["speed", "1.5x", ">= 2x", "NOT MET"],
        ["compiled", "no compiler", ">= 1x", "not measured"],
    ]


def test_units_stand_apart_from_their_figures() -> None:
    made = make_run(things=Result("", bars=[Bar("work", 1900.0, "<=", 17.94, " GFLOP")]))
    assert report.bar_cells(made)[1] == [["work", "17.9 GFLOP", "<= 1,900 GFLOP", "met"]]


def test_timings_and_their_spread() -> None:
    made = make_run(things=RESULT)
    found = list(report.timings(made["suites"]["things"]))
    assert found == [("a, big", "time", [12.34, 12.0, 13.0]), ("b", "time", [1, 1, 1])]
    assert report.spread([10.0, 9.0, 13.0]) == pytest.approx(0.2)
    assert report.median_spread(made) == pytest.approx(0.5 / 12.34 / 2)
    assert report.median_spread(make_run(things=Result("empty"))) is None


def test_cases_go_by_text_and_whole_numbers() -> None:
    result = Result(
        "",
        ["varied", "value", "GFLOP", "time", "peak"],
        [
            {"varied": "tasks", "value": 2, "GFLOP": 1.5, "time": [1, 1, 1], "peak": "~7"},
            {"varied": "tasks", "value": 3, "GFLOP": 2.5, "time": "~9"},
        ],
    )
    [(case, column, _)] = report.timings(make_run(things=result)["suites"]["things"])
    assert (case, column) == ("tasks, 2", "time")


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
    text = shown(make_run(things=RESULT))
    for part in ("things", "12.3 ±0.5", "a [note]", "NOT MET", "no compiler", "cores", "no less"):
        assert part in text
    assert "warning" not in text


def test_failure_hides_figures() -> None:
    made = make_run(things=Result("things", failure="check failed: result 0: wrong"))
    assert "nothing is shown: check failed: result 0: wrong" in shown(made)
    assert report.bar_cells(made)[1] == [["things: all bars", "failed", "", "NOT MET"]]


def test_unfinished_run_says_so() -> None:
    made = {**make_run(things=RESULT), "unfinished": ["head"]}
    assert "warning: the run was cut off before head" in shown(made)


def test_file_is_read_as_written(tmp_path: Path) -> None:
    made = make_run(things=RESULT)
    path = tmp_path / "a.json"
    path.write_text("of the run before")
    report.write(path, made)
    assert report.read(path) == made
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "a.json: cannot be read .No such file"),
        ("{", "a.json: expected a benchmark's results, got no JSON"),
        ("[]", "a.json: expected the results of a benchmark, got other JSON"),
        (json.dumps({"rows": []}), "got other JSON"),
        (json.dumps({"format": 1, "suites": {}}), "expected results of format 2, got format 1"),
    ],
)
def test_unreadable_file_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(report.ReportError, match=message):
        report.read(path)


def test_commit_and_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    error = environment.compiler_error()
    assert error is not None and "no-such-compiler" in error
    monkeypatch.setenv("PATH", "")
    assert environment.collect()["commit"] is None


def test_clocks_and_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = environment.collect()
    assert facts["mhz"] is None or facts["mhz"] > 100
    assert environment.to_text({**facts, "gpu": "NVIDIA H200"}).startswith("NVIDIA H200, ")
    assert environment.to_text({**facts, "gpu": None}).startswith(facts["processor"])
    done = subprocess.CompletedProcess("", 0, "driver, clocks\n580.1, 1980 MHz, 3201 MHz\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert environment._gpu_state() == "580.1, 1980 MHz, 3201 MHz"


def test_busy_machine_is_warned_about() -> None:
    facts = environment.collect()
    facts["load"] = 3.0
    assert any("busy" in line for line in environment.warnings(facts))
    facts["load"] = 0.1
    facts["engines"] = ["reference"]
    assert any("native module" in line for line in environment.warnings(facts))


def test_timing_in_milliseconds() -> None:
    assert milliseconds(Timing((0.001, 0.002, 0.003))) == pytest.approx([2.0, 1.5, 2.5])
