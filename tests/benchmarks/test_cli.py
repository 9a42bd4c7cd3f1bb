"""The command: files it leaves, how it ends, and what it says when it cannot."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from report_support import BARS, LINES

import xattn_kernels.__main__
from benchmarks import __main__ as bench
from benchmarks import report
from benchmarks.core import PRESETS, Bar, Preset, Result
from xattn_kernels import registry

Run = Callable[[Preset, Callable[[str], None]], Result]


def passing(preset: Preset, say: Callable[[str], None]) -> Result:
    say("timing")
    return Result("fine", ["way"], [{"way": "a"}], [Bar("b", 1.0, ">=", 1.0)], plots=[LINES, BARS])


def wrong(preset: Preset, say: Callable[[str], None]) -> Result:
    raise AssertionError("output 3: off")


def broken(preset: Preset, say: Callable[[str], None]) -> Result:
    raise RuntimeError("not enough memory")


def interrupted(preset: Preset, say: Callable[[str], None]) -> Result:
    raise KeyboardInterrupt


@pytest.fixture
def suites(monkeypatch: pytest.MonkeyPatch) -> dict[str, Run]:
    """What stands for the suites; `linear` and `head` pass unless a test has it otherwise."""
    chosen: dict[str, Run] = {"linear": passing, "head": passing}
    for name in chosen:
        suite = SimpleNamespace(run=lambda *args, name=name: chosen[name](*args))
        monkeypatch.setitem(sys.modules, f"benchmarks.suites.{name}", suite)
    return chosen


ONLY = ("--preset", "smoke", "--only", "linear", "head")


def read(out: Path) -> dict[str, Any]:
    return report.read(out / bench.RESULTS)


def test_folder_holds_results_pictures_and_page(suites: dict[str, Run], tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    assert bench.main([*ONLY, "--out", str(out)]) == 0
    pictures = [f"{name}-{number}.png" for name in ("linear", "head") for number in (1, 2)]
    assert {path.name for path in out.iterdir()} == {bench.RESULTS, bench.PAGE, *pictures}
    found = read(out)
    assert list(found["suites"]) == ["linear", "head"]
    assert found["unfinished"] == []
    assert found["command"] == f"{bench.COMMAND} --preset smoke --only linear head"


def test_page_can_be_left_out(suites: dict[str, Run], tmp_path: Path) -> None:
    assert bench.main([*ONLY, "--no-html", "--out", str(tmp_path)]) == 0
    assert not (tmp_path / bench.PAGE).exists()


@pytest.mark.parametrize(
    ("run", "failure"),
    [(wrong, "check failed: output 3: off"), (broken, "RuntimeError: not enough memory")],
)
def test_failing_suite_has_no_figures_and_others_run(
    run: Run, failure: str, suites: dict[str, Run], tmp_path: Path
) -> None:
    suites["linear"] = run
    assert bench.main([*ONLY, "--out", str(tmp_path)]) == 1
    linear, head = read(tmp_path)["suites"].values()
    assert linear["failure"] == failure
    assert linear["rows"] == linear["bars"] == linear["answers"] == linear["plots"] == []
    assert head["failure"] is None and head["rows"]


def test_finished_suites_are_kept_after_an_interrupt(
    suites: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suites["head"] = interrupted
    assert bench.main([*ONLY, "--out", str(tmp_path)]) == bench.INTERRUPTED
    found = read(tmp_path)
    assert list(found["suites"]) == ["linear"] and found["unfinished"] == ["head"]
    assert "the finished suites are kept" in capsys.readouterr().out
    assert "cut off before head" in (tmp_path / bench.PAGE).read_text()


def test_results_are_written_after_every_suite(suites: dict[str, Run], tmp_path: Path) -> None:
    seen = []

    def head(preset: Preset, say: Callable[[str], None]) -> Result:
        seen.append(read(tmp_path))
        return Result("")

    suites["head"] = head
    assert bench.main([*ONLY, "--out", str(tmp_path)]) == 0
    [before] = seen
    assert list(before["suites"]) == ["linear"] and before["unfinished"] == ["head"]


@pytest.mark.parametrize(
    ("value", "strict", "status"),
    [(1.0, True, 0), (0.5, False, 0), (0.5, True, 1), (None, True, 1)],
)
def test_bars_decide_when_strict(
    value: float | None, strict: bool, status: int, suites: dict[str, Run], tmp_path: Path
) -> None:
    suites["head"] = lambda preset, say: Result("", bars=[Bar("", 1.0, ">=", value)])
    arguments = [*ONLY, "--out", str(tmp_path), *(["--strict"] if strict else [])]
    assert bench.main(arguments) == status


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert bench.main(arguments) == 2
    return capsys.readouterr().out


def test_no_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = refused(capsys, "--preset", "gpu", "--out", str(tmp_path))
    assert "preset 'gpu': expected an NVIDIA GPU" in text
    assert not list(tmp_path.iterdir())


def test_engine_that_is_not_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(registry, "unavailable", lambda name: f"no {name} today")
    text = refused(capsys, "--engine", "triton", "--out", str(tmp_path))
    assert "--engine: got 'triton', which is not available here: no triton today" in text


def test_engine_is_asked_for(
    suites: dict[str, Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XATTN_BACKEND", "auto")
    monkeypatch.setattr(registry._default, "name", "auto")
    suites["linear"] = lambda preset, say: Result(registry.current_backend())
    assert bench.main([*ONLY, "--engine", "reference", "--out", str(tmp_path)]) == 0
    assert read(tmp_path)["suites"]["linear"]["title"] == "reference"


def test_folder_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    text = refused(capsys, "--out", str(tmp_path / "file"))
    assert "--out: expected a folder to write to" in text


@pytest.mark.parametrize("option", ["--preset", "--only", "--engine"])
def test_unknown_names(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        bench.main([option, "nothing"])
    assert error.value.code == 2
    assert f"argument {option}: invalid choice: 'nothing'" in capsys.readouterr().err


def test_presets_are_those_of_the_issue() -> None:
    assert {"quick", "full", "gpu", "scaling", "network"} <= set(PRESETS)


def test_bench_is_a_command_of_the_library() -> None:
    command = [sys.executable, "-m", "xattn_kernels", "bench", "--preset", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "invalid choice: 'nothing'" in done.stderr


def test_library_without_what_benchmarks_need(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'rich'", name="rich")

    monkeypatch.setattr(importlib, "import_module", missing)
    assert xattn_kernels.__main__.main(["bench"]) == 2
    assert "'rich' is missing" in capsys.readouterr().err
