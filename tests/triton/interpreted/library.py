"""The operators as torch sees them with this engine: schemas, compiled calls, huge batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

import xattn_kernels as xk
from tests.ops.test_pyramid_projection import Pyramid
from tests.ops.test_torch_library import OPS, sample_inputs
from xattn_kernels import registry
from xattn_kernels.engines.triton import runtime
from xattn_kernels.schedule import Schedule
from xattn_kernels.testing.cases import single

PYRAMID = Pyramid("small", ((4, 5), (2, 3)), (3, 2), hidden=6, outputs=2)
TASKS = Schedule.cross_task(2)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Registration


def pyramid_samples() -> dict[str, tuple[Any, ...]]:
    arguments = PYRAMID.draw(torch.float32)
    results = OPS.pyramid_projection(*arguments, True, 1e-5, True, "triton")
    grad = torch.randn_like(results[0])
    wanted = [True, False, True, True, True, False, True, True]
    return {
        "pyramid_projection": (*arguments, True, 1e-5, False, "triton"),
        "pyramid_projection_backward": (
            *(grad, *arguments[:-1], *results[1:], True, 1e-5, wanted, "triton"),
        ),
    }


def training_samples() -> dict[str, tuple[Any, ...]]:
    """Two slots that are the query and the source of each other, with weights of their own."""
    torch.manual_seed(0)
    channels, batch, tokens = 3, 2, (5, 4)
    features = [torch.randn(batch, channels, n) for n in tokens]
    square = (channels, channels)
    center, slots = torch.randn(2, channels), [0, 1]
    target = (features, center, slots, torch.randn(2, *square), torch.randn(2, 2, channels))
    source = (features, center, slots, torch.randn(2, 2, *square), torch.randn(2, 2, 2, channels))
    second, affine = torch.randn(2, *square), torch.rand(2, 3, channels)
    state = (torch.randn(2, batch, *square), torch.rand(2, batch, channels) + 1)
    attended = (*target, second, affine, [0, 1], *state, 1e-12)
    sourced = (*source, second, affine, *state)
    grads = [torch.randn_like(x) for x in features]
    coefficients, precise = torch.randn(2, 2, channels), torch.tensor([True, False])

    def zeros() -> list[Tensor]:
        return [x.new_zeros(batch, x.size(2), channels).transpose(1, 2) for x in features]

    samples: dict[str, tuple[Any, ...]] = {
        "moments": (features,),
        "first_moments": (*target[:4], precise),
        "hidden_moments": (*target, second),
        "states": (*source, second, affine),
        "attend": (*attended, [torch.empty_like(x) for x in features]),
        "target_sums": (*attended, grads),
        "target_gradients": (*attended, grads, coefficients, precise, zeros()),
        "source_sums": (*sourced, precise, zeros()),
        "source_gradients": (*sourced, coefficients, precise, zeros()),
        "input_gradient": (features, center, torch.randn(2, *square), center, zeros()),
    }
    name = "cross_attention_block_training"
    return {
        name if phase == "attend" else f"{name}_{phase}": (*arguments, "triton")
        for phase, arguments in samples.items()
    }


CORES_AND_BLOCK = [
    *("linear_cross_attention", "linear_cross_attention_backward"),
    *("softmax_cross_attention", "softmax_cross_attention_backward"),
    *("pack_block_weights", "fold_block_weights"),
    *("cross_attention_block", "cross_attention_block_out"),
]
PYRAMIDS = ["pyramid_projection", "pyramid_projection_backward"]
TRAINING = [
    "cross_attention_block_training" + suffix
    for suffix in (
        *("", "_moments", "_first_moments", "_hidden_moments", "_states", "_target_sums"),
        *("_target_gradients", "_source_sums", "_source_gradients", "_input_gradient"),
    )
]


def test_all_operators_are_listed() -> None:
    listed = {*CORES_AND_BLOCK, *PYRAMIDS, *TRAINING}
    prefix = registry.OPERATORS
    registered = {
        name.partition("::")[2]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("xattn_kernels::")
    }
    assert {name for name in registered if name.startswith(prefix)} <= listed
    assert listed <= registered


@pytest.mark.parametrize("name", [*CORES_AND_BLOCK, *PYRAMIDS, *TRAINING])
def test_opcheck(name: str) -> None:
    if name in CORES_AND_BLOCK:
        arguments = (*sample_inputs(name, "token_major", False)[:-1], "triton")
        if name.startswith("cross_attention_block"):  # what is packed differs by engine
            weights = torch.randn(6, 5, 8, 8), torch.randn(6, 5, 8)
            packed = OPS.pack_block_weights(*weights, torch.float32, "triton")
            arguments = (arguments[0], packed, *arguments[2:])
    else:
        arguments = (pyramid_samples() if name in PYRAMIDS else training_samples())[name]
    torch.library.opcheck(getattr(OPS, name).default, arguments)


# Compiled calls


def compiled_equals_eager(
    run: Callable[..., Sequence[Tensor]], leaves: Sequence[Tensor], gradients: bool = True
) -> None:
    """In one graph; values to the bit, as the same kernels run, and gradients, that torch adds."""
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(gradients):
        expected, results = run(*leaves), compiled(*leaves)
    assert all(map(torch.equal, results, expected))
    if gradients:
        torch.manual_seed(1)
        grads = [torch.randn_like(x) for x in expected]
        found, wanted = (torch.autograd.grad(x, leaves, grads) for x in (results, expected))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("core", ["linear_cross_attention", "softmax_cross_attention"])
def test_compiled_core(core: str) -> None:
    case = single("core", 9, 7, channels=5, value_channels=3)
    leaves = [x.requires_grad_() for group in case.tensors(torch.float32) for x in group]

    def run(*x: Tensor) -> list[Tensor]:
        return [getattr(xk, core)(*(2 * y for y in x)) + 1]

    compiled_equals_eager(run, leaves)


def test_compiled_block() -> None:
    weight, bias = torch.randn(2, 5, 8, 8) / 3, torch.randn(2, 5, 8)

    def run(*x: Tensor) -> list[Tensor]:
        return xk.cross_attention_block([2 * y for y in x], weight, bias, TASKS)

    compiled_equals_eager(run, [torch.randn(2, 8, 9), torch.randn(2, 8, 6)], gradients=False)


@pytest.mark.parametrize("statistics", [False, True], ids=["fixed", "batch"])
def test_compiled_pyramid(statistics: bool) -> None:
    leaves = [x.requires_grad_() for x in PYRAMID.draw(torch.float32).flat()]

    def run(*flat: Tensor) -> list[Tensor]:
        result = xk.pyramid_projection(*PYRAMID.group(flat), batch_statistics=statistics)
        return [2 * (result[0] if isinstance(result, tuple) else result)]

    compiled_equals_eager(run, leaves)


def test_compiled_training_block() -> None:
    from xattn_kernels.functional import cross_attention_block_training

    shape = (TASKS.num_weights, 5, 4)
    parameters = [torch.randn(*shape, 4) / 2, torch.rand(shape) + 0.5, torch.randn(shape)]
    leaves = [x.requires_grad_() for x in (torch.randn(2, 4, 9), torch.randn(2, 4, 6))]
    leaves += [x.requires_grad_() for x in parameters]

    def run(first: Tensor, second: Tensor, *parameters: Tensor) -> list[Tensor]:
        outputs, _ = cross_attention_block_training([2 * first, second], *parameters, TASKS)
        return list(outputs)

    compiled_equals_eager(run, leaves)


# Batches that no other dimension of a grid than the first could count

BATCH = 70_000
KEPT = 4


@pytest.fixture
def ends_of_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long grid the first and the last programs run: those of the first and last samples."""

    def ends(*bounds: int) -> Sequence[int]:
        whole = range(*bounds)
        return whole if len(whole) < 1000 else [*whole[:KEPT], *whole[-KEPT:]]

    monkeypatch.setattr(interpreter, "range", ends, raising=False)
    monkeypatch.setattr(runtime, "_PROGRAMS_INTERPRETED", 2**31 - 1)


