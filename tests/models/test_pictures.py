"""Pictures of predictions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xattn_models import pictures

RANDOM = np.random.default_rng(0)


def test_palette_is_that_of_voc() -> None:
    colours = pictures.palette(256)
    assert colours.shape == (256, 3) and colours.dtype == np.uint8
    assert len({tuple(c) for c in colours.tolist()}) == 256
    # background, aeroplane, bicycle, person, tv monitor, void
    expected = {
        0: (0, 0, 0),
        1: (128, 0, 0),
        2: (0, 128, 0),
        15: (192, 128, 128),
        20: (0, 64, 128),
        255: (224, 224, 192),
    }
    assert {label: tuple(colours[label].tolist()) for label in expected} == expected


@pytest.mark.parametrize(("task", "count"), [("semseg", 40), ("human_parts", 7), ("other", 2)])
def test_classes(task: str, count: int) -> None:
    classes = RANDOM.integers(0, count, (6, 9))
    output = np.eye(count, dtype=np.float32)[classes].transpose(2, 0, 1)
    picture = pictures.draw(task, output)
    assert np.array_equal(picture.pixels, pictures.palette(count)[classes])
    assert picture.caption == f"{task}: {len(np.unique(classes))} of {count} classes"


@pytest.mark.parametrize("task", ["edge", "sal"])
def test_probabilities(task: str) -> None:
    logits = np.array([[[-1000, 0, 1000, np.log(3)]]], dtype=np.float32)
    picture = pictures.draw(task, logits)
    assert picture.pixels.tolist() == [[0, 128, 255, 191]]


def test_normals() -> None:
    vectors = np.array([[0, 0, 5], [-2, 0, 0], [0, 1e-3, 0], [0, 0, 0], [3, 4, 0]], np.float32)
    picture = pictures.draw("normals", vectors.T[:, None])
    assert picture.pixels.tolist() == [
        [[128, 128, 255], [0, 128, 128], [128, 255, 128], [128, 128, 128], [204, 230, 128]]
    ]


def test_depth_runs_from_least_to_most() -> None:
    from matplotlib import colormaps

    picture = pictures.draw("depth", np.array([[[2.0, 3.0, 6.0]]], dtype=np.float32))
    expected = [colormaps["viridis"](x, bytes=True)[:3] for x in (0.0, 0.25, 1.0)]
    assert np.abs(picture.pixels[0].astype(int) - np.array(expected)).max() <= 1
    assert picture.caption == "depth: 2 (dark) to 6 (bright)"


def test_constant_depth() -> None:
    picture = pictures.draw("depth", np.full((1, 2, 2), 7.0, dtype=np.float32))
    assert len(np.unique(picture.pixels.reshape(-1, 3), axis=0)) == 1
    assert "7" in picture.caption


@pytest.mark.parametrize(("task", "count"), [("semseg", 5), ("normals", 3), ("depth", 1)])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_black(task: str, count: int, bad: float) -> None:
    output = np.abs(RANDOM.normal(size=(count, 3, 4))).astype(np.float32) + 1
    output[:, 1, 2] = bad
    with np.errstate(all="raise"):
        picture = pictures.draw(task, output)
    assert picture.pixels[1, 2].tolist() == [0, 0, 0]
    output[:, 1, 2] = output[:, 0, 0]
    rest = pictures.draw(task, output).pixels
    others = np.ones((3, 4), dtype=bool)
    others[1, 2] = False
    assert np.array_equal(picture.pixels[others], rest[others])


def test_nothing_finite() -> None:
    assert not pictures.draw("depth", np.full((1, 2, 2), np.nan)).pixels.any()


@pytest.mark.parametrize("shape", [(4, 4), (1, 0, 3), (0, 2, 2), (1, 1, 2, 2)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="output of depth: got shape"):
        pictures.draw("depth", np.zeros(shape))


def test_files_tell_what_they_show(tmp_path: Path) -> None:
    picture = pictures.draw("depth", RANDOM.normal(size=(1, 5, 7)))
    pictures.save(tmp_path / "depth.png", picture)
    with Image.open(tmp_path / "depth.png") as image:
        assert image.size == (7, 5) and image.text["Description"] == picture.caption
        assert np.array_equal(np.asarray(image), picture.pixels)


@pytest.mark.parametrize(("count", "size"), [(1, (64, 48)), (4, (131, 97)), (6, (400, 3))])
def test_sheet(count: int, size: tuple[int, int], tmp_path: Path) -> None:
    width, height = size
    drawn = {
        f"task{i}": pictures.draw(f"task$_{{{i}", RANDOM.normal(size=(1, height, width)))
        for i in range(count)
    }
    pictures.sheet(tmp_path / "sheet.png", Image.new("RGB", size, "red"), drawn, title=r"a $b_{c")
    with Image.open(tmp_path / "sheet.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert 100 < pixels.shape[0] < 3000 and 300 < pixels.shape[1] < 3000
    assert (pixels == (255, 0, 0)).all(axis=2).mean() > 0.001


@pytest.mark.parametrize(("panels", "columns"), [(1, 1), (2, 2), (4, 4), (5, 3), (6, 3), (7, 4)])
def test_panels_are_spread_over_rows(panels: int, columns: int) -> None:
    assert pictures._columns(panels) == columns
