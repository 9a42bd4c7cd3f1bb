"""Image files of every kind, and sizes that the network takes."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from file_support import write_png
from PIL import Image

from xattn_models import images
from xattn_models.memory import PixelLimit
from xattn_models.timm_compat import import_timm


@pytest.mark.parametrize(
    ("mode", "pixel", "expected"),
    [
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("L", 77, (77, 77, 77)),
        ("1", 255, (255, 255, 255)),
        ("P", 0, (0, 0, 0)),
        ("LA", (77, 0), (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 257 * 100, (100, 100, 100)),
    ],
)
def test_modes(
    mode: str, pixel: int | tuple[int, ...], expected: tuple[int, ...], tmp_path: Path
) -> None:
    path = tmp_path / "image.png"
    Image.new(mode, (5, 4), pixel).save(path)
    image = images.read_image(path)
    assert image.dtype == torch.float32 and image.shape == (3, 4, 5)
    assert (image * 255).round().flatten(1).T.unique(dim=0).tolist() == [list(expected)]


def test_palette_with_transparent_colour(tmp_path: Path) -> None:
    path = tmp_path / "image.gif"
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.putpixel((1, 0), 1)
    image.save(path, transparency=1)
    pixels = (images.read_image(path) * 255).round()
    assert pixels[:, 0, 0].tolist() == [200, 0, 0] and pixels[:, 0, 1].tolist() == [255] * 3


def test_cmyk(tmp_path: Path) -> None:
    path = tmp_path / "image.tiff"
    Image.new("CMYK", (5, 4), (0, 0, 0, 255)).save(path)
    assert not images.read_image(path).any()


def test_sixteen_bits_per_colour(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    write_png(path, 1, 1, 16, 2, b"\0" + struct.pack(">HHH", 0xFFFF, 0x8000, 0))
    assert (images.read_image(path) * 255).round().flatten().tolist() == [255, 128, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation: int, tmp_path: Path) -> None:
    upright = np.zeros((24, 40), dtype=np.uint8)
    upright[:8, :8] = 255  # marks the upper left corner
    backward = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Transpose that a camera undoes
    stored = Image.fromarray(upright)
    if orientation in backward:
        stored = stored.transpose(Image.Transpose(backward[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "image.png"
    stored.save(path, exif=exif)
    image = images.read_image(path)
    assert torch.equal((image[0] * 255).byte(), torch.from_numpy(upright))


def _nothing(path: Path) -> None:
    """Leave the path without a file."""


def _text(path: Path) -> None:
    path.write_text("no image")


def _truncated(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, format="PNG")
    path.write_bytes(path.read_bytes()[:2000])


def _truncated_jpeg(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[:1500])


def _floats(path: Path) -> None:
    Image.new("F", (5, 4)).save(path, format="TIFF")


def _drawing(path: Path) -> None:
    Image.new("RGB", (5, 4)).save(path, format="EPS")


def _integers(path: Path) -> None:
    Image.fromarray(np.full((4, 5), 70000, dtype=np.int32)).save(path, format="TIFF")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_nothing, "does not exist"),
        (Path.mkdir, "is no file"),
        (Path.touch, "cannot be read as an image"),
        (_text, "cannot be read as an image"),
        (_truncated, "cannot be read as an image"),
        (_truncated_jpeg, "cannot be read as an image"),
        (_floats, "floating-point"),
        (_integers, "32-bit"),
        (_drawing, "EPS drawing"),
    ],
)
def test_unusable_files_are_named(
    write: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "image"
    write(path)
    with pytest.raises(images.ImageError, match=message) as error:
        images.read_image(path)
    assert str(path) in str(error.value)


# Sizes


@pytest.mark.parametrize(
    ("size", "named"),
    [
        ((12_000, 12_000), "got 12000 x 12000 = 144,000,000 pixels"),
        ((3, 100_000), "got 3 x 100000 = 300,000 pixels"),
        ((20_000, 20_000), "got 400,000,000 pixels"),  # Pillow tells no more of those
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_large_images_are_not_decoded(
    size: tuple[int, int], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "image.png"
    write_png(path, *size, 8, 0, b"")
    monkeypatch.delattr("PIL.ImageFile.ImageFile.load")
    message = f"image.png: {named}, for which about .* GB .* at most 250,000: .*--max-pixels"
    with pytest.raises(images.ImageError, match=message):
        images.open_image(path, PixelLimit(250_000, 1e4))


def test_pillows_limit_is_named_where_ours_is_above(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    write_png(path, 20_000, 20_000, 8, 0, b"")
    for limit in (None, PixelLimit(10**9)):
        with pytest.raises(images.ImageError, match=r"image\.png: Image size \(400000000 pixels\)"):
            images.open_image(path, limit)


def test_limit_of_rotated_images_and_animations(tmp_path: Path) -> None:
    """The limit is one of pixels, that of a single frame."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (4, 6)).save(tmp_path / "rotated.jpg", exif=exif)
    frames = [Image.new("L", (4, 6), colour) for colour in (10, 20, 30)]
    frames[0].save(tmp_path / "animation.gif", save_all=True, append_images=frames[1:])
    for name, size in (("rotated.jpg", (6, 4)), ("animation.gif", (4, 6))):
        assert images.open_image(tmp_path / name, PixelLimit(24)).size == size
        with pytest.raises(images.ImageError, match=f"{name}: got 6 x 4 = 24 pixels"):
            images.open_image(tmp_path / name, PixelLimit(23))


