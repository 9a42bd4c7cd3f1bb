"""The cross-attention block's path for sm_90a on the host, against float64.

Its instructions are the host's (twin/sm90_twin.h): what is tested is where matrices lie, who waits
for whom, and the sums; not what a GPU makes of the instructions.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from block import BLOCKS, ONE, SHARED, TASKS, Block, judge, run

from xattn_kernels.schedule import Schedule
from xattn_kernels.testing import compositions
from xattn_kernels.testing.cases import LAYOUTS

SOURCES, TARGETS = "block_sources_sm90", "block_targets_sm90"
#: Every instance at both ends of what it is for, and how it lies; wider ones have only targets.
WIDTHS = (33, 36, 40, 41, 48, 65, 71, 72, 89, 96, 137, 144, 185, 192, 288)


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XATTN_CUDA_SM90A", "1")


def kernels(twin: Any) -> set[str]:
    return {launch[0] for launch in twin.twin_launches()}


@pytest.mark.parametrize("channels", WIDTHS)
def test_widths(channels: int, twin: Any) -> None:
    judge(Block("width", ONE, (70, 100), channels=channels, batch=1), torch.bfloat16)
    assert kernels(twin) & {SOURCES, TARGETS} == (
        {SOURCES, TARGETS} if channels <= 144 else {TARGETS}
    )


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_cases(block: Block) -> None:
    judge(replace(block, channels=36), torch.bfloat16)


@pytest.mark.parametrize("channels", [36, 72, 144])
def test_many_tiles(channels: int) -> None:
    """Several tiles and chunks for every block, the last ones ragged."""
    judge(Block("tiles", Schedule.cross_task(2), (300, 500), channels=channels), torch.bfloat16)


@pytest.mark.parametrize("processors", [1, 2, 40])
def test_processors(processors: int, twin: Any) -> None:
    """Slabs that stay for a whole slot, or for one of its pairs; one tile a block."""
    twin.twin_configure(seed=processors, processors=processors)
    judge(replace(TASKS, tokens=(300, 200, 129), channels=40), torch.bfloat16)


def test_more_outputs_than_slabs(twin: Any) -> None:
    """States go through the ring, while all outputs share a projection of the query."""
    edges = [(0, 1 + i % 2, i, i % 3 if i else 0) for i in range(17)]
    edges = [(q, s, o, 0) for q, s, o, _ in edges]
    schedule = Schedule.from_edges(edges, num_queries=3)
    judge(Block("many", schedule, (150, 30, 64), channels=36), torch.bfloat16)
    assert TARGETS in kernels(twin)


@pytest.mark.parametrize(
    ("layout", "channels"),
    [*((layout, 36) for layout in LAYOUTS), ("contiguous", 144), ("token_major", 144)],
)
def test_layouts(layout: str, channels: int) -> None:
    block = Block("layout", SHARED, (70, 40, 65), channels=channels)
    features, weight, bias = block.tensors(torch.bfloat16)
    expected = run(features, weight, bias, SHARED)
    got = run([LAYOUTS[layout](x) for x in features], weight, bias, SHARED)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("channels", [36, 72])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_in_larger_tensors(layout: str, channels: int) -> None:
    """Outputs are written into views, and nothing else is."""
    block = Block("outputs", ONE, (70, 40), channels=channels)
    features, weight, bias = block.tensors(torch.bfloat16)
    (expected,) = run(features, weight, bias, ONE)
    poison = torch.full_like(expected, torch.nan)
    view = LAYOUTS[layout](poison.clone())
    base = view if view._base is None else view._base
    before = base.clone()
    run(features, weight, bias, ONE, out=[view])
    assert torch.equal(view, expected)
    view.copy_(poison)
    assert torch.equal(base.view(torch.int16), before.view(torch.int16))


@pytest.mark.parametrize("channels", [36, 72, 96, 144])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("slot", [0, 1], ids=["query", "source"])
def test_not_finite(slot: int, value: float, channels: int) -> None:
    """What is not a number stays where the reference has it."""
    block = Block("not_finite", ONE, (70, 70), channels=channels, batch=2)
    features, weight, bias = block.tensors(torch.bfloat16)
    features[slot][1, 3, 65] = value
    (output,) = run(features, weight, bias, ONE)
    double = [x.double() for x in (*features, weight, bias)]
    (truth,) = compositions.cross_attention_block(double[:2], *double[2:], ONE)
    assert torch.equal(output.isfinite(), truth.isfinite())
    finite = truth.isfinite()
    assert torch.allclose(output.double()[finite], truth[finite], rtol=0.05, atol=0.05)


def test_results_repeat(twin: Any) -> None:
    block = Block("repeat", Schedule.cross_task(3), (100, 300, 20), channels=72)
    features, weight, bias = block.tensors(torch.bfloat16)
    results = []
    for seed in range(4):
        twin.twin_configure(seed=seed, processors=3)
        results.append(run(features, weight, bias, block.schedule))
    for first, other in itertools.pairwise(results):
        assert all(map(torch.equal, first, other))


@pytest.mark.parametrize(
    ("channels", "dtype", "settings"),
    [
        (18, torch.bfloat16, {}),
        (384, torch.bfloat16, {}),
        (36, torch.float16, {}),
        (36, torch.float32, {}),
        (36, torch.bfloat16, {"capability": 80}),
        (36, torch.bfloat16, {"capability": 120, "shared_bytes": 101376}),
        (144, torch.bfloat16, {"shared_bytes": 60000}),
    ],
)
def test_where_it_is_not_for(
    channels: int, dtype: torch.dtype, settings: dict[str, int], twin: Any
) -> None:
    twin.twin_configure(seed=1, processors=3, **settings)
    judge(Block("other", ONE, (20, 30), channels=channels, batch=1), dtype)
    assert not kernels(twin) & {SOURCES, TARGETS}


@pytest.mark.parametrize("value", [None, "0", ""])
def test_only_when_asked(value: str | None, twin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XATTN_CUDA_SM90A")
    if value is not None:
        monkeypatch.setenv("XATTN_CUDA_SM90A", value)
    judge(Block("plain", ONE, (20, 30), channels=36, batch=1), torch.bfloat16)
    assert not kernels(twin) & {SOURCES, TARGETS}
