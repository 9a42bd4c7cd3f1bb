"""SyncBatchNorm and DistributedDataParallel: the op-by-op modules on all ranks' samples at once."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from modules.support import make, norms, set_norms
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from xattn_kernels import collectives
from xattn_kernels.distributed import sum_gradients
from xattn_kernels.modules.layers import BasicBlock

from . import support, world

NAMES = ("CrossAttention", "CrossTaskAttention", "CrossScaleHead")


def trains(
    name: str,
    sizes: tuple[int, ...],
    recompute: bool,
    momentum: float | None = 0.1,
    **options: Any,
) -> None:
    """Forward, backward and running statistics of two steps, with `sizes` samples on the ranks."""
    group, rank = support.group(*range(len(sizes))), dist.get_rank()
    if rank >= len(sizes):
        return
    pair = make(name, batch=sum(sizes), **options)
    support.recompute(pair.ours, recompute)
    set_norms(pair, momentum=momentum)
    parallel = DistributedDataParallel(pair.ours, process_group=group)
    # After wrapping: torch's wrapper refuses synchronised batch norms on CPU.
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(parallel.module, group)
    for _ in range(2):
        for module in (parallel, pair.theirs):
            module.zero_grad()
        arguments = support.part(pair.arguments, lambda x: sizes, rank, 0)
        expected = pair.theirs(*pair.arguments)
        factors = support.weights(expected)
        for x in pair.leaves():
            x.grad = None
        support.backward(expected, factors)
        outputs = parallel(*arguments)
        # DistributedDataParallel averages: the loss of all samples is the mean of the ranks'.
        support.backward(outputs, support.part(factors, lambda x: sizes, rank, 0), len(sizes))
        support.same(outputs, support.part(expected, lambda x: sizes, rank, 0), "outputs")
        gradients = support.part(support.gradients(pair.arguments), lambda x: sizes, rank, 0)
        scaled = [g * len(sizes) for g in gradients]
        support.same(support.gradients(arguments), scaled, "gradients of features")
        support.same(
            support.parameter_gradients(ours),
            support.parameter_gradients(pair.theirs),
            "gradients of parameters",
        )
        support.same_buffers(ours, pair.theirs)


def shares_are_those_of_layers(name: str) -> None:
    """Each rank's parameter gradients, before any averaging: recomputed, and layer by layer."""
    sizes, rank = (2, 1, 3, 1), dist.get_rank()
    pair = make(name, batch=sum(sizes))
    arguments = support.part(pair.arguments, lambda x: sizes, rank, 0)
    found = []
    for recompute in (True, False):
        module = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(pair.ours))
        support.recompute(module, recompute)
        outputs = module(*arguments)
        support.backward(outputs, support.weights(outputs))
        found.append(support.parameter_gradients(module))
    support.same(*found, "gradients of parameters")


def evaluates(name: str) -> None:
    """Running statistics: no rank needs another, gradient or not."""
    pair = make(name, training=False)
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(pair.ours)
    if dist.get_rank() == 0:
        support.same(ours(*pair.arguments), pair.theirs(*pair.arguments), "outputs")
        with torch.no_grad():
            support.same(ours(*pair.arguments), pair.theirs(*pair.arguments), "inference")
    support.same_buffers(ours, pair.theirs)


def some_norms_are_frozen() -> None:
    pair = make("CrossTaskAttention", batch=4)
    for module in (pair.ours, pair.theirs):
        for i, (_, bn) in enumerate(norms(module)):
            bn.train(i % 3 > 0)
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(pair.ours)
    sizes, rank = (1, 1, 1, 1), dist.get_rank()
    outputs = ours(*support.part(pair.arguments, lambda x: sizes, rank, 0))
    expected = pair.theirs(*pair.arguments)
    support.same(outputs, support.part(expected, lambda x: sizes, rank, 0), "outputs")
    support.same_buffers(ours, pair.theirs)


