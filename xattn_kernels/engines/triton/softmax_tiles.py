"""Tile sizes of the kernels of softmax cross-attention, by widths of a head and precision.

For widths that the shipped table does not have; see :mod:`xattn_kernels.engines.triton.tuning`.
"""

from __future__ import annotations

from typing import NamedTuple

from xattn_kernels.engines.triton.runtime import pieces


class Tiles(NamedTuple):
    """Channels of a head a step, queries and keys of a tile, warps; whether steps are unrolled."""

    step: int
    queries: int
    keys: int
    warps: int
    unroll: bool


class SourceTiles(NamedTuple):
    """As :class:`Tiles`, and whether one launch computes the gradients of keys and of values."""

    step: int
    queries: int
    keys: int
    warps: int
    unroll: bool
    together: bool


def forward_tiles(width: int, value_width: int, dot: str, architecture: int = 90) -> Tiles:
    """For the forward kernel, which holds outputs of all channels of a head."""
    wide = _wider(width, value_width)
    if dot == "ieee":
        return Tiles(16, 32 if wide <= 80 else 16, 32, 8, False)
    if wide > 160 and architecture == 80:
        return Tiles(16, 64, 16, 8, False) if dot == "bf16" else Tiles(16, 16, 32, 4, False)
    return Tiles(16, 64, 64 if wide <= 80 else 32, 4 if wide <= 80 else 8, wide <= 160)


def query_gradient_tiles(width: int, value_width: int, dot: str, architecture: int = 90) -> Tiles:
    """For the kernel of dq, which holds all channels of a head."""
    wide = _wider(width, value_width)
    if dot == "ieee":
        few_warps = 80 < wide <= 160 or (wide <= 48 and architecture == 80)
        return Tiles(16, 16, 16, 4 if few_warps else 8, False)
    if wide > 160 and architecture == 80:
        return Tiles(16, 64, 16, 8, False) if dot == "bf16" else Tiles(16, 16, 32, 4, False)
    few = wide > 48 and dot == "tf32" and architecture == 80
    return Tiles(16, 64, 32 if wide > 160 or few else 64, 8, wide <= 80)


def source_gradient_tiles(
    width: int, value_width: int, dot: str, architecture: int = 90
) -> SourceTiles:
    """For the kernel of dk and dv; rows of 64 are multiplied best, here the keys."""
    wide = _wider(width, value_width)
    if dot == "ieee":
        few_warps = wide <= 48 and architecture == 80
        together = wide <= 160 or architecture == 90
        return SourceTiles(16, 16, 16, 4 if few_warps else 8, False, together)
    tiles = query_gradient_tiles(width, value_width, dot, architecture)
    together = wide <= (80 if architecture == 80 else 160)
    return SourceTiles(tiles.step, tiles.keys, tiles.queries, *tiles[3:], together)


def _wider(width: int, value_width: int) -> int:
    return max(sum(pieces(w)) for w in (width, value_width))
