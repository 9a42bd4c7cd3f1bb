"""Pyramids of four scales from timm's backbones."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from xattn_kernels.modules.normalisation import is_hooked, is_inference
from xattn_kernels.ops.autocast import autocast_dtype
from xattn_kernels.ops.tracing import is_observed

from .files import clip
from .timm_compat import import_timm

STRIDES = (4, 8, 16, 32)


def create_backbone(
    name: str, *, pretrained: bool = False, arguments: Mapping[str, Any] | None = None
) -> nn.Module:
    """A timm backbone that gives features at strides 4, 8, 16 and 32; see `pyramid`.

    HRNets are those of the SCA-MTL authors: the features of the last stage without timm's widening
    modules, bilinear upsampling (align_corners=False) where timm has nearest, batch norm momentum
    0.01. Their `state_dict` has the names and shapes of the authors'. Swin transformers take images
    of any size.

    Args:
        name: a model of timm, such as "hrnet_w18_small_v2", "resnet50", "convnext_tiny".
        pretrained: load ImageNet weights, which timm downloads or has downloaded.
        arguments: further arguments for `timm.create_model`.

    Raises:
        TypeError: for a name that is no text, and arguments that are no mapping.
        ValueError: for an unknown name, for arguments that timm does not take or that are made
            here, and for a model without these four scales.
    """
    if not isinstance(name, str):
        raise TypeError(f"backbone: got {clip(repr(name), 200)}, expected the name of a timm model")
    if arguments is not None and not isinstance(arguments, Mapping):
        raise TypeError(
            f"backbone_arguments: got {clip(repr(arguments), 200)}, expected a dict of arguments"
        )
    fixed = {"features_only", "model_name", "pretrained"}.intersection(arguments or {})
    if fixed:
        raise ValueError(f"backbone_arguments: got {sorted(fixed)}, which are not given this way")
    timm = import_timm()
    is_hrnet = timm.models.is_model_in_modules(name.split(".")[0], ["hrnet"])
    settings: dict[str, Any] = {"out_indices": (-4, -3, -2, -1)}
    if is_hrnet:
        settings = {"out_indices": (1, 2, 3, 4), "feature_location": ""}
    elif timm.models.is_model_in_modules(
        name.split(".")[0], ["swin_transformer", "swin_transformer_v2"]
    ):
        settings["strict_img_size"] = False
    if not timm.is_model(name):
        close = timm.list_models(f"{name.split('_')[0]}*")[:8]
        raise ValueError(
            f"backbone: got {clip(repr(name))}, expected a model of timm {timm.__version__}"
            + (f", such as {', '.join(close)}" if close else "")
        )
    settings.update(arguments or {})
    try:
        backbone = timm.create_model(name, pretrained=pretrained, features_only=True, **settings)
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        if pretrained:
            raise
        if arguments:
            raise ValueError(
                f"backbone_arguments: got {clip(repr(dict(arguments)))}, which {name} does not "
                f"take: {type(error).__name__}: {clip(error)}"
            ) from error
        raise ValueError(_no_pyramid(name, str(error))) from error
    strides = tuple(backbone.feature_info.reduction())
    if strides != STRIDES:
        raise ValueError(_no_pyramid(name, f"its last four features have strides {strides}"))
    if is_hrnet:
        for module in backbone.modules():
            if isinstance(module, nn.Upsample):
                module.mode, module.align_corners = "bilinear", False
            elif isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.01
    result: nn.Module = backbone
    return result


def widths(backbone: nn.Module) -> list[int]:
    """Channels of the four scales, finest first."""
    return list(backbone.feature_info.channels())  # type: ignore[operator, union-attr]


def pyramid(backbone: nn.Module, image: Tensor) -> list[Tensor]:
    """The four feature maps (B, C_s, H / 4 / 2^s, W / 4 / 2^s) of an image (B, 3, H, W).

    Args:
        backbone: of `create_backbone`.
        image: in the parameters' dtype.
    """
    features = backbone(image)
    if getattr(backbone, "output_fmt", "NCHW") == "NHWC":
        features = [x.permute(0, 3, 1, 2) for x in features]
    return list(features)


def can_fold(backbone: nn.Module, image: Tensor) -> bool:
    """Whether `fold_backbone` computes what the backbone would: in inference, without hooks."""
    if is_observed() or autocast_dtype(image.device.type) is not None:
        return False
    modules = [*backbone.modules()]
    return not any(is_hooked(m) for m in modules) and is_inference([backbone], [image])


def fold_backbone(backbone: nn.Module) -> nn.Module:
    """A copy of a backbone whose batch norms are folded into the convolutions before them.

    Where that is known to be so: in `nn.Sequential`, and in timm's HRNets and ResNets, which name
    the batch norm of the convolution ``conv<n>`` ``bn<n>``.
    """
    resnet, hrnet = import_timm().models.resnet, import_timm().models.hrnet
    named = (resnet.BasicBlock, resnet.Bottleneck, hrnet.HighResolutionNetFeatures)
    folded = copy.deepcopy(backbone).requires_grad_(False)
    for module in folded.modules():
        children = module._modules
        pairs: list[tuple[str, str]] = []
        if type(module) is nn.Sequential:
            pairs = list(itertools.pairwise(children))
        elif isinstance(module, named):
            pairs = [(f"conv{n}", f"bn{n}") for n in (1, 2, 3) if f"conv{n}" in children]
        for convolution, norm in pairs:
            conv, bn = children[convolution], children[norm]
            if type(conv) is nn.Conv2d and type(bn) is nn.BatchNorm2d:
                children[convolution] = fuse_conv_bn_eval(conv, bn)
                children[norm] = nn.Identity()
    result: nn.Module = folded.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return result


def _no_pyramid(name: str, reason: str) -> str:
    return f"backbone: got {name!r}, expected features at strides {STRIDES}: {clip(reason)}"
