"""The pyramid projection's CUDA kernels on the host against float64."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
from xattn_kernels.engines import native_cuda
from xattn_kernels.ops.pyramid_projection import cuda as engine_module
from xattn_kernels.testing import compare

__all__ = ["test_empty", "test_nan_stays_where_it_is_seen"]

OPS = torch.ops.xattn_kernels
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATISTICS = pytest.mark.parametrize("statistics", [False, True], ids=["fixed", "batch"])
TWO = Pyramid("two", ((7, 9), (3, 4)), (5, 6), hidden=20, outputs=3)
#: Of widths as published networks have them, and odd ones.
WIDTHS = [
    Pyramid("wide_finest", ((5, 6), (3, 3)), (144, 20), hidden=70, outputs=40),
    Pyramid("narrow_finest", ((5, 7), (2, 3)), (36, 72), hidden=65, outputs=33),
    Pyramid("many_outputs", ((4, 5), (2, 2)), (17, 100), hidden=20, outputs=150),
    Pyramid("widest", ((3, 5), (2, 2)), (384, 400), hidden=40, outputs=384, batch=1),
    Pyramid("five_levels", ((8, 9), (4, 5), (2, 3), (3, 1), (1, 1)), (1, 4, 5, 6, 2), hidden=18),
    Pyramid("samples", ((1, 2), (1, 1)), (3, 2), hidden=4, outputs=2, batch=30),
    Pyramid("large", ((18, 40), (9, 20), (5, 10)), (18, 5, 3), hidden=150, outputs=21),
]
SMALL_CARD = 99 * 1024
#: Linux's MAP_NORESERVE, which Python has from 3.13 on.
NORESERVE = 0x4000


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def run(case: Pyramid, flat: Sequence[Tensor], statistics: bool = False) -> Tensor:
    return output_of(xk.pyramid_projection(*case.group(flat), batch_statistics=statistics))


def judge(case: Pyramid, dtype: torch.dtype, statistics: bool, gradients: bool = False) -> None:
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
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values(case: Pyramid, dtype: torch.dtype, statistics: bool) -> None:
    if case.name == "one_pixel" and statistics and dtype is not torch.float32:
        case = replace(case, batch=40)  # two values, normalised, are 1 and -1 or anything
    judge(case, dtype, statistics)


@STATISTICS
@pytest.mark.parametrize("case", [*CASES[:7], *CASES[8:]], ids=lambda case: case.name)
def test_gradients(case: Pyramid, statistics: bool) -> None:
    judge(case, torch.float32, statistics, gradients=True)


@pytest.mark.parametrize("processors", [1, 50])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", WIDTHS, ids=lambda case: case.name)
def test_widths_and_levels(case: Pyramid, dtype: torch.dtype, processors: int, twin: Any) -> None:
    """In large tiles, where one processor has them all, and in smaller ones."""
    twin.twin_configure(seed=1, processors=processors)
    judge(case, dtype, False)
    if case.hidden < 100:
        judge(case, dtype, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*WIDTHS, CASES[5]], ids=lambda case: case.name)
def test_cards_with_little_shared_memory(case: Pyramid, dtype: torch.dtype, twin: Any) -> None:
    twin.twin_configure(seed=2, processors=1, shared_bytes=SMALL_CARD)
    judge(case, dtype, False)
    if case.outputs < 100:
        judge(case, dtype, True)
    assert max(shared for _, _, _, shared in twin.twin_launches()) <= SMALL_CARD


@STATISTICS
@pytest.mark.parametrize("case", [FOUR, CASES[1], WIDTHS[1]], ids=lambda case: case.name)
def test_tf32(case: Pyramid, statistics: bool, tf32: None) -> None:
    """As exact as float16, which has as many bits, but for the largest error's few."""
    arguments = case.draw(torch.float32)
    exact = [x.double() for x in arguments.flat()]
    expected = evaluate(case, statistics, False)(exact, 0)[0]
    output = run(case, arguments.flat(), statistics).flatten(2)
    error = (output - expected).norm() / expected.norm()
    assert 1e-6 < error < 1e-3


