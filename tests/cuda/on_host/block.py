"""The cross-attention block on the host against float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import xattn_kernels as xk
from xattn_kernels.modules import CrossTaskAttention
from xattn_kernels.schedule import Schedule
from xattn_kernels.testing import compare, compositions
from xattn_kernels.testing.cases import LAYOUTS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: What every bfloat16 kernel is for, and widths between these; the wide ones are streams of weights.
WIDTHS = (1, 6, 17, 18, 24, 25, 36, 40, 41, 48, 50, 72, 75, 96, 100, 144, 150, 192, 288, 300, 384)


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


ONE = Schedule.from_edges([(0, 1, 0, 0)], num_queries=2)
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
    Block("empty_sources", ONE, (20, 0), channels=8),
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


@pytest.mark.parametrize("channels", WIDTHS)
def test_widths(channels: int) -> None:
    judge(Block("width", ONE, (37, 45), channels=channels, batch=1), torch.bfloat16)
