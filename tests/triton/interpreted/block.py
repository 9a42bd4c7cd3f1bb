"""The cross-attention block in Triton's interpreter against float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import xattn_kernels as xk
from xattn_kernels.modules import CrossTaskAttention
from xattn_kernels.schedule import Schedule
from xattn_kernels.testing import compare, compositions
from xattn_kernels.testing.cases import LAYOUTS

DTYPES = (torch.float32, torch.float16)


@dataclass(frozen=True)
class Block:
    """Sizes of a block problem."""

    name: str
    schedule: Schedule
    tokens: tuple[int, ...]
    channels: int = 18
    batch: int = 2

    def tensors(self, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
        """Features of every slot, weight (W, 5, C, C) and bias (W, 5, C)."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        features = [draw(self.batch, self.channels, n).to(dtype) for n in self.tokens]
        sets, c = self.schedule.num_weights, self.channels
        weight = draw(sets, 5, c, c) * (2 / c) ** 0.5
        return features, weight.to(dtype), draw(sets, 5, c).to(dtype)


TASKS = Block("cross_task", Schedule.cross_task(3), (40, 40, 40))
#: Outputs 0 and 1 share query and weights, 0 and 2 a source with its weights.
SHARED = Schedule.from_edges(
    [(0, 1, 0, 0), (0, 2, 1, 0), (2, 1, 2, 0), (2, 0, 2, 0), (1, 0, 3, 1)],
    num_queries=3,
    num_weights=2,
)
BLOCKS = [
    TASKS,
    Block("cross_scale", Schedule.cross_scale(4), (80, 20, 5, 1)),
    Block("auxiliary", Schedule.cross_task(2, 1), (33, 40, 50), channels=12),
    Block("joint", Schedule.all_pairs(3, 1), (20, 30, 40), channels=9),
    Block("shared", SHARED, (20, 30, 40), channels=20),
    Block("chunks", Schedule.cross_task(2), (300, 600), channels=5, batch=1),
    Block("one_channel", Schedule.cross_task(2), (5, 7), channels=1),
    Block("empty_source", Schedule.cross_task(3), (20, 0, 10), channels=8),
    Block("empty_sources", Schedule.from_edges([(0, 1, 0, 0)], num_queries=2), (20, 0), channels=8),
    Block("empty_batch", Schedule.cross_task(2), (20, 10), channels=8, batch=0),
]


def run(features: list[Tensor], weight: Tensor, bias: Tensor, *args: Any, **kw: Any) -> Any:
    with torch.no_grad():
        return xk.cross_attention_block(features, weight, bias, *args, **kw)


def judge(block: Block, dtype: torch.dtype) -> None:
    features, weight, bias = block.tensors(dtype)
    inputs = [*features, weight, bias]
    kept = [x.clone() for x in inputs]
    outputs = run(features, weight, bias, block.schedule)

    def evaluate(x: Any, order: int) -> list[Tensor]:
        *slots, w, b = x
        shuffled = slots
        if order:  # tokens of sources, not of queries, may come in another order
            generator = torch.Generator().manual_seed(order)
            index = [torch.randperm(y.shape[2], generator=generator) for y in slots]
            shuffled = [y[:, :, i] for y, i in zip(slots, index, strict=True)]
        edges = [(e.query, e.source + len(slots), e.output, e.weight) for e in block.schedule.edges]
        schedule = Schedule.from_edges(edges, num_weights=block.schedule.num_weights)
        return compositions.cross_attention_block([*slots, *shuffled], w, b, schedule)

    with torch.no_grad():
        truths = compare.truths(evaluate, inputs, dtype)
    for i, (output, truth) in enumerate(zip(outputs, truths, strict=True)):
        assert output.dtype is dtype
        compare.check(f"output {i}", output, truth)
    assert all(map(torch.equal, inputs, kept)), "inputs changed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_cases(block: Block, dtype: torch.dtype) -> None:
    judge(block, dtype)


@pytest.mark.parametrize("channels", [6, 17, 33, 36, 48, 72, 144, 288, 384])
def test_widths(channels: int) -> None:
    sizes = (37, 20) if channels < 100 else (5, 9)
    block = Block("width", Schedule.cross_task(2), sizes, channels=channels, batch=1)
    judge(block, torch.float32)
    if channels in (36, 144):
        judge(block, torch.float16)