@STATISTICS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_in_16_bits(dtype: torch.dtype, statistics: bool) -> None:
    """Of the stored z: where that is near 0, its rounding decides whether a gradient passes."""
    arguments = FOUR.draw(dtype)
    options = (statistics, 1e-5)
    results = OPS.pyramid_projection(*arguments, *options, True, "cuda")
    grad = cotangent(results[0])
    operands = (grad, *arguments[:-1], *results[1:], *options, [True] * 12, "cuda")
    found = OPS.pyramid_projection_backward(*operands)

    exact = FOUR.group([x.double().requires_grad_() for x in arguments.flat()])
    size = exact.features[0].shape[2:]
    z = torch.stack(
        [
            F.interpolate(torch.einsum("mc,bchw->bmhw", w, x), size=size, mode="bilinear")
            for x, w in zip(exact.features, exact.weights, strict=True)
        ]
    ).sum(dim=0)
    unit = compare.UNIT[dtype]
    stored = results[3].view_as(z).double().requires_grad_()
    assert (stored - z).norm() <= unit * z.norm()
    normalised = F.batch_norm(stored, None, None, training=True) if statistics else stored
    active = F.relu(normalised * exact.scale[:, None, None] + exact.shift[:, None, None])
    output = F.conv2d(active, exact.classifier[:, :, None, None], exact.classifier_bias)
    at_z, *of_rest = torch.autograd.grad(output, [stored, *exact[2:]], grad.double())
    expected = [*torch.autograd.grad(z, [*exact.features, *exact.weights], at_z), *of_rest]
    for x, y in zip(found, expected, strict=True):
        assert x.dtype is dtype
        assert (x.double() - y).norm() <= 3 * unit * y.norm()


def test_small_gradients_in_16_bits() -> None:
    """dz is far below what float16 holds, sums of it are not."""
    scaled = TWO.draw(torch.float16).flat()
    scaled[4] *= 2**-10  # scale
    scaled[6] *= 2**-10  # classifier
    scaled = [x.requires_grad_() for x in scaled]
    output = run(TWO, scaled)
    found = torch.autograd.grad(output, scaled[2:4], 1000 * cotangent(output))
    exact = [x.detach().double().requires_grad_() for x in scaled]
    with xk.backend("reference"):
        expected = torch.autograd.grad(
            run(TWO, exact), exact[2:4], 1000 * cotangent(output).double()
        )
    for x, y in zip(found, expected, strict=True):
        assert (x.double() - y).norm() < 2e-3 * y.norm() + 2**-24 * y.numel() ** 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_numbers_are_exact(dtype: torch.dtype) -> None:
    case = Pyramid("whole", ((5, 7), (5, 7)), (3, 4), hidden=6, outputs=2)
    leaves = [x.requires_grad_() for x in case.draw(dtype, whole=True).flat()]
    output = run(case, leaves)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    with xk.backend("reference"):
        expected = run(case, exact)
    assert torch.equal(output.double(), expected)
    ones = torch.ones_like(output)
    found = torch.autograd.grad(output, leaves, ones)
    wanted = torch.autograd.grad(expected, exact, ones.double())
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(x, y.to(dtype))


# Tensors of any strides


def misaligned(x: Tensor) -> Tensor:
    """The same values, one element from where they would be aligned."""
    memory = x.new_full((x.numel() + 1,), math.nan)
    return memory[1:].view(x.shape).copy_(x)


