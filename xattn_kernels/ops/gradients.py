"""Gradients as they leave the package: with the strides of the tensor that they belong to.

torch's own layers go by strides: its CPU batch norm takes a gradient of one sample whose batch
stride is not the usual one for contiguous when it is not, and computes something else (seen in
torch 2.13).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xattn_kernels.ops.tracing import is_recorded

#: Dimensions of (B, C, H, W), slowest first.
CONTIGUOUS = (0, 1, 2, 3)
CHANNELS_LAST = (0, 2, 3, 1)


def with_plain_gradient(x: Tensor) -> Tensor:
    """`x`, whose gradient will be dense, with its dimensions in the order of those of `x`."""
    if not (torch.is_grad_enabled() and x.requires_grad) or is_recorded():
        return x
    result: Tensor = _PlainGradient.apply(x)  # type: ignore[no-untyped-call]
    return result


def empty_gradient(x: Tensor) -> Tensor:
    """An uninitialised gradient of `x`, dense, with its dimensions in the order of those of `x`."""
    order = memory_order(x)
    return x.new_empty([x.shape[dim] for dim in order]).permute(_inverse(order))


def memory_order(x: Tensor) -> tuple[int, ...]:
    """The dimensions of `x`, slowest first, as a dense tensor like it has them in memory.

    Strides of dimensions of size 1 count only where the others leave a choice.
    """
    shape, strides = x.shape, x.stride()
    orders = [tuple(range(x.dim()))]
    if x.dim() > 2:
        orders.append((0, *range(2, x.dim()), 1))
    for every in (True, False):
        for order in orders:
            dense = _dense_strides(shape, order)
            if all(
                a == b or (n == 1 and not every)
                for a, b, n in zip(strides, dense, shape, strict=True)
            ):
                return order
    return tuple(sorted(orders[0], key=lambda dim: -strides[dim]))


def in_order(x: Tensor, order: Sequence[int]) -> Tensor:
    """`x`, dense, its dimensions in this order in memory; copied unless it is so."""
    if x.stride() == _dense_strides(x.shape, order):
        return x
    # Not `contiguous`: it does not look at the strides of dimensions of size 1.
    copied = x.permute(tuple(order)).clone(memory_format=torch.contiguous_format)
    return copied.permute(_inverse(order))


def _dense_strides(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)


def _inverse(order: Sequence[int]) -> list[int]:
    return [order.index(dim) for dim in range(len(order))]


class _PlainGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.detach()  # no view: changes of `x` are noticed where its value is needed

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.order = memory_order(inputs[0])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Tensor | None:
        return None if gradient is None else in_order(gradient, ctx.order)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.view_as(tangent)
