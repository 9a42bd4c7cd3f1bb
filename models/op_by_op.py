"""The SCA-MTL network composed from stock PyTorch operators, nothing fused.

The oracle of the tests and the baseline of the benchmarks: windows are cut and attended to one step
at a time, repeats are concatenated as they are written down, and no operator of this library runs.
It is arranged as the released network is: modules, attributes and names of parameters, a dict with
`features_<task>` and `<task>` between them, one list of scales into each head. So it is also what a
user's existing network looks like to `xattn_kernels.convert_`.

Source: Kim, Choi, Min, "Sequential Cross Attention Based Multi-task Learning", ICIP 2022
(arXiv 2209.02518); window attention of Liu et al., "Swin Transformer" (arXiv 2103.14030).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn_kernels.testing.op_by_op import BasicBlock, CrossAttention, CrossScaleHead

from .backbone import create_backbone, pyramid, widths

WINDOW = 7
MASKED = -100.0
"""Added to scores between tokens that are neighbours only because the map was rolled."""


class WindowAttention(nn.Module):
    """Self-attention within windows: (windows, 49, C) -> (windows, 49, C)."""

    relative_position_index: Tensor

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * WINDOW - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        rows, columns = torch.meshgrid(torch.arange(WINDOW), torch.arange(WINDOW), indexing="ij")
        places = torch.stack([rows.flatten(), columns.flatten()])
        down, right = places[:, :, None] - places[:, None, :] + WINDOW - 1
        self.register_buffer("relative_position_index", down * (2 * WINDOW - 1) + right)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """`mask`: (windows of one image, 49, 49), added to the scores."""
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(2, 3)
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        scores = scores + bias.unflatten(0, (WINDOW**2, WINDOW**2)).permute(2, 0, 1)
        if mask is not None:
            scores = scores.unflatten(0, (-1, len(mask))) + mask.unsqueeze(1)
            scores = scores.flatten(0, 1)
        attended = scores.softmax(dim=3) @ value
        output: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return output


class WindowBlock(nn.Module):
    """x + DropPath(attention(norm(x))): (B, H, W, C) -> (B, H, W, C).

    Maps are filled up with zeros to whole windows after the norm; those zeros are keys like others.
    """

    def __init__(self, channels: int, heads: int, shift: int, drop_path: float) -> None:
        super().__init__()
        self.shift = shift
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)  # in every checkpoint, and not used

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        padded = F.pad(self.norm1(x), (0, 0, 0, -width % WINDOW, 0, -height % WINDOW))
        mask = None
        if self.shift:
            padded = torch.roll(padded, (-self.shift, -self.shift), dims=(1, 2))
            mask = self._mask(padded)
        attended = from_windows(self.attn(to_windows(padded), mask), padded.shape)
        if self.shift:
            attended = torch.roll(attended, (self.shift, self.shift), dims=(1, 2))
        return x + self._drop(attended[:, :height, :width])

    def _mask(self, padded: Tensor) -> Tensor:
        """MASKED between tokens of different regions of the rolled map, else 0."""
        regions = padded.new_zeros(1, *padded.shape[1:3], 1)
        parts = (slice(-WINDOW), slice(-WINDOW, -self.shift), slice(-self.shift, None))
        for i, rows in enumerate(parts):
            for j, columns in enumerate(parts):
                regions[:, rows, columns] = 3 * i + j
        windows = to_windows(regions)
        return (windows != windows.transpose(1, 2)).to(padded.dtype) * MASKED

    def _drop(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return x
        keep = 1 - self.drop_path
        return x * x.new_empty(len(x), 1, 1, 1).bernoulli_(keep).div_(keep)


def to_windows(x: Tensor) -> Tensor:
    """(B, H, W, C) with whole windows -> (B windows, 49, C)."""
    x = x.unflatten(2, (-1, WINDOW)).unflatten(1, (-1, WINDOW))
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def from_windows(windows: Tensor, shape: Sequence[int]) -> Tensor:
    """The map (B, H, W, C) of `shape` that `to_windows` was given."""
    batch, height, width, channels = shape
    x = windows.view(batch, height // WINDOW, width // WINDOW, WINDOW, WINDOW, channels)
    return x.transpose(2, 3).reshape(batch, height, width, channels)


class PatchEmbed(nn.Module):
    """1x1 convolution and layer norm: (B, C, H, W) -> (B, H, W, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, channels, 1)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return embedded


