"""Feature maps split by rows over processes: the op-by-op modules on whole maps."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from modules.support import TASKS, make, norms, randomise, set_norms, tensors
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from xattn_kernels import modules
from xattn_kernels.distributed import shard_rows, sum_gradients
from xattn_kernels.modules.layers import BasicBlock
from xattn_kernels.modules.row_sharding import rows_of, with_halos
from xattn_kernels.testing import op_by_op

from . import support, world
from .support import cuts

NAMES = ("CrossAttention", "CrossTaskAttention", "CrossScaleAttention")


def _heights(ranks: int) -> Callable[[Tensor], Sequence[int]]:
    return lambda x: cuts(x.shape[2], ranks)


def compare(
    ours: nn.Module,
    theirs: nn.Module,
    reference: Callable[..., Any],
    arguments: tuple[Any, ...],
    ranks: int,
) -> None:
    """Two steps, forward and backward, of rows on the first `ranks` ranks."""
    group, rank = support.group(*range(ranks)), dist.get_rank()
    if rank >= ranks:
        return
    assert shard_rows(ours, group) is ours
    parts = support.part(arguments, _heights(ranks), rank, 2)
    for _ in range(2):
        expected = reference(*arguments)
        factors = support.weights(expected)
        support.backward(expected, factors)
        outputs = ours(*parts)
        support.backward(outputs, support.part(factors, _heights(ranks), rank, 2))
        support.same(outputs, support.part(expected, _heights(ranks), rank, 2), "outputs")
    gradients = support.part(support.gradients(arguments), _heights(ranks), rank, 2)
    support.same(support.gradients(parts), gradients, "gradients of features")
    sum_gradients(ours, group)
    support.same(
        support.parameter_gradients(ours),
        support.parameter_gradients(theirs, like=ours),
        "gradients of parameters",
    )
    support.same_buffers(ours, theirs)


def _pair(name: str, ranks: int, **options: Any) -> tuple[Any, Callable[..., Any]]:
    options = {"size": (16, 6) if ranks == 4 else (12, 8), **options}
    pair = make(name, **options)
    reference: Callable[..., Any] = pair.theirs
    if name == "CrossScaleAttention":
        state = pair.theirs.state_dict()
        pair.ours.load_state_dict({k: state[k] for k in pair.ours.state_dict()})
        reference = pair.theirs.attend  # type: ignore[assignment]
    return pair, reference


def attends(
    name: str, ranks: int, recompute: bool, momentum: float | None = 0.1, **options: Any
) -> None:
    pair, reference = _pair(name, ranks, **options)
    support.recompute(pair.ours, recompute)
    set_norms(pair, momentum=momentum)
    compare(pair.ours, pair.theirs, reference, pair.arguments, ranks)


def in_channels_last(name: str) -> None:
    pair, reference = _pair(name, 2)
    support.recompute(pair.ours)
    arguments = tree_map(
        lambda x: x.detach().to(memory_format=torch.channels_last).requires_grad_(), pair.arguments
    )
    compare(pair.ours, pair.theirs, reference, arguments, 2)


def infers(name: str, ranks: int, recompute: bool) -> None:
    pair, reference = _pair(name, ranks, training=False, requires_grad=False)
    support.recompute(pair.ours, recompute)
    group, rank = support.group(*range(ranks)), dist.get_rank()
    if rank < ranks:
        shard_rows(pair.ours, group)
        with torch.no_grad():
            outputs = pair.ours(*support.part(pair.arguments, _heights(ranks), rank, 2))
            expected = support.part(reference(*pair.arguments), _heights(ranks), rank, 2)
        support.same(outputs, expected, "outputs")


def in_checkpoints() -> None:
    """The forward pass runs again in backward, collectives included."""
    pair, reference = _pair("CrossTaskAttention", 2)
    support.recompute(pair.ours)
    group, rank = support.group(0, 1), dist.get_rank()
    if rank > 1:
        return
    shard_rows(pair.ours, group)
    parts = support.part(pair.arguments, _heights(2), rank, 2)
    outputs = checkpoint(pair.ours, *parts, use_reentrant=False)
    expected = reference(*pair.arguments)
    factors = support.weights(expected)
    support.backward(outputs, support.part(factors, _heights(2), rank, 2))
    support.backward(expected, factors)
    gradients = support.part(support.gradients(pair.arguments), _heights(2), rank, 2)
    support.same(support.gradients(parts), gradients, "gradients of features")


def under_autocast(name: str) -> None:
    """bfloat16 features, float32 parameters: as on whole maps but for rounding."""
    pair, _ = _pair(name, 2, dtype=torch.float32)
    support.recompute(pair.ours)
    whole = copy.deepcopy(pair.ours)
    group, rank = support.group(0, 1), dist.get_rank()
    if rank > 1:
        return
    shard_rows(pair.ours, group)
    parts = support.part(pair.arguments, _heights(2), rank, 2)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, expected = pair.ours(*parts), whole(*pair.arguments)
    factors = support.weights(expected)
    support.backward(outputs, support.part(factors, _heights(2), rank, 2))
    support.backward(expected, factors)
    for ours, theirs in zip(tensors(outputs), tensors(expected), strict=True):
        assert ours.dtype == theirs.dtype
    support.same(outputs, support.part(expected, _heights(2), rank, 2), "outputs", 3e-2)
    gradients = support.part(support.gradients(pair.arguments), _heights(2), rank, 2)
    support.same(support.gradients(parts), gradients, "gradients of features", 6e-2)


def some_norms_are_frozen() -> None:
    pair, reference = _pair("CrossTaskAttention", 2)
    for module in (pair.ours, pair.theirs):
        for i, (_, bn) in enumerate(norms(module)):
            bn.train(i % 3 > 0)
    compare(pair.ours, pair.theirs, reference, pair.arguments, 2)


def sizes_differ_between_tasks() -> None:
    pair, reference = _pair("CrossTaskAttention", 2)
    support.recompute(pair.ours)
    features = pair.arguments[0]
    features["depth"] = features["depth"][:, :, :7, 1:].detach().requires_grad_()
    compare(pair.ours, pair.theirs, reference, pair.arguments, 2)


def convolves(widths: tuple[int, int], ranks: int, training: bool) -> None:
    ours = BasicBlock(*widths, 0.1, shortcut=widths[0] != widths[1]).double()
    theirs = op_by_op.BasicBlock(*widths, 0.1).double()
    randomise(theirs, torch.Generator().manual_seed(0))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, widths[0], 9, 5, dtype=torch.float64, requires_grad=True)
    compare(ours.train(training), theirs.train(training), theirs, (x,), ranks)


def halos(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    rank = dist.get_rank()
    whole = torch.arange(2 * 3 * 8 * 5).reshape(2, 3, 8, 5).remainder(128).to(dtype)
    sizes = cuts(8, world.RANKS)
    start = sum(sizes[:rank])
    own = whole[:, :, start : start + sizes[rank]].clone(memory_format=memory_format)
    padded = F.pad(whole, (0, 0, 1, 1))[:, :, start : start + sizes[rank] + 2]
    for x in (own, own.requires_grad_()):
        one, other = with_halos([x, x[:, :1]], dist.group.WORLD)
        assert torch.equal(one, padded) and torch.equal(other, padded[:, :1])
        assert one.is_contiguous(memory_format=memory_format)


def data_and_rows(recompute: bool) -> None:
    """Two halves of the samples, each map of which two ranks share: statistics are of all four."""
    rank = dist.get_rank()
    groups = support.group(0, 1), support.group(2, 3)
    pair, _ = _pair("CrossTaskAttention", 2, batch=3)
    support.recompute(pair.ours, recompute)
    parallel = DistributedDataParallel(pair.ours)
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(parallel.module)
    shard_rows(ours, groups[rank // 2])

    def own(value: Any) -> Any:
        samples = support.part(value, lambda x: (1, 2), rank // 2, 0)
        return support.part(samples, _heights(2), rank % 2, 2)

    expected = pair.theirs(*pair.arguments)
    factors = support.weights(expected)
    support.backward(expected, factors)
    arguments = own(pair.arguments)
    outputs = parallel(*arguments)
    support.backward(outputs, own(factors), 4)
    support.same(outputs, own(expected), "outputs")
    gradients = [4 * g for g in own(support.gradients(pair.arguments))]
    support.same(support.gradients(arguments), gradients, "gradients of features")
    support.same(
        support.parameter_gradients(ours),
        support.parameter_gradients(pair.theirs),
        "gradients of parameters",
    )
    support.same_buffers(ours, pair.theirs)


def repeats_bit_for_bit() -> None:
    pair, _ = _pair("CrossTaskAttention", 4)
    support.recompute(pair.ours)
    shard_rows(pair.ours, dist.group.WORLD)
    results = []
    for _ in range(2):
        parts = support.part(pair.arguments, _heights(4), dist.get_rank(), 2)
        outputs = pair.ours(*parts)
        support.backward(outputs, support.weights(outputs))
        results.append([*outputs.values(), *support.gradients(parts)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def copies_and_whole_maps() -> None:
    block = modules.CrossAttention(4)
    shard_rows(block, dist.group.WORLD)
    assert rows_of(copy.deepcopy(block)) is dist.group.WORLD
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(block)
    assert rows_of(pickle.loads(pickle.dumps(shard_rows(block, None)))) is None


def refusals() -> None:
    everyone = dist.group.WORLD
    rank = dist.get_rank()
    block = nn.ModuleDict({"a": nn.Sequential(modules.CrossAttention(4))})
    shard_rows(block, everyone)
    attention = block["a"][0]
    x = torch.randn(1, 4, 2, 2)
    with pytest.raises(ValueError, match=r"map 1: got .*B=1, H=2, W=3.* expected the same"):
        attention(x, torch.randn(1, 4, 2, 3 if rank == 2 else 2))
    with pytest.raises(ValueError, match="at least one row"):
        attention(x[:, :, : 2 * (rank > 0)], x)
    attention.value_project.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="CrossAttention: got hooks or layers other"):
        attention(x, x)
    residual = shard_rows(BasicBlock(4, 4, 0.1, shortcut=False), everyone)
    residual.bn1 = nn.InstanceNorm2d(4)
    with pytest.raises(RuntimeError, match="BasicBlock: got hooks or layers other"):
        residual(x)
    with pytest.raises(TypeError, match=r"module: got a CrossScaleHead"):
        shard_rows(modules.CrossScaleHead((4, 8), 2), everyone)
    with pytest.raises(TypeError, match=r"module\.1: got a Conv2d"):
        shard_rows(nn.Sequential(modules.CrossAttention(4), nn.Conv2d(4, 4, 3)), everyone)
    with pytest.raises(ValueError, match=r"module\.b: got kind 'softmax', expected 'linear'"):
        shard_rows(nn.ModuleDict({"b": modules.CrossAttention(4, kind="softmax")}), everyone)
    outside = support.group(0, 1)
    if rank > 1:
        with pytest.raises(ValueError, match="not one of its ranks"):
            shard_rows(modules.CrossAttention(4), outside)
        return
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(modules.CrossAttention(4), outside)
    shard_rows(converted, outside)(x, x)


def group_of_norms_is_too_small() -> None:
    group, outside = support.group(0, 1), support.group(0, 1, 2)
    if dist.get_rank() > 1:
        return
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(modules.CrossAttention(4), group)
    shard_rows(converted, outside)
    from xattn_kernels.modules.normalisation import statistics_group

    with pytest.raises(ValueError, match=r"SyncBatchNorm: its process group lacks the ranks \[2\]"):
        statistics_group(converted.value_project.bn, outside)


CASES = [
    *(
        partial(halos, dtype, memory_format)
        for dtype in (torch.float64, torch.bfloat16, torch.float16)
        for memory_format in (torch.contiguous_format, torch.channels_last)
    ),
    *(partial(convolves, widths, 2, True) for widths in [(6, 4), (5, 5)]),
    *(partial(convolves, (6, 4), 4, training) for training in (True, False)),
    *(
        partial(attends, name, ranks, recompute, training=training)
        for name in NAMES
        for ranks in (2, 4)
        for recompute in (True, False)
        for training in (True, False)
    ),
    *(
        partial(infers, name, ranks, recompute)
        for name in NAMES
        for ranks in (2, 4)
        for recompute in (True, False)
    ),
    *(partial(in_channels_last, name) for name in NAMES),
    partial(attends, "CrossTaskAttention", 2, True, momentum=None),
    partial(attends, "CrossTaskAttention", 2, True, auxiliary_tasks=("edge", *TASKS)),
    partial(attends, "CrossTaskAttention", 4, True, batch=1),
    *(
        partial(support.with_kernels, partial(attends, name, 4, recompute, training=training))
        for name in NAMES
        for recompute, training in [(True, True), (True, False), (False, True)]
    ),
    *(partial(support.with_kernels, partial(infers, name, 2, True)) for name in NAMES),
    in_checkpoints,
    *(partial(under_autocast, name) for name in NAMES),
    some_norms_are_frozen,
    sizes_differ_between_tasks,
    *(partial(data_and_rows, recompute) for recompute in (True, False)),
    repeats_bit_for_bit,
    copies_and_whole_maps,
    group_of_norms_is_too_small,
    refusals,
]


@pytest.mark.timeout(world.PYTEST_LIMIT)
def test_shard_rows() -> None:
    failures = world.run(CASES)
    assert not failures, "\n".join(failures)
