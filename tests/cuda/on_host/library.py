"""The CUDA engine through the public package: registration, compilation, errors, modules."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import xattn_kernels as xk
from tests.modules import support
from tests.ops.test_pyramid_projection import Pyramid, cotangent, output_of
from tests.ops.test_torch_library import OPS, sample_inputs
from xattn_kernels import registry
from xattn_kernels.schedule import Schedule
from xattn_kernels.testing.cases import single

PYRAMID = Pyramid("small", ((4, 5), (2, 3)), (3, 2), hidden=6, outputs=2)
TASKS = Schedule.cross_task(2)
CORES = ("linear_cross_attention", "softmax_cross_attention")
MODULES = ("CrossAttention", "CrossTaskAttention", "CrossScaleAttention", "CrossScaleHead")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def core(name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(xk, name)
    return function


# Registration


OPERATORS = [
    *("linear_cross_attention", "linear_cross_attention_backward"),
    *("softmax_cross_attention", "softmax_cross_attention_backward"),
    *("pack_block_weights", "fold_block_weights"),
    *("cross_attention_block", "cross_attention_block_out"),
    *("pyramid_projection", "pyramid_projection_backward"),
]


def arguments_of(name: str, layout: str) -> tuple[Any, ...]:
    if not name.startswith("pyramid"):
        arguments = (*sample_inputs(name, layout, False)[:-1], "cuda")
        if name.startswith("cross_attention_block"):  # what is packed differs by engine
            weights = torch.randn(6, 5, 8, 8), torch.randn(6, 5, 8)
            packed = OPS.pack_block_weights(*weights, torch.float32, "cuda")
            arguments = (arguments[0], packed, *arguments[2:])
        return arguments
    operands = PYRAMID.draw(torch.float32)
    if name == "pyramid_projection":
        return (*operands, True, 1e-5, False, "cuda")
    results = OPS.pyramid_projection(*operands, True, 1e-5, True, "cuda")
    wanted = [True, False, True, True, True, False, True, True]
    grad = torch.randn_like(results[0])
    return (grad, *operands[:-1], *results[1:], True, 1e-5, wanted, "cuda")


def test_all_operators_are_listed() -> None:
    registered = {
        name.partition("::")[2]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("xattn_kernels::")
    }
    others = {name for name in registered if name.startswith(registry.TRAINING)}
    assert {x for x in registered if x.startswith(registry.OPERATORS)} - others <= {*OPERATORS}
    assert {*OPERATORS} <= registered


@pytest.mark.parametrize("layout", ["contiguous", "token_major", "sliced"])
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str, layout: str) -> None:
    torch.library.opcheck(getattr(OPS, name).default, arguments_of(name, layout))


# Gradients


def slopes_agree(run: Callable[..., Sequence[Tensor]], leaves: Sequence[Tensor]) -> None:
    """Differences along random directions are what gradients say, as far as float32 shows."""
    results = run(*leaves)
    torch.manual_seed(5)
    grads = [torch.randn_like(x) for x in results]
    gradients = torch.autograd.grad(results, leaves, grads)
    for x, gradient in zip(leaves, gradients, strict=True):
        direction = torch.randn_like(x)
        direction /= direction.norm()

        def value(step: float, x: Tensor = x, direction: Tensor = direction) -> float:
            with torch.no_grad():
                moved = run(*(y + step * direction if y is x else y for y in leaves))
            return sum(
                float((y.double() * g.double()).sum()) for y, g in zip(moved, grads, strict=True)
            )

        slope = (value(1e-2) - value(-1e-2)) / 2e-2
        expected = float((gradient.double() * direction.double()).sum())
        assert abs(slope - expected) <= 1e-2 * float(gradient.norm()) + 1e-4


@pytest.mark.parametrize("name", CORES)
def test_slopes(name: str) -> None:
    case = single("core", 9, 7, channels=5, value_channels=3)
    leaves = [x.requires_grad_() for group in case.tensors(torch.float32) for x in group]
    slopes_agree(lambda *x: [core(name)(*x)], leaves)


def test_slopes_of_a_state() -> None:
    case = single("core", 9, 7, channels=5, value_channels=3)
    leaves = [x for group in case.tensors(torch.float32) for x in group]
    state = torch.rand(1, 2, 3, 5), torch.rand(1, 2, 5)
    leaves = [x.requires_grad_() for x in (*leaves, *state)]

    def run(*x: Tensor) -> list[Tensor]:
        output, new = xk.linear_cross_attention(*x[:3], state=(x[3], x[4]), return_state=True)
        return [output, *new]

    slopes_agree(run, leaves)


@pytest.mark.parametrize("statistics", [False, True], ids=["fixed", "batch"])
def test_slopes_of_the_pyramid(statistics: bool) -> None:
    leaves = [x.requires_grad_() for x in PYRAMID.draw(torch.float32).flat()]

    def run(*flat: Tensor) -> list[Tensor]:
        # Far from where relu bends.
        flat = (*flat[:5], flat[5] + 6, *flat[6:])
        arguments = PYRAMID.group(flat)
        return [output_of(xk.pyramid_projection(*arguments, batch_statistics=statistics))]

    slopes_agree(run, leaves)


@pytest.mark.parametrize("name", [*CORES, "pyramid_projection"])
def test_gradients_of_any_strides(name: str) -> None:
    """That of a result as torch's own operators leave it: expanded, or turned."""
    if name == "pyramid_projection":
        inputs = PYRAMID.draw(torch.float32).flat()

        def run(*x: Tensor) -> Tensor:
            return xk.pyramid_projection(*PYRAMID.group(x))
    else:
        inputs = [torch.randn(2, c, n) for c, n in ((5, 9), (5, 7), (5, 7))]

        def run(*x: Tensor) -> Tensor:
            result: Tensor = core(name)(*x)
            return result

    leaves = [x.requires_grad_() for x in inputs]
    output = run(*leaves)
    for view in (
        torch.ones(()).expand(output.shape),
        cotangent(output)[:, :1].expand(output.shape),
        cotangent(output.transpose(0, -1)).transpose(0, -1),
        cotangent(output).flip(-1),
    ):
        found = torch.autograd.grad(output, leaves, view, retain_graph=True)
        expected = torch.autograd.grad(output, leaves, view.contiguous(), retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("name", CORES)
def test_compiled_core(name: str, twin: Any) -> None:
    case = single("core", 9, 7, channels=5, value_channels=3)
    leaves = [x.requires_grad_() for group in case.tensors(torch.float32) for x in group]
    compiled_equals_eager(lambda *x: [core(name)(*(2 * y for y in x)) + 1], leaves)
    assert twin.twin_launches()


def test_compiled_block() -> None:
    weight, bias = torch.randn(2, 5, 8, 8) / 3, torch.randn(2, 5, 8)

    def run(*x: Tensor) -> list[Tensor]:
        return xk.cross_attention_block([2 * y for y in x], weight, bias, TASKS)

    compiled_equals_eager(run, [torch.randn(2, 8, 9), torch.randn(2, 8, 6)], gradients=False)


@pytest.mark.parametrize("statistics", [False, True], ids=["fixed", "batch"])
def test_compiled_pyramid(statistics: bool) -> None:
    leaves = [x.requires_grad_() for x in PYRAMID.draw(torch.float32).flat()]

    def run(*flat: Tensor) -> list[Tensor]:
        arguments = PYRAMID.group(flat)
        return [2 * output_of(xk.pyramid_projection(*arguments, batch_statistics=statistics))]

    compiled_equals_eager(run, leaves)


# Engines by name


def call(op: str, dtype: torch.dtype = torch.float32, width: int = 4) -> Any:
    """A small problem of an operator."""
    x = torch.randn(1, width, 3, dtype=dtype)
    if op in CORES:
        return core(op)(x, x, x)
    if op == "cross_attention_block":
        weight, bias = torch.randn(2, 5, width, width), torch.randn(2, 5, width)
        return xk.cross_attention_block([x, x], weight.to(dtype), bias.to(dtype), TASKS)
    case = Pyramid("call", ((2, 3),), (width,), hidden=4, outputs=2)
    return xk.pyramid_projection(*case.draw(dtype))


@pytest.mark.parametrize(
    "op", [*CORES, "cross_attention_block", "pyramid_projection"], ids=lambda op: op
)
def test_a_name_never_falls_back(op: str, twin: Any) -> None:
    call(op)
    assert twin.twin_launches()
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run") as error:
        call(op, torch.float64)
    message = str(error.value)
    assert "cuda: has no float64 kernels" in message
    assert "cpu: could run, was not asked for" in message and "triton: " in message
    with pytest.raises(RuntimeError, match="cuda: takes up to 384 channels, not 385"):
        call(op, width=385)
    call(op, width=384)
    twin.twin_configure()
    for other in ("auto", "cpu", "reference"):
        with xk.backend(other):
            call(op, torch.float64)
    assert not twin.twin_launches()


def test_heads_share_the_widest() -> None:
    x = torch.randn(1, 770, 2)
    assert core("softmax_cross_attention")(*([x[:, :768]] * 3), heads=2).shape == (1, 768, 2)
    with pytest.raises(RuntimeError, match="takes up to 384 channels a head, not 385"):
        core("softmax_cross_attention")(x, x, x, heads=2)


def test_transforms_are_refused() -> None:
    x = torch.randn(2, 1, 4, 3)
    with pytest.raises(RuntimeError, match=r"cuda: kernels have no rules for torch\.func"):
        torch.func.vmap(core("linear_cross_attention"))(x, x, x)


def test_what_the_engine_has_not() -> None:
    """Training of the block: by name it is an error; what asks first does without."""
    from xattn_kernels.functional import cross_attention_block_training

    shape = (TASKS.num_weights, 5, 4)
    parameters = torch.randn(*shape, 4) / 2, torch.rand(shape) + 0.5, torch.randn(shape)
    features = [torch.randn(2, 4, 9), torch.randn(2, 4, 6)]
    with pytest.raises(RuntimeError, match="cuda: has no cross_attention_block_training"):
        cross_attention_block_training(features, *parameters, TASKS)
    problem = registry.Problem(registry.TRAINING, torch.float32, "cpu", 4, 4, gradient=True)
    assert registry.find(problem) is None


def test_auto_needs_measurements() -> None:
    x = torch.randn(1, 4, 3)
    assert xk.explain("linear_cross_attention", x).engine == "cuda"
    with xk.backend("auto"):
        explained = xk.explain("linear_cross_attention", x)
    assert explained.engine == "cpu" and explained.reasons["cuda"] == ()
    assert {info.name: info.available for info in xk.list_backends()}["cuda"]


def test_environment_and_process_wide_choice(monkeypatch: pytest.MonkeyPatch, twin: Any) -> None:
    monkeypatch.setattr(registry._choice, "name", None)
    monkeypatch.setattr(registry._default, "name", None)
    monkeypatch.setenv("XATTN_BACKEND", "cuda")
    assert registry.current_backend() == "cuda"
    call("linear_cross_attention")
    assert twin.twin_launches()
    twin.twin_configure()
    xk.set_backend("reference")
    call("linear_cross_attention")
    assert not twin.twin_launches()


def test_backward_runs_where_forward_did(twin: Any) -> None:
    x = torch.randn(1, 4, 3, requires_grad=True)
    output = core("linear_cross_attention")(x, x, x)
    twin.twin_configure()
    with xk.backend("cpu"):
        output.sum().backward()
    assert twin.twin_launches()


# Sizes


MANY = Schedule.all_pairs(5, 4)


@pytest.mark.parametrize("name", CORES)
def test_more_slots_than_a_parameter_holds(name: str) -> None:
    """20 slots, 380 edges."""
    torch.manual_seed(0)
    slots = [torch.randn(1, 3, 1 + i % 4) for i in range(60)]
    found = []
    for engine in ("cuda", "reference"):
        leaves = [x.detach().requires_grad_() for x in slots]
        with xk.backend(engine):
            outputs = core(name)(leaves[:20], leaves[20:40], leaves[40:], MANY)
        total = sum((i + 1) * x.sum() for i, x in enumerate(outputs))
        found.append([*outputs, *torch.autograd.grad(total, leaves)])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * float(y.detach().abs().max()))


