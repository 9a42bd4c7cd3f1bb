"""Image files of every kind, and sizes that the network takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from xattn_models import images
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
    # Written by hand: Pillow has no such mode. One pixel of (0xffff, 0x8000, 0).
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    data = zlib.compress(b"\0" + struct.pack(">HHH", 0xFFFF, 0x8000, 0))
    path = tmp_path / "image.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )
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
