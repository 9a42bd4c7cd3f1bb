"""The residual block: folded in inference, layer by layer else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap

from xattn_kernels.modules.layers import BasicBlock
from xattn_kernels.testing import op_by_op


def make(in_channels: int = 6, dtype: torch.dtype = torch.float64) -> BasicBlock:
    torch.manual_seed(0)
    block = BasicBlock(in_channels, 6, momentum=0.1, shortcut=in_channels != 6).to(dtype)
    with torch.no_grad():
        for name, x in [*block.named_parameters(), *block.named_buffers()]:
            if name.endswith("running_var") or x.dim() == 1:
                x.copy_(torch.rand(x.shape) + 0.5)
    return block.eval()


def plain(block: BasicBlock, x: Tensor) -> Tensor:
    hidden = F.relu(block.bn1(block.conv1(x)))
    return F.relu(block.bn2(block.conv2(hidden)) + (block.downsample or nn.Identity())(x))


@pytest.mark.parametrize("in_channels", [6, 10])
@pytest.mark.parametrize("last", [False, True])
def test_inference(in_channels: int, last: bool) -> None:
    block = make(in_channels)
    x = torch.randn(2, in_channels, 5, 7, dtype=torch.float64)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    before = x.clone()
    with torch.no_grad():
        y = block(x)
        torch.testing.assert_close(y, plain(block, x))
    assert torch.equal(x, before)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("in_channels", [6, 10])
def test_training(in_channels: int) -> None:
    blocks = [make(in_channels).train() for _ in range(2)]
    x = torch.randn(2, in_channels, 5, 7, dtype=torch.float64)
    for block, call in zip(blocks, (BasicBlock.forward, plain), strict=True):
        call(block, x).square().sum().backward()
    for p, q in zip(blocks[0].parameters(), blocks[1].parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    for p, q in zip(blocks[0].buffers(), blocks[1].buffers(), strict=True):
        torch.testing.assert_close(p, q)


def scale(block: nn.Module) -> None:
    with torch.no_grad():
        block.conv2.weight.mul_(2)


def hook(block: nn.Module) -> None:
    block.bn1.register_forward_hook(lambda _, __, y: y + 1)


def replace(block: nn.Module) -> None:
    block.downsample[0] = nn.Conv2d(10, 6, 1, bias=True, dtype=torch.float64)


def bias(block: nn.Module) -> None:
    block.conv1 = nn.Conv2d(10, 6, 3, padding=1, dtype=torch.float64)


def other_norm(block: nn.Module) -> None:
    block.bn2 = nn.GroupNorm(2, 6, dtype=torch.float64)


@pytest.mark.parametrize("change", [scale, hook, replace, bias, other_norm])
def test_changes_are_seen(change: Any) -> None:
    block = make(10)
    x = torch.randn(1, 10, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        before = block(x)
        change(block)
        after = block(x)
        torch.testing.assert_close(after, plain(block, x))
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    block = make(10, dtype)
    x = torch.randn(1, 10, 8, 8, dtype=dtype)
    with torch.no_grad():
        y = block(x)
        expected = plain(block.double(), x.double())
    assert y.dtype == dtype
    assert (y.double() - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm()


def test_autocast() -> None:
    block = make(10, torch.float32)
    x = torch.randn(1, 10, 8, 8)
    with torch.no_grad():
        expected = block(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = block(x)
    assert y.dtype == torch.bfloat16
    assert (y - expected).norm() <= 0.02 * expected.norm()


def test_transforms() -> None:
    block = make(10)
    x = torch.randn(3, 1, 10, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        block(x[0])
        expected = torch.stack([plain(block, y) for y in x])
        torch.testing.assert_close(vmap(block)(x), expected)
        value, tangent = jvp(block, (x[0],), (torch.ones_like(x[0]),))
        torch.testing.assert_close(value, expected[0])
        step = plain(block, x[0] + 1e-6) - plain(block, x[0] - 1e-6)
        torch.testing.assert_close(tangent, step / 2e-6, rtol=1e-5, atol=1e-5)
        state = {name: 2 * y for name, y in block.state_dict().items()}
        doubled = functional_call(block, state, x[0])
        block.load_state_dict(state)
        torch.testing.assert_close(doubled, plain(block, x[0]))


def test_state_is_that_of_the_reference() -> None:
    ours, theirs = BasicBlock(10, 6, 0.1), op_by_op.BasicBlock(10, 6, 0.1)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    short = BasicBlock(6, 6, 0.1, shortcut=False)
    assert not any("downsample" in name for name in short.state_dict())


@pytest.mark.parametrize("norm", ["bn1", "bn2"])
def test_what_hooks_keep_is_not_written_to(norm: str) -> None:
    block = BasicBlock(4, 4, 0.1).train()
    kept: list[Tensor] = []
    layer = block.get_submodule(norm)
    layer.register_forward_hook(lambda module, args, y: kept.append(y))
    block(torch.randn(2, 4, 5, 5))
    assert kept[0].min() < 0
    layer.register_full_backward_hook(lambda module, before, after: None)
    block(torch.randn(2, 4, 5, 5, requires_grad=True)).sum().backward()