@pytest.mark.parametrize("channels", [144, 288])
def test_wide_kernels(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What bfloat16 has fused at these widths, in its tiles, with exact products."""
    from xattn_kernels.ops.cross_attention_block import triton as engine

    monkeypatch.setattr(engine, "is_fused", lambda *_: True)
    for name in ("source_tiles", "target_tiles"):
        tiles = getattr(engine, name)
        monkeypatch.setattr(
            engine, name, lambda width, _, arch, tiles=tiles: tiles(width, "bf16", arch)
        )
    edges = Schedule.from_edges([(0, 1, 0, 0)], num_queries=2)
    judge(Block("wide", edges, (5, 9), channels=channels, batch=1), torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_features(layout: str) -> None:
    features, weight, bias = TASKS.tensors(torch.float16)
    expected = run(features, weight, bias, TASKS.schedule)
    views = [LAYOUTS[layout](x) for x in features]
    outputs = run(views, weight, bias, TASKS.schedule)
    assert all(map(torch.equal, outputs, expected))
    for x, edge in zip(outputs, TASKS.schedule.edges, strict=True):
        assert (x.stride(1) == 1) == (views[edge.query].stride(1) == 1)


@pytest.mark.parametrize("layout", ["planes", "channels_last"])
def test_outputs_in_slices_of_a_buffer(layout: str) -> None:
    """Every output in its place among NaN, which stays where nothing is to be written."""
    features, weight, bias = TASKS.tensors(torch.float32)
    images = [x.unflatten(2, (5, 8)) for x in features]
    expected = run(images, weight, bias, TASKS.schedule)
    width = 18
    buffer = torch.full((2, 13 * width, 5, 8), float("nan"))
    if layout == "channels_last":
        buffer = buffer.to(memory_format=torch.channels_last)
    slices = [buffer[:, (2 * i + 1) * width : (2 * i + 2) * width] for i in range(6)]
    outputs = run(images, weight, bias, TASKS.schedule, out=slices)
    assert all(x is y for x, y in zip(outputs, slices, strict=True))
    assert all(map(torch.equal, outputs, expected))
    gaps = [buffer[:, 2 * i * width : (2 * i + 1) * width] for i in range(7)]
    assert all(bool(gap.isnan().all()) for gap in gaps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_weights(dtype: torch.dtype) -> None:
    features, weight, bias = TASKS.tensors(dtype)
    expected = run(features, weight, bias, TASKS.schedule)
    packed = xk.pack_block_weights(weight, bias)
    again = run(features, weight, bias, TASKS.schedule, packed=packed)
    assert all(map(torch.equal, again, expected))
    if dtype is torch.float16:  # weights of 16-bit features may stay in float32
        weight, bias = weight.float(), bias.float()
        packed = xk.pack_block_weights(weight, bias, dtype)
        again = run(features, weight, bias, TASKS.schedule, packed=packed)
        assert all(map(torch.equal, again, expected))
    for wrong in (xk.pack_block_weights(weight[:5], bias[:5]), torch.zeros(17)):
        with pytest.raises(ValueError, match="packed"):
            run(features, weight, bias, TASKS.schedule, packed=wrong)


def test_an_edge_more_changes_no_other() -> None:
    features, weight, bias = TASKS.tensors(torch.float32)
    expected = run(features, weight, bias, TASKS.schedule)
    edges = [edge for edge in TASKS.schedule.edges if edge.output != 5]
    schedule = Schedule.from_edges(edges, num_queries=3, num_weights=6)
    outputs = run(features, weight, bias, schedule)
    assert all(map(torch.equal, outputs, expected[:5]))


def test_not_a_number_in_one_source() -> None:
    features, weight, bias = TASKS.tensors(torch.float32)
    clean = run(features, weight, bias, TASKS.schedule)
    features[1][1, 3, 4] = float("nan")
    dirty = run(features, weight, bias, TASKS.schedule)
    for x, y, edge in zip(dirty, clean, TASKS.schedule.edges, strict=True):
        assert torch.equal(x[0], y[0])
        if edge.source == 1:
            assert x[1].isnan().all()
        elif edge.query == 1:
            assert x[1, :, 4].isnan().all()
            assert torch.equal(x[1, :, 5:], y[1, :, 5:])
        else:
            assert torch.equal(x, y)


def test_module() -> None:
    """CTAM with this engine below it, in inference."""
    torch.manual_seed(0)
    module = CrossTaskAttention(["a", "b", "c"], 12).eval()
    features = {task: torch.randn(2, 12, 4, 7) for task in "abc"}
    with torch.no_grad():
        outputs = module(features)
        with xk.backend("reference"):
            expected = module(features)
    for task in "abc":
        torch.testing.assert_close(outputs[task], expected[task], rtol=1e-5, atol=1e-5)


def test_large_values() -> None:
    block = replace(TASKS, channels=12)
    features, weight, bias = block.tensors(torch.float16)
    features = [x * 100 for x in features]
    outputs = run(features, weight, bias, block.schedule)
    assert all(x.isfinite().all() for x in outputs)
    with xk.backend("reference"):
        expected = run(features, weight, bias, block.schedule)
    for x, y in zip(outputs, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=4e-3, atol=1e-3 * y.abs().max().item())
