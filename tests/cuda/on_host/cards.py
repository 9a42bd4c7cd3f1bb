"""Every kernel fits every card: launches for the published widths and the widest, on the host.

What kernels take of registers is in docs/cuda_resources.json.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import xattn_kernels as xk
from benchmarks.resources.cuda_table import SHARED_LIMITS
from xattn_kernels.schedule import Schedule

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTHS = (36, 72, 144, 288, 384)
#: One architecture for each size of shared memory, on which alone the choice of tiles depends.
ARCHS = {size: arch for arch, size in reversed(SHARED_LIMITS.items())}.values()
PAIR = Schedule.from_edges([(0, 1, 0, 0)], num_queries=2)
TOKENS = 9
#: What does not fit and says so: batch statistics of the widest levels, on small cards.
TOO_LARGE = {("pyramid", dtype, 384, 99 * 1024) for dtype in (torch.float16, torch.float32)}


def _slots(count: int, channels: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(1, channels, TOKENS).to(dtype).requires_grad_() for _ in range(count)]


def _attend(function: Callable[..., list[Tensor]], channels: int, dtype: torch.dtype) -> None:
    slots = [_slots(2, channels, dtype) for _ in range(3)]
    [output] = function(*slots, PAIR)
    output.sum().backward()


def linear(channels: int, dtype: torch.dtype) -> None:
    _attend(xk.linear_cross_attention, channels, dtype)


def softmax(channels: int, dtype: torch.dtype) -> None:
    _attend(xk.softmax_cross_attention, channels, dtype)


def block(channels: int, dtype: torch.dtype) -> None:
    weight = torch.randn(1, 5, channels, channels).to(dtype) * channels**-0.5
    features = [x.detach() for x in _slots(2, channels, dtype)]
    with torch.no_grad():
        xk.cross_attention_block(features, weight, weight[..., 0], PAIR)


def pyramid(channels: int, dtype: torch.dtype) -> None:
    """Levels of this width, and as many outputs."""
    features = [torch.randn(1, channels, *size).to(dtype) for size in ((3, 4), (2, 2))]
    weights = [torch.randn(40, channels).to(dtype) for _ in features]
    scale, shift, bias = torch.ones(40), torch.zeros(40), torch.zeros(channels)
    classifier = torch.randn(channels, 40)
    rest = [x.to(dtype) for x in (scale, shift, classifier, bias)]
    with torch.no_grad():
        for statistics in (False, True):
            xk.pyramid_projection(features, weights, *rest, batch_statistics=statistics)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("operator", [linear, softmax, block, pyramid], ids=lambda x: x.__name__)
def test_launches_fit(
    operator: Callable[[int, torch.dtype], None],
    arch: str,
    twin: Any,
) -> None:
    """A launch that asks for more than the card has raises, as on a GPU."""
    most = SHARED_LIMITS[arch]
    capability = int(arch.rstrip("af"))
    for dtype in DTYPES:
        for channels in WIDTHS:
            twin.twin_configure(processors=2, shared_bytes=most, capability=capability)
            if (operator.__name__, dtype, channels, most) in TOO_LARGE:
                with pytest.raises(RuntimeError, match=r"needs \d+ bytes of shared memory"):
                    operator(channels, dtype)
                continue
            operator(channels, dtype)
            launches: Sequence[tuple[str, int, int, int]] = twin.twin_launches()
            assert launches
            for name, blocks, threads, shared in launches:
                what = f"{name}, {dtype}, C={channels}"
                assert blocks > 0 and 0 < threads <= 1024 and threads % 32 == 0, what
                assert 0 <= shared <= most, what
