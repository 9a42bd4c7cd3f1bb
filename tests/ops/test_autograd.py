"""Gradients: against finite differences, where asked only, and the limits of what is offered."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import xattn_kernels as xk
from xattn_kernels.schedule import Schedule
from xattn_kernels.testing.cases import Case, single

from .harness import CORES, Core, flat, split

#: Joint and shared slots, ragged, Cv != C; small enough for finite differences.
JOINT = Case(
    "joint",
    Schedule.from_edges([(0, 1, 0, 0), (0, 0, 0, 0), (1, 1, 1, 0)], num_queries=2, allow_self=True),
    (3, 2),
    (4, 5),
    channels=4,
    value_channels=2,
)
EMPTY_SOURCE = Case("empty source", JOINT.schedule, (3, 2), (4, 0), channels=4, value_channels=2)
ONE_CHANNEL = single("one channel", 3, 4, channels=1)


def gradcheck(function: Any, inputs: list[Tensor]) -> None:
    """Plain, and through a transposed result, whose gradient then arrives transposed."""
    settings: dict[str, Any] = {"eps": 1e-6, "atol": 1e-5, "rtol": 1e-3, "nondet_tol": 0.0}
    leaves = [x.detach().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(function, leaves, **settings)
    assert torch.autograd.gradcheck(
        lambda *x: [y.transpose(-1, -2).contiguous() for y in function(*x)], leaves, **settings
    )


def inputs_of(case: Case) -> list[Tensor]:
    return flat(case.tensors(torch.float64))


@pytest.mark.parametrize("case", [JOINT, EMPTY_SOURCE, ONE_CHANNEL], ids=lambda case: case.name)
def test_gradcheck(engine: str, core: Core, case: Case) -> None:
    # The log-sum-exp over an empty source is -inf, which has no differences.
    results = 2 if case is EMPTY_SOURCE else None
    gradcheck(lambda *x: core.library(split(x, case), case)[:results], inputs_of(case))


@pytest.mark.parametrize("feature_map", ["relu", "elu", "identity"])
def test_gradcheck_of_feature_maps(engine: str, feature_map: str) -> None:
    inputs = [x.abs() + 0.1 if feature_map == "identity" else x for x in inputs_of(JOINT)]
    gradcheck(
        lambda *x: CORES["linear"].library(split(x, JOINT), JOINT, feature_map=feature_map), inputs
    )


def test_gradcheck_where_the_denominator_is_clamped(engine: str) -> None:
    gradcheck(
        lambda *x: xk.linear_cross_attention(*split(x, JOINT), JOINT.schedule, eps=18.0),
        inputs_of(JOINT),
    )


def test_gradcheck_of_the_initial_state(engine: str) -> None:
    s, z = torch.randn(2, 2, 2, 4).double(), torch.rand(2, 2, 4).double() + 1
    gradcheck(
        lambda s, z, *x: CORES["linear"].library(split(x, JOINT), JOINT, state=(s, z)),
        [s, z, *inputs_of(JOINT)],
    )


def test_gradcheck_of_heads(engine: str) -> None:
    case = single("heads", 3, 5, channels=4, heads=2)
    gradcheck(lambda *x: CORES["softmax"].library(split(x, case), case, scale=0.7), inputs_of(case))


def test_state_continues_over_shards(engine: str) -> None:
    case = single("shards", 9, 20)
    query, key, value = (x[0] for x in case.tensors(torch.float64))
    inputs = [x.requires_grad_() for x in (query, key, value)]
    whole = xk.linear_cross_attention(*inputs)
    nothing = query[:, :, :0]
    states = [
        xk.linear_cross_attention(nothing, k, v, return_state=True)[1]
        for k, v in zip(key.split(7, dim=2), value.split(7, dim=2), strict=True)
    ]
    state = tuple(torch.stack(parts).sum(dim=0) for parts in zip(*states, strict=True))
    sharded = xk.linear_cross_attention(query, nothing, nothing, state=state)
    torch.testing.assert_close(sharded, whole)
    g = torch.randn(whole.shape, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(sharded, inputs, g), torch.autograd.grad(whole, inputs, g)
    )


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:])
def test_only_gradients_that_are_asked_for(
    engine: str, core: Core, wanted: tuple[bool, bool, bool]
) -> None:
    slots = JOINT.tensors(torch.float32)
    everything = [x.clone().requires_grad_() for x in flat(slots)]
    core.library(split(everything, JOINT), JOINT)[0].sum().backward()
    some = [
        x.clone().requires_grad_(want)
        for group, want in zip(slots, wanted, strict=True)
        for x in group
    ]
    core.library(split(some, JOINT), JOINT)[0].sum().backward()
    for x, y in zip(some, everything, strict=True):
        if x.requires_grad and y.grad is not None:
            assert x.grad is not None
            torch.testing.assert_close(x.grad, y.grad)
        else:
            assert x.grad is None or not x.grad.any()


def test_nothing_is_recorded_without_need(engine: str, core: Core) -> None:
    inputs = flat(JOINT.tensors(torch.float32))
    assert all(y.grad_fn is None for y in core.library(split(inputs, JOINT), JOINT))
    inputs[0].requires_grad_()
    with torch.no_grad():
        assert all(y.grad_fn is None for y in core.library(split(inputs, JOINT), JOINT))
    with torch.inference_mode():
        assert core.library(split(inputs, JOINT), JOINT)[0].is_inference()
    assert core.library(split(inputs, JOINT), JOINT)[0].requires_grad


def test_slots_without_an_edge_have_no_gradient(engine: str, core: Core) -> None:
    case = Case(
        "unused",
        Schedule.from_edges([(0, 1, 0, 0)], num_queries=2, num_sources=3),
        (3, 4),
        (5,) * 3,
    )
    inputs = [x.requires_grad_() for x in flat(case.tensors(torch.float32))]
    sum(x.sum() for x in core.library(split(inputs, case), case)).backward()  # type: ignore[union-attr]
    assert [x.grad is not None for x in inputs] == [
        *(True, False),
        *(False, True, False),
        *(False, True, False),
    ]


def test_double_backward(engine: str, core: Core) -> None:
    x = [x.requires_grad_() for x in inputs_of(ONE_CHANNEL)]
    output = core.function(*x)
    gradient = torch.autograd.grad(output.square().sum(), x[1], create_graph=True)[0]
    if engine == "reference":
        torch.autograd.grad(gradient.sum(), x[1])
        return
    # The first derivative is there, and can be used in what does not differentiate it.
    assert torch.autograd.grad((output * gradient.detach().sum()).sum(), x[1])
    with pytest.raises(NotImplementedError, match=r"twice.*backend\(\"reference\"\)"):
        torch.autograd.grad(gradient.sum(), x[1])


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_input_changed_before_backward(core: Core, changed: int) -> None:
    leaves = [x.requires_grad_() for x in inputs_of(ONE_CHANNEL)]
    x = [x * 1 for x in leaves]
    with xk.backend("cpu"):
        output = core.function(*x)
    x[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_output_changed_before_backward(core: Core) -> None:
    x = [x.requires_grad_() for x in inputs_of(ONE_CHANNEL)]
    with xk.backend("cpu"):
        output = core.function(*x)
    expected = torch.autograd.grad(output.sum(), x, retain_graph=True)
    output.detach().mul_(2)
    if core.name == "softmax":  # its backward reads the output
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(output.sum(), x)
    else:
        assert all(map(torch.equal, torch.autograd.grad(output.sum(), x), expected))


def test_two_backward_passes(engine: str, core: Core) -> None:
    x = [x.requires_grad_() for x in inputs_of(JOINT)]
    results = core.library(split(x, JOINT), JOINT)
    loss = sum(y.sum() for y in results)
    assert isinstance(loss, Tensor)
    first = torch.autograd.grad(loss, x, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, x)))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, x)


def test_unused_outputs(engine: str, core: Core) -> None:
    x = [x.requires_grad_() for x in inputs_of(JOINT)]
    results = core.library(split(x, JOINT), JOINT)
    only = torch.autograd.grad(results[1].sum(), x, retain_graph=True, allow_unused=True)
    zeros = [torch.ones_like(y) if i == 1 else torch.zeros_like(y) for i, y in enumerate(results)]
    explicit = torch.autograd.grad(results, x, zeros, allow_unused=True)
    for a, b in zip(only, explicit, strict=True):
        torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b)


def test_functional_transforms(core: Core) -> None:
    """Kernels have no rules for them: "auto" takes the reference, a name is refused."""
    case = single("vmap", 3, 4, channels=2)
    x = [torch.stack([y, 2 * y]) for y in flat(case.tensors(torch.float64))]
    expected = torch.stack([core.function(*y) for y in zip(*x, strict=True)])
    with xk.backend("auto"):
        torch.testing.assert_close(torch.func.vmap(core.function)(*x), expected)
        grad = torch.func.grad(lambda q: core.function(q, x[1][0], x[2][0]).sum())(x[0][0])
        leaf = x[0][0].clone().requires_grad_()
        core.function(leaf, x[1][0], x[2][0]).sum().backward()
        torch.testing.assert_close(grad, leaf.grad)
        tangents = tuple(torch.ones_like(y[0]) for y in x)
        _, tangent = torch.func.jvp(core.function, tuple(y[0] for y in x), tangents)
        step = 1e-6
        moved = [core.function(*(y[0] + s * step for y in x)) for s in (1, -1)]
        torch.testing.assert_close(tangent, (moved[0] - moved[1]) / (2 * step))
    with (
        xk.backend("cpu"),
        pytest.raises(RuntimeError, match=r"cpu: .*torch\.func"),
    ):
        torch.func.vmap(core.function)(*x)


def test_forward_mode(core: Core) -> None:
    x = [y.detach() for y in inputs_of(ONE_CHANNEL)]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x[0], torch.ones_like(x[0]))
        with xk.backend("auto"):
            output = core.function(dual, *x[1:])
        assert torch.autograd.forward_ad.unpack_dual(output).tangent is not None
        with xk.backend("cpu"), pytest.raises(RuntimeError, match="forward-mode"):
            core.function(dual, *x[1:])


def test_backward_runs_on_the_engine_of_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    from xattn_kernels.ops.linear_cross_attention import cpu

    calls = []
    backward = cpu.backward
    monkeypatch.setattr(cpu, "backward", lambda *a: calls.append("cpu") or backward(*a))
    x = [x.requires_grad_() for x in inputs_of(ONE_CHANNEL)]
    with xk.backend("cpu"):
        output = xk.linear_cross_attention(*x)
    with xk.backend("reference"):
        output.sum().backward()
    assert calls == ["cpu"]
