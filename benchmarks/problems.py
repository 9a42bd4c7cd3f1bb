"""Problems of several suites: the cross-attentions of one scale, op by op and folded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xattn_kernels.cost import NYUD_V2, STRIDES
from xattn_kernels.schedule import Schedule
from xattn_kernels.testing import op_by_op

IMAGE = (480, 640)
TASKS = ("semseg", "depth", "normals", "edge")
SCHEDULE = Schedule.cross_task(len(TASKS))
SCALES = tuple(range(len(STRIDES)))


@dataclass(frozen=True)
class Scale:
    """One scale of the NYUD-v2 pyramid."""

    number: int

    @property
    def width(self) -> int:
        """Channels C."""
        return NYUD_V2.sizes[self.number].width

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W)."""
        stride = STRIDES[self.number]
        return IMAGE[0] // stride, IMAGE[1] // stride

    def __str__(self) -> str:
        height, width = self.shape
        return f"{self.number}: C={self.width}, {height}x{width}"

    def features(self, batch: int = 1, seed: int = 0) -> list[Tensor]:
        """One (B, C, H, W) per task, standard normal."""
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, self.width, *self.shape)
        return [torch.randn(shape, generator=generator) for _ in TASKS]


class OpByOpSet(nn.Module):
    """The cross-attentions of all edges of cross-task attention, one call of torch at a time."""

    def __init__(self, channels: int, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.blocks = nn.ModuleList(op_by_op.CrossAttention(channels) for _ in SCHEDULE.edges)
            as_if_trained(self)
        self.slots = [(edge.query, edge.source) for edge in SCHEDULE.edges]
        self.eval()

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """One map per edge, in the order of the schedule."""
        return [
            block(features[target], features[source])
            for block, (target, source) in zip(self.blocks, self.slots, strict=True)
        ]

    def layers(self) -> list[op_by_op.Projection]:
        """The projections of all edges, in the order of `functional.cross_attention_block`."""
        layers = []
        for block in self.blocks:
            assert isinstance(block, op_by_op.CrossAttention)
            layers += [*block.query_project, *block.key_project, block.value_project]
        return layers

    @torch.no_grad()
    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight (W, 5, C, C) and bias (W, 5, C) of `functional.cross_attention_block`."""
        pairs = [_fold(layer.conv, layer.bn) for layer in self.layers()]
        weights, biases = map(list, zip(*pairs, strict=True))
        shape = (len(self.blocks), 5)
        return torch.stack(weights).unflatten(0, shape), torch.stack(biases).unflatten(0, shape)


def as_if_trained(module: nn.Module) -> None:
    """Give batch norms statistics and factors other than those that do nothing."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None and norm.running_var is not None
            nn.init.normal_(norm.running_mean, std=0.1)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.1)


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    weight = conv.weight.flatten(1).double() * scale.unsqueeze(1)
    bias = norm.bias.double() - norm.running_mean.double() * scale
    return weight.float(), bias.float()
