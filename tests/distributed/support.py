"""What the cases in several processes share: groups, parts of whole tensors, comparisons."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from modules import support
from modules.support import tensors
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import xattn_kernels

TOLERANCE = 1e-10


@functools.cache
def group(*ranks: int) -> Any:
    """The group of these ranks. All ranks of the world have to ask for it, in the same order."""
    return dist.new_group(list(ranks))


def cuts(length: int, parts: int) -> list[int]:
    """Sizes of `parts` unequal parts, none empty unless there are too few rows."""
    generator = torch.Generator().manual_seed(length)
    inner = torch.randperm(length - 1, generator=generator)[: parts - 1].add(1).sort().values
    bounds = [0, *inner.tolist(), length]
    return [end - start for start, end in itertools.pairwise(bounds)]


def recompute(module: nn.Module, value: bool = True) -> None:
    """Set how all attention modules train."""
    for child in module.modules():
        if hasattr(child, "recompute"):
            child.recompute = value


def with_kernels(case: Callable[[], None]) -> None:
    """Run a case with the engine of choice; without, cases use `reference`."""
    with xattn_kernels.backend("auto"):
        case()


def part(value: Any, sizes: Callable[[Tensor], Sequence[int]], index: int, dim: int) -> Any:
    """Part `index` of every tensor, cut along `dim`."""

    def cut(x: Tensor) -> Tensor:
        return x.detach().split(list(sizes(x)), dim)[index].clone().requires_grad_(x.requires_grad)

    return tree_map(cut, value)


def weights(outputs: Any) -> list[Tensor]:
    """What the losses of the cases weight outputs with."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in tensors(outputs)]


def backward(outputs: Any, factors: Sequence[Tensor], scale: float = 1.0) -> None:
    pairs = zip(tensors(outputs), factors, strict=True)
    (scale * sum((y * w).sum() for y, w in pairs)).backward()


def gradients(values: Any) -> list[Tensor]:
    return [torch.zeros_like(x) if x.grad is None else x.grad for x in tensors(values)]


def same(actual: Any, expected: Any, what: str, tolerance: float = TOLERANCE) -> None:
    distance = support.distance(actual, expected)
    assert distance <= tolerance, f"{what}: relative difference {distance:.1e}"


def same_buffers(actual: nn.Module, expected: nn.Module) -> None:
    theirs = dict(expected.named_buffers())
    for name, buffer in actual.named_buffers():
        same(buffer, theirs[name], name)


def parameter_gradients(module: nn.Module, like: nn.Module | None = None) -> list[Tensor]:
    """Gradients of the parameters of `module`, in the order of those of `like`."""
    named = dict(module.named_parameters())
    names = named if like is None else dict(like.named_parameters())
    return gradients([named[name] for name in names])
