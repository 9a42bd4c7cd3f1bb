"""Overfit the network to one photograph, with labels computed from the photograph itself.

No trained weights ship with any package. This gives the network something to show, and no more: it
learns to repeat, for one image, what `labels` computes from it. It has learnt nothing of depth,
normals or objects.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn_models import SCAMTL, sca_mtl
from xattn_models.images import normalise

CLUSTERS = 8
NUM_OUTPUTS = {"semseg": CLUSTERS, "normals": 3, "edge": 1, "depth": 1}
WEIGHTS = {"semseg": 1.0, "normals": 2.0, "edge": 2.0, "depth": 2.0}
SEED = 0
LEARNING_RATE = 2e-3


def labels(image: Tensor) -> dict[str, Tensor]:
    """Labels for an image (3, H, W) in [0, 1], from its colours alone.

    Returns:
        semseg: (H, W), the cluster of the smoothed colour, by k-means.
        normals: (3, H, W), unit normals of the smoothed luminance taken for a height.
        edge: (1, H, W), whether the luminance's gradient is among the steepest eighth.
        depth: (1, H, W), the smoothed luminance, from -1 to 1.
    """
    from sklearn.cluster import KMeans

    smooth = _blur(image, 5)
    luminance = smooth.new_tensor([0.299, 0.587, 0.114]) @ smooth.flatten(1)
    luminance = luminance.unflatten(0, image.shape[1:])[None]
    dy, dx = torch.gradient(luminance, dim=(1, 2))
    slope = (dx.square() + dy.square()).sqrt()
    normals = torch.cat([-8 * dx, -8 * dy, torch.full_like(dx, 0.5)])
    means = KMeans(CLUSTERS, n_init=1, random_state=SEED)
    clusters = means.fit_predict(smooth.flatten(1).T.numpy())
    return {
        "semseg": torch.from_numpy(clusters).long().unflatten(0, image.shape[1:]),
        "normals": F.normalize(normals, dim=0),
        "edge": (slope > slope.quantile(0.875)).float(),
        "depth": 2 * (luminance - luminance.min()) / (luminance.max() - luminance.min()) - 1,
    }


def loss(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    """Weighted sum over the tasks of outputs (1, n, H, W) against `labels`."""
    normals = F.normalize(outputs["normals"], dim=1)
    parts = {
        "semseg": F.cross_entropy(outputs["semseg"], targets["semseg"][None]),
        "normals": F.l1_loss(normals, targets["normals"][None]),
        "edge": F.binary_cross_entropy_with_logits(outputs["edge"], targets["edge"][None]),
        "depth": F.l1_loss(outputs["depth"], targets["depth"][None]),
    }
    return torch.stack([WEIGHTS[task] * part for task, part in parts.items()]).sum()


def overfit(image: Tensor, steps: int, each: Callable[[int, float], None] | None = None) -> SCAMTL:
    """A network trained on one image (3, H, W) in [0, 1], H and W multiples of 32, by Adam.

    Batch norms are trained with the statistics of the image, and at the end take these for theirs.

    Args:
        image: to overfit to.
        steps: of the optimiser.
        each: called with the number of each step and its loss.
    """
    torch.manual_seed(SEED)
    model = sca_mtl(tuple(NUM_OUTPUTS), NUM_OUTPUTS)
    targets, inputs = labels(image), normalise(image)[None]
    optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps)
    for step in range(steps):
        outputs = model(inputs)
        value = loss(outputs, targets)
        # At a quarter of the resolution, supervised as training does.
        for logits in outputs["deep_supervision"].values():
            resized = {
                task: F.interpolate(y, image.shape[1:], mode="bilinear")
                for task, y in logits.items()
            }
            value = value + loss(resized, targets) / 4
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        schedule.step()
        if each is not None:
            each(step + 1, value.item())
    _settle(model, inputs)
    return model.eval()


@torch.no_grad()
def _settle(model: SCAMTL, inputs: Tensor) -> None:
    """Running statistics from the image and the final weights alone."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the calls
    model(inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _blur(image: Tensor, size: int) -> Tensor:
    padded = F.pad(image[None], (size // 2,) * 4, mode="replicate")
    return F.avg_pool2d(padded, size, stride=1)[0]
