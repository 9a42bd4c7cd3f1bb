"""Gradients as others meet them: their strides, their second derivatives, batches of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import xattn_kernels as xk
from xattn_kernels.modules import CrossAttention, CrossScaleAttention, CrossTaskAttention

from . import subjects
from .subjects import SUBJECTS, draw

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "made-up batch stride": lambda x: x.as_strided(x.shape, (x.shape[1], *x.stride()[1:])),
    "channels together, made-up batch stride": lambda x: (
        x.permute(0, 2, 3, 1)
        .contiguous()
        .permute(0, 3, 1, 2)
        .as_strided(x.shape, (x.shape[1], 1, x.shape[3] * x.shape[1], x.shape[1]))
    ),
}


def usual_strides(x: Tensor) -> tuple[int, ...]:
    """Of a new tensor in the memory format of `x`."""
    last = x.stride(1) == 1 and x.shape[1] > 1
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(x.shape, memory_format=layout).stride()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [n for n in SUBJECTS if n not in ("converted", "network")])
def test_strides_at_batch_1(name: str, layout: str, training: bool) -> None:
    module, maps = subjects.make(name)
    module.train(training)
    x = [LAYOUTS[layout](y).requires_grad_() for y in draw(maps, batch=1)]
    outputs = module(*x)
    gradients = torch.autograd.grad(sum(y.square().sum() for y in outputs), x)
    for y, gradient in zip(x, gradients, strict=True):
        assert gradient.stride() == usual_strides(y)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("engine", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["attention", "stored", "softmax", "auxiliary", "scales"])
def test_between_batch_norms_at_batch_1(name: str, engine: str, channels_last: bool) -> None:
    """Convolution and batch norm before and behind, against finite differences."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"stored": {"recompute": False}, "softmax": {"kind": "softmax"}}.get(
        name, {}
    )
    before = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)).double()
    after = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)).double()
    x, s = (torch.randn(1, c, 8, 8, dtype=torch.float64) for c in (3, 8))
    if channels_last:
        before, after = (m.to(memory_format=torch.channels_last) for m in (before, after))
        x = x.contiguous(memory_format=torch.channels_last)
    if name == "auxiliary":
        inner: nn.Module = CrossTaskAttention(["a"], 8, ["a", "b", "c"]).double()
        weight = torch.randn(1, 8, 8, 8, dtype=torch.float64)

        def attended(z: Tensor) -> Tensor:
            return inner({"a": s, "b": z, "c": z * 0.5})["a"]

    elif name == "scales":
        inner = CrossScaleAttention([8, 1]).double()
        weight = torch.randn(1, 8, 8, 8, dtype=torch.float64)

        def attended(z: Tensor) -> Tensor:
            return inner([z, z.mean(dim=1, keepdim=True)])[0][0]

    else:
        inner = CrossAttention(8, **options).double()
        weight = torch.randn(1, 8, 8, 8, dtype=torch.float64)

        def attended(z: Tensor) -> Tensor:
            return inner(z, s) + inner(s, z)

    for module in (before, inner, after):
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.momentum = 0.0

    def loss() -> Tensor:
        return (after(attended(before(x))) * weight).sum()

    with xk.backend(engine):
        (found,) = torch.autograd.grad(loss(), before[0].weight)
        with torch.no_grad():
            for index in ((0, 0, 0, 0), (3, 1, 2, 0), (7, 2, 1, 1)):
                ends = []
                for step in (1e-5, -1e-5):
                    before[0].weight[index] += step
                    ends.append(float(loss()))
                    before[0].weight[index] -= step
                difference = (ends[0] - ends[1]) / 2e-5
                assert abs(float(found[index]) - difference) <= 1e-5 * float(found.abs().max())


