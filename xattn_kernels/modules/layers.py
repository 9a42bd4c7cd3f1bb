"""Parameter containers under the names of the reference implementation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Projection(nn.Module):
    """1x1 convolution without bias, then batch norm: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        nn.init.xavier_uniform_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        normalised: Tensor = self.bn(self.conv(x))
        return normalised


class ProjectionSet(nn.Module):
    """The five projections of one cross-attention: 5 C^2 + 10 C parameters."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query_project = nn.ModuleList(Projection(channels) for _ in range(2))
        self.key_project = nn.ModuleList(Projection(channels) for _ in range(2))
        self.value_project = Projection(channels)

    def projections(self) -> list[Projection]:
        """In the order of `functional.cross_attention_block`: 2 query, 2 key, 1 value layers."""
        modules = [*self.query_project, *self.key_project, self.value_project]
        return [module for module in modules if isinstance(module, Projection)]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, C_in, H, W) -> (B, C_out, H, W).

    He et al., "Deep Residual Learning for Image Recognition" (2015), fig. 5.

    Args:
        in_channels: width C_in.
        out_channels: width C_out.
        momentum: of both batch norms; that of the shortcut has torch's default.
        shortcut: have the shortcut projected by a 1x1 convolution and batch norm; without, it is
            the input itself and C_in = C_out.
    """

    def __init__(
        self, in_channels: int, out_channels: int, momentum: float, *, shortcut: bool = True
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels, momentum=momentum)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels, momentum=momentum)
        self.downsample: nn.Sequential | None = None
        if shortcut:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.bn1(self.conv1(x)), inplace=True)
        residual = self.bn2(self.conv2(hidden))
        residual += x if self.downsample is None else self.downsample(x)
        return F.relu(residual, inplace=True)


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, Projection, ProjectionSet, BasicBlock)


def is_stock(*modules: nn.Module) -> bool:
    """Whether modules and all below them do what their parameters say and nothing else.

    Then others may compute it for them. False with hooks or where a layer was replaced
    (`nn.SyncBatchNorm`, a quantised, pruned or parametrised convolution): those have to be called.
    """
    stack = list(modules)
    while stack:
        module = stack.pop()
        kind = type(module)
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        ):
            return False
        if kind is nn.BatchNorm2d:
            if module.weight is None:
                return False
        elif issubclass(kind, _CONTAINERS):
            stack += [child for child in module._modules.values() if child is not None]
        elif kind is not nn.Conv2d and kind is not nn.ReLU:
            return False
    return True


def sum_repeats(weight: Tensor, channels: int) -> Tensor:
    """Weights for [x, c_1, ..., c_n] from those for [x, c_1, x, c_2, ..., x, c_n].

    All parts have `channels` channels. A convolution is linear in its input: those of the repeats
    of x add up.
    """
    parts = weight.unflatten(1, (-1, 2, channels))
    return torch.cat([parts[:, :, 0].sum(dim=1), parts[:, :, 1].flatten(1, 2)], dim=1)
