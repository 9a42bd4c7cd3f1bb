"""Operations on the rows that this process has of feature maps split over processes."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from xattn_kernels import functional
from xattn_kernels.collectives import gather, reduction
from xattn_kernels.ops.library import forbid_double_backward

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


_INSTEAD = "attention to maps that are whole can"


def set_rows(module: nn.Module, group: ProcessGroup | None) -> None:
    """Have a module and those in it take features to be rows split over `group`; None: whole."""
    handle = None if group is None or group.size() == 1 else _Rows(group)
    for part in module.modules():
        part._xattn_rows = handle  # type: ignore[assignment]


def rows_of(module: nn.Module) -> ProcessGroup | None:
    """The ranks that share the rows of the module's features, see `shard_rows`."""
    handle: _Rows | None = getattr(module, "_xattn_rows", None)
    return None if handle is None else handle.group


class _Rows:
    """A process group as an attribute of modules. Copies of a module share it."""

    def __init__(self, group: ProcessGroup) -> None:
        # Weak: a group of gloo that outlives `destroy_process_group` may abort the process's exit.
        self._group = weakref.ref(group)

    @property
    def group(self) -> ProcessGroup:
        group = self._group()
        if group is None:
            raise RuntimeError(
                "the process group over which rows are split was destroyed: call "
                "shard_rows(module, None), or shard_rows with another group"
            )
        return group

    def __deepcopy__(self, memo: dict[int, Any]) -> _Rows:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "a module of split feature maps cannot be pickled: shard_rows(module, None)"
        )


def check_rows(features: Sequence[Tensor], group: ProcessGroup | None) -> None:
    """Check that the ranks' features (B, C, H, W) are rows of the same maps; on all ranks alike.

    Nothing is checked if there is no group.

    Raises:
        ValueError: for another number of samples or columns than on other ranks, and for maps of
            which a rank has no row.
    """
    if group is None:
        return
    sizes = [(x.shape[0], x.shape[3], x.shape[2]) for x in features]
    table = gather(torch.tensor(sizes, device=features[0].device), group).unbind(dim=1)
    for i, shapes in enumerate(x.tolist() for x in table):
        if len({(b, w) for b, w, _ in shapes}) > 1 or any(h == 0 for _, _, h in shapes):
            shown = [f"B={b}, H={h}, W={w}" for b, w, h in shapes]
            raise ValueError(
                f"features, map {i}: got {shown} on the ranks that share its rows, expected the "
                "same B and W and at least one row on each"
            )


def convolve3x3(
    inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, rows: ProcessGroup | None
) -> list[Tensor]:
    """3x3 convolutions with zero padding of maps (B, C, H, W), whole or split over `rows`."""
    if rows is None:
        return [F.conv2d(x, weight, bias, padding=1) for x in inputs]
    return [F.conv2d(x, weight, bias, padding=(0, 1)) for x in with_halos(inputs, rows)]


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
def with_halos(inputs: Sequence[Tensor], rows: ProcessGroup) -> list[Tensor]:
    """Each (B, C, H + 2, W): with the last row of the rank before and the first of the next one.

    Zeros at the edges of the whole map. Differentiable; in the memory format of the input.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return list(_Halos.apply(rows, *inputs))  # type: ignore[no-untyped-call]
    return list(_Halos.forward(rows, *inputs))


class _Halos(torch.autograd.Function):
    @staticmethod
    def forward(rows: ProcessGroup, *inputs: Tensor) -> tuple[Tensor, ...]:
        neighbours = _neighbours(inputs, rows)
        return tuple(_pad(x, *pair) for x, pair in zip(inputs, neighbours, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.rows = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            own = [gradient[:, :, 1:-1].clone() for gradient in gradients]
            for x, (above, below) in zip(own, _neighbours(gradients, ctx.rows), strict=True):
                for row, neighbour in ((x[:, :, 0], above), (x[:, :, -1], below)):
                    if neighbour is not None:
                        row += neighbour
        return None, *forbid_double_backward("rows of neighbours", own, gradients, _INSTEAD)


def _pad(x: Tensor, above: Tensor | None, below: Tensor | None) -> Tensor:
    last = x.is_contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    padded = torch.empty(
        (batch, channels, height + 2, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )
    padded[:, :, 1:-1] = x
    for row, neighbour in ((padded[:, :, 0], above), (padded[:, :, -1], below)):
        row.zero_() if neighbour is None else row.copy_(neighbour)
    return padded


class _AllReduce(torch.autograd.Function):
    """Sums of states over the ranks, and of their gradients."""

    @staticmethod
    def forward(rows: ProcessGroup, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return reduction(None, rows).states(s, z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.rows = inputs[0]

    @staticmethod
    def backward(ctx: Any, s: Tensor, z: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            states = reduction(None, ctx.rows).states(s, z)
        return None, *forbid_double_backward("sums of states", states, (s, z), _INSTEAD)


def _neighbours(
    inputs: Sequence[Tensor], rows: ProcessGroup
) -> list[tuple[Tensor | None, Tensor | None]]:
    """Per input, the last row of the rank before and the first of the next; None at the edges."""
    edges = [torch.stack([x[:, :, 0], x[:, :, -1]]) for x in inputs]
    gathered = gather(torch.cat([pair.flatten() for pair in edges]), rows)
    rank, parts = dist.get_rank(rows), gathered.split([pair.numel() for pair in edges], dim=1)
    result = []
    for part, pair in zip(parts, edges, strict=True):
        above = part[rank - 1].view_as(pair)[1] if rank else None
        below = part[rank + 1].view_as(pair)[0] if rank + 1 < len(part) else None
        result.append((above, below))
    return result
