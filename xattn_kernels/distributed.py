"""Training in several processes: batch statistics over ranks, feature maps split over ranks.

Data parallelism needs nothing from here: `torch.nn.SyncBatchNorm.convert_sync_batchnorm` and
`torch.nn.parallel.DistributedDataParallel` work as with any module. Images too large for one device
are split by rows of their feature maps: see `shard_rows`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["shard_rows", "sum_gradients"]


class Reduction:
    """How sums over tokens are completed over processes. This one: there are no others.

    All ranks have to make the same calls in the same order. What decides between ways to compute
    must therefore be the same on all of them: ask `counts`, never a rank's own sizes.
    """

    is_local: bool = True
    """Whether every method returns its arguments."""

    def counts(self, features: Sequence[Tensor]) -> list[int]:
        """Numbers of (sample, token) of each of `features` (B, C, ...), of all ranks together."""
        return [x.numel() // x.shape[1] for x in features]

    def moments(
        self, mean: Tensor, deviations: Tensor, count: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Moments of all ranks' tokens from those of each rank's.

        Args:
            mean: (P, C) of P sets of tokens; anything for a set that is empty.
            deviations: (P, C) sums of squared deviations from `mean`, or (P, C, C) of their outer
                products.
            count: (P) numbers of tokens, in the dtype of `mean`.

        Returns:
            The same for all ranks' tokens together, equal to the last bit on all ranks. Chan,
            Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample
            variances" (1979), eq. 2.1.
        """
        return mean, deviations, count

    def sums(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks that share batch statistics: for the batch norms' backward."""
        return tensor

    def states(self, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over the ranks that share the tokens: of attention states, and of their gradients."""
        return s, z


LOCAL = Reduction()


class GroupReduction(Reduction):
    """Completes sums over process groups. Deterministic.

    Args:
        statistics: ranks that share batch statistics; None: each has its own, or they are fixed.
        rows: ranks that share the tokens of each sample; None: samples are whole.
    """

    is_local = False

    def __init__(self, statistics: ProcessGroup | None, rows: ProcessGroup | None) -> None:
        self._statistics = statistics
        self._rows = rows

    def counts(self, features: Sequence[Tensor]) -> list[int]:
        own = super().counts(features)
        group = self._statistics or self._rows
        assert group is not None
        total: list[int] = sum_over(torch.tensor(own, device=features[0].device), group).tolist()
        return total

    def moments(
        self, mean: Tensor, deviations: Tensor, count: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        group = self._statistics
        if group is None:
            return mean, deviations, count
        squares = deviations.dim() == 2
        parts = [count.unsqueeze(1), mean, deviations] if squares else [count.unsqueeze(1), mean]
        widths = [part.shape[1] for part in parts]
        # In double: the squared difference of two means must not be that of their rounding errors.
        gathered = gather(torch.cat(parts, dim=1), group).double()
        counts, means, *local = gathered.split(widths, dim=2)
        means = means.where(counts > 0, 0)
        total = counts.sum(dim=0)
        share = counts / total.clamp_min(1)
        offset = means - means[:1]
        centre = means[0] + (share * offset).sum(dim=0)
        offset = means - centre
        if squares:
            merged = (local[0] + counts * offset.square()).sum(dim=0).to(mean.dtype)
        else:
            own = offset[dist.get_rank(group)]
            outer = count.double()[:, None, None] * own.unsqueeze(2) * own.unsqueeze(1)
            merged = sum_over(deviations + outer.to(mean.dtype), group)
        return centre.to(mean.dtype), merged, total.squeeze(1).to(count.dtype)

    def sums(self, tensor: Tensor) -> Tensor:
        return tensor if self._statistics is None else sum_over(tensor, self._statistics)

    def states(self, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        if self._rows is None:
            return s, z
        both = sum_over(torch.cat([s.flatten(), z.flatten()]), self._rows)
        return both[: s.numel()].view(s.shape), both[s.numel() :].view(z.shape)


def reduction(statistics: ProcessGroup | None, rows: ProcessGroup | None) -> Reduction:
    """The reduction over these groups, see `GroupReduction`."""
    return LOCAL if statistics is None and rows is None else GroupReduction(statistics, rows)


def statistics_group(norm: nn.Module, rows: ProcessGroup | None = None) -> ProcessGroup | None:
    """The ranks over which a batch norm takes batch statistics; None for this process alone.

    Those of its process group if it is a `torch.nn.SyncBatchNorm` in training, else those that
    share the rows of its input.

    Raises:
        ValueError: if the former do not contain the latter.
    """
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training:
        return rows
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group: ProcessGroup | None = norm.process_group or dist.group.WORLD
    assert group is not None
    if rows is not None:
        outside = {*dist.get_process_group_ranks(rows)} - {*dist.get_process_group_ranks(group)}
        if outside:
            raise ValueError(
                f"SyncBatchNorm: its process group lacks the ranks {sorted(outside)}, expected all "
                "that share the rows of its input"
            )
    return group if group.size() > 1 else None


def shard_rows(module: nn.Module, group: ProcessGroup | None) -> nn.Module:
    """Have attention modules take their features to be some rows of maps split over `group`.

    Rank r of the group then passes its rows of every feature map, which follow those of rank r - 1,
    and gets its rows of the outputs. Outputs and gradients are those of the whole maps: attention
    states and batch statistics are summed over the ranks, the 3x3 convolutions of residual blocks
    read the neighbours' rows. How many rows a rank has may differ between ranks and between maps;
    at least one of each. All ranks have to run forward, backward and changes between train and eval
    mode alike.

    The loss of the whole maps is the sum of the ranks' losses, and so are the gradients of the
    parameters: `sum_gradients` sums them. Under DistributedDataParallel, which averages, multiply
    the loss by the size of the group instead. Batch norms other than `torch.nn.SyncBatchNorm` use
    the statistics of the group. Softmax attention and `CrossScaleHead` need whole maps.

    Args:
        module: a `CrossAttention`, `CrossTaskAttention`, `CrossScaleAttention` or `BasicBlock`, or
            nested `ModuleList`, `ModuleDict` and `Sequential` of these.
        group: the ranks that share the rows. None: maps are whole again.

    Returns:
        `module`, changed in place.

    Raises:
        TypeError: for other modules.
        ValueError: for softmax attention, and if this process is not of the group.
    """
    from xattn_kernels import modules
    from xattn_kernels.modules.layers import BasicBlock

    supported = (
        modules.CrossAttention,
        modules.CrossTaskAttention,
        modules.CrossScaleAttention,
        BasicBlock,
    )
    if group is not None and dist.get_rank(group) < 0:
        raise ValueError("group: this process is not one of its ranks")
    stack, found = [("module", module)], []
    while stack:
        name, child = stack.pop()
        if isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            stack += [(f"{name}.{key}", x) for key, x in child.named_children()]
        elif not isinstance(child, supported):
            raise TypeError(
                f"{name}: got a {type(child).__name__}, expected one of "
                f"{[kind.__name__ for kind in supported]} or containers of these"
            )
        elif getattr(child, "kind", "linear") != "linear":
            raise ValueError(f"{name}: got kind {child.kind!r}, expected 'linear'")
        else:
            found.append(child)
    handle = None if group is None or group.size() == 1 else _Rows(group)
    for child in found:
        for part in child.modules():
            part._xattn_rows = handle  # type: ignore[assignment]
    return module


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


def sum_gradients(module: nn.Module, group: ProcessGroup | None = None) -> None:
    """Sum the parameters' gradients over ranks, in place, in one all-reduce per dtype.

    A gradient that a rank lacks counts as zero if another rank has it.

    Args:
        module: its parameters that require a gradient are the same on all ranks.
        group: the ranks; default: all.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        return
    group = group or dist.group.WORLD
    assert group is not None
    device = parameters[0].device
    present = torch.tensor([p.grad is not None for p in parameters], device=device)
    known = sum_over(present.long(), group).tolist()
    parameters = [p for p, count in zip(parameters, known, strict=True) if count]
    for dtype in dict.fromkeys(p.dtype for p in parameters):
        part = [p for p in parameters if p.dtype == dtype]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in part]
        total = sum_over(torch.cat([g.flatten() for g in gradients]), group)
        sizes = [g.numel() for g in gradients]
        for p, g, new in zip(part, gradients, total.split(sizes), strict=True):
            g.copy_(new.view_as(g))
            p.grad = g


def sum_over(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of all ranks' `x`, as a new tensor."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """(ranks, ...) from `x`, which has the same shape on all ranks."""
    # As bytes: backends differ in the dtypes that they know.
    own = x.contiguous().view(-1).view(torch.uint8)
    gathered = own.new_empty(group.size(), own.numel())
    dist.all_gather(list(gathered.unbind()), own, group=group)
    return gathered.view(x.dtype).view(group.size(), *x.shape)
