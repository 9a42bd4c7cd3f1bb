"""The pyramid projection: values, gradients, layouts, statistics, memory, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import xattn_kernels as xk
from xattn_kernels import flops
from xattn_kernels.testing import compare, compositions
from xattn_kernels.testing.cases import DTYPES

EXACT = (torch.float32, torch.float64)


class Arguments(NamedTuple):
    """What the operator takes, in its order."""

    features: list[Tensor]
    weights: list[Tensor]
    scale: Tensor
    shift: Tensor
    classifier: Tensor
    classifier_bias: Tensor

    def flat(self) -> list[Tensor]:
        return [*self.features, *self.weights, *self[2:]]


@dataclass(frozen=True)
class Pyramid:
    """Sizes of a problem."""

    name: str
    sizes: tuple[tuple[int, int], ...]
    channels: tuple[int, ...]
    hidden: int = 50
    outputs: int = 7
    batch: int = 2

    def draw(self, dtype: torch.dtype, whole: bool = False) -> Arguments:
        """Random arguments; small whole numbers if asked for."""
        generator = torch.Generator().manual_seed(0)

        def make(*shape: int, fan: int = 1) -> Tensor:
            if whole:
                return torch.randint(-2, 3, shape, generator=generator).to(dtype)
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            return (x * fan**-0.5).to(dtype)

        levels = list(zip(self.channels, self.sizes, strict=True))
        return Arguments(
            [make(self.batch, c, *size) for c, size in levels],
            [make(self.hidden, c, fan=sum(self.channels)) for c, _ in levels],
            make(self.hidden),
            make(self.hidden),
            make(self.outputs, self.hidden, fan=self.hidden),
            make(self.outputs),
        )

    def group(self, flat: Any) -> Arguments:
        """The reverse of `Arguments.flat`."""
        n = len(self.channels)
        return Arguments(list(flat[:n]), list(flat[n : 2 * n]), *flat[2 * n :])


FOUR = Pyramid("four", ((12, 16), (6, 8), (3, 4), (2, 2)), (9, 12, 5, 18))
CASES = [
    FOUR,
    Pyramid("odd_sizes", ((13, 17), (7, 9), (4, 5)), (3, 8, 5), hidden=23, outputs=1),
    Pyramid("one_level", ((9, 9),), (5,), hidden=17, outputs=3),
    Pyramid("one_pixel", ((1, 1), (1, 1)), (4, 3), hidden=9),
    Pyramid("single_rows", ((1, 70), (1, 33), (1, 1)), (4, 3, 2), hidden=11),
    Pyramid("finer_sources", ((5, 6), (20, 40), (9, 3)), (4, 3, 2), hidden=16),
    Pyramid("far_coarser", ((40, 50), (2, 3)), (3, 4), hidden=8, outputs=2),
    Pyramid("many_bands", ((70, 48), (35, 24)), (80, 7), hidden=120, outputs=5, batch=1),
    Pyramid("one_hidden", ((6, 5), (3, 2)), (2, 2), hidden=1, outputs=1),
]


def by_name(case: Pyramid) -> str:
    return case.name


def evaluate(case: Pyramid, batch_statistics: bool, gradients: bool) -> Any:
    """The composition, for `compare.truths`: the output and, if asked for, all gradients."""

    def run(flat: Any, order: int) -> list[Tensor]:
        leaves = [x.detach().requires_grad_(gradients) for x in flat]
        arguments = case.group(leaves)
        output = compositions.pyramid_projection(
            *arguments, batch_statistics=batch_statistics, order=order
        )
        if not gradients:
            return [output.flatten(2)]
        found = torch.autograd.grad(output, leaves, cotangent(output))
        return [output.flatten(2), *found]

    return run


def cotangent(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)


def output_of(result: Any) -> Tensor:
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output


@pytest.mark.parametrize("statistics", [False, True], ids=["fixed", "batch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_output(engine: str, case: Pyramid, dtype: torch.dtype, statistics: bool) -> None:
    if case.name == "one_pixel" and statistics and dtype not in EXACT:
        case = replace(case, batch=40)  # two values, normalised, are 1 and -1 or anything
    arguments = case.draw(dtype)
    kept = [x.clone() for x in arguments.flat()]
    with torch.no_grad():
        output = output_of(xk.pyramid_projection(*arguments, batch_statistics=statistics))
        truths = compare.truths(evaluate(case, statistics, False), arguments.flat(), dtype)
    assert output.shape == (case.batch, case.outputs, *case.sizes[0])
    compare.check("output", output.flatten(2), truths[0])
    assert all(map(torch.equal, arguments.flat(), kept))


@pytest.mark.parametrize("statistics", [False, True], ids=["fixed", "batch"])
@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_gradients(engine: str, case: Pyramid, dtype: torch.dtype, statistics: bool) -> None:
    leaves = [x.requires_grad_() for x in case.draw(dtype).flat()]
    output = output_of(xk.pyramid_projection(*case.group(leaves), batch_statistics=statistics))
    gradients = torch.autograd.grad(output, leaves, cotangent(output))
    truths = compare.truths(evaluate(case, statistics, True), leaves, dtype)
    compare.check("output", output.flatten(2), truths[0])
    for i, (gradient, truth) in enumerate(zip(gradients, truths[1:], strict=True)):
        compare.check(f"gradient {i}", gradient, truth, gradient=True)


@pytest.mark.parametrize("statistics", [False, True], ids=["fixed", "batch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_in_16_bits(engine: str, dtype: torch.dtype, statistics: bool) -> None:
    """By norm: where z is near 0, its rounding decides whether a gradient passes at all."""
    leaves = [x.requires_grad_() for x in FOUR.draw(dtype).flat()]
    output = output_of(xk.pyramid_projection(*FOUR.group(leaves), batch_statistics=statistics))
    gradients = torch.autograd.grad(output, leaves, cotangent(output))
    run = evaluate(FOUR, statistics, True)
    exact = run([x.double() for x in leaves], 0)[1:]
    by_op = run(leaves, 0)[1:]
    for x, r, e in zip(gradients, exact, by_op, strict=True):
        assert x.dtype is dtype
        baseline = (e.double() - r).norm() / r.norm()
        assert (x.double() - r).norm() / r.norm() <= 3 * baseline + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_numbers_are_exact(engine: str, dtype: torch.dtype) -> None:
    """Sums of small integers are representable; levels of one size are not interpolated."""
    case = Pyramid("whole", ((5, 7), (5, 7)), (3, 4), hidden=6, outputs=2)
    arguments = case.draw(dtype, whole=True)
    leaves = [x.requires_grad_() for x in arguments.flat()]
    output = xk.pyramid_projection(*case.group(leaves))
    ones = torch.ones_like(output)
    gradients = torch.autograd.grad(output, leaves, ones)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = compositions.pyramid_projection(*case.group(exact))
    assert torch.equal(output.double(), expected)
    wanted = torch.autograd.grad(expected, exact, ones.double())
    for x, y in zip(gradients, wanted, strict=True):
        assert torch.equal(x, y.to(dtype))


def layouts(x: Tensor) -> dict[str, Tensor]:
    """(B, C, H, W) views of the same values; what lies between is NaN."""
    b, c, h, w = x.shape
    padded = x.new_full((b, c + 2, h + 1, w + 3), float("nan"))
    padded[:, 1:-1, 1:, 2:-1] = x
    stepped = x.new_full((b, 2 * c, h, 3 * w), float("nan"))
    stepped[:, ::2, :, 1::3] = x
    fused = x.new_full((b, h, w, 2 * c + 1), float("nan"))
    fused[..., 1 : c + 1] = x.permute(0, 2, 3, 1)
    return {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "padded": padded[:, 1:-1, 1:, 2:-1],
        "stepped": stepped[:, ::2, :, 1::3],
        "channels_last_slice": fused[..., 1 : c + 1].permute(0, 3, 1, 2),
        "turned": x.transpose(2, 3).contiguous().transpose(2, 3),
        "batch_last": x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    }


@pytest.mark.parametrize("statistics", [False, True], ids=["fixed", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", list(layouts(torch.zeros(1, 1, 1, 1))))
def test_layouts(engine: str, layout: str, dtype: torch.dtype, statistics: bool) -> None:
    """Features, weights, classifier and the output's gradient of any strides."""

    def run(*tensors: Tensor, grad: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        output = output_of(xk.pyramid_projection(*FOUR.group(leaves), batch_statistics=statistics))
        return [output.detach(), *torch.autograd.grad(output, leaves, grad)]

    arguments = FOUR.draw(dtype)
    grad = cotangent(arguments.features[0].new_empty(2, 7, 12, 16))
    expected = run(*arguments.flat(), grad=grad)
    views = Arguments(
        [layouts(x)[layout] for x in arguments.features],
        [w.t().contiguous().t() for w in arguments.weights],
        *arguments[2:4],
        arguments.classifier.t().contiguous().t(),
        arguments.classifier_bias,
    )
    results = run(*views.flat(), grad=layouts(grad)[layout])
    assert (results[0].stride(1) == 1) == layout.startswith("channels_last")
    for i, (x, y) in enumerate(zip(results, expected, strict=True)):
        if engine == "cpu" and i + 1 < len(results):  # the last is a sum that torch takes
            assert torch.equal(x, y)
        tolerance = 64 * torch.finfo(dtype).eps
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * float(y.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_in_single_precision(engine: str, dtype: torch.dtype) -> None:
    arguments = FOUR.draw(dtype)
    expected = xk.pyramid_projection(*arguments)
    single = [x.float() for x in arguments.flat()[4:]]
    assert torch.equal(xk.pyramid_projection(*FOUR.group([*arguments.features, *single])), expected)
    leaves = [*arguments.features, *(x.requires_grad_() for x in single)]
    output, mean, var = xk.pyramid_projection(*FOUR.group(leaves), batch_statistics=True)
    assert output.dtype is dtype and mean.dtype is var.dtype is torch.float32
    gradients = torch.autograd.grad(output.float().sum(), single)
    assert all(g.dtype is torch.float32 for g in gradients)


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (100.0, 1.0), (-3.0, 1e-3)])
def test_statistics(engine: str, mean: float, deviation: float, dtype: torch.dtype) -> None:
    case = CASES[7]
    arguments = case.draw(torch.float64)
    for x in arguments.features:
        x.mul_(deviation).add_(mean)
    arguments = case.group([x.to(dtype) for x in arguments.flat()])
    _, found_mean, found_var = xk.pyramid_projection(*arguments, batch_statistics=True)
    exact = case.group([x.double() for x in arguments.flat()])
    hidden = sum(
        torch.nn.functional.interpolate(
            torch.einsum("mc,bchw->bmhw", w, x), size=(70, 48), mode="bilinear"
        )
        for x, w in zip(exact.features, exact.weights, strict=True)
    )
    assert isinstance(hidden, Tensor)
    var, average = torch.var_mean(hidden, (0, 2, 3), correction=0)
    size = hidden.abs().amax()
    tolerance = 64 * torch.finfo(dtype).eps
    torch.testing.assert_close(found_mean.double(), average, rtol=0, atol=tolerance * float(size))
    # Rounding of z itself has deviation size * eps.
    noise = tolerance * (float(size) * float(var.amax().sqrt()) + float(var.amax()))
    torch.testing.assert_close(found_var.double(), var, rtol=tolerance, atol=noise)