# Arrays


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.arange(24, dtype=np.uint8).reshape(2, 4, 3), torch.float32),
        (np.linspace(0, 1, 24, dtype=np.float16).reshape(2, 4, 3), torch.float32),
        (np.linspace(0, 1, 24).reshape(2, 4, 3), torch.float64),
        (np.linspace(0, 1, 24).astype(">f8").reshape(2, 4, 3)[::-1, ::-1], torch.float64),
    ],
)
def test_arrays(array: np.ndarray[Any, Any], dtype: torch.dtype) -> None:
    array.flags.writeable = False
    tensor = images.from_array(array)
    expected = array.astype(np.float64) / (255 if array.dtype == np.uint8 else 1)
    assert tensor.dtype == dtype and tensor.shape == (3, 2, 4)
    assert np.allclose(tensor.permute(1, 2, 0).numpy(), expected, atol=1e-7)


def test_normalisation_is_that_of_the_backbones() -> None:
    import_timm()
    from timm import data

    assert images.IMAGENET_MEAN == data.IMAGENET_DEFAULT_MEAN
    assert images.IMAGENET_STD == data.IMAGENET_DEFAULT_STD
    image = torch.rand(2, 3, 4, 5)
    expected = (image - torch.tensor(images.IMAGENET_MEAN)[:, None, None]) / torch.tensor(
        images.IMAGENET_STD
    )[:, None, None]
    assert torch.equal(images.normalise(image), expected)


@pytest.mark.parametrize("size", [(1, 1), (31, 64), (97, 131), (32, 33), (5, 200)])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_padding_and_cropping(size: tuple[int, int], batch: tuple[int, ...]) -> None:
    image = torch.rand(*batch, 3, *size)
    padded = images.pad_to_multiple(image)
    height, width = padded.shape[-2:]
    assert height % 32 == 0 and width % 32 == 0
    assert 0 <= height - size[0] < 32 and 0 <= width - size[1] < 32
    assert torch.equal(images.crop(padded, size), image)
    last = images.crop(padded, (height, size[1]))[..., -1:]
    assert torch.equal(padded[..., size[1] :], last.expand_as(padded[..., size[1] :]))
    rows = padded[..., size[0] - 1 :, :]
    assert torch.equal(rows, rows[..., :1, :].expand_as(rows))


def test_padding_of_what_fits_is_free() -> None:
    image = torch.rand(3, 64, 96)
    assert images.pad_to_multiple(image) is image
    assert images.pad_to_multiple(image, 1) is image


@pytest.mark.parametrize("shape", [(3, 0, 32), (4, 4), (1, 2, 3, 4, 5)])
def test_padding_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="image: got shape"):
        images.pad_to_multiple(torch.zeros(shape))


def test_padding_refuses_other_multiples() -> None:
    with pytest.raises(ValueError, match="multiple: got 0"):
        images.pad_to_multiple(torch.zeros(3, 4, 4), 0)
