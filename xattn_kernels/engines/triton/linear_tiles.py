"""Tile sizes of the kernels of linear cross-attention, by widths and precision.

For widths that the shipped table does not have; see :mod:`xattn_kernels.engines.triton.tuning`.
"""

from __future__ import annotations

from typing import NamedTuple

from xattn_kernels.engines.triton.runtime import ceil_div, pieces


class StateTiles(NamedTuple):
    """A group of rows (values) and columns (keys) of a state, tokens a step, warps."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    tokens: int
    warps: int


class TokenTiles(NamedTuple):
    """A group of rows (channels of the result), channels a step, tokens, warps."""

    rows: tuple[int, int]
    step: int
    tokens: int
    warps: int


def state_tiles(channels: int, value_channels: int, dot: str, architecture: int = 90) -> StateTiles:
    """For the state kernel: the whole state where it fits in registers, else equal groups."""
    if dot == "ieee":
        columns, rows = _fitting(channels, 80), _fitting(value_channels, 80)
    else:  # rows of 64 are what a warp group multiplies at once
        columns = _fitting(channels, 144, groups=((128, 16), (128, 0)))
        rows = _fitting(value_channels, 80, groups=((64, 0),))
    area = sum(rows) * sum(columns)
    tokens = 64 if dot == "bf16" and area <= 6400 else 32
    return StateTiles(rows, columns, tokens, 8 if area > 6400 or dot == "ieee" else 4)


def output_tiles(
    channels: int, value_channels: int, dot: str, architecture: int = 90
) -> TokenTiles:
    """For the output kernel: all rows of up to 288, so that phi(q) is computed once."""
    limit = 144 if dot == "ieee" else 288
    rows = _fitting(value_channels, limit, groups=((128, 16), (128, 0)))
    tokens = 64 if sum(rows) <= 160 else 32
    return TokenTiles(rows, _step(channels, dot), tokens, 4 if sum(rows) <= 80 else 8)


def query_gradient_tiles(
    channels: int, value_channels: int, dot: str, architecture: int = 90
) -> TokenTiles:
    """For the query gradient kernel, which needs all channels of a token in one program."""
    rows = pieces(channels)
    tokens = 64 if sum(rows) <= 48 else 32 if sum(rows) <= 80 else 16
    warps = 4 if sum(rows) <= 48 and dot != "ieee" else 8
    return TokenTiles(rows, _step(value_channels, dot), tokens, warps)


def source_gradient_tiles(
    channels: int, value_channels: int, dot: str, architecture: int = 90
) -> TokenTiles:
    """For the source gradient kernel: groups of one size for keys and values."""
    widths = (channels, value_channels)
    rows = min((64, 32), key=lambda r: sum(ceil_div(w, r) * r for w in widths))
    step = min(_step(channels, dot), _step(value_channels, dot))
    return TokenTiles((rows, 0), step, 64, 8 if dot == "ieee" else 4)


def _fitting(
    width: int,
    limit: int,
    groups: tuple[tuple[int, int], ...] = ((64, 16), (64, 0), (32, 16), (32, 0)),
) -> tuple[int, int]:
    """One group of all ``width`` rows if ``limit`` allows, else the one that wastes least."""
    whole = pieces(width)
    if sum(whole) <= limit:
        return whole
    return min(groups, key=lambda g: (ceil_div(width, sum(g)) * sum(g), -sum(g)))


def _step(width: int, dot: str) -> int:
    """Channels multiplied at a time: little padding, and 16 suffice for an exact product."""
    return 16 if dot == "ieee" or 0 < width % 32 <= 16 else 32