@STATISTICS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [*layouts(torch.zeros(1, 1, 1, 1)), "misaligned"])
def test_layouts(layout: str, dtype: torch.dtype, statistics: bool) -> None:
    """Features, weights, classifier and the output's gradient; vectors as well if misaligned."""
    case = replace(FOUR, channels=(20, 12, 5, 18), outputs=16)

    def make(x: Tensor) -> Tensor:
        return misaligned(x) if layout == "misaligned" else layouts(x)[layout]

    def results(tensors: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        output = run(case, leaves, statistics)
        return [output.detach(), *torch.autograd.grad(output, leaves[:-1], grad)]

    arguments = case.draw(dtype)
    grad = cotangent(arguments.features[0].new_empty(2, 16, 12, 16))
    expected = results(arguments.flat(), grad)
    views = Arguments(
        [make(x) for x in arguments.features],
        [w.t().contiguous().t() for w in arguments.weights],
        *arguments[2:4],
        arguments.classifier.t().contiguous().t(),
        arguments.classifier_bias,
    )
    if layout == "misaligned":
        flat = map(misaligned, arguments.flat()[4:])
        views = case.group([*views.features, *flat])
    found = results(views.flat(), make(grad))
    assert (found[0].stride(1) == 1) == layout.startswith("channels_last")
    assert torch.equal(found[0], expected[0])
    tolerance = 64 * torch.finfo(dtype).eps
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * float(y.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_in_single_precision(dtype: torch.dtype) -> None:
    arguments = TWO.draw(dtype)
    expected = xk.pyramid_projection(*arguments)
    single = [x.float() for x in arguments.flat()[2:]]
    assert torch.equal(xk.pyramid_projection(*TWO.group([*arguments.features, *single])), expected)
    leaves = [*arguments.features, *(x.requires_grad_() for x in single)]
    output, mean, var = xk.pyramid_projection(*TWO.group(leaves), batch_statistics=True)
    assert output.dtype is dtype and mean.dtype is var.dtype is torch.float32
    gradients = torch.autograd.grad(output.float().sum(), single)
    assert all(g.dtype is torch.float32 for g in gradients)


@pytest.mark.parametrize("stride", ["batch", "channel", "pixel"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_offsets_of_64_bits(stride: str, dtype: torch.dtype) -> None:
    """Elements 2^31 apart, in memory of which a few pages are ever touched."""
    case = Pyramid("far", ((1, 4), (1, 2)), (3, 2), hidden=20, outputs=3)
    arguments = case.draw(dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    memory = mmap.mmap(-1, 2 * (2 * 2**31 + 4096), flags=flags)
    numbers = torch.frombuffer(memory, dtype=dtype)
    far = []
    for i, x in enumerate(arguments.features):
        c, w = x.size(1), x.size(3)
        step = (2**31 + 8) // {"batch": 1, "channel": c - 1, "pixel": w - 1}[stride]
        strides = {
            "batch": (step, w, w, 1),
            "channel": (w, step, w, 1),
            "pixel": (c, 1, w * step, step),
        }
        far.append(numbers.as_strided(x.shape, strides[stride], 64 * i).copy_(x))
    expected = xk.pyramid_projection(*arguments)
    assert torch.equal(xk.pyramid_projection(far, *arguments[1:]), expected)


# Infinite values and NaN


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("level", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_features(dtype: torch.dtype, level: int, bad: float) -> None:
    """They reach what is interpolated from them; the rest is the same to the bit."""
    arguments = FOUR.draw(dtype)
    clean = xk.pyramid_projection(*arguments)
    arguments.features[level][1, 2, 1, 1] = bad
    output = xk.pyramid_projection(*arguments)
    with xk.backend("reference"):
        expected = xk.pyramid_projection(*arguments)
    assert not expected.isfinite().all()
    assert torch.equal(output.isnan(), expected.isnan())
    assert torch.equal(output.isposinf(), expected.isposinf())
    # What the pixel reaches, whatever the classifier makes of it.
    arguments.features[level][1, 2, 1, 1] = math.nan
    with xk.backend("reference"):
        untouched = xk.pyramid_projection(*arguments).isfinite()
    assert torch.equal(output[untouched], clean[untouched])


@pytest.mark.parametrize("which", ["weight", "classifier", "scale", "everything"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_parameters(dtype: torch.dtype, which: str) -> None:
    arguments = FOUR.draw(dtype)
    if which == "weight":
        arguments.weights[1][7, 3] = math.nan
    elif which == "classifier":
        arguments.classifier[3, 7] = math.nan
    elif which == "scale":
        arguments.scale[49] = math.nan
    else:
        for x in arguments.features:
            x.fill_(math.nan)
    output = xk.pyramid_projection(*arguments)
    with xk.backend("reference"):
        assert torch.equal(output.isnan(), xk.pyramid_projection(*arguments).isnan())
    assert output.isnan().any()


# Statistics and gradients


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
    for statistics in (False, True):
        output = run(TWO, full, statistics)
        expected = torch.autograd.grad(output, full, cotangent(output))
        for wanted in (*([i] for i in range(8)), [3, 5], [6, 7], [0, 3], [1, 2, 7]):
            leaves = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(full)]
            output = run(TWO, leaves, statistics)
            output.backward(cotangent(output))
            for i, (leaf, gradient) in enumerate(zip(leaves, expected, strict=True)):
                assert (leaf.grad is not None) == (i in wanted)
                if leaf.grad is not None:
                    torch.testing.assert_close(leaf.grad, gradient, rtol=1e-5, atol=1e-5)


def test_samples_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass of one sample at a time."""
    case = replace(TWO, batch=3)
    leaves = [x.requires_grad_() for x in case.draw(torch.float32).flat()]
    output = run(case, leaves, True)
    grad = cotangent(output)
    whole = torch.autograd.grad(output, leaves, grad, retain_graph=True)
    monkeypatch.setattr(engine_module, "_SLICE", 1)
    for x, y in zip(torch.autograd.grad(output, leaves, grad), whole, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@STATISTICS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_are_bitwise(dtype: torch.dtype, statistics: bool, twin: Any) -> None:
    """Whatever the order of threads, and wherever blocks run."""
    arguments = FOUR.draw(dtype)

    def results(seed: int, processors: int) -> list[Tensor]:
        twin.twin_configure(seed=seed, processors=processors)
        leaves = [x.detach().requires_grad_() for x in arguments.flat()]
        result = xk.pyramid_projection(*FOUR.group(leaves), batch_statistics=statistics)
        output = output_of(result)
        return [
            *(result if statistics else [output]),
            *torch.autograd.grad(output, leaves, cotangent(output)),
        ]

    expected = results(0, 4)
    for seed, processors in ((1, 4), (2, 7), (3, 132)):
        assert all(map(torch.equal, results(seed, processors), expected))


def launches(twin: Any, statistics: bool, gradient: bool) -> list[str]:
    twin.twin_configure(seed=0, processors=3)
    run(TWO, [x.requires_grad_(gradient) for x in TWO.draw(torch.float32).flat()], statistics)
    return [launch[0] for launch in twin.twin_launches()]


def test_map_is_stored_if_needed(twin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three launches; the map is neither a result nor scratch memory."""
    sizes: list[int] = []
    ask = native_cuda.Scratch.__call__

    def counted(self: native_cuda.Scratch, size: int) -> int:
        sizes.append(size)
        return ask(self, size)

    monkeypatch.setattr(native_cuda.Scratch, "__call__", counted)
    assert launches(twin, False, False) == ["pyramid_weights", "pyramid_project", "pyramid_forward"]
    assert launches(twin, False, True) == ["pyramid_weights", "pyramid_project", "pyramid_training"]
    with_statistics = ["pyramid_weights", "pyramid_project", "pyramid_training", "pyramid_moments"]
    with_statistics += ["pyramid_weights", "pyramid_classify"]
    assert launches(twin, True, False) == with_statistics
    sizes.clear()
    case = Pyramid("map", ((40, 60), (4, 6)), (3, 4), hidden=100, outputs=2, batch=1)
    with torch.no_grad():
        run(case, case.draw(torch.float32).flat())
    assert len(sizes) == 1 and sizes[0] < 4 * 100 * 40 * 60 / 10


def test_every_barrier_and_wait_is_needed(twin: Any) -> None:
    """Without one, threads race, or results change, in one order of threads or another."""
    case = Pyramid("drop", ((9, 18), (5, 9), (3, 5)), (100, 70, 5), hidden=150, outputs=20)
    kinds = ((torch.bfloat16, False), (torch.float32, True))
    inputs = [case.draw(dtype) for dtype, _ in kinds]
    inputs[0].features[1][1, 2, 3, 4] = math.nan

    def results() -> list[Tensor]:
        both = zip(inputs, kinds, strict=True)
        return [run(case, x.flat(), statistics).nan_to_num(9.0) for x, (_, statistics) in both]

    def is_seen(kind: str, file: str, line: int, seed: int) -> bool:
        twin.twin_configure(seed=seed, processors=2)
        twin.twin_drop(kind, file, line)
        try:
            return not all(map(torch.equal, results(), expected))
        except RuntimeError:
            return True

    twin.twin_configure(seed=0, processors=2)
    expected = results()
    places = [place for place in twin.twin_places() if "pyramid" in place[1]]
    assert {kind for kind, *_ in places} == {"barrier", "wait"}
    for kind, file, line, _ in places:
        assert any(is_seen(kind, file, line, seed) for seed in range(20)), (kind, file, line)


def test_refusals(twin: Any) -> None:
    with pytest.raises(RuntimeError, match="no float64"):
        xk.pyramid_projection(*TWO.draw(torch.float64))
    for wide in (replace(TWO, channels=(385, 2)), replace(TWO, outputs=385)):
        with pytest.raises(RuntimeError, match="up to 384 channels, not 385"):
            xk.pyramid_projection(*wide.draw(torch.float32))
    twin.twin_configure(seed=0, processors=1, shared_bytes=16 * 1024)
    with pytest.raises(RuntimeError, match="bytes of shared memory"):
        xk.pyramid_projection(*TWO.draw(torch.float32))
