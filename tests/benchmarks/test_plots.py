"""Pictures show what they were given."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from PIL import Image
from report_support import BARS, LINES, ROOFLINE

from benchmarks import plots
from benchmarks.core import Plot, Series

KINDS = {"lines": LINES, "bars": BARS, "roofline": ROOFLINE}


def drawn(plot: Plot, monkeypatch: pytest.MonkeyPatch) -> Axes:
    """What a picture was made from."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **options: Any) -> None:
        figures.append(self)
        save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    plots.png(asdict(plot))
    return figures[0].axes[0]


@pytest.mark.parametrize("kind", KINDS)
def test_picture_tells_its_data(kind: str, tmp_path: Path) -> None:
    data = asdict(KINDS[kind])
    picture = plots.png(data)
    with Image.open(io.BytesIO(picture)) as image:
        assert image.format == "PNG" and image.width > 600 and image.height > 150
        colours = image.convert("RGB").getcolors(2**24)
        assert colours is not None and len(colours) > 10
    (tmp_path / "a.png").write_bytes(picture)
    assert plots.fingerprint_of(tmp_path / "a.png") == plots.fingerprint(data)
    assert plots.fingerprint({**data, "title": "another"}) != plots.fingerprint(data)


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="kind: got 'pie', expected one of lines, bars, roofline"):
        plots.png({**asdict(LINES), "kind": "pie"})


def test_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="series: got nothing to draw in 'Memory'"):
        plots.png(asdict(replace(BARS, series=[Series("empty", [], [])])))


def test_exponent_is_that_of_the_measured_points() -> None:
    all_pairs, ours = asdict(LINES)["series"]
    assert plots.exponent(all_pairs) == pytest.approx(2.0)
    assert plots.exponent(ours) == pytest.approx(1.0)
    two = {"x": [1, 2, 4], "y": [1.0, 2.0, 9.0], "modelled": [False, False, True]}
    assert plots.exponent(two) is None
    close = {"x": [10, 11, 12], "y": [1.0, 2.0, 4.0], "modelled": None}
    assert plots.exponent(close) is None


def legend(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_lines_are_logarithmic_with_exponents(monkeypatch: pytest.MonkeyPatch) -> None:
    axes = drawn(LINES, monkeypatch)
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert legend(axes) == [
        r"all pairs  $\propto x^{2.00}$",
        r"ours  $\propto x^{1.00}$",
        "modelled, not measured",
    ]


def test_modelled_points_are_hollow(monkeypatch: pytest.MonkeyPatch) -> None:
    axes = drawn(LINES, monkeypatch)
    hollow = [
        list(line.get_xdata())
        for line in axes.lines
        if line.get_markerfacecolor() == "white" and len(line.get_xdata())
    ]
    assert hollow == [[80]]
    dashed = [list(line.get_xdata()) for line in axes.lines if line.get_linestyle() == "--"]
    assert dashed == [[40, 80]]


def test_bars_have_their_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    axes = drawn(BARS, monkeypatch)
    assert [bar.get_width() for bar in axes.patches] == [30.0, 10.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["op by op", "ours"]
    assert [text.get_text() for text in axes.texts] == ["~30", "10"]
    modelled, measured = (bar.get_facecolor() for bar in axes.patches)
    assert modelled[:3] == (1, 1, 1) and measured[:3] != (1, 1, 1)


def test_bounds_are_lines_and_what_was_reached_points(monkeypatch: pytest.MonkeyPatch) -> None:
    axes = drawn(ROOFLINE, monkeypatch)
    bound, point = axes.lines
    assert bound.get_linestyle() == "-" and bound.get_marker() == "None"
    assert point.get_linestyle() == "None" and list(point.get_xdata()) == [33]
    assert legend(axes) == ["copy and FMA", "fused"]


def test_constant_is_a_bound_beside_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = Series("memory there is", [10, 80], [50.0, 50.0])
    axes = drawn(replace(LINES, series=[*LINES.series, bound]), monkeypatch)
    dotted = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert [line.get_marker() for line in dotted] == ["None"]
    assert "memory there is" in legend(axes)


@pytest.mark.parametrize(
    "names",
    [("op by op", "ours"), ("fused", "op by op", "compiled"), tuple("abcdefg")],
)
def test_colours_tell_series_apart(names: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plot = Plot("bars", "", "", "", [Series(name, ["x"], [1.0]) for name in names])
    bars = drawn(plot, monkeypatch).patches
    colours = [bar.get_facecolor() for bar in bars]
    assert len(set(colours)) == len(names)
    for name, colour in zip(names, colours, strict=True):
        assert (colour == to_rgba(plots.OURS)) is (name in ("ours", "fused"))
