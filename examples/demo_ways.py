"""The attention of SCA-MTL in three ways, and what each of them costs.

What counts, in every way: the attention passes with their projections, cross-task attention's fuse
blocks and cross-scale attention's adapters. What does not: backbone, the projections of features
to tasks, and the heads, which are the same for all.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from demo_inputs import SEED, TASKS, Pyramid
from torch import Tensor, nn

from xattn_kernels import cost, freeze_, modules
from xattn_kernels.schedule import Schedule
from xattn_kernels.testing import op_by_op
from xattn_kernels.testing.measure import peak_memory, resident_bytes

Features = dict[str, Pyramid]

WARMUP_SIZE = (8, 8)
"""(H, W) of the finest map of the call that comes before a measured one."""


class Sequential(nn.Module):
    """Cross-task attention at every scale, then cross-scale attention of every task."""

    def __init__(self, cross_task: Sequence[nn.Module], cross_scale: Sequence[nn.Module]) -> None:
        super().__init__()
        self.cross_task = nn.ModuleList(cross_task)
        self.cross_scale = nn.ModuleList(cross_scale)

    @torch.no_grad()
    def forward(self, features: Features) -> list[Tensor]:
        """All maps that leave a pass: T per scale, then S(S-1)/2 per task."""
        pyramids: Features = {task: [] for task in features}
        for scale, attend in enumerate(self.cross_task):
            attended = attend({task: pyramid[scale] for task, pyramid in features.items()})
            for task, x in attended.items():
                pyramids[task].append(x)
        outputs = [x for pyramid in pyramids.values() for x in pyramid]
        for attend, pyramid in zip(self.cross_scale, pyramids.values(), strict=True):
            outputs += self._maps(attend, pyramid)
        return outputs

    def _maps(self, attend: nn.Module, pyramid: Pyramid) -> list[Tensor]:
        return [x for row in attend(pyramid) for x in row]


class OpByOp(Sequential):
    """Every convolution, normalisation, activation and product a call of its own."""

    def __init__(self, widths: Sequence[int]) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            super().__init__(
                [op_by_op.CrossTaskAttention(TASKS, width) for width in widths],
                [op_by_op.CrossScaleHead(widths, num_outputs=1) for _ in TASKS],
            )
            _as_if_trained(self)
        self.eval()

    def _maps(self, attend: Any, pyramid: Pyramid) -> list[Tensor]:
        return [x for row in attend.attend(pyramid) for x in row]


class Fused(Sequential):
    """The same with this library's modules, frozen, in the same state."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__(
            [modules.CrossTaskAttention(TASKS, width) for width in widths],
            [modules.CrossScaleAttention(widths) for _ in TASKS],
        )
        source = OpByOp(widths)
        self.cross_task.load_state_dict(source.cross_task.state_dict())
        for ours, theirs in zip(self.cross_scale, source.cross_scale, strict=True):
            state = theirs.state_dict()
            head = [name for name in state if name.startswith("last_layer.")]
            ours.load_state_dict({name: x for name, x in state.items() if name not in head})
        freeze_(self.eval())


class NaiveAllPairs(nn.Module):
    """Every (task, scale) cell attends to every other one by softmax, with its scores stored.

    A cell's projections serve all of its sources; a source of another scale is first brought to the
    cell's width. No fuse block.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            self.blocks = nn.ModuleList(
                op_by_op.CrossAttention(width, kind="softmax") for _ in TASKS for width in widths
            )
            self.adapters = nn.ModuleDict(
                {
                    f"{source}to{target}": op_by_op.Projection(widths[source], widths[target])
                    for source in range(len(widths))
                    for target in range(len(widths))
                    if source != target
                }
            )
            _as_if_trained(self)
        self.eval()

    @torch.no_grad()
    def forward(self, features: Features) -> list[Tensor]:
        """One map per pair, TS(TS-1) of them."""
        scales = len(next(iter(features.values())))
        cells = [x for pyramid in features.values() for x in pyramid]
        outputs = []
        for edge in Schedule.all_pairs(len(features), scales, joint=False).edges:
            source, target_scale = cells[edge.source], edge.query % scales
            if edge.source % scales != target_scale:
                source = self.adapters[f"{edge.source % scales}to{target_scale}"](source)
            outputs.append(self.blocks[edge.query](cells[edge.query], source))
        return outputs


WAYS: dict[str, type[nn.Module]] = {
    "op by op": OpByOp,
    "fused": Fused,
    "naive all-pairs": NaiveAllPairs,
}


def _as_if_trained(module: nn.Module) -> None:
    """Give batch norms statistics and factors other than those that do nothing."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, std=0.1)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.1)