def first_and_last(run: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> None:
    """Values and gradients of the first and the last sample of expanded inputs."""
    few = [torch.cat([x[:1], x[-1:]]) for x in inputs]
    found = []
    for tensors in (inputs, few):
        leaves = [x.detach().requires_grad_() for x in tensors]
        results = run(*leaves)
        gradients = torch.autograd.grad(sum(x.sum() for x in results), leaves)
        found.append([torch.stack([x[0], x[-1]]).detach() for x in (*results, *gradients)])
    for x, y in zip(*found, strict=True):
        assert y.isfinite().all()
        torch.testing.assert_close(x, y)


@pytest.mark.usefixtures("ends_of_grids")
@pytest.mark.parametrize("core", ["linear_cross_attention", "softmax_cross_attention"])
def test_batch_of_a_core(core: str) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(BATCH, 2, n) for n in (1, 2, 2)]
    first_and_last(lambda *x: [getattr(xk, core)(*x)], *inputs)


@pytest.mark.usefixtures("ends_of_grids")
def test_batch_of_the_block() -> None:
    weight, bias = torch.randn(1, 5, 2, 2), torch.randn(1, 5, 2)
    schedule = Schedule.from_edges([(0, 1, 0, 0)], num_queries=2, num_weights=1)
    features = [torch.randn(BATCH, 2, n) for n in (1, 2)]
    found = []
    for x in (features, [torch.cat([x[:1], x[-1:]]) for x in features]):
        with torch.no_grad():
            output = xk.cross_attention_block(x, weight, bias, schedule)[0]
        found.append(torch.stack([output[0], output[-1]]))
    torch.testing.assert_close(*found)


@pytest.mark.usefixtures("ends_of_grids")
def test_batch_of_the_pyramid() -> None:
    case = Pyramid("batch", ((1, 2), (1, 1)), (1, 2), hidden=2, outputs=1, batch=1)
    arguments = case.draw(torch.float32)
    torch.manual_seed(0)
    features = [torch.randn(BATCH, *x.shape[1:]) for x in arguments.features]
    first_and_last(lambda *x: [xk.pyramid_projection(list(x), *arguments[1:])], *features)
