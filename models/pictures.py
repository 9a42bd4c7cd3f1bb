"""Pictures of predictions: one per task, and a contact sheet of all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .files import replacing

COLOURMAP = "viridis"
"""matplotlib's, for depth and other measures."""

PANEL = 3.2
"""Width of a panel of the sheet, in inches."""

MAX_ASPECT = 4
"""Of a panel: longer images leave some of it empty."""

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]


class Picture(NamedTuple):
    """What a task's prediction looks like."""

    pixels: Bytes
    """(H, W) or (H, W, 3)."""
    caption: str
    """The task, and what the colours mean."""


def palette(classes: int) -> Bytes:
    """The colours of PASCAL VOC's label files, (classes, 3); class 0 is black.

    The bits of a class go to red, green and blue in turn, the lowest to the highest bit of a
    colour: Everingham et al., "The PASCAL Visual Object Classes Challenge" (2010), its devkit.
    """
    labels = np.arange(classes)
    colours = np.zeros((classes, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((labels >> (3 * bit + channel) & 1) << (7 - bit)).astype(
                np.uint8
            )
    return colours


def draw(task: str, output: Array) -> Picture:
    """Draw the network's output for a task.

    By the name of the task and the number n of outputs: ``normals`` (n = 3) as unit vectors with
    -1..1 in each direction as 0..255; ``edge`` and ``sal`` (n = 1) as probabilities, white for 1;
    other tasks with n > 1, such as ``semseg`` and ``human_parts``, as their most probable class in
    the colours of `palette`; other tasks with n = 1, such as ``depth``, in matplotlib's viridis
    from the smallest to the largest value, which the caption tells. What is not finite is black.

    Args:
        task: name.
        output: (n, H, W), logits or measures, as the network gives them.

    Raises:
        ValueError: for other shapes.
    """
    if output.ndim != 3 or 0 in output.shape:
        raise ValueError(f"output of {task}: got shape {output.shape}, expected (n, H, W)")
    count = output.shape[0]
    if task == "normals" and count == 3:
        return Picture(_normals(output), "normals: x, y, z as red, green, blue")
    if task in ("edge", "sal") and count == 1:
        return Picture(_probability(output[0]), f"{task}: probability, white is 1")
    if count > 1:
        classes = output.argmax(axis=0)
        pixels = _black_unless_finite(output, palette(count)[classes])
        return Picture(pixels, f"{task}: {len(np.unique(classes))} of {count} classes")
    pixels, low, high = _measure(output[0])
    return Picture(pixels, f"{task}: {low:.3g} (dark) to {high:.3g} (bright)")


def _normals(output: Array) -> Bytes:
    finite = np.nan_to_num(output, nan=0, posinf=0, neginf=0)
    unit = finite / np.maximum(np.linalg.norm(finite, axis=0, keepdims=True), 1e-12)
    pixels = _to_bytes((unit.transpose(1, 2, 0) + 1) / 2)
    return _black_unless_finite(output, pixels)


def _probability(logits: Array) -> Bytes:
    # The form that never exponentiates a large number.
    return _to_bytes(0.5 * (1 + np.tanh(0.5 * logits.astype(np.float64))))


def _measure(values: Array) -> tuple[Bytes, float, float]:
    from matplotlib import colormaps

    finite = np.isfinite(values)
    low, high = (math.nan, math.nan)
    if finite.any():
        low, high = float(values[finite].min()), float(values[finite].max())
    scaled = np.zeros(values.shape)
    if high > low:
        scaled[finite] = (values[finite].astype(np.float64) - low) / (high - low)
    pixels = _to_bytes(colormaps[COLOURMAP](scaled)[..., :3])
    return _black_unless_finite(values[None], pixels), low, high


def _to_bytes(values: Array) -> Bytes:
    """[0, 1] to 0..255; NaN to 0."""
    clipped: Bytes = np.nan_to_num(values * 255).round().clip(0, 255).astype(np.uint8)
    return clipped


def _black_unless_finite(output: Array, pixels: Bytes) -> Bytes:
    """`pixels` (H, W, 3), black where one of the `output` (n, H, W) is not finite."""
    valid = np.asarray(np.isfinite(output).all(axis=0))
    return np.where(valid[..., None], pixels, np.uint8(0))


def save(path: Path, picture: Picture) -> None:
    """Write a picture as PNG, with its caption as the text ``Description``.

    Raises:
        OSError: if it cannot be written; there is no part of it then, and a file from before stays.
    """
    info = PngInfo()
    info.add_text("Description", picture.caption)
    with replacing(path) as file:
        Image.fromarray(picture.pixels).save(file, format="PNG", pnginfo=info)


def sheet(
    path: Path,
    image: Image.Image,
    pictures: Mapping[str, Picture],
    *,
    title: str = "",
    width: float = PANEL,
    dpi: int = 110,
) -> None:
    """Write an image and the pictures of its predictions side by side, with their captions.

    Args:
        path: file to write; its suffix gives the format, PNG without one.
        image: what was predicted from.
        pictures: by task.
        title: a line above all.
        width: of a panel, in inches.
        dpi: pixels per inch.

    Raises:
        OSError: as `save`.
        ValueError: for an unknown format.
    """
    # Not pyplot, which would keep figures and choose a backend for the whole process.
    from matplotlib.figure import Figure

    panels = [Picture(np.asarray(image), f"input, {image.height}x{image.width}")]
    panels += pictures.values()
    columns = _columns(len(panels))
    rows = math.ceil(len(panels) / columns)
    aspect = min(max(image.height / image.width, 1 / MAX_ASPECT), MAX_ASPECT)
    height = width * aspect + 0.3
    figure = Figure(
        figsize=(columns * width, rows * height + (0.3 if title else 0)), layout="constrained"
    )
    for number, (pixels, caption) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=255)
        axes.set_title(caption, fontsize="small", parse_math=False)
        axes.axis("off")
    if title:
        figure.suptitle(title, fontsize="medium", parse_math=False)
    with replacing(path) as file:
        figure.savefig(file, dpi=dpi, format=path.suffix[1:] or "png")


def _columns(panels: int) -> int:
    """As few rows of at most four as possible, then as even as possible."""
    return math.ceil(panels / math.ceil(panels / 4))
