"""The pyramid projection in Triton's interpreter against float64."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import xattn_kernels as xk
from tests.ops.test_pyramid_projection import (
    CASES,
    FOUR,
    Arguments,
    Pyramid,
    cotangent,
    evaluate,
    layouts,
    output_of,
    test_empty,
    test_nan_stays_where_it_is_seen,
)
from xattn_kernels.engines.triton.launch import Launch, recorded
from xattn_kernels.ops.pyramid_projection import triton as engine_module
from xattn_kernels.testing import compare

__all__ = ["test_empty", "test_nan_stays_where_it_is_seen"]

DTYPES = (torch.float32, torch.float16)
STATISTICS = pytest.mark.parametrize("statistics", [False, True], ids=["fixed", "batch"])
SMALL = [case for case in CASES if case.name not in ("many_bands", "far_coarser")]
TWO = Pyramid("two", ((7, 9), (3, 4)), (5, 6), hidden=20, outputs=3)
#: As the published network has them: pieces of 128 + 16 and of 32 + 16 channels, 32 + 16 outputs.
WIDTHS = [
    Pyramid("wide_finest", ((5, 6), (3, 3)), (144, 20), hidden=70, outputs=40),
    Pyramid("narrow_finest", ((5, 7), (2, 3)), (36, 72), hidden=65, outputs=33),
    Pyramid("many_outputs", ((4, 5), (2, 2)), (6, 5), hidden=20, outputs=150),
    Pyramid("five_levels", ((8, 9), (4, 5), (2, 3), (3, 1), (1, 1)), (3, 4, 5, 6, 2), hidden=18),
    Pyramid("samples", ((1, 2), (1, 1)), (3, 2), hidden=4, outputs=2, batch=30),
]


def run(case: Pyramid, flat: Sequence[Tensor], statistics: bool) -> Tensor:
    return output_of(xk.pyramid_projection(*case.group(flat), batch_statistics=statistics))


def judge(case: Pyramid, dtype: torch.dtype, statistics: bool, gradients: bool) -> None:
    leaves = [x.requires_grad_(gradients) for x in case.draw(dtype).flat()]
    kept = [x.detach().clone() for x in leaves]
    output = run(case, leaves, statistics)
    assert output.dtype is dtype
    results = [output.flatten(2)]
    if gradients:
        results += torch.autograd.grad(output, leaves, cotangent(output))
    truths = compare.truths(evaluate(case, statistics, gradients), leaves, dtype)
    for i, (result, truth) in enumerate(zip(results, truths, strict=True)):
        compare.check(f"result {i}", result, truth, gradient=i > 0)
    assert all(map(torch.equal, leaves, kept)), "inputs changed"


@STATISTICS
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_values_and_gradients(case: Pyramid, statistics: bool) -> None:
    judge(case, torch.float32, statistics, True)


@STATISTICS
@pytest.mark.parametrize("case", [FOUR, CASES[1]], ids=lambda case: case.name)
def test_values_in_16_bits(case: Pyramid, statistics: bool) -> None:
    judge(case, torch.float16, statistics, False)


@pytest.mark.parametrize("case", WIDTHS, ids=lambda case: case.name)
def test_widths_and_levels(case: Pyramid) -> None:
    judge(case, torch.float32, True, True)
    if case.name == "wide_finest":
        judge(case, torch.float16, False, False)


@STATISTICS
def test_gradients_in_16_bits(statistics: bool) -> None:
    """By norm: where z is near 0, its rounding decides whether a gradient passes at all."""
    leaves = [x.requires_grad_() for x in FOUR.draw(torch.float16).flat()]
    output = run(FOUR, leaves, statistics)
    found = torch.autograd.grad(output, leaves, cotangent(output))
    reference = evaluate(FOUR, statistics, True)
    exact = reference([x.double() for x in leaves], 0)[1:]
    by_op = reference(leaves, 0)[1:]
    for x, r, e in zip(found, exact, by_op, strict=True):
        assert x.dtype is torch.float16
        allowed = 3 * (e.double() - r).norm() / r.norm() + torch.finfo(torch.float16).eps
        assert (x.double() - r).norm() / r.norm() <= allowed


def test_small_gradients_in_16_bits() -> None:
    """dz is far below what float16 holds, sums of it are not."""
    leaves = [x.requires_grad_() for x in TWO.draw(torch.float16).flat()]
    scaled = [x.detach().clone() for x in leaves]
    scaled[4] *= 2**-10  # scale
    scaled[6] *= 2**-10  # classifier
    scaled = [x.requires_grad_() for x in scaled]
    output = run(TWO, scaled, False)
    found = torch.autograd.grad(output, scaled[2:4], 1000 * cotangent(output))
    exact = [x.detach().double().requires_grad_() for x in scaled]
    with xk.backend("reference"):
        expected = torch.autograd.grad(
            run(TWO, exact, False), exact[2:4], 1000 * cotangent(output).double()
        )
    for x, y in zip(found, expected, strict=True):
        assert (x.double() - y).norm() < 2e-3 * y.norm() + 2**-24 * y.numel() ** 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_numbers_are_exact(dtype: torch.dtype) -> None:
    case = Pyramid("whole", ((5, 7), (5, 7)), (3, 4), hidden=6, outputs=2)
    leaves = [x.requires_grad_() for x in case.draw(dtype, whole=True).flat()]
    output = run(case, leaves, False)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    with xk.backend("reference"):
        expected = run(case, exact, False)
    assert torch.equal(output.double(), expected)
    ones = torch.ones_like(output)
    found = torch.autograd.grad(output, leaves, ones)
    wanted = torch.autograd.grad(expected, exact, ones.double())
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(x, y.to(dtype))


@pytest.mark.parametrize("layout", list(layouts(torch.zeros(1, 1, 1, 1))))
def test_layouts(layout: str) -> None:
    """Features, weights, classifier and the output's gradient of any strides."""

    def results(tensors: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        output = run(TWO, leaves, True)
        return [output.detach(), *torch.autograd.grad(output, leaves[:-1], grad)]

    arguments = TWO.draw(torch.float32)
    grad = cotangent(arguments.features[0].new_empty(2, 3, 7, 9))
    expected = results(arguments.flat(), grad)
    views = Arguments(
        [layouts(x)[layout] for x in arguments.features],
        [w.t().contiguous().t() for w in arguments.weights],
        *arguments[2:4],
        arguments.classifier.t().contiguous().t(),
        arguments.classifier_bias,
    )
    found = results(views.flat(), layouts(grad)[layout])
    assert (found[0].stride(1) == 1) == layout.startswith("channels_last")
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5 * float(y.abs().max()))
    assert torch.equal(found[0], expected[0])


