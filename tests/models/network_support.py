"""A small network of this package and the op-by-op one in the same state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xattn_models import SCAMTL, op_by_op

OUTPUTS = {"semseg": 5, "depth": 1, "normals": 3}
WIDTHS = (6, 8, 10, 12)


class FeatureInfo:
    """What timm's backbones tell of their features."""

    def __init__(self, widths: Sequence[int]) -> None:
        self.widths = list(widths)

    def channels(self) -> list[int]:
        return self.widths


class Pyramid(nn.Module):
    """Four scales from four convolutions; their folding is for `backbone` to find."""

    def __init__(self, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.feature_info = FeatureInfo(widths)
        steps = zip((3, *widths), widths, (4, 2, 2, 2), strict=False)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, s, s, bias=False), nn.BatchNorm2d(o), nn.ReLU())
            for i, o, s in steps
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


def perturb(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random running statistics, and scales of norms and tables of biases that are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in [*module.named_parameters(), *module.named_buffers()]:
            if name.endswith("running_var") or (x.dim() == 1 and name.endswith("weight")):
                x.copy_(torch.rand(x.shape, generator=generator) + 0.5)
            elif name.endswith(("running_mean", "bias", "bias_table")):
                x.copy_(torch.rand(x.shape, generator=generator) - 0.5)
    return module


def pair(
    tasks: Sequence[str] = tuple(OUTPUTS),
    auxiliary_tasks: Sequence[str] | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    training: bool = False,
    **options: Any,
) -> tuple[SCAMTL, op_by_op.SCAMTL]:
    """Both networks on backbones of their own."""
    outputs = {task: OUTPUTS[task] for task in auxiliary_tasks or tasks}
    torch.manual_seed(0)
    ours = SCAMTL(Pyramid(), tasks, outputs, auxiliary_tasks, **options)
    theirs = op_by_op.SCAMTL(tasks, outputs, Pyramid(), auxiliary_tasks=auxiliary_tasks, **options)
    perturb(ours.to(dtype))
    theirs.to(dtype).load_state_dict(ours.state_dict())
    return ours.train(training), theirs.train(training)


def image(
    batch: int = 2, height: int = 64, width: int = 96, dtype: torch.dtype = torch.float64
) -> Tensor:
    return torch.randn(
        batch, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(dtype)


def flat(output: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """All predictions of either network by name."""
    tasks = list(getattr(model, "auxiliary_tasks", getattr(model, "auxilary_tasks", ())))
    named = {task: x for task, x in output.items() if task != "deep_supervision"}
    for scale, logits in output["deep_supervision"].items():
        named |= {f"{scale}.{task}": logits[task] for task in tasks}
    return named


def loss(named: Mapping[str, Tensor]) -> Tensor:
    """A number in which every prediction has its own random weights."""
    total = torch.zeros((), dtype=torch.float64)
    for i, (_, x) in enumerate(sorted(named.items())):
        generator = torch.Generator().manual_seed(i)
        weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        total = total + (x.double() * weight).sum()
    return total


def assert_close(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-10
) -> None:
    """By relative L2 norm per tensor; tensors that are zero but for rounding by their size."""
    assert set(actual) == set(expected)
    actual = {name: x.detach() for name, x in actual.items()}
    expected = {name: x.detach() for name, x in expected.items()}
    scale = max(float(x.double().norm()) for x in expected.values())
    for name, x in actual.items():
        assert x.shape == expected[name].shape, name
        distance = (x.double() - expected[name].double()).norm()
        bound = tolerance * max(float(expected[name].double().norm()), 1e-6 * scale)
        assert distance <= bound, f"{name}: {distance} above {bound}"
