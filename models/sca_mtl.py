"""The SCA-MTL network: sequential cross-attention across tasks, then across scales."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn_kernels.modules import CrossScaleHead, CrossTaskAttention
from xattn_kernels.modules.checks import check_names, check_width
from xattn_kernels.modules.freezing import Freezable, refuse_proxies
from xattn_kernels.modules.normalisation import first_parameter
from xattn_kernels.ops.autocast import autocast_dtype
from xattn_kernels.ops.gradients import CHANNELS_LAST, in_order

from .arguments import plain_integer, plain_names, plain_outputs
from .backbone import STRIDES, can_fold, create_backbone, fold_backbone, pyramid, widths
from .files import listing
from .propagation import FeaturePropagation
from .task_heads import InitialPrediction
from .window_attention import WindowTransformer, heads_for

OUTPUTS = {"semseg": 40, "human_parts": 7, "sal": 1, "normals": 3, "edge": 1, "depth": 1}
"""Channels of a task's output where nothing else is said."""

ATTENTION_HEADS = 6
SCALES = len(STRIDES)

Output = dict[str, Any]


class SCAMTL(Freezable):
    """Dense predictions of several tasks from one image.

    With b_s a feature map of the backbone at stride 2^(s+2), for scales s = 3, 2, 1, 0::

        x_s = [ATT_s(b_s), b_s]                                    (B, C_s, H_s, W_s)
        f_st, deep supervision_st = initial prediction_s(x_s, ^p_(s+1)t)
        g_s = CTAM_s(f_s)                         cross-attention between tasks
        p_s = FPMA_s(g_s)                         propagation, s > 0
        y_t = ^(CSAM and head)_t(g_0t .. g_3t)    cross-attention between scales

    and ^ the bilinear interpolation (align_corners=False) by 2, and to the image's size. Kim, Choi,
    Min, "Sequential Cross Attention Based Multi-task Learning" (ICIP 2022, arXiv 2209.02518).

    Parameters and buffers have the names, shapes and order of the authors' released code:
    ``backbone.*``, ``swTransform{1..4}.*``, ``fpm_scale_{3,2,1}.*``, ``scale_{0..3}.*``,
    ``distillation_scale_{0..3}.*``, ``heads.<t>.*``.

    `sca_mtl` builds one from the name of a backbone. `xattn_kernels.freeze_` makes inference
    faster: it keeps copies of the weights with batch norms folded in, and promises that nobody
    writes to the parameters.

    Args:
        backbone: a pyramid of four scales, see `create_backbone`.
        tasks: names of the tasks, in the order in which their features are concatenated.
        num_outputs: channels of every task's output.
        auxiliary_tasks: names of the tasks that are predicted initially and attended to, in the
            order of concatenation; contains `tasks`. Those that are no targets have deep
            supervision alone, and their initial features are what is propagated. Default: `tasks`.
        kind: "linear" or "softmax" cross-attention, see `xattn_kernels.modules.CrossAttention`.
        heads: heads of kind "softmax"; divides the widths C_s.
        recompute: whether cross-attentions keep less for the backward pass and compute it again,
            see `xattn_kernels.modules.CrossAttention`.
        task_softmax: see `FeaturePropagation`.

    Attributes:
        channels: the widths C_s, finest scale first: twice those of the backbone.

    Raises:
        ValueError: for a single task, duplicate names, a target that is no auxiliary task, or
            `num_outputs` of other tasks.
    """

    settings: dict[str, Any] | None = None
    """The arguments of `sca_mtl` that it was made from; saved with checkpoints."""

    def __init__(
        self,
        backbone: nn.Module,
        tasks: Sequence[str],
        num_outputs: Mapping[str, int],
        auxiliary_tasks: Sequence[str] | None = None,
        *,
        kind: str = "linear",
        heads: int = 1,
        recompute: bool | str = "auto",
        task_softmax: bool = False,
    ) -> None:
        tasks = check_names("tasks", tasks)
        sources = tasks
        if auxiliary_tasks is not None:
            auxiliary_tasks = sources = check_names("auxiliary_tasks", auxiliary_tasks)
        if set(num_outputs) != set(sources):
            raise ValueError(
                f"num_outputs: got tasks {list(num_outputs)}, expected those of the network, "
                f"{list(sources)}"
            )
        num_outputs = {
            task: check_width(f"num_outputs[{task!r}]", num_outputs[task]) for task in sources
        }
        super().__init__()
        self.tasks = tasks
        self.auxiliary_tasks = sources
        self.num_outputs = num_outputs
        base = widths(backbone)
        self.channels = tuple(2 * width for width in base)

        options: dict[str, Any] = {"kind": kind, "heads": heads, "recompute": recompute}
        distillations = [  # first, for they check the arguments
            CrossTaskAttention(tasks, width, auxiliary_tasks, **options) for width in self.channels
        ]
        self.backbone = backbone
        for s, width in enumerate(base):
            attention = WindowTransformer(width, heads_for(width, ATTENTION_HEADS))
            self.add_module(f"swTransform{s + 1}", attention)
        for s in range(SCALES - 1, 0, -1):
            propagation = FeaturePropagation(sources, self.channels[s], task_softmax=task_softmax)
            self.add_module(f"fpm_scale_{s}", propagation)
        for s, (width, coarser) in enumerate(
            zip(self.channels, (*self.channels[1:], 0), strict=True)
        ):
            self.add_module(f"scale_{s}", InitialPrediction(self.num_outputs, width, coarser))
        for s, distillation in enumerate(distillations):
            self.add_module(f"distillation_scale_{s}", distillation)
        self.heads = nn.ModuleDict(
            {task: CrossScaleHead(self.channels, num_outputs[task], **options) for task in tasks}
        )

    def forward(self, image: Tensor) -> Output:
        """Predict.

        Args:
            image: (B, 3, H, W) with H and W divisible by 32, in the parameters' dtype (under
                autocast, any), normalised as the backbone expects.

        Returns:
            (B, n_t, H, W) for every task, in channels_last: logits, or values for depth and
            normals. And under "deep_supervision" a dict of "scale_0" .. "scale_3", each a dict of
            the initial predictions (B, n_t, H / 4 / 2^s, W / 4 / 2^s) of every auxiliary task.

        Raises:
            TypeError: for another dtype.
            ValueError: for another shape or device; in training, for a single value per channel.
        """
        refuse_proxies(self, image)
        _check_image(image, first_parameter(self))
        size = image.shape[2:]
        image = in_order(image, CHANNELS_LAST)
        scales = [
            torch.cat([self.get_submodule(f"swTransform{s + 1}")(x), x], dim=1)
            for s, x in enumerate(self._pyramid(image))
        ]
        refined: dict[str, list[Tensor]] = {task: [] for task in self.tasks}
        supervised = {}
        propagated: dict[str, Tensor] | None = None
        for s in reversed(range(SCALES)):
            if propagated is not None:
                finer = scales[s].shape[2:]
                propagated = {task: _resize(x, finer) for task, x in propagated.items()}
            initial, supervised[s] = self.get_submodule(f"scale_{s}")(scales[s], propagated)
            attended = self.get_submodule(f"distillation_scale_{s}")(initial)
            for task, x in attended.items():
                refined[task].insert(0, x)
            if s > 0:
                propagated = self.get_submodule(f"fpm_scale_{s}")(initial | attended)
        output: Output = {
            task: _resize(head(refined[task]), size) for task, head in self.heads.items()
        }
        output["deep_supervision"] = {f"scale_{s}": supervised[s] for s in range(SCALES)}
        return output

    def _pyramid(self, image: Tensor) -> list[Tensor]:
        """The backbone's features; while frozen, of a copy with its batch norms folded."""
        backbone = self.backbone
        if self._frozen is not None and can_fold(backbone, image):
            backbone = self.derived("backbone", lambda: fold_backbone(backbone))
        return pyramid(backbone, image)


