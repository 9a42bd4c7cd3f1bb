"""Strides, offsets, alignment and aliases: the values are what they are wherever they lie."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import xattn_kernels as xk
from xattn_kernels.schedule import Schedule
from xattn_kernels.testing.cases import DTYPES, LAYOUTS, Case

from .harness import Core, cotangents, flat, split, with_gradients

CASE = Case("ragged", Schedule.cross_scale(3), (70, 24, 9), (70, 24, 9), channels=18)


def results_and_gradients(core: Core, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    results, grads = with_gradients(lambda slots: core.library(slots, CASE), inputs, CASE, dtype)
    return results + [g for g in grads if g is not None]


def assert_same(engine: str, results: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(results, expected, strict=True):
        if engine == "reference":  # torch's matrix products depend on strides
            tolerance = 32 * torch.finfo(x.dtype).eps
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_views(engine: str, core: Core, layout: str, dtype: torch.dtype) -> None:
    inputs = flat(CASE.tensors(dtype))
    expected = results_and_gradients(core, inputs, dtype)
    views = [LAYOUTS[layout](x) for x in inputs]
    assert all(torch.equal(x, y) for x, y in zip(views, inputs, strict=True))
    assert_same(engine, results_and_gradients(core, views, dtype), expected)


def test_views_of_different_layouts(engine: str, core: Core) -> None:
    inputs = flat(CASE.tensors(torch.float32))
    expected = results_and_gradients(core, inputs, torch.float32)
    views = [
        make(x)
        for x, make in zip(inputs, itertools.cycle(list(LAYOUTS.values())[1:]), strict=False)
    ]
    assert_same(engine, results_and_gradients(core, views, torch.float32), expected)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_expanded_inputs(engine: str, core: Core, dim: int) -> None:
    narrow = [x.narrow(dim, 0, 1) for x in flat(CASE.tensors(torch.float32))]
    whole = flat(CASE.tensors(torch.float32))
    expanded = [x.expand(y.shape) for x, y in zip(narrow, whole, strict=True)]
    copied = [x.contiguous() for x in expanded]
    expected = results_and_gradients(core, copied, torch.float32)
    assert_same(engine, results_and_gradients(core, expanded, torch.float32), expected)

    # The gradient of what was expanded is the sum over what it was expanded to.
    leaves = [x.clone().requires_grad_() for x in narrow]
    results = core.library(
        split([x.expand(y.shape) for x, y in zip(leaves, whole, strict=True)], CASE), CASE
    )
    grads = torch.autograd.grad(
        results, leaves, cotangents(results, torch.float32), allow_unused=True
    )
    full = iter(expected[len(results) :])
    for grad in grads:
        if grad is not None:
            torch.testing.assert_close(grad, next(full).sum(dim, keepdim=True))


def transposed(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def slice_of_concat(x: Tensor) -> Tensor:
    return torch.cat([x.new_full(x.shape, float("nan")), x], dim=1)[:, x.shape[1] :]


@pytest.mark.parametrize("layout", [transposed, slice_of_concat, LAYOUTS["stepped"]])
def test_layouts_of_gradients(engine: str, core: Core, layout: object) -> None:
    assert callable(layout)
    inputs = [x.requires_grad_() for x in flat(CASE.tensors(torch.float32))]
    results = core.library(split(inputs, CASE), CASE)[: CASE.schedule.num_outputs]
    grads = cotangents(results, torch.float32)
    expected = torch.autograd.grad(results, inputs, grads, retain_graph=True, allow_unused=True)
    given = torch.autograd.grad(results, inputs, [layout(g) for g in grads], allow_unused=True)
    used = [(x, y) for x, y in zip(given, expected, strict=True) if y is not None]
    assert_same(engine, [x for x, _ in used], [y for _, y in used])


def test_expanded_gradients(engine: str, core: Core) -> None:
    inputs = [x.requires_grad_() for x in flat(CASE.tensors(torch.float32))]
    results = core.library(split(inputs, CASE), CASE)
    ones = [torch.ones_like(x) for x in results]
    expected = torch.autograd.grad(results, inputs, ones, retain_graph=True, allow_unused=True)
    sums = sum(x.sum() for x in results)
    given = torch.autograd.grad(sums, inputs, allow_unused=True)
    used = [(x, y) for x, y in zip(given, expected, strict=True) if y is not None]
    assert_same(engine, [x for x, _ in used], [y for _, y in used])


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 5])
def test_alignment(engine: str, core: Core, offset: int) -> None:
    inputs = flat(CASE.tensors(torch.float32))
    aligned = results_and_gradients(core, inputs, torch.float32)
    shifted = []
    for x in inputs:
        memory = torch.full((x.numel() + offset,), float("nan"))
        memory[offset:] = x.flatten()
        shifted.append(memory[offset:].view_as(x))
    assert_same(engine, results_and_gradients(core, shifted, torch.float32), aligned)


def test_one_tensor_as_query_key_and_value(engine: str, core: Core) -> None:
    x = torch.randn(2, 12, 40)
    kept = x.clone()
    torch.testing.assert_close(core.function(x, x, x), core.function(x, x.clone(), x.clone()))
    assert torch.equal(x, kept)
    # Its gradient is the sum of those it has in its three places.
    y = x.clone().requires_grad_()
    places = [x.clone().requires_grad_() for _ in range(3)]
    g = torch.randn(2, 12, 40)
    together = torch.autograd.grad(core.function(y, y, y), y, g)[0]
    apart = torch.autograd.grad(core.function(*places), places, g)
    torch.testing.assert_close(together, apart[0] + apart[1] + apart[2])


def test_images(engine: str, core: Core) -> None:
    query, key, value = torch.randn(2, 6, 5, 7), torch.randn(2, 6, 4, 3), torch.randn(2, 10, 4, 3)
    expected = core.function(query.flatten(2), key.flatten(2), value.flatten(2))
    output = core.function(query, key, value)
    assert output.shape == (2, 10, 5, 7)
    assert output.is_contiguous()
    assert torch.equal(output.flatten(2), expected)
    last = [x.to(memory_format=torch.channels_last) for x in (query, key, value)]
    output = core.function(*last)
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output.flatten(2), expected)
    # No common stride of the spatial dimensions: copied, and right.
    cropped = torch.randn(2, 6, 9, 9)[:, :, 2:7, 1:8].copy_(query)
    torch.testing.assert_close(core.function(cropped, key, value).flatten(2), expected)


def test_gradients_have_the_memory_format_of_their_inputs(core: Core) -> None:
    with xk.backend("cpu"):
        inputs = [
            torch.randn(2, 6, 5, 7).to(memory_format=torch.channels_last).requires_grad_()
            for _ in range(3)
        ]
        core.function(*inputs).sum().backward()
    for x in inputs:
        assert x.grad is not None
        assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_negative_bit(engine: str, core: Core) -> None:
    # The imaginary part of a conjugate is a view whose sign is still to be applied.
    z = torch.randn(2, 8, 20, dtype=torch.complex64)
    lazy = z.conj().imag
    assert lazy.is_neg()
    expected = core.function(*[lazy.resolve_neg()] * 3)
    torch.testing.assert_close(core.function(lazy, lazy, lazy), expected)
