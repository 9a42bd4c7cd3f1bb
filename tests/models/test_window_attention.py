"""Window self-attention against the op-by-op layer: windows, masks, padding, products of tokens."""

from __future__ import annotations

import pytest
import torch
from network_support import perturb
from torch import nn

from xattn_models import op_by_op, window_attention
from xattn_models.window_attention import (
    MASK,
    WINDOW,
    Torn,
    WindowBlock,
    WindowTransformer,
    heads_for,
    pointwise,
)

SIZES = [(1, 1), (7, 7), (7, 14), (3, 20), (10, 13), (15, 8), (14, 21)]


def pair(channels: int = 12, heads: int = 6, depth: int = 2) -> tuple[nn.Module, nn.Module]:
    ours = WindowTransformer(channels, heads, depth=depth).double().eval()
    theirs = op_by_op.SwinTransformer(channels, heads, depth).double().eval()
    perturb(ours)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("explicit", [False, True])
def test_as_op_by_op(
    size: tuple[int, int], depth: int, explicit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what reaches the parameters: padded tokens are keys and reach the bias of qkv."""
    monkeypatch.setattr(window_attention, "_is_faster_explicit", lambda _: explicit)
    ours, theirs = pair(depth=depth)
    x = torch.randn(2, 12, *size, dtype=torch.float64)
    weight = torch.randn_like(x)
    results = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y = y[0] if isinstance(y, tuple) else y
        (y * weight).sum().backward()
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        results.append([y.detach(), leaf.grad, *gradients])
    with torch.no_grad():
        results[0][0] = torch.stack([results[0][0], ours(x)])
        results[1][0] = results[1][0].expand(2, *y.shape)
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).norm() <= 1e-11 * expected.norm() + 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_no_samples(size: tuple[int, int], dtype: torch.dtype) -> None:
    module = WindowTransformer(12, 6).to(dtype)
    x = torch.randn(0, 12, *size, dtype=dtype, requires_grad=True)
    y = module(x)
    y.sum().backward()
    assert y.shape == x.shape and y.dtype == dtype
    assert x.grad is not None and x.grad.shape == x.shape
    assert not any(p.grad.any() for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (2, 3), (4, 2)])
@pytest.mark.parametrize("recorded", [False, True])
def test_torn(rows: int, columns: int, recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a cyclic shift tokens of a window are apart where the map had them a window apart."""
    monkeypatch.setattr(window_attention, "is_recorded", lambda: recorded)
    height, width = rows * WINDOW, columns * WINDOW
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    shifted = [torch.roll(place, (-3, -3), (0, 1)) for place in (y, x)]
    places = [place.view(rows, WINDOW, columns, WINDOW).transpose(1, 2) for place in shifted]
    y, x = (place.reshape(rows * columns, WINDOW**2) for place in places)
    far = (y[:, :, None] - y[:, None]).abs() >= WINDOW
    far |= (x[:, :, None] - x[:, None]).abs() >= WINDOW
    torn = Torn.of(rows, columns, 3, torch.empty(()))
    added = torn.added
    if torn.windows is not None:
        assert len(torn.windows) == len(torn.windows.unique()) == rows + columns - 1
        added = torch.zeros(far.shape).index_copy_(0, torn.windows, torn.added)
    assert recorded == (torn.windows is None)
    assert torch.equal(added, MASK * far)


def test_one_sample_of_a_batch_is_skipped() -> None:
    """In training, and the others are scaled."""
    block = WindowBlock(12, 6, shift=3, drop_path=0.5).double().train()
    perturb(block)
    x = torch.randn(16, 7, 7, 12, dtype=torch.float64)
    torch.manual_seed(0)
    trained = block(x) - x
    inferred = block.eval()(x) - x
    skipped = trained.flatten(1).norm(dim=1) == 0
    assert 0 < skipped.sum() < 16
    torch.testing.assert_close(trained[~skipped], 2 * inferred[~skipped])


def test_unused_parameters_stay_in_the_state() -> None:
    block = WindowBlock(12, 6, shift=0, drop_path=0.0)
    unused = {"norm2.weight", "norm2.bias"}
    assert {name for name, p in block.named_parameters() if not p.requires_grad} == unused
    assert unused <= set(block.state_dict())
    block(torch.randn(1, 7, 7, 12)).sum().backward()
    assert {name for name, p in block.named_parameters() if p.grad is None} == unused
    block.requires_grad_(True)
    x = torch.randn(1, 7, 7, 12, requires_grad=True)
    block(x).sum().backward()
    assert not block.norm2.weight.grad.any() and not block.norm2.bias.grad.any()
    assert x.grad.any()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(1, 5, 3, 8), (2, 4, 8, 12), (1, 1, 1, 8), (0, 4, 4, 8)])
@pytest.mark.parametrize("bias", [False, True])
def test_pointwise(shape: tuple[int, ...], threads: int, bias: bool) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        channels = shape[3]
        x = torch.randn(shape)
        linear = nn.Linear(channels, 10, bias=bias)
        convolution = nn.Conv2d(channels, 10, 1, bias=bias)
        convolution.load_state_dict(
            {k: v[:, :, None, None] if v.dim() == 2 else v for k, v in linear.state_dict().items()}
        )
        for layer in (linear, convolution):
            torch.testing.assert_close(pointwise(layer, x), linear(x))
            strided = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
            torch.testing.assert_close(pointwise(layer, strided), linear(x))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("width", "most", "heads"),
    [(18, 6, 6), (144, 6, 6), (48, 6, 6), (64, 6, 4), (256, 6, 4), (40, 6, 5), (7, 6, 1)]
    + [(width, 4, 4) for width in (72, 144, 288, 576, 1152)],
)
def test_heads_for(width: int, most: int, heads: int) -> None:
    assert heads_for(width, most) == heads


def test_heads_are_checked() -> None:
    with pytest.raises(ValueError, match="heads: got 5, expected a divisor of the 12 channels"):
        WindowTransformer(12, 5)
