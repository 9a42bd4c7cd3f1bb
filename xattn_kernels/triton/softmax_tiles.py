"""Tile sizes of the kernels of softmax cross-attention, by widths of a head and precision."""

from __future__ import annotations

from typing import NamedTuple

from xattn_kernels.triton.runtime import pieces


class Tiles(NamedTuple):
    """Channels of a head a step, queries and keys of a tile, warps; whether steps are unrolled."""

    step: int
    queries: int
    keys: int
    warps: int
    unroll: bool
    together: bool = True
    """Whether one launch computes the gradients of keys and of values."""


def forward_tiles(width: int, value_width: int, dot: str) -> Tiles:
    """For the forward kernel, which holds outputs of all channels of a head."""
    wide = max(sum(pieces(w)) for w in (width, value_width))
    if dot == "ieee":
        return Tiles(16, 32 if wide <= 80 else 16, 32, 8, False)
    return Tiles(16, 64, 64 if wide <= 80 else 32, 4 if wide <= 80 else 8, wide <= 160)


def gradient_tiles(width: int, value_width: int, dot: str) -> Tiles:
    """For both gradient kernels, of which one holds dk and dv of all channels of a head."""
    wide = max(sum(pieces(w)) for w in (width, value_width))
    if dot == "ieee":
        return Tiles(16, 16, 16, 8, False)
    return Tiles(16, 64, 64 if wide <= 160 else 32, 8, wide <= 80, wide <= 160)


def source_tiles(tiles: Tiles) -> Tiles:
    """Those of the kernel for keys and values: rows of 64 are multiplied best, here the keys."""
    return tiles._replace(queries=tiles.keys, keys=tiles.queries)
