"""Self-attention in windows: the ATT of SCA-MTL, a Swin transformer layer without its MLPs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn_kernels.modules.layers import is_stock, keeps_size
from xattn_kernels.ops.autocast import autocast_dtype
from xattn_kernels.ops.tracing import is_observed

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
        plan = windows(tokens.shape[0], tokens.shape[1], tokens.shape[2], self.shift, tokens.device)
        result = self.norm2(tokens + self.drop_path(self.attn(self.norm1(tokens), plan)))
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

    def forward(self, tokens: Tensor, plan: Windows) -> Tensor:
        """Attend.

        Args:
            tokens: (B, H, W, C).
            plan: their windows.

        Returns:
            (B, H, W, C).
        """
        rows = pointwise(self.qkv, tokens).flatten(0, 2)
        gathered = F.embedding(plan.members, rows)
        if plan.padding is not None:
            # What the projection makes of the zeros that the map is padded with.
            zero = rows.new_zeros(()) if self.qkv.bias is None else self.qkv.bias
            gathered.flatten(0, 1)[plan.padding] = zero.to(rows.dtype)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        attended = []
        for part, apart in zip(gathered.split(plan.counts), plan.apart, strict=True):
            query, key, value = part.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            added = bias if apart is None else bias + apart.to(bias.dtype) * MASK
            y = _attend(query, key, value, added.unsqueeze(0).to(query.dtype))
            attended.append(y.transpose(1, 2).flatten(2).flatten(0, 1))
        joined = attended[0] if len(attended) == 1 else torch.cat(attended)
        return pointwise(self.proj, F.embedding(plan.places, joined))


def _attend(query: Tensor, key: Tensor, value: Tensor, added: Tensor) -> Tensor:
    """softmax(query key^T / sqrt(d) + added) value: (N, heads, 49, d), added (1, heads, 49, 49)."""
    if not _is_faster_explicit(query):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=added)
    scores = (query * query.shape[3] ** -0.5) @ key.transpose(2, 3)
    attended: Tensor = scores.add_(added).softmax(dim=3) @ value
    return attended


def _is_faster_explicit(x: Tensor) -> bool:
    """Whether two products and a softmax are faster than torch's operator for all three.

    On two CPU threads by a third for windows of so few channels, and in training, where the bias
    has a gradient, that operator takes the same steps and more.
    """
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


class Windows(NamedTuple):
    """Which tokens of a map (B, H, W) are in which window, the windows ordered by kind.

    Windows of one kind have the same mask: after the cyclic shift, those at the right, at the
    bottom and in the corner hold tokens that were no neighbours.
    """

    members: Tensor
    """The tokens' numbers in each window, (N, 49); any for padding."""
    padding: Tensor | None
    """Where in `members`, flattened, the padding is."""
    counts: list[int]
    """Windows of each kind."""
    apart: list[Tensor | None]
    """Per kind, which tokens were no neighbours: (49, 49), bool."""
    places: Tensor
    """Where every token is in `members`, flattened: (B, H, W)."""


def windows(batch: int, height: int, width: int, shift: int, device: torch.device) -> Windows:
    """The windows of a map after a cyclic shift up and left."""
    right, below = -width % WINDOW, -height % WINDOW
    shapes = ((batch, height, width), (batch, height, right), (batch, below, width + right))
    sizes = [math.prod(shape) for shape in shapes]
    numbers = torch.arange(sum(sizes), device=device)
    tokens, *padding = (part.view(s) for part, s in zip(numbers.split(sizes), shapes, strict=True))
    padded = torch.cat([torch.cat([tokens, padding[0]], dim=2), padding[1]], dim=1)
    rolled = torch.roll(padded, (-shift, -shift), (1, 2))
    grid = rolled.unflatten(2, (-1, WINDOW)).unflatten(1, (-1, WINDOW)).transpose(2, 3)
    grid = grid.flatten(3)  # (B, rows of windows, columns of windows, 49)
    wrapped = (torch.arange(WINDOW, device=device) >= WINDOW - shift).int()
    at_right, at_bottom = (
        side[:, None] != side
        for side in (wrapped.repeat(WINDOW), wrapped.repeat_interleave(WINDOW))
    )
    kinds: list[tuple[Tensor, Tensor | None]] = [(grid, None)]
    if shift:
        kinds = [
            (grid[:, :-1, :-1], None),
            (grid[:, :-1, -1:], at_right),
            (grid[:, -1:, :-1], at_bottom),
            (grid[:, -1:, -1:], at_right | at_bottom),
        ]
    kinds = [(part.reshape(-1, WINDOW**2), apart) for part, apart in kinds if part.numel()]
    members = torch.cat([part for part, _ in kinds])
    places = torch.empty_like(numbers)
    places[members.flatten()] = numbers
    return Windows(
        members.clamp_max(sizes[0] - 1),
        places[sizes[0] :] if right or below else None,
        [part.shape[0] for part, _ in kinds],
        [apart for _, apart in kinds],
        places[: sizes[0]].view(batch, height, width),
    )


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
