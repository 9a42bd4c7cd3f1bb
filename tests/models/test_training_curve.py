"""Two hundred steps of training, by recompute and op by op."""

from __future__ import annotations

import network_support as support
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import xattn_kernels

STEPS = 200
TASKS = ("semseg", "depth")


def settle(model: nn.Module) -> nn.Module:
    """Without drop-path: the networks would draw differently."""
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
        elif isinstance(getattr(module, "drop_path", None), float):
            module.drop_path = 0.0
    return model


def curve(model: nn.Module) -> list[float]:
    """Losses on fixed images with synthetic labels, with the published optimiser."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(2, 4, 3, 64, 64, generator=generator)  # two batches in turn
    classes = F.avg_pool2d(images[:, :, 0], 9, 1, 4).mul(8).round().long().clamp(-2, 2) + 2
    depth = F.avg_pool2d(images[:, :, 1], 5, 1, 2).unsqueeze(2)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=1e-4)

    def loss(output: dict[str, Tensor], i: int) -> Tensor:
        resized = {
            task: F.interpolate(output[task], images.shape[-2:], mode="bilinear") for task in TASKS
        }
        return F.cross_entropy(resized["semseg"], classes[i]) + F.l1_loss(
            resized["depth"], depth[i]
        )

    losses = []
    for step in range(STEPS):
        i = step % 2
        output = model(images[i])
        total = loss(output, i)
        for logits in output["deep_supervision"].values():
            total = total + loss(logits, i)
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        losses.append(total.item())
    return losses


def test_follows_op_by_op() -> None:
    """Within 1 % at every step, in float32; op by op in float64 is no closer to it."""
    ours, theirs = support.pair(TASKS, dtype=torch.float32, training=True)
    for part in ours.modules():
        if hasattr(part, "recompute"):
            part.recompute = True
    with xattn_kernels.backend("cpu"):
        actual = curve(settle(ours))
    expected = curve(settle(theirs))
    assert expected[-1] < 0.9 * expected[0], "nothing was learnt"
    assert max(abs(a - e) / e for a, e in zip(actual, expected, strict=True)) <= 0.01
