"""torch's flop counter sees this library's operators, forward and backward."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import xattn_kernels
from xattn_kernels import flops
from xattn_kernels.functional import pyramid_projection
from xattn_kernels.schedule import Schedule

C, D = 6, 4
TARGET, SOURCES = 10, (7, 5)


def maps(*shapes: tuple[int, int]) -> list[Tensor]:
    return [torch.rand(2, *shape).requires_grad_() for shape in shapes]


@pytest.fixture(params=[False, True])
def joint(request: pytest.FixtureRequest) -> Schedule:
    """Two sources for one target, in one output or in two."""
    outputs = (0, 0) if request.param else (0, 1)
    return Schedule.from_edges(
        [(0, source, output, 0) for source, output in enumerate(outputs)], allow_self=True
    )


def test_linear(joint: Schedule) -> None:
    query, keys = maps((C, TARGET)), maps(*((C, n) for n in SOURCES))
    values = maps(*((D, n) for n in SOURCES))
    outputs: list[Tensor] = []

    def forward() -> None:
        outputs[:] = xattn_kernels.linear_cross_attention(query, keys, values, joint)

    product = 2 * 2 * C * D
    uses, vector = joint.num_outputs * TARGET, 2 * 2 * C
    assert flops.count(forward) == product * (sum(SOURCES) + uses) + vector * uses
    loss = sum(y.sum() for y in outputs)
    expected = product * 2 * (sum(SOURCES) + uses) + 2 * vector * uses
    assert flops.count(lambda: loss.backward()) == expected


def test_only_wanted_gradients() -> None:
    [query], [key], [value] = maps((C, 10)), maps((C, 7)), maps((D, 7))
    output = xattn_kernels.linear_cross_attention(query.detach(), key, value.detach())
    expected = 2 * 2 * (C * D * (10 + 7) + 2 * C * 10)
    assert flops.count(lambda: output.sum().backward()) == expected
    output = xattn_kernels.softmax_cross_attention(query, key.detach(), value)
    assert flops.count(lambda: output.sum().backward()) == 2 * 2 * 70 * (2 * C + 2 * D)


def test_softmax(joint: Schedule) -> None:
    query, keys = maps((C, TARGET)), maps(*((C, n) for n in SOURCES))
    values = maps(*((D, n) for n in SOURCES))
    outputs: list[Tensor] = []

    def forward() -> None:
        outputs[:] = xattn_kernels.softmax_cross_attention(query, keys, values, joint, heads=2)

    pairs = 2 * 2 * TARGET * sum(SOURCES)
    assert flops.count(forward) == pairs * (C + D)
    loss = sum(y.sum() for y in outputs)
    assert flops.count(lambda: loss.backward()) == pairs * (3 * C + 2 * D)


def test_block() -> None:
    """Projections shared between edges are counted once."""
    features = [torch.rand(2, C, n) for n in (10, 7, 5)]
    edges = [(0, 1, 0, 0), (0, 2, 1, 0), (1, 2, 2, 0)]
    schedule = Schedule.from_edges(edges, num_queries=3, num_sources=3, num_weights=1)
    weight, bias = torch.rand(1, 5, C, C), torch.rand(1, 5, C)
    found = flops.count(
        lambda: xattn_kernels.cross_attention_block(features, weight, bias, schedule)
    )
    projections = 4 * (10 + 7) + 6 * (7 + 5)
    core = 2 * (10 + 7) + 2 * (10 + 5) + 2 * (7 + 5)
    assert found == 2 * (C * C * (projections + core) + 2 * C * (10 + 10 + 7))


def test_block_in_training() -> None:
    """What grows with the tokens; the algebra on small matrices between the passes does not."""
    schedule = Schedule.from_edges([(0, 1, 0, 0)], num_queries=2, num_sources=2)
    weight, gamma = torch.rand(1, 5, C, C).requires_grad_(), torch.rand(1, 5, C)
    counts = []
    for tokens in ((10, 7), (20, 7), (10, 17)):
        features = maps(*((C, n) for n in tokens))

        def forward(features: list[Tensor] = features) -> Tensor:
            outputs, _ = xattn_kernels.cross_attention_block_training(
                features, weight, gamma, gamma, schedule
            )
            return outputs[0].sum()

        counts.append((flops.count(forward), flops.count(lambda run=forward: run().backward())))
    targets, sources = (
        [(b - a) / (2 * 2 * C * C * 10) for a, b in zip(counts[0], other, strict=True)]
        for other in counts[1:]
    )
    # Moments, hidden layers again, two layers (three for sources), output or state.
    assert (targets[0], sources[0]) == (1 + 2 + 2 + 1, 1 + 2 + 3 + 1)
    # Sums, gradients, and the affine part.
    assert (targets[1], sources[1]) == (6 + 4 + 7 + 1, 7 + 7 + 8 + 1)


@pytest.mark.parametrize("saved", [False, True])
def test_pyramid(saved: bool) -> None:
    hidden, outputs, sizes, widths = 6, 3, ((4, 4), (2, 2)), (5, 7)
    features = [torch.rand(2, c, *size) for c, size in zip(widths, sizes, strict=True)]
    weights = [torch.rand(hidden, c) for c in widths]
    vectors = [torch.rand(hidden), torch.rand(hidden), torch.rand(outputs, hidden)]
    tensors = [*features, *weights, *vectors, torch.rand(outputs)]
    for x in tensors if saved else ():
        x.requires_grad_()
    results: list[Tensor] = []

    def forward() -> None:
        results.append(pyramid_projection(features, weights, *tensors[4:]))

    levels = 2 * 2 * hidden * (5 * 16 + 7 * 4)
    last = 2 * 2 * outputs * hidden * 16
    assert flops.count(forward) == levels + last
    if saved:
        assert flops.count(lambda: results[0].sum().backward()) == 2 * (levels + last)


def test_plain_counter() -> None:
    """torch's own context counts them."""
    flops.register()
    query, key = torch.rand(1, C, 10), torch.rand(1, C, 7)
    with FlopCounterMode(display=False) as counter:
        xattn_kernels.linear_cross_attention(query, key, key)
    assert counter.get_total_flops() == 2 * C * C * 17 + 2 * C * 10


def test_attention_of_torch_on_cpus() -> None:
    q, k = (torch.rand(2, 3, n, 8, requires_grad=True) for n in (5, 9))
    outputs: list[Tensor] = []

    def forward() -> None:
        outputs.append(torch.nn.functional.scaled_dot_product_attention(q, k, k))

    assert flops.count(forward) == 4 * 2 * 3 * 5 * 9 * 8
    assert flops.count(lambda: outputs[0].sum().backward()) == 10 * 2 * 3 * 5 * 9 * 8


def test_imports_leave_torch_as_it_is() -> None:
    program = """
import sys
import torch
before = list(sys.meta_path)
import xattn_kernels
from xattn_kernels import flops
assert "torch.utils.flop_counter" not in sys.modules
assert sys.meta_path == before
"""
    subprocess.run([sys.executable, "-c", program], check=True)