def test_more_edges_of_a_block_than_a_parameter_holds() -> None:
    torch.manual_seed(0)
    features = [torch.randn(1, 3, 1 + i % 4) for i in range(20)]
    weight, bias = torch.randn(MANY.num_weights, 5, 3, 3), torch.randn(MANY.num_weights, 5, 3)
    found = []
    for engine in ("cuda", "reference"):
        with xk.backend(engine), torch.no_grad():
            found.append(xk.cross_attention_block(features, weight, bias, MANY))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_more_levels_than_a_parameter_holds() -> None:
    sizes = ((4, 6), *((1 + i % 3, 1 + i % 2) for i in range(24)))
    case = Pyramid("many", sizes, tuple(1 + i % 3 for i in range(25)), hidden=9, batch=1)
    arguments = case.draw(torch.float32)
    found = xk.pyramid_projection(*arguments)
    with xk.backend("reference"):
        torch.testing.assert_close(found, xk.pyramid_projection(*arguments))


@pytest.mark.parametrize(
    ("batch", "queries", "sources"), [(0, 3, 2), (2, 0, 2), (2, 3, 0), (0, 0, 0)]
)
@pytest.mark.parametrize("name", CORES)
def test_nothing_to_do(name: str, batch: int, queries: int, sources: int) -> None:
    shapes = [(batch, 4, queries), (batch, 4, sources), (batch, 5, sources)]
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    output = core(name)(*leaves)
    assert output.shape == (batch, 5, queries)
    assert not output.any()
    for x in torch.autograd.grad(output.sum(), leaves):
        assert not x.any()


