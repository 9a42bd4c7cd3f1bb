"""Packed training against the op-by-op modules: values, gradients, statistics, torch's rules."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import xattn_kernels
from xattn_kernels.modules import CrossAttention, CrossTaskAttention

from . import support

KINDS = [{"kind": "linear"}, {"kind": "softmax", "heads": 3}]


@pytest.fixture(params=["reference", "cpu"], autouse=True)
def engine(request: pytest.FixtureRequest):
    with xattn_kernels.backend(request.param):
        yield request.param


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", support.CLASSES)
def test_as_op_by_op(name: str, training: bool, batch: int, options: dict) -> None:
    support.compare_training(support.make(name, batch=batch, training=training, **options))


def test_auxiliary_tasks() -> None:
    names = ("edge", "normals", "semseg", "depth", "sal")
    pair = support.make("CrossTaskAttention", auxiliary_tasks=names)
    support.compare_training(pair)
    assert list(pair.ours(*pair.arguments)) == list(support.TASKS)


def test_sizes_may_differ_between_tasks() -> None:
    pair = support.make("CrossTaskAttention")
    features = pair.arguments[0]
    features["depth"] = features["depth"][:, :, :3, 1:].detach().requires_grad_()
    support.compare_training(pair)


def test_cross_scale_attention_is_the_heads() -> None:
    pair = support.make("CrossScaleAttention")
    state = pair.theirs.state_dict()
    own = {key: value for key, value in state.items() if not key.startswith("last_layer")}
    pair.ours.load_state_dict(own, strict=True)
    assert list(pair.ours.state_dict()) == list(own)
    parameters = [dict(pair.theirs.named_parameters())[k] for k, _ in pair.ours.named_parameters()]
    ours = support.gradients(pair.ours, pair.arguments, [*pair.ours.parameters()])
    theirs = support.gradients(pair.theirs.attend, pair.arguments, parameters)
    assert [len(row) for row in ours[0]] == [2, 1]
    assert support.distance(ours, theirs) <= 1e-9


@pytest.mark.parametrize("momentum", [None, 0.0, 0.3])
@pytest.mark.parametrize("name", support.CLASSES)
def test_momentum(name: str, momentum: float | None) -> None:
    pair = support.make(name, requires_grad=False)
    support.set_norms(pair, momentum=momentum)
    for _ in range(3):
        pair.ours(*pair.arguments), pair.theirs(*pair.arguments)
        support.compare_buffers(pair)


@pytest.mark.parametrize("name", support.CLASSES)
def test_without_running_statistics(name: str) -> None:
    pair = support.make(name)
    for module in (pair.ours, pair.theirs):
        for _, bn in support.norms(module):
            bn.track_running_stats = False
            bn.running_mean = bn.running_var = bn.num_batches_tracked = None
    support.compare_training(pair)
    pair.ours.eval(), pair.theirs.eval()
    support.compare_training(pair)
    with torch.no_grad():
        ours, theirs = pair.ours(*pair.arguments), pair.theirs(*pair.arguments)
    assert support.distance(ours, theirs) <= 1e-9


@pytest.mark.parametrize("frozen", ["all", "one", "first"])
@pytest.mark.parametrize("name", support.CLASSES)
def test_frozen_batch_norm(name: str, frozen: str) -> None:
    """Some in eval mode while the parent trains: those keep their statistics."""
    pair = support.make(name)
    for module in (pair.ours, pair.theirs):
        for i, (key, bn) in enumerate(support.norms(module)):
            if (
                frozen == "all"
                or (frozen == "one" and i == 4)
                or (frozen == "first" and "t.0." in key)
            ):
                bn.eval()
    support.compare_training(pair)


@pytest.mark.parametrize("name", support.CLASSES)
def test_eps(name: str) -> None:
    pair = support.make(name)
    support.set_norms(pair, eps=0.1)
    support.compare_training(pair)
    for module in (pair.ours, pair.theirs):
        for i, (_, bn) in enumerate(support.norms(module)):
            bn.eps = 0.1 * (1 + i % 3)
    support.compare_training(pair)


@pytest.mark.parametrize("name", support.CLASSES)
def test_hooks_and_replaced_layers_are_called(name: str) -> None:
    pair = support.make(name)
    called = []
    for key, bn in support.norms(pair.ours):
        bn.register_forward_hook(lambda *_, key=key: called.append(key))
    support.compare_training(pair)
    assert set(called) == {key for key, _ in support.norms(pair.ours)}

    class Doubled(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    pair = support.make(name)
    for module in (pair.ours, pair.theirs):
        _, bn = next(iter(support.norms(module)))
        bn.__class__ = Doubled
    support.compare_training(pair)


def test_attention_blocks_can_be_hooked() -> None:
    """As one does to look at what a pair of tasks exchanges."""
    pair = support.make("CrossTaskAttention")
    seen = []
    block = pair.ours.cross_attention["semseg"]["depth"]
    block.register_forward_hook(lambda _, inputs, output: seen.append((*inputs, output)))
    support.compare_training(pair)
    assert [x.shape for x in seen[0]] == [(2, 12, 6, 8)] * 3


def test_one_value_per_channel() -> None:
    for name in support.CLASSES:
        pair = support.make(name, batch=1)
        single = support.tree_map(lambda x: x[:, :, :1, :1], pair.arguments)
        for module in (pair.ours, pair.theirs):
            with pytest.raises(ValueError, match="more than 1 value per channel when training"):
                module(*single)
        pair.ours.eval(), pair.theirs.eval()
        assert support.distance(pair.ours(*single), pair.theirs(*single)) <= 1e-9


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(training: bool) -> None:
    for name in support.CLASSES:
        pair = support.make(name, training=training, batch=0)
        support.compare_training(pair)


@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3)))
def test_gradients_only_where_asked(wanted: tuple[bool, bool, bool]) -> None:
    pair = support.make("CrossAttention")
    for module in (pair.ours, pair.theirs):
        for name, p in module.named_parameters():
            p.requires_grad_(wanted[2] and "key" not in name)
    for x, want in zip(pair.arguments, wanted, strict=False):
        x.requires_grad_(want)
    if any(wanted):
        support.compare_training(pair)
    assert pair.ours(*pair.arguments).requires_grad == any(wanted)
    pair.ours(*pair.arguments).sum().backward() if any(wanted) else None
    for x, want in zip(pair.arguments, wanted, strict=False):
        assert (x.grad is not None) == want
    assert all((p.grad is not None) == p.requires_grad for p in pair.ours.parameters())


def test_unused_outputs_and_two_backwards() -> None:
    pair = support.make("CrossTaskAttention")
    leaves = [
        pair.arguments[0]["depth"],
        pair.ours.cross_attention["depth"]["semseg"].key_project[0].conv.weight,
    ]
    peers = [leaves[0], pair.theirs.cross_attention["depth"]["semseg"].key_project[0].conv.weight]
    ours, theirs = pair.ours(*pair.arguments)["depth"], pair.theirs(*pair.arguments)["depth"]
    expected = torch.autograd.grad(theirs.square().sum(), peers)
    for _ in range(2):
        actual = torch.autograd.grad(ours.square().sum(), leaves, retain_graph=True)
        assert support.distance(actual, expected) <= 1e-9


def test_changed_input_is_noticed() -> None:
    pair = support.make("CrossAttention")
    target = pair.arguments[0].detach().clone().requires_grad_()
    copy = target * 1
    output = pair.ours(copy, pair.arguments[1])
    copy.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_target_is_source() -> None:
    pair = support.make("CrossAttention")
    pair.arguments = (pair.arguments[0],) * 2
    support.compare_training(pair)


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("size", [(6, 8), (96, 160)])
def test_float32(size: tuple[int, int], mean: float) -> None:
    """Errors against float64 stay near those of op by op."""
    pair = support.make("CrossAttention", dtype=torch.float32, size=size)
    pair.arguments = tuple((x + mean).detach().requires_grad_() for x in pair.arguments)
    exact = support.make("CrossAttention", size=size)
    exact.arguments = tuple(x.detach().double().requires_grad_() for x in pair.arguments)
    exact.theirs.load_state_dict(pair.theirs.state_dict())
    results = [
        support.gradients(module, arguments, [*module.parameters()])
        for module, arguments in (
            (pair.ours, pair.arguments),
            (pair.theirs, pair.arguments),
            (exact.theirs, exact.arguments),
        )
    ]
    for ours, theirs, reference in zip(*(support.tensors(r) for r in results), strict=True):
        error, baseline = support.distance(ours, reference), support.distance(theirs, reference)
        assert error <= max(3 * baseline, 1e-6)


def test_statistics_without_gradient() -> None:
    """Training mode under no_grad updates statistics, too."""
    pair = support.make("CrossTaskAttention")
    with torch.no_grad():
        ours, theirs = pair.ours(*pair.arguments), pair.theirs(*pair.arguments)
    assert support.distance(ours, theirs) <= 1e-9
    support.compare_buffers(pair)


def test_parameter_count() -> None:
    channels = 36
    block = CrossAttention(channels)
    assert sum(p.numel() for p in block.parameters()) == 5 * channels**2 + 10 * channels
    ctam = CrossTaskAttention(["a", "b", "c", "d"], channels)
    fuse = 9 * (6 + 1) * channels**2 + 6 * channels**2 + 6 * channels
    assert (
        sum(p.numel() for p in ctam.parameters()) == 12 * (5 * channels**2 + 10 * channels) + fuse
    )
