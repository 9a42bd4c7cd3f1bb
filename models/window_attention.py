"""Self-attention in windows: the ATT of SCA-MTL, a Swin transformer layer without its MLPs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    """Window self-attention of one feature map: (B, C, H, W) -> (B, C, H, W).

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
        tokens = self.patch_embed["norm"](self.patch_embed["proj"](x).permute(0, 2, 3, 1))
        for block in self.layers[0]["blocks"]:  # type: ignore[index]
            tokens = block(tokens)
        normalised: Tensor = self.norm0(tokens)
        return normalised.permute(0, 3, 1, 2)


class WindowBlock(nn.Module):
    """x + DropPath(attention(LayerNorm(x))) within windows, on tokens (B, H, W, C).

    The map is padded with zeros at the right and at the bottom to whole windows, after the norm;
    padded tokens are attended to like others. `norm2` takes no part: the reference has it, left
    over from the MLP.
    """

    def __init__(self, channels: int, heads: int, *, shift: int, drop_path: float) -> None:
        super().__init__()
        self.shift = shift
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, heads)
        self.drop_path: nn.Module = nn.Identity()
        if drop_path:
            self.drop_path = import_timm().layers.DropPath(drop_path)
        self.norm2 = nn.LayerNorm(channels)

    def forward(self, tokens: Tensor) -> Tensor:
        height, width = tokens.shape[1:3]
        padding = (0, 0, 0, -width % WINDOW, 0, -height % WINDOW)
        x = F.pad(self.norm1(tokens), padding)
        size = x.shape
        mask = None
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
            mask = shift_mask(size[1], size[2], self.shift, x)
        x = self.attn(to_windows(x), mask)
        x = from_windows(x, size)
        if self.shift:
            x = torch.roll(x, (self.shift, self.shift), (1, 2))
        result: Tensor = tokens + self.drop_path(x[:, :height, :width])
        return result


class WindowAttention(nn.Module):
    """Multi-head self-attention of windows (N, 49, C) with a bias for every relative position."""

    relative_position_index: Tensor

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * WINDOW - 1) ** 2, heads))
        self.register_buffer("relative_position_index", relative_positions())
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, windows: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            windows: (N, 49, C) with N a multiple of M.
            mask: (M, 49, 49) to add to the scores of the windows i M + j, in order j.
        """
        qkv = self.qkv(windows).unflatten(2, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index]
        bias = bias.permute(2, 0, 1).to(query.dtype)
        if mask is not None:
            bias = bias + mask.unsqueeze(1)
            bias = bias.repeat(len(windows) // len(mask), 1, 1, 1)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        result: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return result


def relative_positions() -> Tensor:
    """Row of the bias table for every pair of tokens of a window: (49, 49), int64."""
    side = torch.arange(WINDOW)
    y, x = (grid.flatten() for grid in torch.meshgrid(side, side, indexing="ij"))
    rows = y[:, None] - y + WINDOW - 1
    columns = x[:, None] - x + WINDOW - 1
    return rows * (2 * WINDOW - 1) + columns


def to_windows(x: Tensor) -> Tensor:
    """Tokens (B, H, W, C), with H and W multiples of 7, as windows (N, 49, C)."""
    windows = x.unflatten(2, (-1, WINDOW)).unflatten(1, (-1, WINDOW))
    result: Tensor = windows.transpose(2, 3).reshape(-1, WINDOW**2, x.shape[3])
    return result


def from_windows(windows: Tensor, size: torch.Size) -> Tensor:
    """The inverse of `to_windows` for tokens of shape `size`."""
    batch, height, width, channels = size
    x = windows.view(batch, height // WINDOW, width // WINDOW, WINDOW, WINDOW, channels)
    result: Tensor = x.transpose(2, 3).reshape(size)
    return result


def shift_mask(height: int, width: int, shift: int, like: Tensor) -> Tensor:
    """What to add to the scores after a cyclic shift, per window: (M, 49, 49) of 0 and -100."""
    rows = torch.arange(height, device=like.device)
    columns = torch.arange(width, device=like.device)
    region = 3 * _region(rows, height, shift)[:, None] + _region(columns, width, shift)
    windows = to_windows(region[None, :, :, None]).squeeze(2)
    apart = windows.unsqueeze(1) != windows.unsqueeze(2)
    mask: Tensor = apart.to(like.dtype).mul_(MASK)
    return mask


def _region(position: Tensor, size: int, shift: int) -> Tensor:
    """0 before the last window, 1 in it, 2 where the shift wrapped around."""
    return (position >= size - WINDOW).long() + (position >= size - shift).long()
