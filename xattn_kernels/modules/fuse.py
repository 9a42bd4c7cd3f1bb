"""The fuse block of cross-task attention: one residual block for all targets.

It reads u_t = [x_t, c_1, x_t, c_2, ...] for target t. The repeats of x_t are never formed, see
`sum_repeats`, and the convolutions run on several targets at once, as samples of one batch, as far
as the result is a tensor of moderate size; batch norms see each target by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn_kernels.modules.layers import BasicBlock, is_stock, sum_repeats
from xattn_kernels.modules.normalisation import BatchNorm, uses_batch
from xattn_kernels.modules.row_sharding import rows_of
from xattn_kernels.ops.tracing import is_observed, is_recorded

GROUP_BYTES = 32 * 2**20
"""Size of the largest input made of several targets: the allocator reuses blocks up to it, and maps
larger ones anew, page by page, each time."""


def fuse(block: BasicBlock, rows: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The block's output for every target, (B, C, H, W) in channels_last, differentiably.

    Args:
        block: the residual block; its running statistics are updated once per target, in order.
            Its batches and the maps may span processes.
        rows: for every target t, [x_t, c_1, c_2, ...], all (B, C, H, W).
    """
    channels = rows[0][0].shape[1]
    stock = is_stock(block)
    if rows_of(block) is not None or (not stock and is_stock(block, synchronised=True)):
        # By target: how many fit into one tensor may differ between processes.
        inputs = [_join([row]) for row in rows]
        return block.over_processes(inputs, lambda weight: sum_repeats(weight, channels))
    if not stock:
        return [block(torch.cat([part for c in row for part in (x, c)], 1)) for x, *row in rows]
    shortcut, norm = block.projected_shortcut()
    weight = sum_repeats(block.conv1.weight, channels)
    shortcut_weight = sum_repeats(shortcut.weight, channels)
    fused: list[Tensor] = []
    for group in _groups(rows):
        count = len(group)
        u = _join(group)
        hidden = F.conv2d(u, weight, block.conv1.bias, padding=1)
        hidden = F.relu(_normalise(block.bn1, hidden, count), inplace=True)
        residual = _normalise(block.bn2, block.conv2(hidden), count)
        residual += _normalise(norm, F.conv2d(u, shortcut_weight, shortcut.bias), count)
        fused += _apart(F.relu(residual, inplace=True), count)
    return fused


class FusionInputs:
    """Inputs of the fuse block in inference, for others to write the attended maps into.

    Args:
        features: x_t of every target.
        others: attended maps per target.
    """

    def __init__(self, features: Sequence[Tensor], others: int) -> None:
        rows = [[x] * (1 + others) for x in features]
        self._buffers = []
        self.places: list[Tensor] = []
        """One (B, C, H, W) per attended map, target by target, to be written to."""
        for group in _groups(rows):
            buffer = _allocate(group)
            self._buffers.append((buffer, len(group)))
            for part, row in zip(buffer.chunk(len(group)), group, strict=True):
                own, *places = part.split(row[0].shape[1], dim=1)
                own.copy_(row[0])
                self.places += places

    def fuse(self, block: BasicBlock) -> list[Tensor]:
        """The block's output for every target. Needs `is_stock` and inference."""
        channels = self.places[0].shape[1]
        folded = block.folded(
            "fuse", self.places[0].dtype, lambda weight: sum_repeats(weight, channels)
        )
        return [y for buffer, count in self._buffers for y in folded(buffer).chunk(count)]


def _normalise(bn: BatchNorm, x: Tensor, count: int) -> Tensor:
    """`bn` of each of `count` targets, which are the samples of `x` in order."""
    if count == 1 or not uses_batch(bn):
        normalised: Tensor = bn(x)
        return normalised
    return torch.cat([bn(part) for part in _apart(x, count)])


def _apart(x: Tensor, count: int) -> list[Tensor]:
    """Each of `count` targets, which are the samples of `x` in order."""
    return [x] if count == 1 else list(x.chunk(count))


def _groups(rows: Sequence[Sequence[Tensor]]) -> list[list[Sequence[Tensor]]]:
    """Consecutive targets of one size whose inputs are to be one tensor."""
    groups: list[list[Sequence[Tensor]]] = []
    for row in rows:
        x = row[0]
        if is_recorded():  # a program for any size knows no bytes
            groups.append([row])
            continue
        size = len(row) * x.numel() * x.element_size()
        if groups:
            last = groups[-1]
            if x.shape == last[0][0].shape and size * (len(last) + 1) <= GROUP_BYTES:
                last.append(row)
                continue
        groups.append([row])
    return groups


def _join(group: Sequence[Sequence[Tensor]]) -> Tensor:
    """Targets as samples, parts as channels: (targets B, parts C, H, W) in channels_last."""
    if is_observed():
        rows = [torch.cat(list(row), dim=1) for row in group]
        return rows[0] if len(rows) == 1 else torch.cat(rows)
    parts = [part for row in group for part in row]
    if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
        joined: Tensor = _Join.apply(len(group), *parts)  # type: ignore[no-untyped-call]
        return joined
    return _Join.forward(len(group), *parts)


def _allocate(group: Sequence[Sequence[Tensor]]) -> Tensor:
    x = group[0][0]
    batch, channels, height, width = x.shape
    shape = (len(group) * batch, height, width, len(group[0]) * channels)
    return x.new_empty(shape).permute(0, 3, 1, 2)


class _Join(torch.autograd.Function):
    """Two concatenations and a change of the memory format in one pass."""

    @staticmethod
    def forward(targets: int, *parts: Tensor) -> Tensor:
        step = len(parts) // targets
        rows = [parts[start : start + step] for start in range(0, len(parts), step)]
        joined = _allocate(rows)
        for slot, row in zip(joined.chunk(targets), rows, strict=True):
            for target, part in zip(slot.chunk(step, dim=1), row, strict=True):
                target.copy_(part)
        return joined

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        targets, *parts = inputs
        ctx.targets, ctx.step = targets, len(parts) // targets

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        slots = gradients[0].chunk(ctx.targets)
        return None, *(part for slot in slots for part in slot.chunk(ctx.step, dim=1))
