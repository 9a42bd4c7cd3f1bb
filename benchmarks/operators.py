"""The operators on cases: operands, this library's call, and what it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from xattn_kernels.functional import (
    cross_attention_block,
    linear_cross_attention,
    pack_block_weights,
    softmax_cross_attention,
)
from xattn_kernels.testing import compositions
from xattn_kernels.testing.cases import Case
from xattn_kernels.testing.compare import check

from .checks import truths_in_one_order

LINEAR, SOFTMAX, BLOCK = "linear core", "softmax core", "cross-attention block"
OPERATORS = (LINEAR, SOFTMAX, BLOCK)

Tensors = list[Tensor]
Attend = Callable[[Sequence[Tensor]], Tensors]


def operands(
    operator: str, case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Tensors:
    """Queries, then keys, then values; for the block features alone."""
    query, key, value = case.tensors(dtype, device=device)
    return key if operator == BLOCK else [*query, *key, *value]


def split(case: Case, tensors: Sequence[Tensor]) -> tuple[Tensors, Tensors, Tensors]:
    """Queries, keys and values."""
    queries, sources = len(case.query_tokens), len(case.source_tokens)
    xs = list(tensors)
    return xs[:queries], xs[queries : queries + sources], xs[queries + sources :]


def ours(
    operator: str, case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Attend:
    """This library's call. The block has its weights packed already."""
    if operator == LINEAR:
        return lambda xs: linear_cross_attention(*split(case, xs), case.schedule)
    if operator == SOFTMAX:
        return lambda xs: softmax_cross_attention(*split(case, xs), case.schedule)
    weight, bias = (x.to(device) for x in block_weights(case))
    packed = pack_block_weights(weight, bias, dtype)
    return torch.no_grad()(
        lambda xs: cross_attention_block(list(xs), weight, bias, case.schedule, packed=packed)
    )


def composed(operator: str, case: Case) -> Attend:
    """The same from calls of torch, in the dtype of what it is given, on the CPU."""
    if operator == LINEAR:
        return lambda xs: compositions.linear_cross_attention(*split(case, xs), case.schedule)[0]
    if operator == SOFTMAX:
        return lambda xs: compositions.softmax_cross_attention(*split(case, xs), case.schedule)[0]
    weight, bias = block_weights(case)

    def block(xs: Sequence[Tensor]) -> Tensors:
        return compositions.cross_attention_block(
            list(xs), weight.to(xs[0].dtype), bias.to(xs[0].dtype), case.schedule
        )

    return torch.no_grad()(block)


def block_weights(case: Case) -> tuple[Tensor, Tensor]:
    """Weight (W, 5, C, C) and bias (W, 5, C) of the block, folded."""
    generator = torch.Generator().manual_seed(1)
    c, sets = case.channels, case.schedule.num_weights
    weight = torch.randn(sets, 5, c, c, generator=generator) * c**-0.5
    return weight, 0.1 * torch.randn(sets, 5, c, generator=generator)


def gradient_of(outputs: Sequence[Tensor]) -> Tensors:
    """One gradient per output, the same in every dtype and on every device."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in outputs]


# Zeros for slots without an edge.
_gradients = partial(torch.autograd.grad, materialize_grads=True)


def forward(attend: Attend, xs: Sequence[Tensor]) -> Callable[[], Tensors]:
    """A call without gradients."""
    return torch.no_grad()(partial(attend, xs))


def both(attend: Attend, xs: Sequence[Tensor]) -> Callable[[], Tensors]:
    """A call of forward and backward: outputs, then gradients."""
    leaves = [x.detach().requires_grad_() for x in xs]
    with torch.no_grad():
        gradients = gradient_of(attend(xs))

    def call() -> Tensors:
        outputs = attend(leaves)
        return [*outputs, *_gradients(outputs, leaves, gradients)]

    return call


def backward(attend: Attend, xs: Sequence[Tensor]) -> Callable[[], Sequence[Tensor]]:
    """A call of backward alone, of a forward pass that has run."""
    leaves = [x.detach().requires_grad_() for x in xs]
    outputs = attend(leaves)
    gradients = gradient_of(outputs)
    return lambda: _gradients(outputs, leaves, gradients, retain_graph=True)


class Judge:
    """Accepts what ways return for operands: outputs, or outputs and gradients."""

    def __init__(self, attend: Attend, xs: Sequence[Tensor], *, gradients: bool) -> None:
        self._outputs = 0

        def evaluate(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
            results = (both if gradients else forward)(attend, inputs)()
            self._outputs = len(results) - len(inputs) * gradients
            return results

        self._truths = truths_in_one_order(evaluate, [x.cpu() for x in xs], xs[0].dtype)

    def __call__(self, name: str, results: Sequence[Tensor]) -> None:
        """Accept all results.

        Raises:
            AssertionError: if one is not accepted.
        """
        expected = (self._outputs, len(self._truths))
        if len(results) not in expected:
            raise AssertionError(f"{name}: {len(results)} results, expected {expected}")
        for number, (x, truth) in enumerate(zip(results, self._truths, strict=False)):
            check(f"{name}, result {number}", x, truth, gradient=number >= self._outputs)
