"""The demo's picture: time and memory over resolution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from PIL import Image

COLOURS = {"op by op": "#4c72b0", "fused": "#c44e52", "naive all-pairs": "#8c8c8c"}
MEASURED, MODELLED = "o", "D"


def draw(path: Path, photograph: Image.Image, report: dict[str, Any]) -> None:
    """Write the picture of a demo's report: the photograph, milliseconds and MiB over pixels.

    Measured points are filled circles on solid lines; modelled ones are hollow diamonds at
    the end of dotted lines.
    """
    points = [point for point in report["points"] if point["scales"][0] == 0]
    figure, (image, time, memory) = plt.subplots(
        1, 3, figsize=(14, 4.2), width_ratios=(0.9, 1, 1), layout="constrained"
    )
    image.imshow(photograph)
    image.set_title(f"input, {photograph.height}x{photograph.width}")
    image.axis("off")
    _curves(time, points, "seconds", 1e3)
    time.set_title("time of all attention passes, ms")
    _curves(memory, points, "peak_bytes", 2**-20)
    memory.set_title("peak memory beyond inputs and weights, MiB")
    handles = [Line2D([], [], color=colour, label=way) for way, colour in COLOURS.items()]
    handles += [
        Line2D([], [], color="black", linestyle="", marker=MEASURED, label="measured"),
        Line2D(
            [], [], color="black", linestyle=":", marker=MODELLED, mfc="white", label="modelled"
        ),
    ]
    time.legend(handles=handles, loc="upper left", fontsize="small")
    facts = report["facts"]
    figure.suptitle(
        f"CTAM and CSAM, {len(facts['tasks'])} tasks, 4 scales, fp32, threads: {facts['threads']}, "
        f"{facts['processor']}",
        fontsize="medium",
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _curves(axes: Axes, points: list[dict[str, Any]], key: str, factor: float) -> None:
    for way, colour in COLOURS.items():
        own = [point for point in points if point["way"] == way]
        measured = [point for point in own if point["measured"]]
        modelled = [point for point in own if not point["measured"]]
        solid, dashed = measured, measured[-1:] + modelled
        for line, style, marker in ((solid, "-", MEASURED), (dashed, ":", "")):
            axes.plot(
                [_pixels(point) for point in line],
                [point[key] * factor for point in line],
                linestyle=style,
                marker=marker,
                color=colour,
            )
        axes.plot(
            [_pixels(point) for point in modelled],
            [point[key] * factor for point in modelled],
            linestyle="",
            marker=MODELLED,
            markerfacecolor="white",
            color=colour,
        )
    axes.set(xscale="log", yscale="log", xlabel="resolution, H x W")
    sizes = sorted({tuple(point["size"]) for point in points})
    axes.set_xticks([h * w for h, w in sizes], [f"{h}x{w}" for h, w in sizes], fontsize="small")
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _pixels(point: dict[str, Any]) -> int:
    height, width = point["size"]
    return int(height * width)
