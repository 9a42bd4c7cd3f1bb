"""From a photograph to the feature maps of every task and scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from xattn_kernels.cost import WIDTHS
from xattn_models.timm_compat import import_timm

TASKS = ("semseg", "depth", "normals", "edge")
BACKBONE = "hrnet_w18_small_v2"
SEED = 0

Pyramid = list[Tensor]
"""(1, C_s, H / stride_s, W / stride_s) of each scale, finest first."""


def bundled_photograph() -> Image.Image:
    """The Summer Palace in Beijing, 427 x 640: china.jpg of scikit-learn (CC BY, in its README)."""
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image("china.jpg"))


def fit(photograph: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize to cover (H, W), then cut off what is beyond it, evenly on both sides."""
    height, width = size
    return ImageOps.fit(photograph, (width, height), Image.Resampling.BICUBIC)


class FeatureExtractor(nn.Module):
    """Backbone and one 1x1 projection per task and scale, to the widths of SCA-MTL.

    No trained weights ship with any package, so these are random, drawn from a fixed seed. The
    backbone normalises with the statistics of the photograph itself (batch norm in training mode),
    which keeps random features in the range that trained ones have.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            self.backbone: Any = import_timm().create_model(
                BACKBONE, features_only=True, feature_location="", out_indices=(1, 2, 3, 4)
            )
            channels = self.backbone.feature_info.channels()
            self.projections = nn.ModuleDict(
                {
                    task: nn.ModuleList(
                        nn.Conv2d(b, c, 1) for b, c in zip(channels, widths, strict=True)
                    )
                    for task in TASKS
                }
            )

    @torch.no_grad()
    def forward(self, photograph: Image.Image) -> dict[str, Pyramid]:
        """Features of a photograph whose height and width are multiples of 32, by task."""
        pixels = torch.from_numpy(np.asarray(photograph).copy()).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(self.backbone.default_cfg[k]) for k in ("mean", "std"))
        image = (pixels - mean[:, None, None]) / std[:, None, None]
        scales = self.backbone.train()(image.unsqueeze(0))
        return {
            task: [project(x) for project, x in zip(projections, scales, strict=True)]
            for task, projections in self.projections.items()
        }