def test_parameters_in_single_precision() -> None:
    arguments = TWO.draw(torch.float16)
    expected = xk.pyramid_projection(*arguments)
    single = [x.float() for x in arguments.flat()[2:]]
    assert torch.equal(xk.pyramid_projection(*TWO.group([*arguments.features, *single])), expected)
    leaves = [*arguments.features, *(x.requires_grad_() for x in single)]
    output, mean, var = xk.pyramid_projection(*TWO.group(leaves), batch_statistics=True)
    assert output.dtype is torch.float16 and mean.dtype is var.dtype is torch.float32
    gradients = torch.autograd.grad(output.float().sum(), single)
    assert all(g.dtype is torch.float32 for g in gradients)


def test_statistics_far_from_zero() -> None:
    """Mean 100, standard deviation 1."""
    case = Pyramid("far", ((11, 13), (4, 5)), (6, 5), hidden=20, outputs=2)
    arguments = case.draw(torch.float32)
    for x in arguments.features:
        x.add_(100.0)
    _, mean, var = xk.pyramid_projection(*arguments, batch_statistics=True)
    exact = [x.double() for x in arguments.flat()]
    with xk.backend("reference"):
        _, exact_mean, exact_var = xk.pyramid_projection(*case.group(exact), batch_statistics=True)
    eps = torch.finfo(torch.float32).eps
    size = float(exact_mean.abs().max())
    torch.testing.assert_close(mean.double(), exact_mean, rtol=0, atol=8 * eps * size)
    noise = 64 * eps * (size * float(exact_var.max().sqrt()) + float(exact_var.max()))
    torch.testing.assert_close(var.double(), exact_var, rtol=0, atol=noise)


