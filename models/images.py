"""Image files to tensors, and to sizes that the network takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from .files import clip, shown
from .memory import PixelLimit

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Per channel, for values in [0, 1]; as timm.data and torchvision's weights have them."""

MULTIPLE = 32
"""Of which the network's heights and widths are multiples: its coarsest stride."""


DRAWINGS = ("EPS", "WMF")
"""Formats that Pillow has other programs draw, which run what is in them."""


class ImageError(Exception):
    """An image file that cannot be used; the message names the file and says why."""


def open_image(path: str | Path, limit: PixelLimit | None = None) -> Image.Image:
    """Return an image file as RGB, 8 bits per channel.

    Grayscale, palette, CMYK and 16-bit images are converted, transparent ones are laid on white,
    the orientation in the EXIF data is applied, and of an animation the first frame is taken.

    Args:
        path: of the file.
        limit: to the size, which is read before any pixel is.

    Raises:
        ImageError: if the file is missing, is no image or a drawing, is truncated, is above the
            limit (or Pillow's own, see `PIL.Image.MAX_IMAGE_PIXELS`), or holds floating-point or
            32-bit values, of which nobody knows the range.
    """
    path = Path(path)
    name = shown(path)
    try:
        if not path.is_file():
            raise ImageError(f"{name}: {'is no file' if path.exists() else 'does not exist'}")
        with Image.open(path) as image:
            if image.format in DRAWINGS:
                raise ImageError(f"{name}: {image.format} drawing, expected an image of pixels")
            return to_rgb(image, limit, name)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:  # instead of the size
        found = re.search(r"\((\d+) pixels\)", str(error))
        refusal = limit.refusal(int(found[1])) if limit is not None and found else None
        raise ImageError(f"{name}: {refusal or clip(error)}") from error
    # Decoders of damaged files raise nearly anything.
    except Exception as error:
        reason = clip(error) or type(error).__name__
        raise ImageError(f"{name}: cannot be read as an image ({reason})") from error


def to_rgb(image: Image.Image, limit: PixelLimit | None = None, name: str = "image") -> Image.Image:
    """Return an image as RGB, as `open_image` does; `name` is for errors.

    Raises:
        ImageError: if it is above the limit, or holds floating-point or 32-bit values.
        OSError: if its pixels cannot be decoded.
    """
    pixels = image.height * image.width
    size = f"{image.height} x {image.width} = "
    refusal = limit.refusal(pixels, size) if limit is not None else None
    if refusal:
        raise ImageError(f"{name}: {refusal}")
    if not pixels:
        raise ImageError(f"{name}: got {size}0 pixels, expected some")
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ImageError(f"{name}: floating-point image, expected 8 or 16 bits per channel")
    if image.mode.startswith("I"):
        # 16-bit values, which convert() would clip to 255 instead of scaling.
        values = np.asarray(image).astype(np.float64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{name}: 32-bit image, expected 8 or 16 bits per channel")
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def read_image(path: str | Path) -> Tensor:
    """Read an image file as `open_image` does.

    Returns:
        (3, H, W), float32, RGB in [0, 1].

    Raises:
        ImageError: if the file cannot be used.
    """
    return to_tensor(open_image(path))


def from_array(array: npt.NDArray[Any]) -> Tensor:
    """An array (H, W, 3), RGB, as (3, H, W).

    Args:
        array: uint8, or floating-point in [0, 1].

    Returns:
        float32; float64 for float64.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape.
    """
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise TypeError(
            f"image: got an array of {array.dtype}, expected uint8, or floating-point in [0, 1]"
        )
    if array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"image: got an array of shape {array.shape}, expected (H, W, 3)")
    precise = np.float64 if array.dtype.itemsize > 4 else np.float32
    pixels = torch.from_numpy(np.array(array.transpose(2, 0, 1), dtype=precise, order="C"))
    return pixels / 255 if array.dtype == np.uint8 else pixels


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as (3, H, W), float32, in [0, 1]."""
    pixels = torch.from_numpy(np.array(image.convert("RGB")))
    return pixels.permute(2, 0, 1).contiguous().float() / 255


def normalise(
    image: Tensor,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Tensor:
    """(image - mean) / std per channel, for (..., 3, H, W)."""
    centre, scale = (image.new_tensor(values)[:, None, None] for values in (mean, std))
    return (image - centre) / scale


def pad_to_multiple(image: Tensor, multiple: int = MULTIPLE) -> Tensor:
    """Repeat the last row and the last column until height and width are multiples.

    Padding is at the bottom and on the right, so that pixels keep their place and `crop` takes the
    first ones. Repeated, not mirrored, pixels: that works for images of any size, even smaller
    than the padding, and draws no edge as a constant would.

    Args:
        image: (..., C, H, W), not empty.
        multiple: of which height and width will be multiples.

    Returns:
        (..., C, H', W'); `image` itself if there is nothing to do.

    Raises:
        ValueError: for an image of other shapes or without pixels, or a multiple below 1.
    """
    if multiple < 1:
        raise ValueError(f"multiple: got {multiple}, expected at least 1")
    if image.dim() not in (3, 4) or 0 in image.shape[-2:]:
        raise ValueError(
            f"image: got shape {tuple(image.shape)}, expected (3, H, W) or (B, 3, H, W) with pixels"
        )
    height, width = image.shape[-2:]
    right, bottom = -width % multiple, -height % multiple
    if not right and not bottom:
        return image
    return F.pad(image, (0, right, 0, bottom), mode="replicate")


def crop(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The first (H, W) pixels of (..., H', W'): what `pad_to_multiple` was given."""
    return x[..., : size[0], : size[1]]
