"""Sums over tokens completed over processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