@pytest.mark.parametrize("statistics", [False, True], ids=["fixed", "batch"])
def test_gradcheck(engine: str, statistics: bool) -> None:
    case = Pyramid("small", ((3, 5), (2, 3)), (2, 3), hidden=4, outputs=2)
    leaves = [x.requires_grad_() for x in case.draw(torch.float64).flat()]

    def run(*flat: Tensor) -> Tensor:
        return output_of(xk.pyramid_projection(*case.group(flat), batch_statistics=statistics))

    options = {"eps": 1e-6, "atol": 1e-5, "rtol": 1e-3, "nondet_tol": 0.0}
    assert torch.autograd.gradcheck(run, leaves, **options)
    assert torch.autograd.gradcheck(lambda *x: run(*x).transpose(0, 3), leaves, **options)


def test_every_subset_of_gradients(engine: str) -> None:
    case = CASES[1]
    full = [x.requires_grad_() for x in case.draw(torch.float64).flat()]
    output, _, _ = xk.pyramid_projection(*case.group(full), batch_statistics=True)
    expected = torch.autograd.grad(output, full, cotangent(output))
    count = len(full)
    subsets = [[i] for i in range(count)] + [[i for i in range(count) if i != j] for j in (0, 4, 8)]
    for wanted in subsets:
        leaves = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(full)]
        output, mean, var = xk.pyramid_projection(*case.group(leaves), batch_statistics=True)
        assert not mean.requires_grad and not var.requires_grad
        output.backward(cotangent(output))
        for i, (leaf, gradient) in enumerate(zip(leaves, expected, strict=True)):
            assert (leaf.grad is not None) == (i in wanted)
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad, gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [FOUR, CASES[7]], ids=by_name)
def test_repeats_and_threads_are_bitwise(case: Pyramid) -> None:
    arguments = case.draw(torch.float32)
    threads = torch.get_num_threads()

    def run(count: int) -> list[Tensor]:
        torch.set_num_threads(count)
        try:
            leaves = [x.detach().requires_grad_() for x in arguments.flat()]
            with xk.backend("cpu"):
                output, mean, var = xk.pyramid_projection(
                    *case.group(leaves), batch_statistics=True
                )
            # Its last gradient is a sum that torch takes.
            gradients = torch.autograd.grad(output, leaves[:-1], cotangent(output))
            return [output.detach(), mean, var, *gradients]
        finally:
            torch.set_num_threads(threads)

    expected = run(1)
    for count in (1, 2, 3, 8, 2):
        assert all(map(torch.equal, run(count), expected))


