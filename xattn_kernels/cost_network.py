"""Cost model of the whole SCA-MTL network: floating-point operations of its parts, from formulas.

Counted is what `torch.utils.flop_counter.FlopCounterMode` counts (see `xattn_kernels.flops`): 2 for
every multiply-add of a convolution or matrix product, the attentions' divisors among them, and
nothing else. Kim, Choi, Min, "Sequential Cross Attention Based Multi-task Learning"
(arXiv 2209.02518).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from xattn_kernels.cost import (
    STRIDES,
    MapSize,
    aggregation_head_flops,
    attention_cost,
    fuse_block_flops,
    pyramid,
)
from xattn_kernels.schedule import Schedule

BASE_WIDTHS = (18, 36, 72, 144)
"""Widths b_s of HRNet-W18-small-v2; features have C_s = 2 b_s."""
WINDOW = 7
REDUCTION = 16

_HRNET = 1_016_683
"""FLOP of HRNet-W18-small-v2 for 16 pixels, counted."""


@dataclass(frozen=True)
class NetworkFlops:
    """Floating-point operations of a network's parts."""

    backbone: int
    window_attention: int
    """ATT of all scales."""
    initial_prediction: int
    cross_task: int
    """Cross-attentions of CTAM with their projections."""
    fuse: int
    """CTAM's fuse blocks."""
    propagation: int
    """FPMA of all scales."""
    cross_scale: int
    """CSAM: cross-attentions with their projections and adapters."""
    aggregation: int
    """The heads' convolutions after CSAM."""

    @property
    def total(self) -> int:
        """Of all parts."""
        return sum(getattr(self, part.name) for part in fields(self))


def hrnet_flops(image_size: tuple[int, int], *, batch: int = 1) -> int:
    """FLOP of the features of HRNet-W18-small-v2, for sides that are multiples of 32."""
    height, width = image_size
    return batch * height * width // 16 * _HRNET


def network_flops(
    num_outputs: Sequence[int],
    image_size: tuple[int, int],
    base_widths: Sequence[int] = BASE_WIDTHS,
    *,
    auxiliary_outputs: Sequence[int] = (),
    backbone: int | None = None,
    rewritten: bool = False,
    batch: int = 1,
) -> NetworkFlops:
    """FLOP of one forward pass in inference, with linear attention.

    Args:
        num_outputs: channels of every task's output.
        image_size: (H, W) in pixels, multiples of 32.
        base_widths: widths b_s of the backbone's four scales, finest first.
        auxiliary_outputs: channels of the tasks that are predicted initially and attended to, and
            are no outputs.
        backbone: FLOP of the backbone. Default: those of HRNet-W18-small-v2.
        rewritten: count `xattn_models.SCAMTL` instead of the published composition. Its exact
            rewrites: a fuse block reads its target once; the aggregation is applied at each scale's
            own resolution, repeats of a map folded; a scale's query is projected once for all of
            its sources; the last projection of windows leaves out their padding.
        batch: number of images.

    Raises:
        ValueError: if H or W is not a multiple of 32, the widths are not four, or there are fewer
            than two tasks.
    """
    if len(base_widths) != len(STRIDES):
        raise ValueError(f"base_widths: got {len(base_widths)}, expected {len(STRIDES)}")
    sizes = pyramid(image_size, widths=[2 * width for width in base_widths])
    shapes = [(image_size[0] // stride, image_size[1] // stride) for stride in STRIDES]
    tasks, every = len(num_outputs), [*num_outputs, *auxiliary_outputs]
    attend = [
        window_attention_flops(shape, width, padded=not rewritten)
        for shape, width in zip(shapes, base_widths, strict=True)
    ]
    propagate = [
        propagation_flops(shape, size.width, len(every), padded=not rewritten)
        for shape, size in zip(shapes[1:], sizes[1:], strict=True)
    ]
    cross_task = Schedule.cross_task(tasks, len(auxiliary_outputs))
    cross_scale = Schedule.cross_scale(len(sizes))
    aggregate = [
        aggregation_head_flops(1, sizes, per_scale=rewritten, folded=rewritten, num_outputs=count)
        for count in num_outputs
    ]
    return NetworkFlops(
        backbone=batch * hrnet_flops(image_size) if backbone is None else backbone,
        window_attention=batch * sum(attend),
        initial_prediction=batch
        * sum(
            initial_prediction_flops(size, coarser, every)
            for size, coarser in zip(sizes, [*(s.width for s in sizes[1:]), 0], strict=True)
        ),
        cross_task=batch
        * sum(_attention(cross_task, [size] * cross_task.num_sources, rewritten) for size in sizes),
        fuse=fuse_block_flops(
            tasks, sizes, num_auxiliary=len(auxiliary_outputs), folded=rewritten, batch=batch
        ),
        propagation=batch * sum(propagate),
        cross_scale=batch * tasks * _attention(cross_scale, sizes, rewritten),
        aggregation=batch * sum(aggregate),
    )


def window_attention_flops(
    shape: tuple[int, int], width: int, *, depth: int = 2, padded: bool = True
) -> int:
    """FLOP of window attention (ATT) of one map: a 1x1 convolution, then `depth` blocks.

    `padded`: the last projection, too, sees what fills the map up to whole windows.
    """
    tokens = shape[0] * shape[1]
    filled = (shape[0] + -shape[0] % WINDOW) * (shape[1] + -shape[1] % WINDOW)
    projections = 2 * width**2 * (3 * filled + (filled if padded else tokens))
    return 2 * tokens * width**2 + depth * (projections + 4 * filled * WINDOW**2 * width)


def initial_prediction_flops(size: MapSize, coarser: int, num_outputs: Sequence[int]) -> int:
    """FLOP of the initial prediction of one scale: two basic blocks and a classifier per task.

    `coarser`: width of what comes from the coarser scale; 0 at the coarsest, which has no shortcut
    to project.
    """
    tokens, width = size
    blocks = 9 * (width + coarser) * width + 3 * 9 * width**2
    shortcut = (width + coarser) * width if coarser else 0
    return sum(2 * tokens * (blocks + shortcut + width * count) for count in num_outputs)


def propagation_flops(
    shape: tuple[int, int], width: int, num_tasks: int, *, padded: bool = True
) -> int:
    """FLOP of propagation (FPMA) from one scale: window attention, a basic block, excitations."""
    tokens, joint = shape[0] * shape[1], num_tasks * width
    block = 2 * tokens * (9 * joint * width + 9 * width**2 + joint * width)
    excitations = num_tasks * 4 * width * max(width // REDUCTION, 1)
    return window_attention_flops(shape, joint, depth=1, padded=padded) + block + excitations


def _attention(schedule: Schedule, sizes: Sequence[MapSize], share: bool) -> int:
    """Cross-attentions, and the products of queries and summed keys that divide them."""
    divisors = sum(2 * sizes[q].width * sizes[q].tokens for q in schedule.output_queries)
    return attention_cost(schedule, sizes, share_queries=share).linear_flops + divisors
