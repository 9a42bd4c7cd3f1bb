"""Tile sizes of the kernels of the cross-attention block in training, by width and precision."""

from __future__ import annotations

from typing import NamedTuple

from xattn_kernels.triton.runtime import MAX_WIDTH, pieces


class Tiles(NamedTuple):
    """A group of rows of a sum, channels and tokens a step, warps."""

    rows: tuple[int, int]
    step: int
    tokens: int
    warps: int


#: Widest block that has a tile in registers, by phase and how products are computed.
_WIDEST = {"ieee": 80, "tf32": 80, "bf16": MAX_WIDTH}


def is_fused(channels: int, dot: str) -> bool:
    """Whether kernels compute a phase from features alone."""
    return channels <= _WIDEST[dot]


def sums_tiles(channels: int, dot: str) -> Tiles:
    """For kernels that sum (C, C) products over a chunk of tokens: all rows where they fit."""
    whole = pieces(channels)
    small = sum(whole) <= 80
    rows = whole if small else (64, 0) if sum(whole) <= 160 else (32, 0)
    return Tiles(rows, 16, 32, 4 if sum(whole) <= 48 and dot == "bf16" else 8)


def token_tiles(channels: int, dot: str) -> Tiles:
    """For kernels that keep nothing over tokens, or C numbers."""
    small = sum(pieces(channels)) <= 80
    return Tiles((16, 0), 16, 32 if dot == "ieee" or not small else 64, 8)
