"""One way to call either attention core, as the library and as a composition of torch calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import xattn_kernels as xk
from xattn_kernels.testing import compositions
from xattn_kernels.testing.cases import Case

Slots = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Core:
    """An attention core; both functions give outputs and what comes with them in one list."""

    name: str
    library: Callable[..., list[Tensor]]
    composition: Callable[..., list[Tensor]]
    function: Callable[..., Any]
    """The public function."""


def _linear(slots: Slots, case: Case, **options: Any) -> list[Tensor]:
    outputs, state = xk.linear_cross_attention(*slots, case.schedule, return_state=True, **options)
    return [*outputs, *state]


def _linear_composition(slots: Slots, case: Case, **options: Any) -> list[Tensor]:
    outputs, state = compositions.linear_cross_attention(*slots, case.schedule, **options)
    return [*outputs, *state]


def _softmax(slots: Slots, case: Case, **options: Any) -> list[Tensor]:
    outputs, lse = xk.softmax_cross_attention(
        *slots, case.schedule, heads=case.heads, return_lse=True, **options
    )
    return [*outputs, *lse]


def _softmax_composition(slots: Slots, case: Case, **options: Any) -> list[Tensor]:
    outputs, lse = compositions.softmax_cross_attention(
        *slots, case.schedule, heads=case.heads, **options
    )
    return [*outputs, *lse]


CORES = {
    "linear": Core("linear", _linear, _linear_composition, xk.linear_cross_attention),
    "softmax": Core("softmax", _softmax, _softmax_composition, xk.softmax_cross_attention),
}


def flat(slots: Slots) -> list[Tensor]:
    """Queries, keys, values in one list."""
    return [x for group in slots for x in group]


def split(tensors: Sequence[Tensor], case: Case) -> Slots:
    """The reverse of :func:`flat`."""
    queries, keys = len(case.query_tokens), len(case.source_tokens)
    return (
        tensors[:queries],
        tensors[queries : queries + keys],
        tensors[queries + keys :],
    )


def cotangents(results: Sequence[Tensor], dtype: torch.dtype, seed: int = 7) -> list[Tensor]:
    """Gradients of results: random, the same in every dtype but for one rounding to ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in results]
    return [g.to(dtype).to(x.dtype) for g, x in zip(drawn, results, strict=True)]


def with_gradients(
    run: Callable[[Slots], list[Tensor]],
    inputs: Sequence[Tensor],
    case: Case,
    dtype: torch.dtype,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Results of ``run`` and the gradients of ``inputs`` for :func:`cotangents`."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = run(split(leaves, case))
    grads = torch.autograd.grad(results, leaves, cotangents(results, dtype), allow_unused=True)
    return [x.detach() for x in results], list(grads)


def in_other_order(slots: Slots, seed: int) -> Slots:
    """The same problem with the tokens of its sources in another order; as it is for seed 0."""
    if seed == 0:
        return slots
    query, key, value = slots
    orders = [
        torch.randperm(k.shape[2], generator=torch.Generator().manual_seed(seed + 10 * i))
        for i, k in enumerate(key)
    ]
    return (
        query,
        [k[:, :, order] for k, order in zip(key, orders, strict=True)],
        [v[:, :, order] for v, order in zip(value, orders, strict=True)],
    )