class BasicLayer(nn.Module):
    """Window blocks, every other one shifted, drop-path rising to the last."""

    def __init__(self, channels: int, heads: int, depth: int, drop_path: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            WindowBlock(channels, heads, i % 2 * (WINDOW // 2), drop_path * i / max(depth - 1, 1))
            for i in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class SwinTransformer(nn.Module):
    """Window attention of one map (ATT): (B, C, H, W) -> a tuple of one (B, C, H, W)."""

    def __init__(
        self, channels: int, heads: int = 6, depth: int = 2, drop_path: float = 0.2
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(channels)
        heads = heads_for(channels, heads)
        self.layers = nn.ModuleList([BasicLayer(channels, heads, depth, drop_path)])
        self.norm0 = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.norm0(self.layers[0](self.patch_embed(x)))
        return (x.permute(0, 3, 1, 2).contiguous(),)


class GlobalContextAttentionBlock(CrossAttention):
    """The cross-attention module (CAM)."""

    eps = 1e-12


class InitialTaskPredictionModule(nn.Module):
    """First features and logits of every task at one scale.

    (B, C_in, H, W), and per task the features (B, C_up, H/2, W/2) of the coarser scale if there are
    any -> dict with `features_<task>` (B, C, H, W) and `<task>` (B, n, H, W).
    """

    def __init__(
        self, tasks: Sequence[str], in_channels: int, channels: int, num_outputs: Mapping[str, int]
    ) -> None:
        super().__init__()
        self.tasks = list(tasks)
        self.refinement = nn.ModuleDict(
            {
                task: nn.Sequential(
                    BasicBlock(in_channels, channels, momentum=0.1),
                    BasicBlock(channels, channels, momentum=0.1),
                )
                for task in tasks
            }
        )
        self.decoders = nn.ModuleDict(
            {task: nn.Conv2d(channels, num_outputs[task], 1) for task in tasks}
        )

    def forward(
        self, features: Tensor, coarser: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        out = {}
        for task in self.tasks:
            x = features
            if coarser is not None:
                x = torch.cat([features, interpolate(coarser[task], scale_factor=2)], dim=1)
            out[f"features_{task}"] = self.refinement[task](x)
            out[task] = self.decoders[task](out[f"features_{task}"])
        return out


class MultiTaskDistillationModule(nn.Module):
    """Every task attends to every other at one scale (CTAM).

    Dict with `features_<task>` (B, C, H, W), other entries ignored -> dict of (B, C, H, W) by task.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        auxilary_tasks: Sequence[str],
        channels: int,
        kind: str = "linear",
        heads: int = 1,
    ) -> None:
        super().__init__()
        self.tasks = list(tasks)
        self.auxilary_tasks = list(auxilary_tasks)
        self.dimensionality_reduction = BasicBlock(
            2 * (len(auxilary_tasks) - 1) * channels, channels, momentum=0.01
        )
        self.cross_attention = nn.ModuleDict(
            {
                task: nn.ModuleDict(
                    {
                        other: GlobalContextAttentionBlock(channels, kind, heads)
                        for other in auxilary_tasks
                        if other != task
                    }
                )
                for task in tasks
            }
        )

    def forward(self, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out = {}
        for task in self.tasks:
            target = x[f"features_{task}"]
            blocks: Any = self.cross_attention[task]
            attended = {a: block(target, x[f"features_{a}"]) for a, block in blocks.items()}
            pairs = [part for a in reversed(attended) for part in (target, attended[a])]
            out[task] = target + self.dimensionality_reduction(torch.cat(pairs, dim=1))
        return out


class SEBlock(nn.Module):
    """Channels weighted by a function of their means: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.squeeze = nn.Sequential(
            nn.Linear(channels, hidden),
            nn.ReLU(),
            nn.Linear(hidden, channels),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        weights: Tensor = self.squeeze(x.mean(dim=(2, 3)))
        return x * weights[:, :, None, None]


class FPM(nn.Module):
    """What the tasks of one scale hand to the next finer one (FPMA): dict -> dict by task.

    The softmax of the released network runs over T consecutive channels; with `task_softmax` it
    runs over the tasks.
    """

    def __init__(self, tasks: Sequence[str], channels: int, task_softmax: bool = False) -> None:
        super().__init__()
        self.tasks = list(tasks)
        self.task_softmax = task_softmax
        self.swtf = SwinTransformer(len(tasks) * channels, heads=4, depth=1)
        self.dimensionality_reduction = BasicBlock(len(tasks) * channels, channels, momentum=0.1)
        self.se = nn.ModuleDict({task: SEBlock(channels) for task in tasks})

    def forward(self, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        together = torch.cat([x[task] for task in self.tasks], dim=1)
        count = len(self.tasks)
        view, dim = ((count, -1), 1) if self.task_softmax else ((-1, count), 2)
        mask = self.swtf(together)[0].unflatten(1, view).softmax(dim=dim)
        shared = self.dimensionality_reduction((mask * together.unflatten(1, view)).flatten(1, 2))
        return {task: self.se[task](shared) + x[task] for task in self.tasks}


class SCAMTL(nn.Module):
    """The whole network: image (B, 3, H, W) -> dict of (B, n, H, W) by task.

    The result also has `deep_supervision`: for `scale_0` to `scale_3` what the initial prediction
    of that scale returned. H and W are multiples of 32.

    Args:
        tasks: target tasks, the outputs.
        num_outputs: channels of each task's output.
        backbone: name of a timm network, or a module that returns four maps, finest first, whose
            widths `feature_info.channels()` tells.
        pretrained: whether to load timm's weights.
        auxiliary_tasks: tasks that are predicted at every scale and attended to, the targets among
            them. Default: `tasks`.
        kind: "linear" or "softmax", the cross-attentions'.
        heads: heads of kind "softmax".
        task_softmax: see `FPM`.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        num_outputs: Mapping[str, int],
        backbone: str | nn.Module = "hrnet_w18_small_v2",
        pretrained: bool = False,
        auxiliary_tasks: Sequence[str] | None = None,
        kind: str = "linear",
        heads: int = 1,
        task_softmax: bool = False,
    ) -> None:
        super().__init__()
        self.tasks = list(tasks)
        self.auxilary_tasks = list(tasks if auxiliary_tasks is None else auxiliary_tasks)
        names = self.auxilary_tasks
        if isinstance(backbone, str):
            backbone = create_backbone(backbone, pretrained=pretrained)
        self.backbone = backbone
        base = widths(backbone)
        channels = [2 * width for width in base]
        for s, width in enumerate(base):
            self.add_module(f"swTransform{s + 1}", SwinTransformer(width))
        for s in (3, 2, 1):
            self.add_module(f"fpm_scale_{s}", FPM(names, channels[s], task_softmax))
        for s, width in enumerate(channels):
            both = width + (channels[s + 1] if s < 3 else 0)
            module = InitialTaskPredictionModule(names, both, width, num_outputs)
            self.add_module(f"scale_{s}", module)
        for s, width in enumerate(channels):
            distillation = MultiTaskDistillationModule(tasks, names, width, kind, heads)
            self.add_module(f"distillation_scale_{s}", distillation)
        self.heads = nn.ModuleDict(
            {task: CrossScaleHead(channels, num_outputs[task], kind, heads) for task in tasks}
        )

    def forward(self, image: Tensor) -> dict[str, Any]:
        attended = []
        for s, x in enumerate(pyramid(self.backbone, image)):
            window_attention = self.get_submodule(f"swTransform{s + 1}")
            attended.append(torch.cat([window_attention(x)[0], x], dim=1))
        out: dict[str, Any] = {"deep_supervision": {}}
        scales: list[dict[str, Tensor]] = [{}, {}, {}, {}]
        coarser: tuple[dict[str, Tensor], ...] = ()
        for s in (3, 2, 1, 0):
            initial = self.get_submodule(f"scale_{s}")(attended[s], *coarser)
            scales[s] = self.get_submodule(f"distillation_scale_{s}")(initial)
            if s > 0:
                # Tasks that are no target have no other features than their first.
                found = {task: initial[f"features_{task}"] for task in self.auxilary_tasks}
                coarser = (self.get_submodule(f"fpm_scale_{s}")({**found, **scales[s]}),)
            out["deep_supervision"][f"scale_{s}"] = initial
        for task in self.tasks:
            y = self.heads[task]([scale[task] for scale in scales])
            out[task] = interpolate(y, size=image.shape[2:])
        return out


def interpolate(x: Tensor, **options: Any) -> Tensor:
    """Bilinear, corners not aligned."""
    return F.interpolate(x, mode="bilinear", align_corners=False, **options)


def heads_for(channels: int, most: int) -> int:
    """The largest number of heads that divides the width: `most`, for all published widths."""
    return max(heads for heads in range(1, most + 1) if channels % heads == 0)
