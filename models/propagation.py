"""Propagation of the tasks' features to the next finer scale: the FPMA of SCA-MTL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from xattn_kernels.modules.layers import BasicBlock

from .window_attention import WindowTransformer, heads_for

HEADS = 4
REDUCTION = 16


class SqueezeExcitation(nn.Module):
    """Channels weighted by what their means tell: (B, C, H, W) -> (B, C, H, W).

    Hu et al., "Squeeze-and-Excitation Networks" (arXiv 1709.01507).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // REDUCTION, 1)
        self.squeeze = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x * self.squeeze(x.mean(dim=(2, 3)))[:, :, None, None]
        return result


class FeaturePropagation(nn.Module):
    """Joint features of all tasks, added to those of each: the FPMA of SCA-MTL.

    With x the tasks' features, concatenated (T C channels), S a softmax and R a residual block::

        u = R(x * S(ATT(x)))                       (B, C, H, W)
        y_t = x_t + SE_t(u)

    As in the released code, S is over T *consecutive channels* each, not over the tasks: ATT(x)
    is read as (C, T) channels. Kim, Choi, Min, "Sequential Cross Attention Based Multi-task
    Learning" (arXiv 2209.02518).

    Parameters and buffers are named ``swtf.*`` (`WindowTransformer`),
    ``dimensionality_reduction.*`` (`BasicBlock`) and ``se.<t>.squeeze.{0,2}.*``.

    Args:
        tasks: names of the tasks, in the order of their concatenation.
        channels: width C of each.
        task_softmax: have the softmax over the tasks, as the paper describes. Checkpoints of the
            released code do not fit that.
    """

    def __init__(self, tasks: Sequence[str], channels: int, *, task_softmax: bool = False) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.task_softmax = task_softmax
        width = len(self.tasks) * channels
        self.swtf = WindowTransformer(width, heads_for(width, HEADS), depth=1, drop_path=0.0)
        self.dimensionality_reduction = BasicBlock(width, channels, momentum=0.1)
        self.se = nn.ModuleDict({task: SqueezeExcitation(channels) for task in self.tasks})

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Propagate.

        Args:
            features: (B, C, H, W) for every task.

        Returns:
            The same for the next finer scale, at this one's resolution.
        """
        parts = [features[task] for task in self.tasks]
        x = torch.cat(parts, dim=1)
        count = len(self.tasks)
        groups = (count, -1) if self.task_softmax else (-1, count)
        dim = 1 if self.task_softmax else 2
        weight = self.swtf(x).unflatten(1, groups).softmax(dim=dim).flatten(1, 2)
        joint = self.dimensionality_reduction(x * weight)
        return {
            task: self.se[task](joint) + part for task, part in zip(self.tasks, parts, strict=True)
        }

    def extra_repr(self) -> str:
        return f"task_softmax={self.task_softmax}"