def sca_mtl(
    tasks: Iterable[str] = ("semseg", "depth", "normals", "edge"),
    num_outputs: Mapping[str, int] | None = None,
    backbone: str = "hrnet_w18_small_v2",
    pretrained: bool = False,
    auxiliary_tasks: Iterable[str] | None = None,
    kind: str = "linear",
    *,
    heads: int = 1,
    recompute: bool | str = "auto",
    task_softmax: bool = False,
    backbone_arguments: Mapping[str, Any] | None = None,
) -> SCAMTL:
    """An `SCAMTL` on a backbone of timm.

    A published one is ``sca_mtl(**config("nyud_4").arguments())``, see `xattn_models.CONFIGS`.

    Args:
        tasks: see `SCAMTL`; any iterable with an order, such as the keys of a dict.
        num_outputs: channels of every task's output; by default those of `OUTPUTS`.
        backbone: name of a timm model with features at strides 4, 8, 16 and 32, such as
            "hrnet_w18_small_v2" (the published one), "hrnet_w48", "resnet50",
            "swin_tiny_patch4_window7_224", "convnext_tiny".
        pretrained: load ImageNet weights into the backbone, which timm downloads if need be.
        auxiliary_tasks: see `SCAMTL`.
        kind: see `SCAMTL`.
        heads: see `SCAMTL`.
        recompute: see `SCAMTL`.
        task_softmax: see `FeaturePropagation`.
        backbone_arguments: further arguments for `timm.create_model`.

    Raises:
        ModuleNotFoundError: without timm; says how to install it.
        TypeError: for numbers of outputs that are no mapping, and as `create_backbone`.
        ValueError: for a backbone without these scales, an unknown name, tasks without an order, a
            task whose number of outputs is not known, and as `SCAMTL`.
    """
    tasks = plain_names("tasks", tasks)
    if auxiliary_tasks is not None:
        auxiliary_tasks = plain_names("auxiliary_tasks", auxiliary_tasks)
    if num_outputs is None:
        names = tasks if auxiliary_tasks is None else auxiliary_tasks
        check_names("tasks", names)
        unknown = [task for task in names if task not in OUTPUTS]
        if unknown:
            raise ValueError(
                f"num_outputs: got None, expected the numbers of outputs, for {listing(unknown)} "
                f"are not among the known tasks {list(OUTPUTS)}"
            )
        num_outputs = {task: OUTPUTS[task] for task in names}
    num_outputs = plain_outputs("num_outputs", num_outputs)
    heads = plain_integer(heads)
    model = SCAMTL(
        create_backbone(backbone, pretrained=pretrained, arguments=backbone_arguments),
        tasks,
        num_outputs,
        auxiliary_tasks,
        kind=kind,
        heads=heads,
        recompute=recompute,
        task_softmax=task_softmax,
    )
    model.settings = {
        "tasks": tasks,
        "num_outputs": num_outputs,
        "backbone": backbone,
        "auxiliary_tasks": auxiliary_tasks,
        "kind": kind,
        "heads": heads,
        "recompute": recompute,
        "task_softmax": task_softmax,
        "backbone_arguments": None if backbone_arguments is None else dict(backbone_arguments),
    }
    return model


def _check_image(image: Tensor, parameter: Tensor) -> None:
    if not isinstance(image, Tensor) or not image.is_floating_point():
        kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"image: got {kind}, expected a floating-point tensor")
    if image.dim() != 4 or image.shape[1] != 3:
        raise ValueError(f"image: got shape {tuple(image.shape)}, expected (B, 3, H, W)")
    height, width = image.shape[2:]
    if height % STRIDES[-1] or width % STRIDES[-1] or 0 in (height, width):
        raise ValueError(
            f"image: got height {height} and width {width}, expected multiples of {STRIDES[-1]}; "
            "xattn_models.predict pads images of other sizes and crops what it predicts"
        )
    if image.dtype != parameter.dtype and autocast_dtype(image.device.type) is None:
        raise TypeError(f"image: got {image.dtype}, expected {parameter.dtype}, as the parameters")
    if image.is_meta:
        raise ValueError(
            f"image: got shape {tuple(image.shape)} on meta, expected a tensor with data; for "
            "shapes alone, call the model under torch._subclasses.FakeTensorMode"
        )
    if image.device != parameter.device:
        raise ValueError(
            f"image: got a tensor on {image.device}, expected {parameter.device} as the parameters"
        )


def _resize(x: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
