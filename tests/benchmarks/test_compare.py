"""Two runs are compared case by case, with their noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_support import RESULT, make_run

from benchmarks import compare
from benchmarks.core import Result


def run(facts: dict[str, Any] | None = None, **times: list[float]) -> dict[str, Any]:
    rows = [{"way": way, "forward": time} for way, time in times.items()]
    return make_run(facts=facts, core=Result("core", ["way", "forward"], rows))


def verdicts(before: dict[str, Any], after: dict[str, Any], floor: float = 0.05) -> dict[str, str]:
    found = compare.compare(before, after, floor)
    return {case.name: case.verdict for case in found.cases}


def test_beyond_the_quartiles() -> None:
    before = run(steady=[10.0, 9.9, 10.1], noisy=[10.0, 8.0, 12.0], faster=[10.0, 9.9, 10.1])
    after = run(steady=[12.0, 11.9, 12.1], noisy=[12.0, 10.0, 14.0], faster=[5.0, 4.9, 5.1])
    assert verdicts(before, after) == {
        "steady; forward": "slower",
        "noisy; forward": "same",
        "faster; forward": "faster",
    }


def test_rates_are_better_when_larger() -> None:
    def rate(value: float) -> dict[str, Any]:
        row = {"way": "a", "ours, images/s": [value, 0.99 * value, 1.01 * value]}
        return make_run(net=Result("", ["way", "ours, images/s"], [row]))

    [case] = compare.compare(rate(10.0), rate(5.0)).cases
    assert case.verdict == "slower" and case.ratio == pytest.approx(2.0)


def test_floor() -> None:
    before, after = run(a=[10.0, 10.0, 10.0]), run(a=[10.4, 10.4, 10.4])
    assert verdicts(before, after) == {"a; forward": "same"}
    assert verdicts(before, after, floor=0.03) == {"a; forward": "slower"}


def test_ratios_and_summary() -> None:
    before = run(a=[10.0, 9.9, 10.1], b=[10.0, 9.9, 10.1], c=[10.0, 9.9, 10.1])
    after = run(a=[10.0, 9.9, 10.1], b=[15.0, 14.9, 15.1], c=[8.0, 7.9, 8.1])
    found = compare.compare(before, after)
    assert [case.ratio for case in found.cases] == pytest.approx([1.0, 1.5, 0.8])
    assert found.worse
    assert compare.summary(found) == (
        "3 cases: 1 slower, 1 faster, 1 the same within the noise. B / A is 1.000 at the median; "
        "half of the cases differ by less than 25.0 %."
    )


def test_cases_of_one_run_alone() -> None:
    found = compare.compare(run(a=[1, 1, 1], b=[1, 1, 1]), run(b=[1, 1, 1], c=[1, 1, 1]))
    assert [case.name for case in found.cases] == ["b; forward"]
    assert found.missing == [("core", "a; forward")]
    assert found.added == [("core", "c; forward")]
    assert not found.worse


def test_failure_is_worse() -> None:
    before = make_run(core=RESULT)
    after = make_run(core=Result("core", failure="check failed: off"))
    found = compare.compare(before, after)
    assert found.failed == ["core: check failed: off"] and found.worse
    assert not compare.compare(after, after).worse


def test_runs_of_different_machines_are_told() -> None:
    found = compare.compare(run(), run(facts={"threads": 1, "load": 3.0}))
    assert found.differences == [
        "threads: 2 and 1",
        "second run: the machine is busy: load average 3.0",
    ]


def main(tmp_path: Path, before: Any, after: Any) -> int:
    for name, contents in (("a.json", before), ("b.json", after)):
        (tmp_path / name).write_text(json.dumps(contents))
    return compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")])


@pytest.mark.parametrize(
    ("before", "after", "status", "text"),
    [
        (run(a=[1, 1, 1]), run(a=[1, 1, 1]), 0, "1 the same"),
        (run(a=[2, 2, 2]), run(a=[1, 1, 1]), 0, "1 faster"),
        (run(a=[1, 1, 1]), run(a=[2, 2, 2]), 1, "1 slower"),
        (run(a=[1, 1, 1]), run(b=[2, 2, 2]), 2, "No case is in both runs."),
        (run(a=[1, 1, 1]), {"format": 1, "suites": {}}, 2, "got format 1"),
        ([], run(a=[1, 1, 1]), 2, "got other JSON"),
    ],
)
def test_exit_status(
    before: Any,
    after: Any,
    status: int,
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(tmp_path, before, after) == status
    assert text in capsys.readouterr().out


def test_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = {f"way {number}": [1.0, 1.0, 1.0] for number in range(9)}
    main(tmp_path, run(a=[10.0, 9.9, 10.1]), run(a=[20.0, 19.9, 20.1], **many))
    text = capsys.readouterr().out
    for part in ("core", "a; forward", "2.000", "±5.0 %", "slower", "only in B: core: 9 cases"):
        assert part in text
