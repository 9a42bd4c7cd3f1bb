"""When a result is accepted.

A result x is compared with R, computed in float64 from the same, already rounded inputs. How much
it may differ is measured, not guessed: E is the op-by-op evaluation in the dtype of x that is
farthest off among a few that add in different orders. With u the unit roundoff of the dtype:

* NaN and infinities stand exactly where R, rounded to the dtype, has them.
* max|x - R| <= m max|E - R| + f max|R|, with m = 2 for outputs and 3 for gradients.
* The L2 error of every sample and tile of 64 tokens, relative to the tile, is at most twice that
  of E's worst tile, or f, or twice that of R rounded to the dtype, and never above :data:`WORST`.
  Where an evaluation in float32 is above that too, the values cancel, and nothing that computes in
  float32 can do better: there it counts, eightfold, as both are noise.

f is 2u for 16-bit results, which are rounded once from float32. It is 16u for float32 and 128u for
float64: in small problems an op-by-op evaluation rounds less than a kernel, which recomputes, and
R itself is no better than float64.

In float64 E is as exact as R: the error of a float32 evaluation, scaled by the ratio of the unit
roundoffs, stands in for that of E.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: Unit roundoff.
UNIT = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
#: Largest relative L2 error of any tile, whatever E does.
WORST = {
    torch.float64: 1e-13,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}
#: What is accepted whatever E does, relative to the largest value or to a tile: f above.
FLOOR = {
    torch.float64: 128 * UNIT[torch.float64],
    torch.float32: 16 * UNIT[torch.float32],
    torch.float16: 2 * UNIT[torch.float16],
    torch.bfloat16: 2 * UNIT[torch.bfloat16],
}
TILE = 64
#: Evaluations of which the farthest off counts.
ORDERS = 4

Evaluation = Callable[[Sequence[Tensor], int], Sequence[Tensor]]


class Truth(NamedTuple):
    """What a result is compared with: R, and how far other evaluations are from it."""

    exact: Tensor
    by_op: Tensor
    """|E - R|; 0 where E overflows."""
    single: Tensor
    """The same of float32 evaluations (for float64 results, of their stand-ins)."""


def truths(evaluate: Evaluation, inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Truth]:
    """Evaluate op by op what results in ``dtype`` of ``inputs`` are to be compared with.

    Args:
        evaluate: gives the results of inputs in the dtype of those, adding in an order that
            depends on the seed that is its second argument.
        inputs: tensors of ``dtype``.
        dtype: that of the results to be judged.
    """
    exact = [x.detach() for x in evaluate([x.double() for x in inputs], 0)]

    def farthest(dtype: torch.dtype) -> list[Tensor]:
        converted = [x.to(dtype) for x in inputs]
        runs = [evaluate(converted, seed) for seed in range(ORDERS)]
        return [
            torch.stack([_error(run[i].detach().double(), r) for run in runs]).amax(dim=0)
            for i, r in enumerate(exact)
        ]

    single = farthest(torch.float32)
    by_op = single if dtype is torch.float32 else farthest(dtype)
    if dtype is torch.float64:
        by_op = single = [x * (UNIT[torch.float64] / UNIT[torch.float32]) for x in single]
    return [Truth(*values) for values in zip(exact, by_op, single, strict=True)]


def check(name: str, result: Tensor, truth: Truth, *, gradient: bool = False) -> None:
    """Accept ``result`` or raise AssertionError.

    Args:
        name: what is compared, for the message.
        result: x, in its own dtype. If it is 3-D, its last dimension is tokens.
        truth: R and what is known about rounding.
        gradient: whether x is a gradient.
    """
    dtype = result.dtype
    if result.shape != truth.exact.shape:
        raise AssertionError(
            f"{name}: shape {tuple(result.shape)}, expected {tuple(truth.exact.shape)}"
        )
    x, exact = result.detach().cpu().double(), truth.exact.detach()
    rounded = exact.to(dtype).double()
    finite = rounded.isfinite()
    if not torch.equal(x.isfinite(), finite):
        wrong = (x.isfinite() != finite).sum().item()
        raise AssertionError(f"{name}: {wrong} elements are finite in one of x and R only")
    if not torch.equal(x[~finite].nan_to_num(), rounded[~finite].nan_to_num()):
        raise AssertionError(f"{name}: infinities or NaN of another kind than in R")

    error = _error(x, exact)
    size = exact.abs().where(finite, 0.0)
    if size.numel() == 0:
        return
    largest, by_op = size.max(), truth.by_op.where(finite, 0.0).max()
    bound = (3 if gradient else 2) * by_op + FLOOR[dtype] * largest + _quantum(dtype)
    if error.max() > bound:
        raise AssertionError(
            f"{name}: largest error {error.max():.3e}, allowed {bound:.3e} "
            f"(op by op {by_op:.3e}, largest value {largest:.3e})"
        )
    if size.dim() == 3:
        _check_tiles(name, error, _error(rounded, exact), truth, size, dtype)


def _check_tiles(
    name: str, error: Tensor, rounding: Tensor, truth: Truth, size: Tensor, dtype: torch.dtype
) -> None:
    lengths = _by_tile(size)
    # A tile of zeros is left to the bound of the largest error.
    relative, rounding, by_op, single = (
        torch.where(lengths > 0, _by_tile(y.where(size > 0, 0.0)) / lengths, 0.0)
        for y in (error, rounding, truth.by_op, truth.single)
    )
    worst = torch.tensor(WORST[dtype], dtype=torch.float64)
    bound = 2 * torch.maximum(rounding, by_op.max()).clamp_min(FLOOR[dtype] / 2)
    bound = torch.minimum(bound, torch.maximum(2 * rounding, worst))
    bound = torch.where(single > worst, torch.maximum(bound, 8 * single), bound)
    bad = (relative > bound).nonzero()
    if len(bad):
        b, tile = bad[0].tolist()
        raise AssertionError(
            f"{name}: sample {b}, tokens from {tile * TILE}: relative L2 error "
            f"{relative[b, tile]:.3e}, allowed {bound[b, tile]:.3e} (op by op "
            f"{by_op[b, tile]:.3e})"
        )


def _error(x: Tensor, exact: Tensor) -> Tensor:
    return torch.where(exact.isfinite() & x.isfinite(), x - exact, 0.0).abs()


def _quantum(dtype: torch.dtype) -> float:
    """Smallest positive number: what rounding may cost where R is subnormal."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def _by_tile(x: Tensor) -> Tensor:
    """(B, C, N) -> (B, tiles): L2 norm of every sample and tile of tokens."""
    padding = -x.shape[2] % TILE
    tiles = torch.nn.functional.pad(x, (0, padding)).unflatten(2, (-1, TILE))
    lengths: Tensor = tiles.norm(dim=(1, 3))
    return lengths
