"""Pictures of what was measured, from the plain data of `core.Plot`."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Callable, Sequence
from math import log
from pathlib import Path
from statistics import linear_regression
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from PIL import Image

#: Okabe and Ito's colours, which colour-blind readers can tell apart, but for yellow.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#7F7F7F", "#000000")
#: Colour of this library's own ways, whatever stands beside them.
OURS = "#D55E00"
MARKERS = "osD^vPX*"
SOURCE = "Source"
"""Entry of a picture's file that tells which data it shows."""

_OWN_WORDS = ("ours", "fused", "sequential linear", "sequential, linear")
_SMALL = 8.5
_LABELLED_TICKS = 9
#: Factor between the ends of x from which an exponent is told.
_SPAN = 3.9
#: Span of a logarithmic axis below which powers of ten are too few ticks.
_NARROW = 50

Data = dict[str, Any]


def png(plot: Data) -> bytes:
    """The picture of a plot.

    Args:
        plot: fields of a `core.Plot`.

    Raises:
        ValueError: for a kind of plot that is not known, or without data.
    """
    if plot["kind"] not in _KINDS:
        raise ValueError(f"kind: got {plot['kind']!r}, expected one of {', '.join(_KINDS)}")
    if not any(series["x"] for series in plot["series"]):
        raise ValueError(f"series: got nothing to draw in {plot['title']!r}")
    draw, size = _KINDS[plot["kind"]]
    figure = Figure(figsize=size(plot), layout="constrained")
    axes = figure.add_subplot()
    draw(axes, plot)
    axes.set_title(plot["title"], fontsize="medium", loc="left", wrap=True)
    axes.spines[["top", "right"]].set_visible(False)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=110, metadata={SOURCE: fingerprint(plot), "Software": None})
    return stream.getvalue()


def fingerprint(plot: Data) -> str:
    """What changes when the data of a plot do."""
    return hashlib.sha256(json.dumps(plot, sort_keys=True).encode()).hexdigest()


def fingerprint_of(picture: Path) -> str | None:
    """The fingerprint of the data a picture was made from; None if it is no such picture.

    Raises:
        OSError: if the file cannot be read.
    """
    with Image.open(picture) as image:
        found: str | None = image.info.get(SOURCE)
    return found


def exponent(series: Data) -> float | None:
    """The power of x with which the measured values grow.

    None for less than three points, or a span of x too short to tell.
    """
    points = [
        (log(x), log(y))
        for x, y, modelled in zip(series["x"], series["y"], _modelled(series), strict=True)
        if not modelled and x > 0 and y > 0
    ]
    tokens = [x for x, _ in points]
    if len(set(tokens)) < 3 or max(tokens) - min(tokens) < log(_SPAN):
        return None
    return linear_regression(*zip(*points, strict=True)).slope


def _modelled(series: Data) -> list[bool]:
    return series["modelled"] or [False] * len(series["y"])


def _is_ours(name: str) -> bool:
    return any(word in name.lower() for word in _OWN_WORDS)


def _colours(names: Sequence[str]) -> list[str]:
    """One for each name; the first of ours has always the same."""
    others = itertools.cycle(COLOURS)
    first = next(filter(_is_ours, names), None)
    return [OURS if name == first else next(others) for name in names]


def _names(plot: Data) -> list[str]:
    return [series["name"] for series in plot["series"]]


def _lines(axes: Axes, plot: Data) -> None:
    both_log = plot["x_log"] and plot["y_log"]
    _scales(axes, plot)
    for number, (series, colour) in enumerate(
        zip(plot["series"], _colours(_names(plot)), strict=True)
    ):
        if _is_bound(series):
            axes.plot(series["x"], series["y"], ":", color="#444444", label=series["name"])
            continue
        marker = MARKERS[number % len(MARKERS)]
        label, power = series["name"], exponent(series) if both_log else None
        if power is not None:
            label += rf"  $\propto x^{{{power:.2f}}}$"
        _curve(axes, series, colour, marker, label)
    _ticks_at_values(axes, plot)
    _legend(axes, plot)


def _is_bound(series: Data) -> bool:
    """Whether this is a constant beside the curves, such as the memory there is."""
    return len(series["x"]) == 2 and series["y"][0] == series["y"][1]


def _curve(axes: Axes, series: Data, colour: str, marker: str, label: str) -> None:
    """Measured points filled on a solid line, modelled ones hollow on a dashed one."""
    order = sorted(range(len(series["x"])), key=lambda i: series["x"][i])
    x, y = ([series[key][i] for i in order] for key in ("x", "y"))
    modelled = [_modelled(series)[i] for i in order]
    if series["low"] is not None and series["high"] is not None:
        low, high = ([series[key][i] for i in order] for key in ("low", "high"))
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    for i in range(len(x) - 1):
        style = "--" if modelled[i] or modelled[i + 1] else "-"
        axes.plot(x[i : i + 2], y[i : i + 2], style, color=colour, linewidth=1.6)
    for hollow in (False, True):
        chosen = [i for i in range(len(x)) if modelled[i] is hollow]
        axes.plot(
            [x[i] for i in chosen],
            [y[i] for i in chosen],
            linestyle="",
            marker=marker,
            color=colour,
            markerfacecolor="white" if hollow else colour,
        )
    style = "--" if all(modelled) else "-"
    face = "white" if all(modelled) else colour
    axes.plot([], [], style, color=colour, marker=marker, markerfacecolor=face, label=label)