@pytest.mark.parametrize(("batch", "tokens"), [(0, 3), (2, 0)])
def test_no_work_for_the_block(batch: int, tokens: int) -> None:
    weight, bias = torch.randn(2, 5, 4, 4), torch.randn(2, 5, 4)
    features = [torch.randn(batch, 4, tokens), torch.randn(batch, 4, 5)]
    with torch.no_grad():
        found = xk.cross_attention_block(features, weight, bias, TASKS)
        with xk.backend("reference"):
            expected = xk.cross_attention_block(features, weight, bias, TASKS)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


# Modules


def close(found: Any, expected: Any, tolerance: float) -> None:
    assert support.distance(found, expected) <= tolerance


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("name", MODULES)
def test_modules_in_inference(name: str, dtype: torch.dtype, tolerance: float, twin: Any) -> None:
    pair = support.make(name, dtype=dtype, training=False, requires_grad=False)
    exact = copy.deepcopy(pair.ours).double()
    arguments = pair.with_arguments(dtype=torch.float64)
    with torch.no_grad():
        found = pair.ours(*pair.arguments)
        launched = {launch[0] for launch in twin.twin_launches()}
        with xk.backend("reference"):
            close(found, exact(*arguments), tolerance)
    assert any(kernel.startswith("block") for kernel in launched), launched
    assert ("pyramid_forward" in launched) == (name == "CrossScaleHead")


