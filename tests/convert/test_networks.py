"""Residual networks of torchvision and timm: swapped and the same, or left with a reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xattn_kernels.convert import convert_, revert_
from xattn_models.timm_compat import import_timm

from .support import distance, inference, randomise

STRIDED = "its conv1 is no 3x3 convolution of stride 1"
DILATED = "its conv2 is no 3x3 convolution of stride 1"
SE = "it has further parameters or buffers: se."


def of_torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import_timm()  # with what torchvision may lack
        from torchvision import models

        return getattr(models, name)(weights=None, num_classes=5, **options)

    return make


def of_timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: import_timm().create_model(name, pretrained=False, num_classes=5, **options)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, dict[str, int]]] = {
    "torchvision resnet18": (of_torchvision("resnet18"), 5, {STRIDED: 3}),
    "torchvision resnet34": (of_torchvision("resnet34"), 13, {STRIDED: 3}),
    "torchvision resnet50": (of_torchvision("resnet50"), 0, {}),
    "timm resnet18": (of_timm("resnet18"), 5, {STRIDED: 3}),
    "timm resnet26": (of_timm("resnet26"), 0, {}),
    "timm resnet34d": (of_timm("resnet34d"), 13, {STRIDED: 3}),
    "timm hrnet_w18_small": (of_timm("hrnet_w18_small"), 18, {}),
    "squeeze and excitation": (of_timm("seresnet18"), 0, {SE: 5, STRIDED: 3}),
    "anti-aliased": (
        of_timm("resnetblur18"),
        5,
        {"it has further parameters or buffers: aa.filt": 3},
    ),
    "drop path": (
        of_timm("resnet18", drop_path_rate=0.1),
        1,
        {"it has an unknown submodule drop_path (DropPath)": 4, STRIDED: 3},
    ),
    "drop block": (
        of_timm("resnet18", drop_block_rate=0.1),
        3,
        {"it has an unknown submodule drop_block (DropBlock2d)": 2, STRIDED: 3},
    ),
    "output stride 16": (of_timm("resnet18", output_stride=16), 4, {STRIDED: 3, DILATED: 1}),
    "output stride 8": (of_timm("resnet34", output_stride=8), 6, {STRIDED: 9, DILATED: 1}),
    "gelu": (
        of_timm("resnet18", act_layer="gelu"),
        0,
        {"it has an unknown submodule act1 (GELU)": 5, STRIDED: 3},
    ),
    "group norm": (
        of_timm("resnet18", norm_layer="groupnorm"),
        0,
        {"its bn1 is GroupNorm, where BatchNorm2d is expected": 5, STRIDED: 3},
    ),
}


def image() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn((2, 3, 64, 64), generator=generator, dtype=torch.float64)


def step(model: nn.Module) -> dict[str, Tensor]:
    """Outputs, gradients and statistics of one training step."""
    torch.manual_seed(1)
    y = model.train()(image())
    y.square().mean().backward()
    return {
        "output": y.detach(),
        **{f"gradient {k}": p.grad for k, p in model.named_parameters() if p.grad is not None},
        **{f"buffer {k}": b.double().clone() for k, b in model.named_buffers()},
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name: str) -> None:
    make, swapped, left = NETWORKS[name]
    torch.manual_seed(0)
    plain = randomise(make()).double()
    model = copy.deepcopy(plain)
    report = convert_(model)
    found = {reason: sum(e.reason.startswith(reason) for e in report.left) for reason in left}
    assert (len(report.converted), found) == (swapped, left)
    assert sum(left.values()) == len(report.left)
    assert distance(inference(model, image()), inference(plain, image())) <= 1e-9
    if swapped:
        assert distance(step(model), step(plain)) <= 1e-7
        revert_(model)
        expected = inference(plain, image())[""]
        assert torch.allclose(inference(model, image())[""], expected, rtol=1e-9)


def test_dilated_after_conversion() -> None:
    """Strides of the last stages are taken out of networks that exist, as DeepLab does."""
    torch.manual_seed(0)
    plain = randomise(of_torchvision("resnet18")()).double()
    model = copy.deepcopy(plain)
    convert_(model)
    before = inference(model, image())
    for network in (model, plain):
        for stage, dilation in ((network.layer3, 2), (network.layer4, 4)):
            for module in stage.modules():
                if isinstance(module, nn.Conv2d):
                    module.stride = (1, 1)
                    if module.kernel_size == (3, 3):
                        module.dilation = module.padding = (dilation, dilation)
    expected = inference(plain, image())
    assert distance(before, expected) > 1e-3
    assert distance(inference(model, image()), expected) <= 1e-12
    assert distance(step(model), step(plain)) <= 1e-7