def test_some_gradients() -> None:
    full = [x.requires_grad_() for x in TWO.draw(torch.float32).flat()]
    output = run(TWO, full, True)
    expected = torch.autograd.grad(output, full, cotangent(output))
    for wanted in ([0], [1], [2], [3, 5], [4], [6, 7], [0, 3], [1, 2, 7]):
        leaves = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(full)]
        output = run(TWO, leaves, True)
        output.backward(cotangent(output))
        for i, (leaf, gradient) in enumerate(zip(leaves, expected, strict=True)):
            assert (leaf.grad is not None) == (i in wanted)
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad, gradient, rtol=1e-5, atol=1e-5)


def test_samples_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass of one sample at a time, and the same bits over and over."""
    case = replace(TWO, batch=3)
    leaves = [x.requires_grad_() for x in case.draw(torch.float32).flat()]
    output = run(case, leaves, True)
    grad = cotangent(output)
    first, again = (torch.autograd.grad(output, leaves, grad, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, again))
    monkeypatch.setattr(engine_module, "_SLICE", 1)
    for x, y in zip(torch.autograd.grad(output, leaves, grad), first, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def launches(statistics: bool, gradient: bool) -> list[Launch]:
    leaves = [x.requires_grad_(gradient) for x in TWO.draw(torch.float32).flat()]
    with recorded() as found:
        run(TWO, leaves, statistics)
    return found


@STATISTICS
def test_no_gradient_stores_nothing(statistics: bool) -> None:
    kept = launches(statistics, True)
    assert sum(launch.constants.get("STORE", False) for launch in kept) == 1
    found = launches(statistics, False)
    assert len(found) == (3 if statistics else 2)
    assert not any(launch.constants.get("STORE", False) for launch in found)
    assert all(launch.constants["PROJECT"] for launch in found[1:])


def test_offsets_of_64_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Features 2^31 elements apart, in a file with holes; all other offsets as wide by request."""
    arguments = TWO.draw(torch.float32)
    expected = xk.pyramid_projection(*arguments)
    path = tmp_path / "memory"
    with path.open("wb") as file:
        file.truncate(4 * (2 * 2**31 + 4096))
    with path.open("r+b") as file:
        memory = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.float32)
    step = (2**31 + 8) // 4
    far = [
        memory.as_strided(x.shape, (x[0, 0].numel(), step, x.size(3), 1), 512 * i).copy_(x)
        for i, x in enumerate(arguments.features)
    ]
    assert torch.equal(xk.pyramid_projection(far, *arguments[1:]), expected)
    launch = engine_module.launch

    def wide(*args: Any, **constants: Any) -> None:
        launch(*args, **{k: v or k.endswith("_WIDE") for k, v in constants.items()})

    monkeypatch.setattr(engine_module, "launch", wide)
    assert torch.equal(xk.pyramid_projection(*arguments), expected)


def test_refusals() -> None:
    with pytest.raises(RuntimeError, match="no float64"):
        xk.pyramid_projection(*TWO.draw(torch.float64))
    wide = replace(TWO, channels=(385, 2))
    with pytest.raises(RuntimeError, match="up to 384 channels, not 385"):
        xk.pyramid_projection(*wide.draw(torch.float32))