def _scales(axes: Axes, plot: Data) -> None:
    axes.set(xlabel=plot["x_label"], ylabel=plot["y_label"])
    if plot["x_log"]:
        axes.set_xscale("log")
    if plot["y_log"]:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
        axes.margins(y=0.1)
    axes.grid(alpha=0.3, which="major")
    for axis, is_log, key in ((axes.xaxis, plot["x_log"], "x"), (axes.yaxis, plot["y_log"], "y")):
        if is_log:
            values = [value for series in plot["series"] for value in series[key] if value > 0]
            if values and max(values) < _NARROW * min(values):
                axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0, 7.0)))
                axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
            axis.set_minor_formatter(NullFormatter())


def _ticks_at_values(axes: Axes, plot: Data) -> None:
    """Ticks where something was measured, if these are few."""
    values = sorted({x for series in plot["series"] for x in series["x"]})
    if len(values) <= _LABELLED_TICKS:
        tilted = sum(len(_number(x)) for x in values) > 45
        axes.set_xticks(
            values,
            [_number(x) for x in values],
            fontsize=_SMALL,
            rotation=30 if tilted else 0,
        )
        axes.minorticks_off()


def _legend(axes: Axes, plot: Data) -> None:
    handles, _ = axes.get_legend_handles_labels()
    if any(any(_modelled(series)) for series in plot["series"]):
        handles.append(
            Line2D([], [], linestyle="--", marker="o", color="#444444", mfc="white", label=_HOLLOW)
        )
    axes.legend(
        handles=handles, fontsize=_SMALL, edgecolor="none", framealpha=0.85, handlelength=2.6
    )


def _bars(axes: Axes, plot: Data) -> None:
    """Horizontal bars in groups, the value at the end of each."""
    groups = _groups(plot)
    thickness = 0.8 / len(plot["series"])
    lengths = [y for series in plot["series"] for y in series["y"]]
    for number, (series, colour) in enumerate(
        zip(plot["series"], _colours(_names(plot)), strict=True)
    ):
        spread = series["low"] is not None and series["high"] is not None
        # A single series needs no colour of its own: there, ours stands out among the groups.
        single = len(plot["series"]) == 1 and any(map(_is_ours, groups))
        for i, (group, y) in enumerate(zip(series["x"], series["y"], strict=True)):
            if single:
                colour = OURS if _is_ours(str(group)) else COLOURS[0]
            at = groups.index(str(group)) + (number - (len(plot["series"]) - 1) / 2) * thickness
            hollow = _modelled(series)[i]
            axes.barh(
                at,
                y,
                height=0.9 * thickness,
                facecolor="white" if hollow else colour,
                edgecolor=colour,
                linestyle="--" if hollow else "-",
            )
            end = y
            if spread:
                low, high = series["low"][i], series["high"][i]
                axes.hlines(at, low, high, color="black", linewidth=1.2)
                end = max(y, high)
            text = f"{'~' if hollow else ''}{_number(y)}"
            axes.annotate(
                text, (end, at), (4, 0), textcoords="offset points", va="center", fontsize=_SMALL
            )
    if plot["y_log"]:
        axes.set_xscale("log")
        positive = [y for y in lengths if y > 0] or [1]
        axes.set_xlim(min(positive) / 2, max(positive) * 2.5)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
    else:
        axes.set_xlim(0, max(lengths) * 1.16)
    axes.set_yticks(range(len(groups)), groups)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(plot["y_label"])
    axes.set_ylabel(plot["x_label"])
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)
    _legend_of_bars(axes, plot)


def _legend_of_bars(axes: Axes, plot: Data) -> None:
    handles = []
    if len(plot["series"]) > 1:
        handles = [
            Patch(color=colour, label=series["name"])
            for series, colour in zip(plot["series"], _colours(_names(plot)), strict=True)
        ]
    if any(any(_modelled(series)) for series in plot["series"]):
        handles.append(Patch(fc="white", ec="#444444", linestyle="--", label=_HOLLOW))
    if handles:
        axes.figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=min(4, len(handles)),
            fontsize=_SMALL,
            frameon=False,
        )


def _roofline(axes: Axes, plot: Data) -> None:
    """Bounds as lines, what was reached as points."""
    _scales(axes, plot)
    bounds = [series for series in plot["series"] if len(series["x"]) > 1]
    for number, series in enumerate(bounds):
        style = ("-", "--", ":", "-.")[number % 4]
        axes.plot(series["x"], series["y"], style, color="#444444", label=series["name"])
    for number, (series, colour) in enumerate(
        zip(plot["series"], _colours(_names(plot)), strict=True)
    ):
        if series in bounds:
            continue
        marker = MARKERS[number % len(MARKERS)]
        face = "white" if any(_modelled(series)) else colour
        axes.plot(
            series["x"],
            series["y"],
            marker,
            color=colour,
            markerfacecolor=face,
            markersize=8,
            label=series["name"],
        )
        if series["low"] is not None and series["high"] is not None:
            axes.vlines(series["x"], series["low"], series["high"], color=colour)
    axes.legend(fontsize=_SMALL, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _groups(plot: Data) -> list[str]:
    """Names of the groups of bars, in order of first appearance."""
    return list(dict.fromkeys(str(x) for series in plot["series"] for x in series["x"]))


def _number(value: Any) -> str:
    """Three digits, and no more zeros than are needed."""
    if not isinstance(value, (int, float)):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e8:
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:.2g}"


_HOLLOW = "modelled, not measured"
_Sized = tuple[Callable[[Axes, Data], None], Callable[[Data], tuple[float, float]]]
_KINDS: dict[str, _Sized] = {
    "lines": (_lines, lambda plot: (8.0, 4.8)),
    "bars": (
        _bars,
        lambda plot: (
            8.0,
            1.5 + 0.27 * len(plot["series"]) * len(_groups(plot)) + 0.1 * len(_groups(plot)),
        ),
    ),
    "roofline": (_roofline, lambda plot: (9.5, 4.8)),
}
