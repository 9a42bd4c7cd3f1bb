"""Backbones of timm: their scales, the authors' HRNet, folding."""

from __future__ import annotations

import pytest
import torch
from network_support import Pyramid, perturb
from torch import nn

from xattn_models.backbone import can_fold, create_backbone, fold_backbone, pyramid, widths

BACKBONES = {
    "hrnet_w18_small_v2": (18, 36, 72, 144),
    "hrnet_w32": (32, 64, 128, 256),
    "hrnet_w48": (48, 96, 192, 384),
    "resnet18": (64, 128, 256, 512),
    "resnet50": (256, 512, 1024, 2048),
    "swin_tiny_patch4_window7_224": (96, 192, 384, 768),
    "swinv2_tiny_window8_256": (96, 192, 384, 768),
    "convnext_atto": (40, 80, 160, 320),
    "mobilenetv3_small_050": (8, 16, 24, 288),
}
DEFERRED = {"hrnet_w48", "resnet50"}
"""Large: built without values, and not run."""


@pytest.mark.parametrize("name", BACKBONES)
def test_pyramid(name: str) -> None:
    """Sizes and widths, for an image that is not square, and folding changes nothing."""
    with torch.device("meta" if name in DEFERRED else "cpu"):
        backbone = create_backbone(name)
    assert widths(backbone) == list(BACKBONES[name])
    if name in DEFERRED:
        return
    perturb(backbone.double().eval())
    image = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        features = pyramid(backbone, image)
        folded = pyramid(fold_backbone(backbone), image)
    for s, (x, y) in enumerate(zip(features, folded, strict=True)):
        assert x.shape == (1, BACKBONES[name][s], 16 >> s, 24 >> s)
        assert (x - y).norm() <= 1e-12 * x.norm()


def test_hrnet_is_the_authors() -> None:
    backbone = create_backbone("hrnet_w18_small_v2")
    assert len(backbone.state_dict()) == 864
    upsampling = [m for m in backbone.modules() if isinstance(m, nn.Upsample)]
    assert upsampling
    assert {(m.mode, m.align_corners) for m in upsampling} == {("bilinear", False)}
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {m.momentum for m in norms} == {0.01}


def test_others_keep_their_momentum() -> None:
    norms = [m for m in create_backbone("resnet18").modules() if isinstance(m, nn.BatchNorm2d)]
    assert {m.momentum for m in norms} == {0.1}


@pytest.mark.parametrize("name", ["hrnet_w18_small", "resnet18"])
def test_folding_leaves_no_norm_after_a_named_convolution(name: str) -> None:
    backbone = create_backbone(name).eval()
    folded = fold_backbone(backbone)
    left = [k for k, m in folded.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert left == ([] if name.startswith("hrnet") else ["bn1"])
    assert any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())


def test_where_folding_is_possible() -> None:
    """In inference, without hooks and without gradients of anything."""
    backbone, image = Pyramid().eval(), torch.randn(1, 3, 32, 32)
    assert not can_fold(backbone, image)  # parameters may get gradients
    with torch.no_grad():
        assert can_fold(backbone, image)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not can_fold(backbone, image)
        handle = backbone.stages[1][1].register_forward_hook(lambda *_: None)
        assert not can_fold(backbone, image)
        handle.remove()
        backbone.stages[1][1].train()
        assert not can_fold(backbone, image)
        backbone.eval()
    backbone.requires_grad_(False)
    assert can_fold(backbone, image)
    assert not can_fold(backbone, image.requires_grad_())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tiny_patch16_224", r"strides \(4, 8, 16, 32\).*strides \(16, 16, 16, 16\)"),
        ("levit_128", r"expected features at strides"),
        ("hrnet_w19", r"got 'hrnet_w19', expected a model of timm .*such as hrnet_w18"),
        ("nonsense", "got 'nonsense', expected a model of timm"),
    ],
)
def test_unusable_backbones(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"backbone: .*{message}"):
        create_backbone(name)


def test_arguments_reach_timm() -> None:
    backbone = create_backbone("convnext_atto", arguments={"drop_path_rate": 0.25})
    rates = {m.drop_prob for m in backbone.modules() if hasattr(m, "drop_prob")}
    assert max(rates) == pytest.approx(0.25)
