"""Tile sizes of the kernels of the cross-attention block, by width and precision.

For widths that the shipped table does not have; see :mod:`xattn_kernels.engines.triton.tuning`.
"""

from __future__ import annotations

from typing import NamedTuple

from xattn_kernels.engines.triton.runtime import pieces


class SourceTiles(NamedTuple):
    """Groups of rows (values) and columns (keys) of a state, hidden channels and tokens a step."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    hidden: int
    tokens: int
    warps: int


class TargetTiles(NamedTuple):
    """Rows of an output and hidden channels a step, tokens."""

    rows: int
    hidden: int
    tokens: int
    warps: int


def source_tiles(channels: int, dot: str, architecture: int = 90) -> SourceTiles:
    """For the source kernel: whole states up to 80 channels, then groups of them."""
    whole = pieces(channels)
    if sum(whole) <= 48:
        return SourceTiles(whole, whole, 16, 32, 4 if dot == "bf16" else 8)
    if dot == "ieee":
        return SourceTiles((32, 16), (32, 16), 16, 32, 8)
    if sum(whole) <= 80:
        if dot == "bf16" and architecture == 90:
            return SourceTiles(whole, whole, 16, 32, 4)
        return SourceTiles(whole, whole, 16, 16, 8)
    if sum(whole) > 160 and architecture == 90:  # keys are computed anew for every group of rows
        return SourceTiles((128, 0), (128, 16), 16, 32, 8)
    few = dot == "tf32" and architecture == 80
    return SourceTiles((64, 0), (128, 16), 16, 16 if few else 32, 8)


def target_tiles(channels: int, dot: str, architecture: int = 90) -> TargetTiles:
    """For the target kernel, which has q of all channels in one program."""
    small = sum(pieces(channels)) <= 80
    rows = 16 if channels % 32 in range(1, 17) or dot == "ieee" else 32
    if dot == "ieee":
        return TargetTiles(rows, 16, 16 if channels > 48 else 32, 8)
    return TargetTiles(rows, 16, 64 if small else 32, 8)