# Formulas


def sizes_of(features: Features) -> list[cost.MapSize]:
    """Tokens and width of each scale."""
    pyramid = next(iter(features.values()))
    return [cost.MapSize(x.shape[2] * x.shape[3], x.shape[1]) for x in pyramid]


@dataclass(frozen=True)
class Formula:
    """What the cost model says of one way."""

    pairs: int
    flops: int
    peak_bytes: int
    """Maps kept to the end and, while one pair is worked on, its scores and their softmax."""


def formula(way: str, sizes: Sequence[cost.MapSize]) -> Formula:
    """Pairs and FLOP of a pass in fp32; bytes at its peak for the naive way, else 0."""
    tasks, scales = len(TASKS), len(sizes)
    if way == "naive all-pairs":
        all_pairs = cost.all_pairs_cost(tasks, sizes, dtype_bytes=4)
        kept = cost.attention_cost(
            Schedule.all_pairs(tasks, scales, joint=False), list(sizes) * tasks, dtype_bytes=4
        ).output_bytes
        scores = 4 * sizes[0].tokens ** 2
        return Formula(all_pairs.pairs, all_pairs.softmax_flops, kept + 2 * scores)
    fused = way == "fused"
    cross_task = cost.cross_task_cost(tasks, sizes)
    cross_scale = (
        tasks
        * cost.attention_cost(Schedule.cross_scale(scales), sizes, share_queries=fused).linear_flops
    )
    fuse = cost.fuse_block_flops(tasks, sizes, folded=fused)
    pairs = cost.sequential_cost(tasks, sizes).pairs
    return Formula(pairs, cross_task.linear_flops + cross_scale + fuse, 0)


# Measured in processes of their own


@dataclass(frozen=True)
class Call:
    """A model's first call at a resolution."""

    seconds: float
    rise_bytes: int
    """Resident bytes at the peak beyond those before the call: outputs and intermediates."""
    folded_bytes: int
    """Resident bytes that the model keeps beside its parameters: folded weights."""
    method: str
    """How the peak was measured."""


def measured_call(way: str, features_file: Path, first_scale: int) -> Call:
    """Build a way's model and call it once on stored features, from scale `first_scale` on.

    Meant for a process that does nothing else. What has run before, so that code is loaded, threads
    are started and weights are folded, is a call on hardly any tokens.
    """
    features: Features = torch.load(features_file, weights_only=True)
    features = {task: pyramid[first_scale:] for task, pyramid in features.items()}
    widths = [size.width for size in sizes_of(features)]
    tiny = _tiny(widths)
    WAYS[way](widths)(tiny)
    model = WAYS[way](widths)
    before = resident_bytes()
    model(tiny)
    folded = resident_bytes() - before
    seconds: list[float] = []

    def call() -> Any:
        start = time.perf_counter()
        result = model(features)
        seconds.append(time.perf_counter() - start)
        return result

    memory = peak_memory(call)
    return Call(seconds[0], memory.rise, folded, memory.method)


def _tiny(widths: Sequence[int]) -> Features:
    height, width = WARMUP_SIZE
    return {
        task: [
            torch.zeros(1, channels, height >> s, width >> s) for s, channels in enumerate(widths)
        ]
        for task in TASKS
    }
