"""Initial predictions of all tasks at one scale."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from xattn_kernels.modules.layers import BasicBlock


class InitialPrediction(nn.Module):
    """Features of every task at one scale, and what they predict by themselves.

    Two residual blocks per task on [features, propagated_t], and a 1x1 convolution whose logits
    are supervised in training. Kim, Choi, Min, "Sequential Cross Attention Based Multi-task
    Learning" (arXiv 2209.02518); after Vandenhende et al., "MTI-Net" (arXiv 2001.06902).

    Parameters and buffers are named ``refinement.<t>.{0,1}.*`` (`BasicBlock`) and
    ``decoders.<t>.*``.

    Args:
        num_outputs: channels of the logits by task; its order is that of the tasks.
        channels: width C of the scale's features, and of each task's.
        propagated: channels of the features propagated from the next coarser scale; 0 at the
            coarsest.
    """

    def __init__(self, num_outputs: Mapping[str, int], channels: int, propagated: int = 0) -> None:
        super().__init__()
        self.refinement = nn.ModuleDict(
            {
                task: nn.Sequential(
                    BasicBlock(
                        channels + propagated, channels, momentum=0.1, shortcut=propagated > 0
                    ),
                    BasicBlock(channels, channels, momentum=0.1, shortcut=False),
                )
                for task in num_outputs
            }
        )
        self.decoders = nn.ModuleDict(
            {task: nn.Conv2d(channels, count, 1) for task, count in num_outputs.items()}
        )

    def forward(
        self, features: Tensor, propagated: Mapping[str, Tensor] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Predict.

        Args:
            features: (B, C, H, W), shared by the tasks.
            propagated: (B, C', H, W) for every task, except at the coarsest scale.

        Returns:
            The tasks' features (B, C, H, W) and their logits (B, n_t, H, W).
        """
        refined, logits = {}, {}
        for task, blocks in self.refinement.items():
            x = features
            if propagated is not None:
                x = torch.cat([features, propagated[task]], dim=1)
            refined[task] = blocks(x)
            logits[task] = self.decoders[task](refined[task])
        return refined, logits