def second_derivatives(module: nn.Module, x: tuple[Tensor, ...], route: str) -> None:
    """Differentiate gradients again, by one of several routes."""
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    leaves = [y.requires_grad_() for y in x]
    loss = factor * sum(y.square().mean() for y in module(*leaves))
    if route == "inputs":
        (g, *_) = torch.autograd.grad(loss, leaves, create_graph=True)
        torch.autograd.grad(g.square().sum(), leaves[-1], allow_unused=True)
    elif route == "what it is multiplied with":
        (g, *_) = torch.autograd.grad(loss, leaves, create_graph=True)
        (second,) = torch.autograd.grad(g.norm(), factor)
        assert abs(float(second) - float(g.norm())) <= 1e-9 * float(g.norm())
    elif route == "parameters":
        parameters = [p for p in module.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        total = sum(g.square().sum() for g in gradients if g is not None)
        (second,) = torch.autograd.grad(total, factor)
        assert abs(float(second) - 2 * float(total)) <= 1e-8 * float(total)
    else:
        loss.backward(create_graph=True)
        sum(y.grad.square().sum() for y in leaves).backward()


ROUTES = ("inputs", "what it is multiplied with", "parameters", "backward")
ATTENTION = ("attention", "attention-softmax", "attention-stored", "cross-task", "cross-scale")


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", [*ATTENTION, "cross-task-softmax", "head"])
def test_second_derivatives_of_kernels_are_refused(name: str, route: str) -> None:
    module, maps = subjects.make(name, dtype=torch.float64)
    with (
        xk.backend("cpu"),
        pytest.raises(NotImplementedError, match=r"cannot be differentiated twice: .* can$"),
    ):
        second_derivatives(module.train(), draw(maps, dtype=torch.float64), route)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", [*ATTENTION, "cross-task-softmax", "head", "block"])
def test_second_derivatives_of_plain_pytorch(name: str, route: str) -> None:
    module, maps = subjects.make(name, dtype=torch.float64)
    with xk.backend("reference"):
        second_derivatives(module.train(), draw(maps, dtype=torch.float64), route)


def test_second_derivatives_are_right() -> None:
    module = CrossAttention(4, recompute=False).double()
    x, y = (torch.randn(1, 4, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with xk.backend("reference"):
        assert torch.autograd.gradgradcheck(lambda *z: module(*z), (x, y))


@pytest.mark.parametrize("name", ["attention", "attention-softmax", "head"])
def test_batched_gradients(name: str) -> None:
    """`is_grads_batched`, as `torch.autograd.functional.jacobian(vectorize=True)` has them."""
    module, maps = subjects.make(name)
    leaves = [y.requires_grad_() for y in draw(maps)]
    with xk.backend("reference"):
        (output, *_) = module(*leaves)
        rows = torch.randn(3, *output.shape)
        found = torch.autograd.grad(output, leaves, rows, is_grads_batched=True, retain_graph=True)
        for i, row in enumerate(rows):
            expected = torch.autograd.grad(output, leaves, row, retain_graph=True)
            for x, y in zip(found, expected, strict=True):
                torch.testing.assert_close(x[i], y, rtol=1e-3, atol=1e-4)
    (output, *_) = module(*leaves)
    with pytest.raises(NotImplementedError, match=r"one gradient at a time.*reference"):
        torch.autograd.grad(output, leaves, rows, is_grads_batched=True)


@pytest.mark.parametrize("engine", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("kind", "lse"), [("linear", False), ("softmax", False), ("softmax", True)]
)
def test_negative_bit(kind: str, lse: bool, engine: str) -> None:
    """Gradients and inputs that are minus what stands in their memory."""
    torch.manual_seed(0)

    def negative(x: Tensor) -> Tensor:
        """`x` in another form."""
        y = torch.complex(torch.zeros_like(x), -x).conj().imag
        assert y.is_neg()
        return y

    def run(*slots: Tensor) -> Tensor:
        if kind == "linear":
            return xk.linear_cross_attention(*slots)
        output, sums = xk.softmax_cross_attention(*slots, return_lse=True)
        return sums if lse else output

    slots = [torch.randn(2, 4, 6, dtype=torch.float64) for _ in range(3)]
    with xk.backend(engine):
        for which in itertools.product([False, True], repeat=3):
            inputs = [negative(x) if w else x for x, w in zip(slots, which, strict=True)]
            torch.testing.assert_close(run(*inputs), run(*slots))
        leaves = [x.requires_grad_() for x in slots[: 2 if lse else 3]]
        output = run(*slots)
        weight = torch.randn_like(output)
        expected = torch.autograd.grad(output, leaves, weight, retain_graph=True)
        found = torch.autograd.grad(output, leaves, negative(weight))
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y)
