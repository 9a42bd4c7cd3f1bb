"""Operations on the rows that this process has of feature maps split over processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from xattn_kernels import functional
from xattn_kernels.distributed import gather, reduction

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def convolve3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: ProcessGroup | None
) -> Tensor:
    """3x3 convolution with zero padding of a map (B, C, H, W), or of the rows split over `rows`."""
    if rows is None:
        return F.conv2d(x, weight, bias, padding=1)
    return F.conv2d(with_halo(x, rows), weight, bias, padding=(0, 1))


@torch.compiler.disable
def linear_cross_attention(query: Tensor, key: Tensor, value: Tensor, rows: ProcessGroup) -> Tensor:
    """`functional.linear_cross_attention` of one edge whose tokens are split over `rows`."""
    _, (s, z) = functional.linear_cross_attention(query[:, :, :0], key, value, return_state=True)
    s, z = _AllReduce.apply(rows, s, z)  # type: ignore[no-untyped-call]
    output: Tensor = functional.linear_cross_attention(
        query, key[:, :, :0], value[:, :, :0], state=(s, z)
    )
    return output


@torch.compiler.disable
def with_halo(x: Tensor, rows: ProcessGroup) -> Tensor:
    """(B, C, H + 2, W): with the last row of the rank before and the first of the next one.

    Zeros at the edges of the whole map. Differentiable; in the memory format of `x`.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _Halo.apply(x, rows)  # type: ignore[no-untyped-call]
        return result
    return _Halo.forward(x, rows)


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, rows: ProcessGroup) -> Tensor:
        last = x.is_contiguous(memory_format=torch.channels_last)
        batch, channels, height, width = x.shape
        padded = torch.empty(
            (batch, channels, height + 2, width),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last if last else torch.contiguous_format,
        )
        padded[:, :, 1:-1] = x
        above, below = _neighbours(x[:, :, 0], x[:, :, -1], rows)
        for row, neighbour in ((padded[:, :, 0], above), (padded[:, :, -1], below)):
            row.zero_() if neighbour is None else row.copy_(neighbour)
        return padded

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.rows = inputs[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        own = gradient[:, :, 1:-1].clone(memory_format=torch.preserve_format)
        above, below = _neighbours(gradient[:, :, 0], gradient[:, :, -1], ctx.rows)
        for row, neighbour in ((own[:, :, 0], above), (own[:, :, -1], below)):
            if neighbour is not None:
                row += neighbour
        return own, None


class _AllReduce(torch.autograd.Function):
    """Sums of states over the ranks, and of their gradients."""

    @staticmethod
    def forward(rows: ProcessGroup, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return reduction(None, rows).states(s, z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.rows = inputs[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, s: Tensor, z: Tensor) -> tuple[None, Tensor, Tensor]:
        return None, *reduction(None, ctx.rows).states(s, z)


def _neighbours(
    first: Tensor, last: Tensor, rows: ProcessGroup
) -> tuple[Tensor | None, Tensor | None]:
    """The `last` of the rank before and the `first` of the next one; None at the edges."""
    edges = gather(torch.stack([first, last]), rows)
    rank = dist.get_rank(rows)
    above = edges[rank - 1, 1] if rank else None
    return above, edges[rank + 1, 0] if rank + 1 < len(edges) else None
