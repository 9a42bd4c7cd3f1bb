"""Image files to tensors, and to sizes that the network takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Per channel, for values in [0, 1]; as timm.data and torchvision's weights have them."""

MULTIPLE = 32
"""Of which the network's heights and widths are multiples: its coarsest stride."""


class ImageError(Exception):
    """An image file that cannot be used; the message names the file and says why."""


def open_image(path: str | Path) -> Image.Image:
    """Return an image file as RGB, 8 bits per channel.

    Grayscale, palette, CMYK and 16-bit images are converted, transparent ones are laid on white,
    the orientation in the EXIF data is applied, and of an animation the first frame is taken.

    Raises:
        ImageError: if the file is missing, is no image, is truncated, or holds floating-point or
            32-bit values, of which nobody knows the range.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise ImageError(f"{path}: {'is no file' if path.exists() else 'does not exist'}")
        with Image.open(path) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image), path)
    except ImageError:
        raise
    # Decoders of damaged files raise nearly anything.
    except Exception as error:
        raise ImageError(f"{path}: cannot be read as an image ({error})") from error


def _to_rgb(image: Image.Image, path: Path) -> Image.Image:
    if image.mode == "F":
        raise ImageError(f"{path}: floating-point image, expected 8 or 16 bits per channel")
    if image.mode.startswith("I"):
        # 16-bit values, which convert() would clip to 255 instead of scaling.
        values = np.asarray(image).astype(np.float64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{path}: 32-bit image, expected 8 or 16 bits per channel")
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
