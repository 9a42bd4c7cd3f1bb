"""Kernels compiled for GPUs that are not here: registers, shared memory, instructions."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.resources import aot
from benchmarks.resources import triton_table as resources
from benchmarks.resources.triton_table import Case
from xattn_kernels.engines.triton import launch, tuning
from xattn_kernels.schedule import Schedule

FILE = Path(__file__).parents[2] / "docs" / "triton_resources.json"


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    written: dict[str, Any] = json.loads(FILE.read_text())
    return written


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


_TRAINING = "cross_attention_block_training"

#: Kernels over the budget of spills, and their spilling instructions. A tile of the block without
#: spills would compute keys twice as often; those of training were made for 9.0 and 10.0.
KNOWN = {
    "sm_120 cross_attention_block fp16 C=144 source_kernel": 81,
    f"sm_80 {_TRAINING} bf16 C=72 gradient_kernel FIRST SECOND": 270,
    f"sm_80 {_TRAINING} bf16 C=72 gradient_kernel SOURCE FIRST SECOND": 116,
    f"sm_120 {_TRAINING} bf16 C=72 gradient_kernel FIRST SECOND": 257,
    f"sm_120 {_TRAINING} bf16 C=72 gradient_kernel SOURCE FIRST SECOND": 121,
    f"sm_80 {_TRAINING} fp32 C=72 gradient_kernel SOURCE FIRST SECOND": 20,
    f"sm_80 {_TRAINING} bf16 C=144 gradient_kernel FIRST": 193,
    f"sm_80 {_TRAINING} bf16 C=144 gradient_kernel SECOND": 161,
    f"sm_120 {_TRAINING} bf16 C=144 state_kernel": 121,
    f"sm_120 {_TRAINING} bf16 C=144 gradient_kernel FIRST": 122,
    f"sm_120 {_TRAINING} bf16 C=144 gradient_kernel SECOND": 101,
    f"sm_80 {_TRAINING} bf16 C=288 state_kernel": 277,
    f"sm_120 {_TRAINING} bf16 C=288 state_kernel": 252,
}


def is_known(row: dict[str, Any]) -> bool:
    """Whether all that is wrong with a row are spills that are known."""
    return row["spills"] <= KNOWN.get(resources.identity(row), 0) and not resources.problems(
        {**row, "spills": 0}
    )


def test_all_rows_are_acceptable(table: dict[str, Any]) -> None:
    bad = [row for row in table["kernels"] if resources.problems(row)]
    found = {resources.identity(row): resources.problems(row) for row in bad}
    assert all(map(is_known, bad)), found
    assert len(bad) == len(KNOWN), found


def test_all_cases_are_there(table: dict[str, Any]) -> None:
    seen = {(row["operator"], row["C"], row["type"], row["sm"]) for row in table["kernels"]}
    assert seen == {
        (*case, capability) for case in resources.cases() for capability in resources.CAPABILITIES
    }


@pytest.mark.parametrize(
    ("case", "capability"),
    [
        (Case("linear_cross_attention", 36, "bf16"), 90),
        (Case("linear_cross_attention", 72, "fp32"), 80),
        (Case("softmax_cross_attention", 36, "tf32"), 120),
        (Case("cross_attention_block", 288, "bf16"), 120),
        (Case("cross_attention_block", 72, "fp32"), 100),
    ],
    ids=str,
)
def test_compiled_again(case: Case, capability: int, table: dict[str, Any]) -> None:
    import triton

    written = [
        row
        for row in table["kernels"]
        if (row["operator"], row["C"], row["type"], row["sm"]) == (*case, capability)
    ]
    compiled = list(resources.rows([case], [capability]))
    assert all(map(is_known, (row for row in compiled if resources.problems(row))))
    assert list(map(resources.identity, compiled)) == list(map(resources.identity, written))
    if triton.__version__ == table["triton"]:
        how = f"python -m benchmarks.resources.triton_table {FILE.relative_to(FILE.parents[1])}"
        assert compiled == written, f"the kernels have changed; run {how}"


def test_a_set_of_cross_attention_blocks_takes_three_launches() -> None:
    """In a CUDA graph too: no table has to be written before the first kernel."""

    def slots(count: int = 4) -> list[torch.Tensor]:
        return [torch.empty(1, 36, 64, dtype=torch.bfloat16) for _ in range(count)]

    with launch.recorded() as found:
        resources.operators()["cross_attention_block"].call(slots, Schedule.cross_task(4))
    names = [x.kernel.__name__ for x in found]
    assert names == ["source_kernel", "reduce_kernel", "target_kernel"]
    table, template, length = found[0].args[:3]
    assert length == template.numel()
    assert all(x.args[0] is table for x in found)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_shipped_tiles(capability: int) -> None:
    """Those of every kernel at the published widths are in the table."""
    arch, missing = 90 if capability in (90, 100) else 80, []
    for operator in ("linear_cross_attention", "softmax_cross_attention", "cross_attention_block"):
        for case in resources.cases([operator]):
            with pytest.MonkeyPatch.context() as patch:

                def shipped(task: tuning.Task, found: int, rule: Any) -> Any:
                    assert found == arch
                    entry = tuning.entry_name(task.kernel, task.widths, task.dot)
                    if entry not in tuning._table()[f"sm_{arch}"]:
                        missing.append(entry)
                    return rule(*task.widths, task.dot, arch)

                patch.setattr(tuning, "shipped", shipped)
                case.launches(capability)
    assert not missing


def test_the_table_writer_compiles() -> None:
    from xattn_kernels.engines.triton.table_kernel import ARGUMENTS, write_kernel

    memory = torch.empty(ARGUMENTS, dtype=torch.int64)
    args = (memory, 0, *range(ARGUMENTS))
    compiled = aot.compile_launch(launch.Launch(write_kernel, 1, args, {}, 1, 1), 90)
    found = aot.resources(compiled)
    assert found.spills == found.stack == 0
    assert found.instructions["store"] >= ARGUMENTS // 2


def test_problems_are_found(table: dict[str, Any]) -> None:
    row = next(row for row in table["kernels"] if row["products"] == "ieee" and row["sm"] == 120)
    assert not resources.problems(row)
    for change, message in {
        ("shared", 100 * 1024): "shared memory",
        ("spills", 1000): "the budget is 16",
        ("tf32", 3): "nobody asked for",
    }.items():
        assert message in resources.problems({**row, change[0]: change[1]})[0]
    row = next(row for row in table["kernels"] if row["products"] == "bf16" and row["sm"] == 90)
    assert not resources.problems(row)
    assert "wider than 16 bits" in resources.problems({**row, "widest_load": 16})[0]


def test_some_operators_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: dict[str, Any]
) -> None:
    """Rows of the others stay, and all are in the order of the operators."""
    file = tmp_path / "table.json"
    file.write_text(json.dumps({"triton": "", "kernels": table["kernels"][::-1]}))

    def rows(chosen: list[Case], _: object) -> Iterator[dict[str, Any]]:
        assert {case.operator for case in chosen} == {"softmax_cross_attention"}
        for row in table["kernels"]:
            if (row["operator"], row["C"], row["type"]) in chosen:
                yield {**row, "spills": 0}

    monkeypatch.setattr(resources, "rows", rows)
    resources.main([str(file), "--only", "softmax_cross_attention"])
    written = json.loads(file.read_text())["kernels"]
    names = list(dict.fromkeys(row["operator"] for row in written))
    assert names == [name for name in resources.operators() if name in names]
    assert len(written) == len(table["kernels"])
    for row in written:
        assert row["spills"] == 0 or row["operator"] != "softmax_cross_attention"
