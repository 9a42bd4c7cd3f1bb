"""The largest image, by what it takes."""

from __future__ import annotations

import pytest
import torch
from network_support import OUTPUTS, Pyramid, pair
from torch import nn

from xattn_models import SCAMTL
from xattn_models.memory import BUDGET, MAPS, MAX_PIXELS, PixelLimit, pixel_limit


def test_limit() -> None:
    limit = PixelLimit(6, 1e9)
    assert limit.refusal(6) is None
    assert limit.refusal(7, "1 x 7 = ") == (
        "got 1 x 7 = 7 pixels, for which about 7.0 GB of memory are needed; expected at most 6: "
        "make the image smaller, or raise max_pixels (--max-pixels)"
    )
    assert "GB" not in str(PixelLimit(6).refusal(7))


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.float64, 8)])
def test_estimate(dtype: torch.dtype, size: int) -> None:
    model, _ = pair(("semseg", "depth"), dtype=dtype)
    maps = sum(2 * width / 16 / 4**s for s, width in enumerate((6, 8, 10, 12)))
    expected = size * (MAPS * maps + OUTPUTS["semseg"] + OUTPUTS["depth"])
    limit = pixel_limit(model, reference=False)
    assert limit.bytes_per_pixel == pytest.approx(expected)
    assert limit.pixels == int(BUDGET / expected)
    twice = pixel_limit(model, reference=True)
    assert twice.pixels < limit.pixels


def test_wider_networks_take_smaller_images() -> None:
    limits = []
    for width in (8, 64):
        with torch.device("meta"):
            model = SCAMTL(Pyramid([width] * 4), ("a", "b"), {"a": 1, "b": 1})
        limits.append(pixel_limit(model, reference=False).pixels)
    assert 7 < limits[0] / limits[1] < 8


def test_limits_that_are_given() -> None:
    model = nn.Linear(1, 1)
    assert pixel_limit(model, reference=False) == PixelLimit(MAX_PIXELS)
    assert pixel_limit(model, reference=False, max_pixels=7) == PixelLimit(7)
    for wrong in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match=f"max_pixels: got {wrong}, expected a positive"):
            pixel_limit(model, reference=False, max_pixels=wrong)  # type: ignore[arg-type]