def single_value_is_refused() -> None:
    """One value per channel on one rank alone is enough, on all together too few."""
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(BasicBlock(2, 2, 0.1, shortcut=False))
    ours(torch.randn(1, 2, 1, 1))
    x = torch.randn(1 if dist.get_rank() == 0 else 0, 2, 1, 1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ours(x)


def moments_are_merged(dtype: torch.dtype, tolerance: float) -> None:
    """Unequal counts, an empty rank, means far from zero."""
    counts = [[3, 0, 7, 1], [0, 5, 0, 2]]
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    sets = [
        [100 + r + torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in row]
        for r, row in enumerate(zip(*counts, strict=True))
    ]
    own = sets[rank]
    means = [x.mean(0) for x in own]  # NaN where there are none
    outer = [(x - m).T @ (x - m) for x, m in zip(own, means, strict=True)]
    reduction = collectives.reduction(dist.group.WORLD, None)
    count = torch.tensor([len(x) for x in own], dtype=dtype)
    mean, deviations, total = reduction.moments(
        torch.stack(means).to(dtype), torch.stack(outer).to(dtype), count
    )
    _, squares, _ = reduction.moments(
        torch.stack(means).to(dtype), torch.stack([m.diag() for m in outer]).to(dtype), count
    )
    for i, parts in enumerate(zip(*sets, strict=True)):
        whole = torch.cat(parts)
        assert total[i] == len(whole)
        support.same(mean[i], whole.mean(0), "mean", tolerance)
        centred = whole - whole.mean(0)
        support.same(deviations[i], centred.T @ centred, "outer products", tolerance)
        support.same(squares[i], centred.square().sum(0), "squares", tolerance)
    everywhere = collectives.gather(torch.cat([mean, squares], 1), dist.group.WORLD)
    assert torch.equal(everywhere, everywhere[:1].expand_as(everywhere))


def sums_and_states() -> None:
    rank = dist.get_rank()
    rows = support.group(0, 1), support.group(2, 3)
    x = torch.full((2, 3), float(rank))
    both = collectives.reduction(dist.group.WORLD, rows[rank // 2])
    assert not both.is_local and collectives.reduction(None, None).is_local
    assert torch.equal(both.sums(x), torch.full((2, 3), 6.0))
    s, z = both.states(x, x[0] + 1)
    assert torch.equal(s, torch.full((2, 3), 1.0 + rank // 2 * 4)) and torch.equal(z, s[0] + 2)
    assert both.counts([torch.empty(rank, 3, 2, 2), torch.empty(2, 3, 5)]) == [24, 40]
    assert torch.equal(collectives.reduction(None, rows[rank // 2]).sums(x), x)
    assert collectives.reduction(None, rows[rank // 2]).counts([x]) == [4]
    module = nn.Linear(2, 1)
    for p in module.parameters():
        p.grad = torch.full_like(p, float(rank)) if rank % 2 else None
    module.bias.grad = None
    sum_gradients(module)
    assert torch.equal(module.weight.grad, torch.full((1, 2), 4.0)) and module.bias.grad is None


CASES = [
    partial(moments_are_merged, torch.float64, 1e-12),
    partial(moments_are_merged, torch.float32, 1e-5),
    sums_and_states,
    *(
        partial(trains, name, sizes, recompute)
        for name in NAMES
        for sizes in [(1, 3), (2, 1, 3, 1)]
        for recompute in (True, False)
    ),
    # Too few tokens on each rank, and enough or not on all together.
    *(partial(trains, "CrossAttention", sizes, True, size=(2, 4)) for sizes in [(1, 7), (1, 2)]),
    partial(trains, "CrossTaskAttention", (2, 2), True, momentum=None),
    partial(trains, "CrossTaskAttention", (2, 2), False, kind="softmax", heads=3),
    *(
        partial(support.with_kernels, partial(trains, name, (1, 0, 2), recompute))
        for name in NAMES
        for recompute in (True, False)
    ),
    *(partial(shares_are_those_of_layers, name) for name in NAMES),
    *(partial(evaluates, name) for name in NAMES),
    some_norms_are_frozen,
    single_value_is_refused,
]


@pytest.mark.timeout(world.PYTEST_LIMIT)
def test_data_parallel() -> None:
    failures = world.run(CASES)
    assert not failures, "\n".join(failures)
