"""torch.compile without graph breaks, and export."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

import xattn_kernels

from . import support

CLASSES = (*support.CLASSES, "CrossScaleAttention")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compare_compiled(pair: support.Pair, backend: str, tolerance: float) -> None:
    eager = copy.deepcopy(pair.ours)
    compiled = torch.compile(pair.ours, fullgraph=True, backend=backend)
    if any(x.requires_grad for x in pair.leaves()):
        actual = support.gradients(compiled, pair.arguments, [*pair.ours.parameters()])
        expected = support.gradients(eager, pair.arguments, [*eager.parameters()])
    else:
        with torch.no_grad():
            actual, expected = compiled(*pair.arguments), eager(*pair.arguments)
    assert support.distance(actual, expected) <= tolerance
    pair.theirs.load_state_dict(eager.state_dict(), strict=False)
    buffers = dict(eager.named_buffers())
    assert support.distance(dict(pair.ours.named_buffers()), buffers) <= tolerance


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CLASSES)
def test_full_graph(name: str, training: bool, requires_grad: bool) -> None:
    pair = support.make(name, training=training, requires_grad=requires_grad)
    compare_compiled(pair, "aot_eager", 1e-9)


@pytest.mark.parametrize("recompute", [True, False])
def test_each_way_full_graph(recompute: bool) -> None:
    """Running statistics of a reused block included."""
    pair = support.make("CrossScaleAttention", size=(16, 16), recompute=recompute)
    compare_compiled(pair, "aot_eager", 1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_softmax_full_graph(training: bool) -> None:
    pair = support.make("CrossTaskAttention", training=training, kind="softmax", heads=2)
    compare_compiled(pair, "aot_eager", 1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_inductor(training: bool) -> None:
    pair = support.make("CrossAttention", training=training, requires_grad=training)
    compare_compiled(pair, "inductor", 1e-9)


def test_compiled_follows_the_parameters() -> None:
    pair = support.make("CrossTaskAttention", training=False, requires_grad=False)
    compiled = torch.compile(pair.ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for _ in range(2):
            assert support.distance(compiled(*pair.arguments), pair.theirs(*pair.arguments)) <= 1e-9
            for module in (pair.ours, pair.theirs):
                for p in module.parameters():
                    p.mul_(1.25)


def test_dynamic_sizes() -> None:
    pair = support.make("CrossTaskAttention", training=False, requires_grad=False)
    compiled = torch.compile(pair.ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((6, 8), (8, 10), (10, 6)):
        other = support.make("CrossTaskAttention", size=size, requires_grad=False)
        with torch.no_grad():
            actual, expected = compiled(*other.arguments), pair.theirs(*other.arguments)
        assert support.distance(actual, expected) <= 1e-9


def test_dynamic_sizes_in_training() -> None:
    pair = support.make("CrossAttention", recompute=True)
    compiled = torch.compile(pair.ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((6, 8), (8, 10)):
        other = support.make("CrossAttention", size=size)
        ours = support.gradients(compiled, other.arguments, [*pair.ours.parameters()])
        theirs = support.gradients(pair.theirs, other.arguments, [*pair.theirs.parameters()])
        assert support.distance(ours, theirs) <= 1e-9


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", CLASSES)
def test_export(name: str, strict: bool) -> None:
    """The graph folds the weights itself and calls the block operator."""
    pair = support.make(name, training=False, requires_grad=False)
    with torch.no_grad(), xattn_kernels.backend("cpu"):
        program = torch.export.export(pair.ours, pair.arguments, strict=strict)
        operators = {str(node.target) for node in program.graph.nodes}
        assert "xattn_kernels.cross_attention_block.default" in operators
        outputs = program.module()(*pair.arguments)
        assert support.distance(outputs, pair.ours(*pair.arguments)) <= 1e-9
