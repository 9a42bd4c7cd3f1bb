"""What training keeps for backward, and what stays behind."""

from __future__ import annotations

import gc
import resource

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from xattn_kernels.modules import CrossAttention
from xattn_kernels.testing import op_by_op

from . import support


def saved_bytes(module: torch.nn.Module, arguments: tuple) -> int:
    """Bytes of distinct storages kept for backward, without inputs, parameters and buffers."""
    known = [*support.tensors(arguments), *module.parameters(), *module.buffers()]
    skipped = {x.untyped_storage().data_ptr() for x in known}
    kept = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in skipped:
            kept[storage.data_ptr()] = (storage.nbytes(), x)  # held, so that addresses are distinct
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        module(*arguments)
    return sum(nbytes for nbytes, _ in kept.values())


@pytest.mark.parametrize(("name", "share"), [("CrossAttention", 0.3), ("CrossTaskAttention", 0.4)])
def test_saved_for_backward(name: str, share: float) -> None:
    pair = support.make(name, dtype=torch.float32, size=(48, 64))
    ours = saved_bytes(pair.ours, pair.arguments)
    assert ours <= share * saved_bytes(pair.theirs, pair.arguments)


@pytest.mark.parametrize(("recompute", "maps"), [(False, 10), (True, 0)])
def test_saved_per_token(recompute: bool, maps: int) -> None:
    """Maps that grow with the number of tokens: as op by op, or none where they are computed again.

    Five outputs of convolutions, five of batch norms or of the relus behind them.
    """
    block, (height, width) = CrossAttention(12, recompute=recompute), (16, 32)
    sizes = []
    for factor in (1, 2):
        x = torch.randn(2, 12, factor * height, width, requires_grad=True)
        y = torch.randn(2, 12, factor * height, width, requires_grad=True)
        sizes.append(saved_bytes(block, (x, y)))
    assert sizes[1] - sizes[0] == maps * 2 * 12 * height * width * 4


@pytest.mark.parametrize("name", support.CLASSES)
def test_checkpoint(name: str) -> None:
    pair = support.make(name, training=False)
    parameters = [*pair.ours.parameters()]
    expected = support.gradients(pair.ours, pair.arguments, parameters)
    actual = support.gradients(
        lambda *arguments: checkpoint(pair.ours, *arguments, use_reentrant=False),
        pair.arguments,
        parameters,
    )
    assert support.distance(actual, expected) == 0


def test_checkpoint_with_autocast() -> None:
    pair = support.make("CrossTaskAttention", dtype=torch.float32, training=False)
    parameters = [*pair.ours.parameters()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = support.gradients(pair.ours, pair.arguments, parameters)
        actual = support.gradients(
            lambda *arguments: checkpoint(pair.ours, *arguments, use_reentrant=False),
            pair.arguments,
            parameters,
        )
    assert support.distance(actual, expected) == 0


@pytest.mark.parametrize("checkpointed", [False, True])
def test_memory_stays_flat(checkpointed: bool) -> None:
    block = CrossAttention(6)
    x, y = torch.randn(1, 6, 4, 4, requires_grad=True), torch.randn(1, 6, 3, 3)

    def iterate(count: int) -> None:
        for i in range(count):
            block.train(i % 2 == 0)
            output = checkpoint(block, x, y, use_reentrant=False) if checkpointed else block(x, y)
            output.sum().backward()
            with torch.no_grad():
                block.eval()(x, y)

    def live() -> int:
        gc.collect()
        return sum(isinstance(x, torch.Tensor) for x in gc.get_objects())

    iterate(100)
    tensors, peak = live(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    iterate(1000)
    assert live() <= tensors
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss <= peak + 8 * 1024  # KiB


def test_op_by_op_is_the_yardstick() -> None:
    """The comparison above means something: op by op keeps about ten maps per attention."""
    block, x = op_by_op.CrossAttention(12), torch.randn(2, 12, 16, 32, requires_grad=True)
    assert saved_bytes(block, (x, x.clone())) >= 10 * x.numel() * x.element_size()
