"""The operators as torch sees them: schemas, fakes, compile, export, checkpoints, autocast."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import xattn_kernels as xk
from xattn_kernels import registry
from xattn_kernels.schedule import Schedule
from xattn_kernels.testing.cases import CASES, DTYPES, LAYOUTS, Case

from .harness import CORES, Core, cotangents, flat, split

OPS = torch.ops.xattn_kernels
CASE = next(case for case in CASES if case.name == "mixed")
EDGES = CASE.schedule.triples_flat


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def case_inputs(dtype: torch.dtype = torch.float32, grad: bool = True) -> list[Tensor]:
    return [x.requires_grad_(grad) for x in flat(CASE.tensors(dtype))]


# Registration


def sample_inputs(name: str, layout: str, grad: bool) -> tuple[Any, ...]:
    """Arguments of a registered operator."""
    torch.manual_seed(0)
    x = [LAYOUTS[layout](x).requires_grad_(grad) for x in case_inputs(grad=False)]
    slots = split(x, CASE)
    s, z = torch.randn(3, 2, 10, 7), torch.rand(3, 2, 7) + 1
    outputs, lse = OPS.softmax_cross_attention(*slots, EDGES, 1, 0.3, "cpu")
    wanted = [True, False, True] * 3
    g = [torch.randn_like(outputs[0]), None, torch.randn_like(outputs[2])]
    weight, bias = torch.randn(6, 5, 8, 8), torch.randn(6, 5, 8)
    features = [LAYOUTS[layout](torch.randn(2, 8, n)) for n in (40, 30, 20)]
    schedule = Schedule.cross_task(3)
    packed = OPS.pack_block_weights(weight, bias, torch.float32, "cpu")
    layers = [torch.randn(8, 8, 1, 1) for _ in range(30)]
    vectors = [[torch.rand(8) + 0.5 for _ in range(30)] for _ in range(4)]
    new = [torch.empty_like(features[q]) for q in schedule.output_queries]
    samples = {
        "linear_cross_attention": (*slots, EDGES, s, z, "elu", 1e-6, "cpu"),
        "linear_cross_attention_backward": (
            *(*slots, EDGES, s, z, g, None, z, "softplus", 1e-12, [*wanted, True, False], "cpu"),
        ),
        "softmax_cross_attention": (*slots, EDGES, 1, 0.3, "cpu"),
        "softmax_cross_attention_backward": (
            *(*slots, [y.detach() for y in outputs], EDGES, [y.detach() for y in lse], g),
            *([lse[0].detach(), None, None], 1, 0.3, wanted, "cpu"),
        ),
        "pack_block_weights": (weight, bias, torch.bfloat16, "cpu"),
        "cross_attention_block": (features, packed, 6, schedule.edges_flat, 1e-12, "cpu"),
        "cross_attention_block_out": (features, packed, 6, schedule.edges_flat, 1e-12, new, "cpu"),
        "fold_block_weights": (layers, *vectors, 1e-5, torch.float32, "cpu"),
    }
    return samples[name]


@pytest.mark.parametrize("layout", ["contiguous", "token_major", "sliced"])
@pytest.mark.parametrize(
    ("name", "grad"),
    [
        ("linear_cross_attention", True),
        ("linear_cross_attention", False),
        ("linear_cross_attention_backward", False),
        ("softmax_cross_attention", True),
        ("softmax_cross_attention", False),
        ("softmax_cross_attention_backward", False),
        ("pack_block_weights", False),
        ("cross_attention_block", False),
        ("cross_attention_block_out", False),
        ("fold_block_weights", False),
    ],
)
def test_opcheck(name: str, grad: bool, layout: str) -> None:
    torch.library.opcheck(getattr(OPS, name).default, sample_inputs(name, layout, grad))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fakes_have_the_strides_of_results(core: Core, layout: str, dtype: torch.dtype) -> None:
    inputs = [LAYOUTS[layout](x) for x in flat(CASE.tensors(dtype))]
    with xk.backend("cpu"):
        real = core.library(split(inputs, CASE), CASE)
        with FakeTensorMode() as mode:
            fake = core.library(split([mode.from_tensor(x) for x in inputs], CASE), CASE)
    for x, y in zip(real, fake, strict=True):
        assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


# Compilers


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(core: Core, compiler: str, dynamic: bool) -> None:
    compare_compiled(core, compiler, dynamic, "cpu")


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_of_the_reference(core: Core, dynamic: bool) -> None:
    # It is torch code: what inductor makes of it is inductor's affair.
    compare_compiled(core, "aot_eager", dynamic, "reference")


def compare_compiled(core: Core, compiler: str, dynamic: bool, engine: str) -> None:
    def run(*x: Tensor) -> list[Tensor]:
        # Work on both sides, so that the compiler chooses the strides in between.
        results = core.library(split([y * 2 for y in x], CASE), CASE)
        return [y + 1 for y in results]

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend=compiler)
    inputs = case_inputs()
    with xk.backend(engine):
        expected, results = run(*inputs), compiled(*inputs)
        torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-5)
        g = cotangents(results, torch.float32)
        torch.testing.assert_close(
            torch.autograd.grad(results, inputs, g, allow_unused=True),
            torch.autograd.grad(expected, inputs, g, allow_unused=True),
            rtol=1e-4,
            atol=1e-5,
        )


def test_compile_with_other_sizes(engine: str, core: Core) -> None:
    compiled = torch.compile(core.function, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, queries, keys in ((2, 20, 30), (3, 31, 17), (1, 64, 64)):
        x = [torch.randn(batch, 8, n) for n in (queries, keys, keys)]
        torch.testing.assert_close(compiled(*x), core.function(*x), rtol=1e-5, atol=1e-5)
        images = [y.unflatten(2, (-1, 1)) for y in x]
        torch.testing.assert_close(compiled(*images), core.function(*images), rtol=1e-5, atol=1e-5)


def test_compile_under_inference(core: Core) -> None:
    x = case_inputs(grad=False)
    compiled = torch.compile(
        lambda *x: core.library(split(x, CASE), CASE), fullgraph=True, backend="inductor"
    )
    with torch.no_grad(), xk.backend("cpu"):
        torch.testing.assert_close(compiled(*x), core.library(split(x, CASE), CASE))


def test_compile_of_the_block(engine: str) -> None:
    weight, bias = torch.randn(6, 5, 8, 8) / 3, torch.randn(6, 5, 8)
    features = [torch.randn(2, 8, 5, 6) for _ in range(3)]
    schedule = Schedule.cross_task(3)

    def run(features: list[Tensor]) -> Tensor:
        x = features[0]
        buffer = x.new_zeros(2, 16 + 6 * 8, 5, 6)
        out = [buffer[:, 8 * (i + 1) : 8 * (i + 2)] for i in range(6)]
        xk.cross_attention_block([y * 2 for y in features], weight, bias, schedule, out=out)
        (first, *_) = xk.cross_attention_block(features, weight, bias, schedule)
        return buffer.sum(dim=1, keepdim=True) + first

    with torch.no_grad():
        compiler = "inductor" if engine == "cpu" else "aot_eager"
        compiled = torch.compile(run, fullgraph=True, backend=compiler)
        torch.testing.assert_close(compiled(features), run(features), rtol=1e-4, atol=1e-4)


def test_compiled_code_follows_the_backend(core: Core) -> None:
    x = [torch.randn(1, 4, 6) for _ in range(3)]
    graphs = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(str(graph.code))
        return graph.forward

    compiled = torch.compile(core.function, fullgraph=True, backend=record)
    ours = "torch.ops.xattn_kernels."
    with xk.backend("cpu"):
        compiled(*x)
        assert ours in graphs[-1]
        with xk.backend("reference"):
            compiled(*x)
            assert ours not in graphs[-1]
        compiled(*x)
    assert len(graphs) == 2
    # Another thread has its own choice, whatever this one asked for.
    with xk.backend("reference"):
        thread = threading.Thread(target=compiled, args=x)
        thread.start()
        thread.join()
    assert len(graphs) == 3
    assert ours in graphs[-1]


def test_backend_inside_of_compiled_code(core: Core) -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def run(*x: Tensor) -> tuple[Tensor, Tensor]:
        with xk.backend("reference"):
            first = core.function(*x)
        with xk.backend("cpu"):
            return first, core.function(*x)

    x = [torch.randn(1, 4, 6) for _ in range(3)]
    torch.testing.assert_close(*run(*x))
    assert registry.current_backend() == "auto"


@pytest.mark.parametrize("strict", [True, False])
def test_export(engine: str, core: Core, strict: bool) -> None:
    class Model(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            output: Tensor = core.function(query.relu(), key, value)
            return output

    x = tuple(torch.randn(2, 8, n) for n in (20, 30, 30))
    batch = torch.export.Dim("batch", min=1, max=64)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    dynamic = ({0: batch}, {0: batch, 2: tokens}, {0: batch, 2: tokens})
    program = torch.export.export(Model(), x, dynamic_shapes=dynamic, strict=strict)
    other = tuple(torch.randn(3, 8, n) for n in (20, 50, 50))
    torch.testing.assert_close(program.module()(*other), core.function(other[0].relu(), *other[1:]))


# Memory and precision


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpoint(engine: str, core: Core, reentrant: bool) -> None:
    inputs = case_inputs()

    def run(*x: Tensor) -> Any:
        return tuple(core.library(split([y * 2 for y in x], CASE), CASE))

    expected = run(*inputs)
    g = cotangents(expected, torch.float32)
    grads = torch.autograd.grad(expected, inputs, g, allow_unused=True)
    torch.autograd.backward(checkpoint(run, *inputs, use_reentrant=reentrant), g)
    for x, grad in zip(inputs, grads, strict=True):
        torch.testing.assert_close(x.grad, grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(engine: str, core: Core, dtype: torch.dtype) -> None:
    inputs = case_inputs()
    lower = [x.detach().to(dtype).requires_grad_() for x in inputs]
    expected = core.library(split(lower, CASE), CASE)
    with torch.autocast("cpu", dtype=dtype):
        results = core.library(split(inputs, CASE), CASE)
        mixed = core.library(split([*lower[:3], *inputs[3:]], CASE), CASE)
        double = core.library(split([x.double() for x in inputs], CASE), CASE)
    for x, y, z, w in zip(results, expected, mixed, double, strict=True):
        assert x.dtype is y.dtype
        assert torch.equal(x, y)
        assert torch.equal(z, y)
        assert w.dtype is torch.float64
    g = cotangents(results, dtype)
    grads = torch.autograd.grad(results, inputs, g, allow_unused=True)
    for grad, y in zip(
        grads, torch.autograd.grad(expected, lower, g, allow_unused=True), strict=True
    ):
        assert (grad is None) == (y is None)
        if grad is not None:
            assert grad.dtype is torch.float32
            assert torch.equal(grad, y.float())
    assert results[0].dtype is dtype


def test_compile_under_autocast(engine: str, core: Core) -> None:
    x = [torch.randn(2, 8, 20) for _ in range(3)]
    compiled = torch.compile(core.function, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = compiled(*x)
        torch.testing.assert_close(output, core.function(*x), rtol=1e-2, atol=1e-2)
    assert output.dtype is torch.bfloat16
    assert compiled(*x).dtype is torch.float32


def test_autocast_does_not_reach_inside(engine: str, core: Core) -> None:
    # In float64, which autocast leaves alone, any cast inside would be seen.
    inputs = flat(CASE.tensors(torch.float64))
    expected = core.library(split(inputs, CASE), CASE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = core.library(split(inputs, CASE), CASE)
        assert torch.is_autocast_enabled("cpu")
    assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("reentrant", [True, False])
def test_autocast_with_activation_checkpoint(engine: str, core: Core, reentrant: bool) -> None:
    project = torch.nn.Conv1d(8, 24, 1)
    x = torch.randn(2, 8, 20, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        output: Tensor = core.function(*project(x).chunk(3, dim=1))
        assert output.dtype is torch.bfloat16
        return output

    def gradients(function: Any) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = function(x)
        return list(torch.autograd.grad(output.float().sum(), [project.weight]))

    def checkpointed(x: Tensor) -> Any:
        return checkpoint(run, x, use_reentrant=reentrant)

    if reentrant:  # has no torch.autograd.grad
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = checkpointed(x)
        output.float().sum().backward()
        assert project.weight.grad is not None
        torch.testing.assert_close(gradients(run)[0], project.weight.grad)
    else:
        torch.testing.assert_close(gradients(run), gradients(checkpointed))
    assert not torch.is_autocast_enabled("cpu")


def test_cores_are_what_is_registered() -> None:
    assert set(CORES) == {"linear", "softmax"}
    assert {name for name in registry.OPERATORS if not hasattr(OPS, name)} == set()


def test_schedule_as_an_input_of_compiled_code(core: Core) -> None:
    """A new schedule is compiled anew, an equal one is not."""
    compiled = torch.compile(core.function, fullgraph=True, backend="eager")
    x = [torch.randn(1, 4, n) for n in (5, 6)]
    for schedule in (Schedule.cross_task(2), Schedule.cross_scale(2), Schedule.cross_task(2)):
        torch.testing.assert_close(compiled(x, x, x, schedule), core.function(x, x, x, schedule))


def test_case_covers_shared_and_joint_slots() -> None:
    assert isinstance(CASE, Case)
    assert max(map(len, CASE.schedule.groups)) == 3
