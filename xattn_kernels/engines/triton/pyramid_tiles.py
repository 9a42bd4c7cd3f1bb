"""Tile sizes of the kernels of the pyramid projection, by widths and precision."""

from __future__ import annotations

from typing import NamedTuple

from xattn_kernels.engines.triton.runtime import ceil_div, pieces

#: What hidden channels are padded to, a multiple of all blocks of them.
BLOCK = 64
#: Most outputs that a program has; more are shared out among programs.
MAX_OUTPUTS = 64


class Tiles(NamedTuple):
    """Hidden channels, tokens (pixels) and input channels a step, and warps of a program."""

    hidden: int
    tokens: int
    channels: int
    warps: int


def project_tiles(dot: str) -> Tiles:
    """For the products of the coarse levels."""
    return Tiles(32, 32, 16, 4) if dot == "ieee" else Tiles(64, 64, 32, 4)


def pixel_tiles(channels: int, outputs: int, dot: str) -> Tiles:
    """For the kernel that has all hidden channels of a tile of pixels, one block at a time."""
    wide = channels > 160 or sum(output_pieces(outputs)) > 48
    if dot == "ieee":
        return Tiles(16, 16 if wide else 32, 0, 4)
    if dot == "tf32":
        return Tiles(16, 32 if wide else 64, 0, 8)
    return Tiles(32, 64 if wide else 128, 0, 8)


def stored_tiles(tiles: Tiles, dot: str) -> Tiles:
    """For the same kernel where it reads z: enough for a thread that its loads are wide."""
    return tiles._replace(hidden=32, warps=4) if dot == "tf32" else tiles


def gradient_tiles(dot: str) -> Tiles:
    """For the gradients at the hidden channels."""
    if dot == "ieee":
        return Tiles(16, 32, 0, 4)
    return Tiles(32, 32 if dot == "tf32" else 64, 0, 4)


def output_pieces(outputs: int) -> tuple[int, int]:
    """Outputs of a program, in one or two powers of two."""
    return pieces(min(outputs, MAX_OUTPUTS))


def output_groups(outputs: int) -> int:
    """Programs that share the outputs of a tile."""
    return ceil_div(outputs, sum(output_pieces(outputs)))
