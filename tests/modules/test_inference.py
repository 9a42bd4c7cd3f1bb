"""Folded inference: as the op-by-op modules, and never behind the parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import xattn_kernels

from . import support

CLASSES = (*support.CLASSES, "CrossScaleAttention")
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(params=["reference", "cpu"], autouse=True)
def engine(request: pytest.FixtureRequest):
    with xattn_kernels.backend(request.param):
        yield request.param


def call_both(pair: support.Pair) -> float:
    """Distance of the outputs in inference."""
    pair.ours.eval(), pair.theirs.eval()
    with torch.no_grad():
        return support.distance(pair.ours(*pair.arguments), pair.theirs(*pair.arguments))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("options", [{"kind": "linear"}, {"kind": "softmax", "heads": 3}])
@pytest.mark.parametrize("name", support.CLASSES)
def test_as_op_by_op(name: str, options: dict, layout: str) -> None:
    pair = support.make(name, requires_grad=False, **options)
    if layout == "channels_last":
        pair.arguments = pair.with_arguments(memory_format=torch.channels_last)
    elif layout == "strided":
        pair.arguments = support.tree_map(lambda x: x.repeat(1, 1, 1, 2)[..., ::2], pair.arguments)
        pair.arguments = support.tree_map(lambda x: x.transpose(2, 3), pair.arguments)
    before = [x.clone() for x in pair.leaves()]
    assert call_both(pair) <= 1e-9
    assert all(torch.equal(x, y) for x, y in zip(pair.leaves(), before, strict=True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CLASSES)
def test_memory_format_follows_the_input(name: str, training: bool) -> None:
    pair = support.make(name, requires_grad=False, training=training)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        arguments = pair.with_arguments(memory_format=memory_format)
        for y in support.tensors(pair.ours(*arguments)):
            assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", support.CLASSES)
def test_dtype(name: str, training: bool, dtype: torch.dtype) -> None:
    """Against float64 from the rounded state: no worse than twice op by op, or the limit."""
    pair = support.make(name, dtype=dtype, training=training, requires_grad=False)
    exact = support.make(name, training=training, requires_grad=False)
    exact.theirs.load_state_dict(pair.theirs.state_dict())
    exact.arguments = pair.with_arguments(dtype=torch.float64)
    with torch.no_grad():
        ours, theirs = pair.ours(*pair.arguments), pair.theirs(*pair.arguments)
        reference = exact.theirs(*exact.arguments)
    assert all(y.dtype is dtype for y in support.tensors(ours))
    error = support.distance(ours, reference)
    assert error <= max(2 * support.distance(theirs, reference), TOLERANCES[dtype] / 10)
    assert error <= TOLERANCES[dtype]


def step(pair: support.Pair) -> None:
    for module in (pair.ours, pair.theirs):
        optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        optimiser.step()


def load(pair: support.Pair, assign: bool = False) -> None:
    support.randomise(pair.theirs, torch.Generator().manual_seed(5))
    state = copy.deepcopy(pair.theirs.state_dict())
    pair.ours.load_state_dict(state, assign=assign)


def write(pair: support.Pair) -> None:
    for module in (pair.ours, pair.theirs):
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(1.25)


def write_buffers(pair: support.Pair) -> None:
    for module in (pair.ours, pair.theirs):
        for _, bn in support.norms(module):
            bn.running_var.mul_(2)
            bn.running_mean[:1] += 1


def replace(pair: support.Pair) -> None:
    for module in (pair.ours, pair.theirs):
        for child in module.modules():
            if isinstance(child, (nn.Conv2d, nn.BatchNorm2d)):
                child.weight = nn.Parameter(child.weight.detach() * 0.5)


def swap_data(pair: support.Pair) -> None:
    for module in (pair.ours, pair.theirs):
        for p in module.parameters():
            p.data = p.data * 0.5
        for p in module.parameters():
            p.data = p.data * 0.5


def transpose(pair: support.Pair) -> None:
    """The same memory with other strides."""
    for module in (pair.ours, pair.theirs):
        for child in module.modules():
            if isinstance(child, nn.Conv2d) and child.weight.shape[0] == child.weight.shape[1]:
                child.weight.data = child.weight.data.transpose(0, 1)


def train(pair: support.Pair) -> None:
    for module in (pair.ours, pair.theirs):
        module.train()(*pair.arguments)


def change_eps(pair: support.Pair) -> None:
    support.set_norms(pair, eps=0.5)


def share(pair: support.Pair) -> None:
    pair.ours.share_memory()


@pytest.mark.parametrize(
    "change",
    [
        step,
        load,
        lambda pair: load(pair, assign=True),
        write,
        write_buffers,
        replace,
        swap_data,
        transpose,
        train,
        change_eps,
        share,
    ],
    ids=lambda change: change.__name__.strip("<>"),
)
@pytest.mark.parametrize("name", support.CLASSES)
def test_folded_weights_follow_the_parameters(name: str, change) -> None:
    pair = support.make(name, requires_grad=False)
    assert call_both(pair) <= 1e-9
    for _ in range(2):
        change(pair)
        assert call_both(pair) <= 1e-9


@pytest.mark.parametrize("name", support.CLASSES)
def test_conversion(name: str) -> None:
    """To another dtype and back: the folded weights are those of the rounded parameters."""
    pair = support.make(name, requires_grad=False)
    assert call_both(pair) <= 1e-9
    for module in (pair.ours, pair.theirs):
        module.to(torch.bfloat16).double()
    assert call_both(pair) <= 1e-9


@pytest.mark.parametrize("name", support.CLASSES)
def test_engines_do_not_share_packed_weights(name: str) -> None:
    pair = support.make(name, requires_grad=False)
    for other in ("cpu", "reference", "auto", "cpu"):
        with xattn_kernels.backend(other):
            assert call_both(pair) <= 1e-9


@pytest.mark.parametrize("name", support.CLASSES)
def test_inference_mode(name: str) -> None:
    """Folded there or under no_grad, used in both; parameters made in inference mode work too."""
    pair = support.make(name, requires_grad=False, training=False)
    expected = pair.theirs(*pair.arguments)
    for context in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with context():
            assert support.distance(pair.ours(*pair.arguments), expected) <= 1e-9
    with torch.inference_mode():
        inside = copy.deepcopy(pair.ours)
        assert support.distance(inside(*pair.arguments), expected) <= 1e-9
        for p in inside.parameters():
            p.mul_(1.25)
    write(pair)
    with torch.inference_mode():
        outputs = inside(*pair.arguments)
        assert support.distance(outputs, pair.theirs(*pair.arguments)) <= 1e-9


def test_functional_call() -> None:
    pair = support.make("CrossTaskAttention", requires_grad=False, training=False)
    other = support.make("CrossTaskAttention", requires_grad=False, training=False, seed=3)
    assert call_both(pair) <= 1e-9
    state = other.theirs.state_dict()
    with torch.no_grad():
        ours = torch.func.functional_call(pair.ours, state, pair.arguments)
        theirs = torch.func.functional_call(pair.theirs, state, pair.arguments)
    assert support.distance(ours, theirs) <= 1e-9
    assert call_both(pair) <= 1e-9


@pytest.mark.parametrize("name", support.CLASSES)
def test_autocast(name: str) -> None:
    """Outputs have the dtype and about the error of the op-by-op modules; nothing leaks."""
    pair = support.make(name, dtype=torch.float32, training=False)
    exact = support.make(name, training=False)
    exact.theirs.load_state_dict(pair.theirs.state_dict())
    exact.arguments = pair.with_arguments(dtype=torch.float64)
    reference = exact.theirs(*exact.arguments)
    for training in (False, True):
        with torch.set_grad_enabled(training), torch.autocast("cpu", dtype=torch.bfloat16):
            ours, theirs = pair.ours(*pair.arguments), pair.theirs(*pair.arguments)
        for a, b in zip(support.tensors(ours), support.tensors(theirs), strict=True):
            assert a.dtype is b.dtype
        error, baseline = support.distance(ours, reference), support.distance(theirs, reference)
        assert error <= 2 * baseline
        with torch.no_grad():
            assert support.distance(pair.ours(*pair.arguments), reference) <= 1e-5
