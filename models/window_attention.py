"""Self-attention in windows: the ATT of SCA-MTL, a Swin transformer layer without its MLPs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn_kernels.modules.layers import is_stock, keeps_size
from xattn_kernels.ops.autocast import autocast_dtype
from xattn_kernels.ops.tracing import is_observed, is_recorded

from .timm_compat import import_timm

WINDOW = 7
SHIFT = 3
MASK = -100.0
"""Added to the scores between tokens that only the cyclic shift made neighbours."""


def heads_for(channels: int, most: int) -> int:
    """The largest number of heads, at most `most`, that divides the channels.

    This is `most` itself for every published width.
    """
    return max(heads for heads in range(1, most + 1) if channels % heads == 0)


class WindowTransformer(nn.Module):
    """Window self-attention of one feature map: (B, C, H, W) -> (B, C, H, W) in channels_last.

    A 1x1 convolution and layer norm, blocks of window attention of which every second is shifted,
    a layer norm. Liu et al., "Swin Transformer" (arXiv 2103.14030), without MLPs; used in Kim,
    Choi, Min, "Sequential Cross Attention Based Multi-task Learning" (arXiv 2209.02518).

    Parameters and buffers are named ``patch_embed.{proj,norm}.*``, ``layers.0.blocks.<i>.*`` and
    ``norm0.*``.

    Args:
        channels: width C.
        heads: heads of the attention; divides C.
        depth: number of blocks.
        drop_path: probability, in training, of a sample's last block being skipped; it grows
            linearly from 0 in the first.

    Raises:
        ValueError: if `heads` does not divide `channels`.
    """

    def __init__(
        self, channels: int, heads: int, *, depth: int = 2, drop_path: float = 0.2
    ) -> None:
        if channels % heads:
            raise ValueError(f"heads: got {heads}, expected a divisor of the {channels} channels")
        super().__init__()
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(channels, channels, 1), "norm": nn.LayerNorm(channels)}
        )
        blocks = nn.ModuleList(
            WindowBlock(
                channels,
                heads,
                shift=SHIFT if i % 2 else 0,
                drop_path=drop_path * i / max(depth - 1, 1),
            )
            for i in range(depth)
        )
        self.layers = nn.ModuleList([nn.ModuleDict({"blocks": blocks})])
        self.norm0 = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = pointwise(self.patch_embed["proj"], x.permute(0, 2, 3, 1))
        tokens = self.patch_embed["norm"](tokens)
        for block in self.layers[0]["blocks"]:  # type: ignore[index]
            tokens = block(tokens)
        normalised: Tensor = self.norm0(tokens)
        return normalised.permute(0, 3, 1, 2)


class WindowBlock(nn.Module):
    """x + DropPath(attention(LayerNorm(x))) within windows, on tokens (B, H, W, C).

    The map is padded at the right and at the bottom to whole windows, after the norm; padded tokens
    are attended to like others. `norm2` takes no part: it stands in checkpoints of the reference.
    """

    def __init__(self, channels: int, heads: int, *, shift: int, drop_path: float) -> None:
        super().__init__()
        self.shift = shift
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, heads)
        self.drop_path: nn.Module = nn.Identity()
        if drop_path:
            self.drop_path = import_timm().layers.DropPath(drop_path)
        self.norm2 = UnusedNorm(channels)

    def forward(self, tokens: Tensor) -> Tensor:
        attended = self.attn(self.norm1(tokens), self.shift)
        result = self.norm2(tokens + self.drop_path(attended))
        assert isinstance(result, Tensor)
        return result


class UnusedNorm(nn.LayerNorm):
    """A layer norm that takes no part in anything: returns its input.

    Its parameters require no gradient, for which DistributedDataParallel would wait in vain. If
    they are made to, their gradient is zero.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and any(p.requires_grad for p in (self.weight, self.bias)):
            x = _Unused.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return x


