"""Results of record: where runs go, which is preferred, and that pictures show them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_support import BARS, LINES, RESULT, make_run

from benchmarks import gpu_bars, readme, record, report
from benchmarks.core import PRESETS, Result
from benchmarks.suites import SUITES


def write(path: Path, run: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run))
    return path


@pytest.mark.parametrize("folder", [path for path in record.RESULTS.iterdir() if path.is_dir()])
def test_runs_of_record_lie_where_they_belong(folder: Path) -> None:
    runs = record.read(folder)
    assert runs
    for run in runs:
        assert record.machine(run) == folder.name
        assert run["command"] and not run["unfinished"]
        assert all(result["failure"] is None for result in run["suites"].values())


def test_every_preset_has_its_rank() -> None:
    assert set(record.THOROUGHNESS) == set(PRESETS)


def test_machines() -> None:
    assert record.machine(make_run(facts={"cores": 8})) == "cpu-8-cores"
    for name, folder in (("NVIDIA H200", "h200"), ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090")):
        run = {**make_run(facts={"gpu": name}), "device": "cuda"}
        assert record.machine(run) == folder
    assert record.machine({**make_run(), "device": "cuda"}) == "gpu"


def whole(preset: str) -> dict[str, Any]:
    return make_run(preset, **dict.fromkeys(PRESETS[preset].suites, RESULT))


def test_run_goes_to_its_machine(tmp_path: Path) -> None:
    file = write(tmp_path / "out" / "results.json", whole("quick"))
    path = record.adopt(file, tmp_path / "results")
    assert path == tmp_path / "results" / "cpu-2-cores" / "quick.json"
    assert record.read(path.parent) == [whole("quick")]
    assert record.adopt(path, tmp_path / "results") == path


def test_run_of_some_suites_stands_beside_the_others(tmp_path: Path) -> None:
    file = write(tmp_path / "results.json", make_run("full", head=RESULT, network=RESULT))
    assert record.adopt(file, tmp_path).name == "full-head-network.json"


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({**make_run(cam=RESULT), "unfinished": ["head"]}, "was cut off before head"),
        (make_run(cam=Result("", failure="off")), "failed in cam"),
    ],
)
def test_run_that_is_not_whole_is_refused(
    run: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(report.ReportError, match=message):
        record.adopt(write(tmp_path / "a.json", run), tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_thorough_runs_are_preferred_then_new_ones(tmp_path: Path) -> None:
    def named(title: str) -> Result:
        return replace(RESULT, title=title)

    old, new = {"date": "2026-01-01"}, {"date": "2026-02-02"}
    for number, run in enumerate(
        (
            make_run("full", new, head=named("new")),
            make_run("full", old, head=named("old"), cam=named("thorough")),
            make_run("quick", new, cam=named("quick"), linear=named("alone")),
        )
    ):
        write(tmp_path / f"{number}.json", run)
    found = record.suites(record.read(tmp_path))
    titles = {name: result["title"] for name, result in found.items()}
    assert titles == {"cam": "thorough", "linear": "alone", "head": "new"}
    assert list(titles) == [name for name in SUITES if name in titles]


def test_pictures_follow_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "PICTURES", {"cam": 2})
    run = write(tmp_path / "quick.json", make_run(cam=replace(RESULT, plots=[LINES, BARS, BARS])))
    first, second = tmp_path / "cam-1.png", tmp_path / "cam-2.png"
    assert record.outdated(tmp_path) == [first, second]
    record.draw(tmp_path)
    assert record.outdated(tmp_path) == []
    write(run, make_run(cam=replace(RESULT, plots=[replace(LINES, title="other")])))
    assert record.outdated(tmp_path) == [first, second]
    record.draw(tmp_path)
    assert first.exists() and not second.exists()
    assert record.outdated(tmp_path) == []


BLOCKS = "\n".join(
    f"<!-- begin {name}: results/m -->\nold\n<!-- end {name} -->\n"
    for name in ("bars", "recompute", "recompute in short")
)


def test_readme_has_answers_table_bars_and_pictures(tmp_path: Path) -> None:
    write(tmp_path / "results" / "m" / "quick.json", make_run(recompute=RESULT))
    text = readme.with_tables(BLOCKS, tmp_path)
    for part in (
        "| speed | 1.5x | >= 2x | NOT MET |",
        "- `run <it>`: A <fast> CPU",
        "- Fused is 1.5 times as fast & no less.",
        "| a | big | 12.3 ±0.5 | 1,234 |",
        "![Time over tokens](results/m/recompute-1.png)",
    ):
        assert part in text
    assert "old" not in text
    assert readme.with_tables(text, tmp_path) == text


def test_readme_of_a_machine_without_results(tmp_path: Path) -> None:
    assert readme.with_tables(BLOCKS, tmp_path).count(readme.NOT_MEASURED) == 3


GPU_BLOCK = "<!-- begin GPU bars: results/gpu -->\n<!-- end GPU bars -->\n"


def test_every_gpu_bar_without_results_is_listed_as_not_measured(tmp_path: Path) -> None:
    text = readme.with_tables(GPU_BLOCK, tmp_path)
    assert text.count("| not measured |") == len(gpu_bars.BARS) >= 16
    assert all(f"| {bar.name} |" in text for bar in gpu_bars.BARS)
    assert len({bar.name for bar in gpu_bars.BARS}) == len(gpu_bars.BARS)


def test_gpu_bars_of_record(tmp_path: Path) -> None:
    first = replace(gpu_bars.BARS[0], value=12.0)
    folder = tmp_path / "results" / "gpu"
    write(folder / "gpu-cam.json", make_run("gpu", cam=Result("", bars=[first])))
    # A later run of the same suite knows nothing of that bar.
    write(folder / "gpu.json", make_run("gpu", {"date": "2027"}, cam=Result("")))
    text = readme.with_tables(GPU_BLOCK, tmp_path)
    assert f"| {first.name} | 12x | >= 10x | met |" in text
    assert text.count("| not measured |") == len(gpu_bars.BARS) - 1
    assert "- `run <it>`" in text


def test_command_writes_text_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    readme.README.write_text(BLOCKS.replace("/m", "/cpu-2-cores"))
    file = write(tmp_path / "new.json", whole("full"))
    assert readme.main(["--check"]) == 1
    assert readme.main([str(file)]) == 0
    assert (tmp_path / "results" / "cpu-2-cores" / "recompute-1.png").exists()
    assert "12.3 ±0.5" in readme.README.read_text()
    assert readme.main(["--check"]) == 0
    (tmp_path / "results" / "cpu-2-cores" / "recompute-1.png").unlink()
    assert readme.main(["--check"]) == 1
    write(file, {"format": 1, "suites": {}})
    assert readme.main([str(file)]) == 2
    assert "got format 1" in capsys.readouterr().out
