"""The attention blocks of SCA-MTL composed from stock PyTorch operators, nothing fused.

Every convolution, normalisation, activation and matrix product is one call of its own, repeats
are concatenated as they are written down, and a block reused for several sources runs once per
source. That makes these modules slow and easy to believe: tests take them as oracle and
benchmarks as baseline. They never call this library's operators.

Names and shapes of parameters and buffers, and their order, are those of `xattn_kernels.modules`,
so one `state_dict` serves both.

Source: Kim, Choi, Min, "Sequential Cross Attention Based Multi-task Learning", ICIP 2022
(arXiv 2209.02518).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-12
"""Lower bound of the attention's denominator."""


class Projection(nn.Module):
    """1x1 convolution without bias, then batch norm. (B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        nn.init.xavier_uniform_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        return with_plain_gradient(self.bn(self.conv(x)))


def with_plain_gradient(x: Tensor) -> Tensor:
    """`x`, whose gradient will be contiguous if it has one sample.

    The gradient that a matrix product with a transposed factor gives back can have its channels
    together and, for a single sample, an arbitrary batch stride. From that torch's CPU batch norm
    (seen in 2.13) takes it for contiguous and computes wrong gradients, silently.
    """
    if x.shape[0] == 1 and x.requires_grad:
        x.register_hook(torch.Tensor.contiguous)
    return x


class CrossAttention(nn.Module):
    """One source attended by one target: (B, C, H, W), (B, C, H', W') -> (B, C, H, W).

    `kind` "linear" applies softplus to queries and keys and divides by the sum of the keys'
    scores; "softmax" takes the pre-activations and a softmax over the source's tokens.
    """

    def __init__(self, channels: int, kind: str = "linear", heads: int = 1) -> None:
        super().__init__()
        self.kind = kind
        self.heads = heads
        self.query_project = nn.ModuleList(Projection(channels, channels) for _ in range(2))
        self.key_project = nn.ModuleList(Projection(channels, channels) for _ in range(2))
        self.value_project = Projection(channels, channels)

    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        query = self.query_project[1](F.relu(self.query_project[0](target))).flatten(2)
        key = self.key_project[1](F.relu(self.key_project[0](source))).flatten(2)
        value = F.relu(self.value_project(source)).flatten(2)
        attend = self._linear if self.kind == "linear" else self._softmax
        return attend(query, key, value).view_as(target)

    def _linear(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key = F.softplus(query), F.softplus(key)
        context = torch.bmm(value, key.transpose(1, 2))
        numerator = torch.bmm(context, query)
        denominator = torch.bmm(key.sum(dim=2).unsqueeze(1), query)
        return numerator / denominator.clamp_min(EPS)

    def _softmax(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.unflatten(1, (self.heads, -1)) for x in (query, key, value))
        scores = query.transpose(2, 3) @ key * query.shape[2] ** -0.5
        attended: Tensor = value @ scores.softmax(dim=-1).transpose(2, 3)
        return attended.flatten(1, 2)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut: (B, C_in, H, W) -> (B, C_out, H, W).

    The shortcut is the input itself where the widths are equal, else a projection.
    """

    def __init__(self, in_channels: int, out_channels: int, momentum: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels, momentum=momentum)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels, momentum=momentum)
        self.downsample: nn.Module | None = None
        if in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(residual + (x if self.downsample is None else self.downsample(x)))


class CrossTaskAttention(nn.Module):
    """Every task attends to every other at one scale: dict of (B, C, H, W) in and out.

    Sources are `auxiliary_tasks` (default: `tasks`), which contains the target tasks.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        channels: int,
        auxiliary_tasks: Sequence[str] | None = None,
        kind: str = "linear",
        heads: int = 1,
    ) -> None:
        super().__init__()
        names = tasks if auxiliary_tasks is None else auxiliary_tasks
        self.others = {task: [name for name in names if name != task] for task in tasks}
        self.dimensionality_reduction = BasicBlock(
            2 * (len(names) - 1) * channels, channels, momentum=0.01
        )
        self.cross_attention = nn.ModuleDict(
            {
                task: nn.ModuleDict({a: CrossAttention(channels, kind, heads) for a in others})
                for task, others in self.others.items()
            }
        )

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = {}
        for task, others in self.others.items():
            x = features[task]
            blocks = self.cross_attention[task]
            assert isinstance(blocks, nn.ModuleDict)
            attended = {name: blocks[name](x, features[name]) for name in others}
            pairs = [part for name in reversed(others) for part in (x, attended[name])]
            outputs[task] = x + self.dimensionality_reduction(torch.cat(pairs, dim=1))
        return outputs


class CrossScaleHead(nn.Module):
    """Every scale attends to the coarser ones, then all are aggregated at the finest scale.

    A list of (B, C_s, H_s, W_s), finest first -> (B, num_outputs, H_0, W_0). `attend` returns
    the attended maps before the aggregation.
    """

    def __init__(
        self, channels: Sequence[int], num_outputs: int, kind: str = "linear", heads: int = 1
    ) -> None:
        super().__init__()
        scales = len(channels)
        repeats = [2 * (scales - 1 - s) for s in range(scales - 1)] + [1]
        width = sum(n * c for n, c in zip(repeats, channels, strict=True))
        self.last_layer = nn.Sequential(
            nn.Conv2d(width, width, 1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, num_outputs, 1),
        )
        for target in reversed(range(scales - 1)):
            name = f"cross_scale_attention{target}"
            self.add_module(name, CrossAttention(channels[target], kind, heads))
            for source in range(target + 1, scales):
                adapter = nn.Sequential(
                    nn.Conv2d(channels[source], channels[target], 1, bias=False),
                    nn.BatchNorm2d(channels[target]),
                )
                self.add_module(f"upsample{source}{target}", adapter)

    def attend(self, features: Sequence[Tensor]) -> list[list[Tensor]]:
        """Attended maps [target][source - target - 1], each (B, C_target, H_target, W_target)."""
        maps = []
        for target in range(len(features) - 1):
            block = self.get_submodule(f"cross_scale_attention{target}")
            row = []
            for source in range(target + 1, len(features)):
                adapted = self.get_submodule(f"upsample{source}{target}")(features[source])
                row.append(block(features[target], adapted))
            maps.append(row)
        return maps

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        size = features[0].shape[2:]
        parts = []
        for x, row in zip(features, self.attend(features), strict=False):
            for attended in row:
                parts.append(torch.cat([x, attended], dim=1))
        parts.append(features[-1])
        resized = [
            F.interpolate(part, size=size, mode="bilinear", align_corners=False) for part in parts
        ]
        output: Tensor = self.last_layer(torch.cat(resized, dim=1))
        return output
