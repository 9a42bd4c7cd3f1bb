"""Gradients of the pyramid's levels by torch, from that of z: plain products, slice by slice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class LevelGradients:
    """Gradients of features and weights, those that are wanted, from slices of samples of dz.

    The adjoint of an interpolation is a product with its matrices, along columns and then rows: so
    it is deterministic, which torch's own adjoint is not on a GPU.

    Args:
        features: (B, C_s, H_s, W_s) of every level, finest first.
        weights: (M, C_s) of every level.
        places: where the gradients of features, then of weights go; None if not wanted.
        work: element type of the products; sums over slices are float32.
    """

    def __init__(
        self,
        features: Sequence[Tensor],
        weights: Sequence[Tensor],
        places: Sequence[Tensor | None],
        work: torch.dtype,
    ) -> None:
        self.features, self.work = features, work
        levels = range(len(features))
        self.grad_features, self.grad_weights = places[: len(features)], places[len(features) :]
        self.wanted = [
            s for s in levels if not (self.grad_features[s] is self.grad_weights[s] is None)
        ]
        self.matrices = {s: weights[s].to(work) for s in self.wanted}
        self.totals = [
            None if x is None else torch.zeros_like(x, dtype=torch.float32)
            for x in self.grad_weights
        ]
        # (H_0, H_s) of every coarse level, and the (W_0, W_s) of all, side by side.
        height, columns = features[0].shape[2:]
        like = torch.empty((), dtype=work, device=features[0].device)
        coarse = [s for s in self.wanted if s > 0]
        self.lengths = {s: features[s].size(3) for s in coarse}
        self.along_rows = {s: _matrix(features[s].size(2), height, like).t() for s in coarse}
        self.along_columns = [_matrix(n, columns, like) for n in self.lengths.values()]

    def add(self, part: slice, dz: Tensor) -> None:
        """Take dz (b, M, H_0 W_0), in the type of products, of the samples ``part``."""
        fine = {0: dz} if 0 in self.wanted else {}
        if self.lengths:
            image = dz.unflatten(2, self.features[0].shape[2:])
            narrow = image @ torch.cat(self.along_columns, dim=1)
            pieces = narrow.split(list(self.lengths.values()), dim=3)
            for s, piece in zip(self.lengths, pieces, strict=True):
                fine[s] = (self.along_rows[s] @ piece).flatten(2)
        for s, dp in fine.items():
            grad_x, total = self.grad_features[s], self.totals[s]
            if grad_x is not None:
                grad_x[part] = (self.matrices[s].t() @ dp).view(grad_x[part].shape)
            if total is not None:
                product = dp @ self.features[s][part].flatten(2).transpose(1, 2).to(self.work)
                total += product.sum(dim=0, dtype=torch.float32)

    def finish(self) -> None:
        """Store the gradients of weights."""
        for place, total in zip(self.grad_weights, self.totals, strict=True):
            if place is not None and total is not None:
                place.copy_(total)


def _matrix(length: int, out: int, like: Tensor) -> Tensor:
    """(out, length): what interpolates rows of ``length`` samples to ``out`` ones."""
    unit = torch.eye(length, dtype=torch.float32, device=like.device).unsqueeze(0)
    shares = F.interpolate(unit, size=out, mode="linear", align_corners=False)
    return shares[0].t().to(like.dtype)
