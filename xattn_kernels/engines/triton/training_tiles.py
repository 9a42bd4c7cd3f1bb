"""Tile sizes of the kernels of the cross-attention block in training, by width and precision."""

from __future__ import annotations

from typing import NamedTuple

from xattn_kernels.engines.triton.runtime import MAX_WIDTH, pieces


class Tiles(NamedTuple):
    """A group of rows of a sum or result, channels and tokens a step, warps."""

    rows: tuple[int, int]
    step: int
    tokens: int
    warps: int
    together: bool = True
    """Whether a launch computes all sums that need groups of rows."""
    stages: int = 2


#: Widest block that has a tile in registers, by how products are computed.
_WIDEST = {"ieee": 80, "tf32": 80, "bf16": MAX_WIDTH}
#: The same of passes that have more in them.
_EXCEPTIONS = {
    ("attend", "ieee"): 48,
    ("target_sums", "bf16"): 160,
    ("target_gradients", "bf16"): 160,
    ("source_sums", "bf16"): 160,
    ("source_gradients", "bf16"): 160,
}
#: Passes that sum (C, C) products over tokens.
_SUMS = ("moments", "states", "target_sums", "gradients", "values")


def is_fused(phase: str, channels: int, dot: str) -> bool:
    """Whether kernels compute a pass from features alone."""
    if phase == "input_gradient":
        return True
    return channels <= _EXCEPTIONS.get((phase, dot), _WIDEST[dot])


def tiles_of(phase: str, channels: int, dot: str) -> Tiles:
    """For the kernel of a pass: ``gradients`` for both sides, ``key_sums``, ``values``."""
    whole = pieces(channels)
    width = sum(whole)
    if phase not in _SUMS:
        tokens = 16 if dot == "ieee" else 64 if width <= 80 or phase == "input_gradient" else 32
        return Tiles((16, 0), 16, tokens, 8)
    if dot == "ieee":
        grouped = width > (32 if phase in ("gradients", "values") else 48)
        return Tiles((32, 0) if grouped else whole, 16, 16, 8)
    stages = 1 if phase == "gradients" else 2
    if width <= 48:
        return Tiles(whole, 16, 32, 4, stages=stages)
    if width <= 80:
        rows = (64, 0) if phase in ("gradients", "target_sums") else whole
        return Tiles(rows, 16, 32, 8)
    wide = phase in ("moments", "states")
    tokens = 32 if wide and width <= 160 else 16
    return Tiles((64, 0), 16, tokens, 8, together=False, stages=stages)
