"""Everything that has to give the same results however it is run: modules and whole networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xattn_kernels import convert_, modules
from xattn_kernels.modules.layers import BasicBlock
from xattn_kernels.testing import op_by_op

TASKS = ("semseg", "depth")
WIDTHS = (12, 18, 24)

Maps = Sequence[tuple[int, int, int]]
"""Channels, height and width of every input."""


class Flat(nn.Module):
    """A module as a function from tensors to a tuple of tensors."""

    def __init__(self, inner: nn.Module, arrange: Callable[..., Any]) -> None:
        super().__init__()
        self.inner = inner
        self.arrange = arrange

    def forward(self, *maps: Tensor) -> tuple[Tensor, ...]:
        return tuple(flatten(self.inner(self.arrange(*maps))))


def flatten(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return [x for one in values for x in flatten(one)]


class Pair(nn.Module):
    """A block of two inputs, called with both in one list."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.inner(*maps)


def by_task(*maps: Tensor) -> dict[str, Tensor]:
    return dict(zip(TASKS, maps, strict=True))


def listed(*maps: Tensor) -> list[Tensor]:
    return list(maps)


def single(x: Tensor) -> Tensor:
    return x


def cross_attention(**options: Any) -> tuple[nn.Module, Callable[..., Any], Maps]:
    return (
        Pair(modules.CrossAttention(12, **options)),
        listed,
        ((12, 8, 12), (12, 6, 8)),
    )


def cross_task(**options: Any) -> tuple[nn.Module, Callable[..., Any], Maps]:
    return modules.CrossTaskAttention(TASKS, 12, **options), by_task, ((12, 8, 12),) * 2


def cross_scale(**options: Any) -> tuple[nn.Module, Callable[..., Any], Maps]:
    maps = tuple((c, 16 >> s, 24 >> s) for s, c in enumerate(WIDTHS))
    return modules.CrossScaleAttention(WIDTHS, **options), listed, maps


def head(**options: Any) -> tuple[nn.Module, Callable[..., Any], Maps]:
    maps = tuple((c, 16 >> s, 24 >> s) for s, c in enumerate(WIDTHS))
    return modules.CrossScaleHead(WIDTHS, 5, **options), listed, maps


def basic_block() -> tuple[nn.Module, Callable[..., Any], Maps]:
    return BasicBlock(8, 12, 0.1), single, ((8, 8, 12),)


def converted() -> tuple[nn.Module, Callable[..., Any], Maps]:
    """A network of other code with every kind of block, converted."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(12, 12, 1), nn.BatchNorm2d(12))
            self.attention = op_by_op.CrossAttention(12)
            self.head = op_by_op.CrossScaleHead((12, 12), 5)

        def forward(self, maps: Sequence[Tensor]) -> Tensor:
            fine, coarse = self.stem(maps[0]), maps[1]
            return self.head([self.attention(fine, coarse), coarse])

    network = Network()
    report = convert_(network, kinds=("cross_attention", "cross_scale_head"))
    assert len(report.converted) == 2, report
    return network, listed, ((12, 16, 16), (12, 8, 8))


def network() -> tuple[nn.Module, Callable[..., Any], Maps]:
    from tests.models.network_support import Pyramid
    from xattn_models import SCAMTL

    outputs = {"semseg": 5, "depth": 1}
    return SCAMTL(Pyramid(), TASKS, outputs), single, ((3, 64, 96),)


def self_attention() -> tuple[nn.Module, Callable[..., Any], Maps]:
    from xattn_models.window_attention import WindowTransformer

    return WindowTransformer(12, 6, drop_path=0.0), single, ((12, 16, 24),)


SUBJECTS: dict[str, Callable[[], tuple[nn.Module, Callable[..., Any], Maps]]] = {
    "attention": cross_attention,
    "attention-softmax": lambda: cross_attention(kind="softmax", heads=2),
    "attention-stored": lambda: cross_attention(recompute=False),
    "cross-task": cross_task,
    "cross-task-softmax": lambda: cross_task(kind="softmax"),
    "cross-scale": cross_scale,
    "head": head,
    "block": basic_block,
    "converted": converted,
    "network": network,
}

WITHOUT_BATCH_NORMS = {"self-attention": self_attention}


def make(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Flat, Maps]:
    """A module with random statistics, in evaluation mode, and its inputs' shapes."""
    torch.manual_seed(seed)
    inner, arrange, maps = (SUBJECTS | WITHOUT_BATCH_NORMS)[name]()
    randomise(inner, seed)
    return Flat(inner, arrange).to(dtype).eval(), maps


def randomise(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in [*module.named_parameters(), *module.named_buffers()]:
            if name.endswith("running_var") or (x.dim() == 1 and name.endswith("weight")):
                x.copy_(torch.rand(x.shape, generator=generator) + 0.5)
            elif name.endswith(("running_mean", "bias")):
                x.copy_(0.4 * torch.rand(x.shape, generator=generator) - 0.2)


def draw(
    maps: Maps,
    *,
    batch: int = 2,
    factor: float = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
) -> tuple[Tensor, ...]:
    """Inputs whose height and width are `factor` times those of `maps`."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(batch, c, int(h * factor), int(w * factor), generator=generator, dtype=dtype)
        for c, h, w in maps
    )


def error(actual: Any, expected: Any) -> float:
    """Largest difference of corresponding tensors, relative to the largest value of each."""
    worst = 0.0
    for a, e in zip(flatten(actual), flatten(expected), strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype
        scale = max(float(e.detach().abs().max()), 1e-6)
        difference = float((a.detach() - e.detach()).abs().max()) / scale
        worst = max(worst, difference if difference == difference else float("inf"))
    return worst
