"""The README: its examples run, and its tables are those of the files they name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import readme, record
from xattn_kernels import cost

TEXT = readme.README.read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(7))
def test_example_runs(number: int) -> None:
    assert len(EXAMPLES) == 7
    exec(compile(EXAMPLES[number], f"README.md, example {number}", "exec"), {})


def test_tables_agree_with_their_files() -> None:
    assert readme.with_tables(TEXT) == TEXT, "run: python -m benchmarks.readme"


def test_pictures_agree_with_their_files() -> None:
    folders = readme.folders(TEXT)
    assert folders
    for folder in folders:
        assert record.outdated(folder) == [], "run: python -m benchmarks.readme"


def test_links_within_the_repository() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT):
        assert (readme.ROOT / target).exists(), target


def test_figures_of_the_cost_model() -> None:
    costs = cost.comparison(cost.NYUD_V2)
    naive, ours = costs["all pairs"], costs["sequential"]
    for figure in (
        f"| {naive.pairs} | softmax | {naive.softmax_core_flops / 1e9:.0f} GFLOP",
        f"| {naive.score_bytes / 2**30:.1f} GiB |",
        f"| {ours.pairs} | softmax | {ours.softmax_core_flops / 1e9:.0f} GFLOP",
        f"| {ours.score_bytes / 2**30:.1f} GiB |",
        f"| **{ours.pairs}** | **linear, as published** | **{ours.linear_flops / 1e9:.1f} GFLOP**",
    ):
        assert figure in TEXT, figure


def test_table_is_replaced_between_its_comments(tmp_path: Path) -> None:
    found = {
        "title": "T",
        "columns": ["", "ms"],
        "rows": [["a", "1"]],
        "notes": ["n"],
        "points": [],
    }
    (tmp_path / "a.json").write_text(json.dumps(found))
    before = "head\n<!-- begin demo: a.json -->\nold\n<!-- end demo -->\ntail\n"
    after = readme.with_tables(before, tmp_path)
    assert after == (
        "head\n<!-- begin demo: a.json -->\nT:\n\n|  | ms |\n| --- | ---: |\n| a | 1 |\n\n- n\n"
        "<!-- end demo -->\ntail\n"
    )
    assert readme.with_tables(after, tmp_path) == after


@pytest.mark.parametrize(
    "text", ["no table\n", "<!-- begin nothing: a.json -->\n<!-- end nothing -->"]
)
def test_comments_that_name_no_table(text: str) -> None:
    with pytest.raises(ValueError, match="README"):
        readme.with_tables(text)
