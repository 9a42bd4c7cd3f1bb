"""Problems as data, for tests and benchmarks, and the tensors they stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xattn_kernels.schedule import Schedule

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """Sizes of an attention problem: who attends to whom, widths, tokens of every slot.

    Attributes:
        name: for test ids.
        schedule: the edges.
        query_tokens: N of every query slot.
        source_tokens: N of every source slot.
        channels: C.
        value_channels: Cv; 0 stands for C.
        batch: B.
        heads: for the softmax operator.
        mean: mean of the pre-activations, whose standard deviation is 1.
    """

    name: str
    schedule: Schedule
    query_tokens: tuple[int, ...]
    source_tokens: tuple[int, ...]
    channels: int = 8
    value_channels: int = 0
    batch: int = 2
    heads: int = 1
    mean: float = 0.0

    def tensors(
        self, dtype: torch.dtype, seed: int = 0, device: str = "cpu"
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Random query, key and value slots, (B, C, N) contiguous, the same for every device."""
        generator = torch.Generator().manual_seed(seed)

        def slots(tokens: tuple[int, ...], channels: int, mean: float) -> list[Tensor]:
            shapes = [(self.batch, channels, n) for n in tokens]
            # Drawn in double and rounded once, so that every dtype sees the same problem.
            drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
            return [(x + mean).to(device=device, dtype=dtype) for x in drawn]

        return (
            slots(self.query_tokens, self.channels, self.mean),
            slots(self.source_tokens, self.channels, self.mean),
            slots(self.source_tokens, self.value_channels or self.channels, 0.0),
        )


def single(name: str, queries: int, sources: int, **sizes: Any) -> Case:
    """One query slot attending to one source slot."""
    return Case(name, Schedule.identity(1), (queries,), (sources,), **sizes)


_TASKS = Schedule.cross_task(3)
_JOINT = Schedule.all_pairs(3, 1)
#: Output 0 reads sources 2, 0, 1 jointly; outputs 1 and 2 share query 1, output 2 has one source.
_MIXED = Schedule.from_edges(
    [(0, 2, 0, 0), (1, 0, 1, 0), (0, 0, 0, 0), (1, 2, 1, 0), (0, 1, 0, 0), (1, 1, 2, 0)],
    num_queries=3,
    allow_self=True,
)

#: What every engine must get right, in every dtype; small, so that all of them run in seconds.
CASES = (
    single("one_token", 1, 1),
    single("one_channel", 5, 7, channels=1),
    single("partial_tiles", 65, 127),
    single("many_queries", 300, 3),
    single("many_sources", 3, 300),
    single("wide_values", 33, 20, channels=6, value_channels=17),
    single("narrow_values", 20, 33, channels=18, value_channels=5),
    Case("cross_task", _TASKS, (70, 70, 70), (70, 70, 70), channels=36),
    Case("cross_task_ragged", _TASKS, (64, 10, 1), (64, 10, 1), channels=12, value_channels=4),
    Case("cross_scale", Schedule.cross_scale(3), (96, 24, 6), (96, 24, 6), channels=18),
    Case("joint", _JOINT, (40, 30, 20), (40, 30, 20), channels=9),
    Case("mixed", _MIXED, (40, 30, 20), (25, 35, 15), channels=7, value_channels=10),
    Case("empty_source", _MIXED, (40, 30, 20), (25, 0, 15), channels=7),
    Case("empty_query", _MIXED, (0, 30, 20), (25, 35, 15), channels=7),
    single("empty_batch", 5, 6, batch=0),
)

#: Cross-task attention of four tasks at the scales of an image of 480x640, finest first, for
#: benchmarks.
SCALES = tuple(
    Case(f"scale{s}", Schedule.cross_task(4), (n,) * 4, (n,) * 4, channels=c, batch=1)
    for s, (n, c) in enumerate(((19200, 36), (4800, 72), (1200, 144), (300, 288)))
)

#: Cross-scale attention of one of these tasks, adapted to the width of the finest scale.
CROSS_SCALE = Case(
    "cross_scale0",
    Schedule.from_edges([(0, s, s - 1, 0) for s in (1, 2, 3)], num_queries=1),
    (19200,),
    (19200, 4800, 1200, 300),
    channels=36,
    batch=1,
)

#: Widths with no common factor of any vector length, and those of the published networks.
WIDTHS = (1, 6, 17, 18, 33, 36, 48, 72, 144, 288, 384)

#: Means of pre-activations that show a softplus that is not PyTorch's.
MEANS = (0.0, -5.0, -10.0, -14.0, -30.0, 25.0)


def _token_major(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _batch_last(x: Tensor) -> Tensor:
    return x.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def _stepped(x: Tensor) -> Tensor:
    wide = x.new_full((x.shape[0], 2 * x.shape[1], 3 * x.shape[2]), float("nan"))
    wide[:, ::2, 1::3] = x
    return wide[:, ::2, 1::3]


def _sliced(x: Tensor) -> Tensor:
    """A channel slice of a fused projection, at an address that is not aligned."""
    batch, channels, tokens = x.shape
    fused = x.new_full((batch, 3 * channels + 1, tokens), float("nan"))
    fused[:, channels + 1 : 2 * channels + 1] = x
    return fused[:, channels + 1 : 2 * channels + 1]


def _token_major_sliced(x: Tensor) -> Tensor:
    batch, channels, tokens = x.shape
    fused = x.new_full((batch, tokens, 3 * channels + 1), float("nan"))
    fused[:, :, channels + 1 : 2 * channels + 1] = x.transpose(1, 2)
    return fused[:, :, channels + 1 : 2 * channels + 1].transpose(1, 2)


def _padded(x: Tensor) -> Tensor:
    """Rows with NaN behind their last token, and an odd offset."""
    batch, channels, tokens = x.shape
    flat = x.new_full((batch * channels * (tokens + 3) + 1,), float("nan"))
    rows = flat[1:].view(batch, channels, tokens + 3)
    rows[:, :, :tokens] = x
    return rows[:, :, :tokens]


#: Views of other strides with the same values; what lies between the elements is NaN.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "token_major": _token_major,
    "batch_last": _batch_last,
    "stepped": _stepped,
    "sliced": _sliced,
    "token_major_sliced": _token_major_sliced,
    "padded": _padded,
}
