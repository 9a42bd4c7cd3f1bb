"""How much memory an image takes, told before it is read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .sca_mtl import SCAMTL

BUDGET = 8 << 30
"""Bytes that the default number of pixels is estimated to stay within."""
MAX_PIXELS = 1 << 23
"""The default for networks of which nothing is known."""
MAPS = 50
"""Maps of the network's widths, at all scales, that are held at the peak in inference.

Measured as 27 to 38 for linear and up to 50 for softmax attention, pictures included, with HRNet,
ResNet, ConvNeXt, Swin and EfficientNet backbones and 2 to 5 tasks, on the engine ``cpu``; twice
that are reckoned for the reference engine.
"""


@dataclass(frozen=True)
class PixelLimit:
    """The largest image, and what is known of its memory.

    Attributes:
        pixels: height times width.
        bytes_per_pixel: estimate of what prediction takes; None if it is not known.
    """

    pixels: int
    bytes_per_pixel: float | None = None

    def refusal(self, pixels: int, size: str = "") -> str | None:
        """Why an image of so many pixels is not taken; None if it is. `size` is put before."""
        if pixels <= self.pixels:
            return None
        memory = ""
        if self.bytes_per_pixel is not None:
            memory = f", for which about {pixels * self.bytes_per_pixel / 1e9:,.1f} GB of memory "
            memory += "are needed"
        return (
            f"got {size}{pixels:,} pixels{memory}; expected at most {self.pixels:,}: make the "
            "image smaller, or raise max_pixels (--max-pixels)"
        )


def pixel_limit(model: nn.Module, *, reference: bool, max_pixels: int | None = None) -> PixelLimit:
    """The limit for a network.

    Args:
        model: of which the memory is estimated if it is an `SCAMTL`: 4 bytes (8 in float64) for
            every output, and for `MAPS` maps of every scale, each in the model's dtype.
        reference: whether it runs on the reference engine or one like it.
        max_pixels: of the limit. Default: what `BUDGET` is enough for, or `MAX_PIXELS`.

    Raises:
        ValueError: for a number of pixels below 1.
    """
    if max_pixels is not None and (type(max_pixels) is not int or max_pixels < 1):
        raise ValueError(f"max_pixels: got {max_pixels!r}, expected a positive integer")
    if not isinstance(model, SCAMTL):
        return PixelLimit(max_pixels or MAX_PIXELS)
    size = next(model.parameters()).dtype.itemsize
    # Scale s has 1 / (16 * 4^s) of the image's pixels.
    values = sum(channels / 16 / 4**s for s, channels in enumerate(model.channels))
    outputs = sum(model.num_outputs[task] for task in model.tasks)
    estimate = MAPS * (2 if reference else 1) * values * size + max(size, 4) * outputs
    return PixelLimit(max_pixels or max(1, int(BUDGET / estimate)), estimate)