class _Unused(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *map(torch.zeros_like, ctx.saved_tensors)


class WindowAttention(nn.Module):
    """Multi-head self-attention in windows with a bias for every relative position."""

    relative_position_index: Tensor

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * WINDOW - 1) ** 2, heads))
        self.register_buffer("relative_position_index", relative_positions())
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, tokens: Tensor, shift: int) -> Tensor:
        """Attend.

        Args:
            tokens: (B, H, W, C).
            shift: by how many tokens the windows lie further right and below.

        Returns:
            (B, H, W, C).
        """
        batch, height, width, channels = tokens.shape
        rows, columns = (height + WINDOW - 1) // WINDOW, (width + WINDOW - 1) // WINDOW
        below, right = rows * WINDOW - height, columns * WINDOW - width
        # A graph is to serve maps with and without whole windows.
        if is_recorded() or below or right:
            tokens = F.pad(tokens, (0, 0, 0, right, 0, below))
        rolled = torch.roll(tokens, (-shift, -shift), (1, 2)) if shift else tokens
        parts = rolled.view(batch, rows, WINDOW, columns, WINDOW, channels).transpose(2, 3)
        parts = parts.reshape(batch, rows * columns, WINDOW**2, channels)

        projected = pointwise(self.qkv, parts).unflatten(3, (3, self.heads, channels // self.heads))
        query, key, value = projected.permute(3, 0, 1, 4, 2, 5)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        torn = Torn.of(rows, columns, shift, query) if shift else None
        attended = _attend(query, key, value, bias.to(query.dtype), torn)

        parts = attended.transpose(2, 3).reshape(batch, rows, columns, WINDOW, WINDOW, channels)
        rolled = parts.transpose(2, 3).reshape(*tokens.shape)
        padded = torch.roll(rolled, (shift, shift), (1, 2)) if shift else rolled
        return pointwise(self.proj, padded[:, :height, :width])


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, torn: Torn | None) -> Tensor:
    """softmax(query key^T / sqrt(d) + bias + torn) value of every window.

    Args:
        query: (B, N, heads, 49, d); `key` and `value` alike.
        bias: (heads, 49, 49).
        torn: what is added beyond that.

    Returns:
        (B, N, heads, 49, d).
    """
    if _is_faster_explicit(query):
        scores = ((query * query.shape[4] ** -0.5) @ key.transpose(3, 4)).add_(bias)
        if torn is not None and torn.windows is not None:
            added = torn.added[:, None].expand(*query.shape[:1], -1, *bias.shape)
            scores.index_add_(1, torn.windows, added)
        elif torn is not None:
            scores = scores + torn.added[:, None]
        attended: Tensor = scores.softmax(dim=4) @ value
        return attended
    if torn is not None:
        bias = bias + torn.added[:, None]
    windows = query.shape[:2]  # Torch's fused kernels take four dimensions.
    bias = bias.expand(*query.shape[:3], -1, -1).flatten(0, 1)
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))
    fused = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return fused.view(*windows, *fused.shape[1:])


def _is_faster_explicit(x: Tensor) -> bool:
    """Whether two products and a softmax are faster than torch's operator for all three.

    On two CPU threads by a third for windows of so few channels, and in training, where the bias
    has a gradient, that operator takes the same steps and more.
    """
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


class Torn(NamedTuple):
    """What keeps tokens of a window apart that only a cyclic shift made neighbours."""

    windows: Tensor | None
    """Numbers of the windows, counted row by row, that have such tokens; None: all are listed."""
    added: Tensor
    """To the scores: `MASK` between tokens that were no neighbours, 0 else; (..., 49, 49)."""

    @classmethod
    def of(cls, rows: int, columns: int, shift: int, query: Tensor) -> Torn:
        """For rows x columns windows; such tokens are in the last row and in the last column.

        The result has the dtype and the device of `query`.
        """
        count, device = rows * columns, query.device
        few = _is_faster_explicit(query) and not is_recorded()
        windows = torch.arange(count, device=device)
        if few:  # down the last column, then along the last row
            windows = torch.cat([windows[columns - 1 : -1 : columns], windows[-columns:]])
        wrapped = (torch.arange(WINDOW, device=device) >= WINDOW - shift).int()
        below, right = (
            side[:, None] != side
            for side in (wrapped.repeat_interleave(WINDOW), wrapped.repeat(WINDOW))
        )
        in_row, in_column = windows >= count - columns, windows % columns == columns - 1
        apart = in_column[:, None, None] & right | in_row[:, None, None] & below
        return cls(windows if few else None, MASK * apart.to(query.dtype))


def relative_positions() -> Tensor:
    """Row of the bias table for every pair of tokens of a window: (49, 49), int64."""
    side = torch.arange(WINDOW)
    y, x = (grid.flatten() for grid in torch.meshgrid(side, side, indexing="ij"))
    rows = y[:, None] - y + WINDOW - 1
    columns = x[:, None] - x + WINDOW - 1
    return rows * (2 * WINDOW - 1) + columns


def pointwise(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer or 1x1 convolution of tokens (B, H, W, C).

    In float32 on a CPU as a convolution in channels_last, which has about twice the speed of
    torch's product of matrices.
    """
    stock = type(layer) is nn.Linear or keeps_size(layer, 1)
    if not (stock and is_stock(layer) and _is_faster_convolved(x)):
        result: Tensor
        if isinstance(layer, nn.Conv2d):
            result = layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        else:
            result = layer(x)
        return result
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    images = x
    if torch.get_num_threads() == 1:  # then torch leaves few images to a slower convolution
        tokens = x.shape[:3].numel()
        count = next((n for n in range(16, 32) if tokens % n == 0), 1)
        images = x.reshape(count, 1, -1, x.shape[3])
    weight = layer.weight.flatten(1)[:, :, None, None]
    y = F.conv2d(images.permute(0, 3, 1, 2), weight, layer.bias).permute(0, 2, 3, 1)
    return y.reshape(*x.shape[:3], -1)


def _is_faster_convolved(x: Tensor) -> bool:
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() > 0
        and autocast_dtype("cpu") is None
        and not is_observed()
    )