def test_nan_stays_where_it_is_seen(engine: str) -> None:
    """A NaN pixel reaches the pixels that are interpolated from it, of its sample, alone."""
    arguments = FOUR.draw(torch.float32)
    clean = xk.pyramid_projection(*arguments)
    arguments.features[1][1, 3, 2, 7] = float("nan")
    output = xk.pyramid_projection(*arguments)
    touched = torch.zeros(12, 16, dtype=torch.bool)
    touched[3:7, 13:16] = True
    assert torch.equal(output[0], clean[0])
    assert output[1][:, touched].isnan().all()
    untouched = ~touched
    assert torch.equal(output[1][:, untouched], clean[1][:, untouched])


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5)])
def test_empty(engine: str, shape: tuple[int, ...]) -> None:
    case = Pyramid("empty", ((4, 5), (2, 2)), (3, 2), hidden=6, outputs=2)
    arguments = case.draw(torch.float32)
    levels = [torch.zeros(shape), torch.zeros(shape[0], 2, 2, 2)]
    leaves = [x.requires_grad_() for x in (*levels, *arguments.flat()[2:])]
    output = xk.pyramid_projection(*case.group(leaves))
    assert output.shape == (shape[0], 2, *shape[2:])
    output.sum().backward()
    for leaf in leaves:
        assert leaf.grad is None or not leaf.grad.any()
    with pytest.raises(ValueError, match="more than one value per channel"):
        xk.pyramid_projection(*case.group(leaves), batch_statistics=True)