@pytest.mark.parametrize("kind", ["linear", "softmax"])
@pytest.mark.parametrize("name", MODULES)
def test_modules_in_training(name: str, kind: str, twin: Any) -> None:
    """The block's training is not this engine's: its projections are stored, by torch."""
    pair = support.make(name, dtype=torch.float32, kind=kind)
    exact = copy.deepcopy(pair.ours).double()
    arguments = [
        torch.utils._pytree.tree_map(lambda x: x.detach().double().requires_grad_(), pair.arguments)
    ]
    found = support.gradients(pair.ours, pair.arguments, [*pair.ours.parameters()])
    launched = {launch[0] for launch in twin.twin_launches()}
    with xk.backend("reference"):
        expected = support.gradients(exact, arguments[0], [*exact.parameters()])
    close(found[0], expected[0], 1e-5)
    whole = torch.cat([x.flatten() for x in found[1]]).double()
    exact_whole = torch.cat([x.flatten() for x in expected[1]])
    assert (whole - exact_whole).norm() <= 1e-4 * exact_whole.norm()
    for x, y in zip(pair.ours.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(x, y, check_dtype=False, rtol=1e-4, atol=1e-5)
    assert any(kernel.startswith(kind) for kernel in launched), launched


@pytest.mark.parametrize("name", MODULES)
def test_training_by_recompute_is_refused(name: str) -> None:
    pair = support.make(name, dtype=torch.float32, recompute=True)
    with pytest.raises(RuntimeError, match="cuda: has no cross_attention_block_training"):
        pair.ours(*pair.arguments)


@pytest.mark.parametrize("name", MODULES)
def test_copies_of_modules(name: str) -> None:
    """And one module on several engines: what each keeps of its weights is its own."""
    module: nn.Module = support.make(name, dtype=torch.float32, training=False).ours
    arguments = support.make(name, dtype=torch.float32, requires_grad=False).arguments
    with torch.no_grad():
        expected = support.tensors(module(*arguments))
        copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module]
        for engine in ("cpu", "reference"):
            with xk.backend(engine):
                close(support.tensors(module(*arguments)), expected, 1e-5)
        for other in copies:
            assert all(map(torch.equal, support.tensors(other(*arguments)), expected))
        next(module.parameters()).mul_(1.5)
        changed = support.tensors(module(*arguments))
        assert not all(map(torch.equal, changed, expected))
        with xk.backend("cpu"):
            close(changed, support.tensors(module(*arguments)), 1e-5)