def test_no_gradient_saves_nothing(engine: str) -> None:
    """Without autograd neither z nor anything else of its size is allocated by torch."""
    case = Pyramid("wide", ((60, 80), (30, 40)), (8, 8), hidden=400, outputs=3, batch=1)
    arguments = case.draw(torch.float32)
    wide = 4 * 400 * 60 * 80
    with xk.backend("cpu"), torch.profiler.profile(profile_memory=True) as profile:
        xk.pyramid_projection(*arguments)
    allocated = sum(max(e.self_cpu_memory_usage, 0) for e in profile.events())
    assert allocated < wide / 10
    leaves = [x.requires_grad_() for x in arguments.flat()]
    saved: list[int] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.numel() * x.element_size())
        return x

    with xk.backend("cpu"), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        xk.pyramid_projection(*case.group(leaves), batch_statistics=True)
    assert wide < sum(saved) < 1.3 * wide


@pytest.mark.parametrize("statistics", [False, True], ids=["fixed", "batch"])
def test_opcheck(statistics: bool) -> None:
    case = CASES[1]
    for gradients in (False, True):
        arguments = case.group(
            [x.requires_grad_(gradients) for x in case.draw(torch.float32).flat()]
        )
        args = (*arguments, statistics, 1e-5, gradients, "cpu")
        torch.library.opcheck(torch.ops.xattn_kernels.pyramid_projection.default, args)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic: bool) -> None:
    case = CASES[1]

    def run(*flat: Tensor) -> Tensor:
        return output_of(xk.pyramid_projection(*case.group(flat), batch_statistics=True)) * 2

    leaves = [x.requires_grad_() for x in case.draw(torch.float32).flat()]
    expected = run(*leaves)
    gradients = torch.autograd.grad(expected.sum(), leaves)
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    output = compiled(*leaves)
    assert torch.equal(output, expected)
    found = torch.autograd.grad(output.sum(), leaves)
    for x, y in zip(found, gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_autocast_and_checkpointing(engine: str) -> None:
    leaves = [x.requires_grad_() for x in FOUR.draw(torch.float32).flat()]

    def run(*flat: Tensor) -> Tensor:
        return xk.pyramid_projection(*FOUR.group(flat))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = run(*leaves)
        expected = torch.autograd.grad(output.float().sum(), leaves)
        assert output.dtype is torch.bfloat16
        again = checkpoint(run, *leaves, use_reentrant=False)
        assert torch.equal(again, output)
        gradients = torch.autograd.grad(again.float().sum(), leaves)
    assert all(map(torch.equal, gradients, expected))
    assert all(x.dtype is torch.float32 for x in gradients)


def test_double_backward_is_refused() -> None:
    leaves = [x.requires_grad_() for x in CASES[1].draw(torch.float64).flat()]
    with xk.backend("cpu"):
        output = xk.pyramid_projection(*CASES[1].group(leaves))
    (gradient,) = torch.autograd.grad(output.sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="pyramid_projection cannot be differentiated"):
        gradient.sum().backward()


def test_changed_input_is_noticed() -> None:
    leaves = [x.requires_grad_() for x in CASES[1].draw(torch.float64).flat()]
    with xk.backend("cpu"):
        output = xk.pyramid_projection(*CASES[1].group(leaves))
    with torch.no_grad():
        leaves[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_two_backwards(engine: str) -> None:
    leaves = [x.requires_grad_() for x in CASES[1].draw(torch.float64).flat()]
    output = xk.pyramid_projection(*CASES[1].group(leaves))
    first = torch.autograd.grad(output.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(output.sum(), leaves)
    assert all(map(torch.equal, first, second))


def test_transforms_go_to_the_reference() -> None:
    arguments = CASES[1].draw(torch.float64)
    features = [torch.stack([x, 2 * x]) for x in arguments.features]

    def run(*levels: Tensor) -> Tensor:
        return xk.pyramid_projection(list(levels), *arguments[1:])

    mapped = torch.func.vmap(run)(*features)
    torch.testing.assert_close(mapped[1], run(*(x[1] for x in features)))
    with xk.backend("cpu"), pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.vmap(run)(*features)


def wrong_arguments() -> list[Any]:
    a = CASES[1].draw(torch.float32)
    cases: dict[str, tuple[type[Exception], str, Arguments]] = {
        "levels": (ValueError, "weights: got 2, expected 3", a._replace(weights=a.weights[:2])),
        "weight": (
            ValueError,
            r"weights\[1\]: .*expected shape \(23, 8\)",
            a._replace(weights=[a.weights[0], a.weights[1].t(), a.weights[2]]),
        ),
        "dimensions": (
            ValueError,
            r"features\[2\]: .*expected shape \(B, C, H, W\)",
            a._replace(features=[*a.features[:2], a.features[2].flatten(2)]),
        ),
        "batch": (
            ValueError,
            r"features\[1\]: .*batch size 2",
            a._replace(features=[a.features[0], a.features[1][:1], a.features[2]]),
        ),
        "pixels": (
            ValueError,
            r"features\[1\]: .*expected pixels",
            a._replace(features=[a.features[0], a.features[1][:, :, :0], a.features[2]]),
        ),
        "mixed": (
            TypeError,
            r"features\[1\]: .*float32 as the first",
            a._replace(features=[a.features[0], a.features[1].double(), a.features[2]]),
        ),
        "integers": (
            TypeError,
            r"features\[0\]: .*expected float32",
            a._replace(features=[x.int() for x in a.features]),
        ),
        "scale": (ValueError, r"scale: .*expected shape \(23,\)", a._replace(scale=a.scale[1:])),
        "shift": (TypeError, "shift: .*torch.float32", a._replace(shift=a.shift.double())),
        "classifier": (
            ValueError,
            r"classifier: .*expected shape \(O, M\)",
            a._replace(classifier=a.classifier[0]),
        ),
        "classifier dtype": (
            TypeError,
            r"weights\[0\]: .*expected torch.float32",
            a._replace(classifier=a.classifier.half()),
        ),
        "bias": (
            ValueError,
            r"classifier_bias: .*expected shape \(1,\)",
            a._replace(classifier_bias=torch.zeros(2)),
        ),
        "device": (
            ValueError,
            r"weights\[2\]: .*where the features are",
            a._replace(weights=[*a.weights[:2], a.weights[2].to("meta")]),
        ),
        "nothing": (TypeError, "features: got list", a._replace(features=[])),
    }
    return [pytest.param(*case, id=name) for name, case in cases.items()]


@pytest.mark.parametrize(("error", "message", "arguments"), wrong_arguments())
def test_wrong_arguments(error: type[Exception], message: str, arguments: Arguments) -> None:
    with pytest.raises(error, match=message):
        xk.pyramid_projection(*arguments)


def test_explain() -> None:
    x = torch.zeros(1, 36, 8, 8)
    assert xk.explain("pyramid_projection", x).engine == "cpu"
    with xk.backend("reference"):
        assert xk.explain("pyramid_projection", x).engine == "reference"


def test_flops_are_those_of_the_rewrite() -> None:
    case = CASES[1]
    with xk.backend("cpu"):
        counted = flops.count(lambda: xk.pyramid_projection(*case.draw(torch.float32)))
    projections = sum(
        2 * 2 * 23 * c * h * w for c, (h, w) in zip(case.channels, case.sizes, strict=True)
    )
    assert counted == projections + 2 * 2 * 1 * 23 * 13 * 17
