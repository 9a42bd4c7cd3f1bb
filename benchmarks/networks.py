"""Problems of the suites on whole networks: op by op, this library's, and converted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from xattn_kernels import convert_, freeze_
from xattn_kernels.cost import STRIDES
from xattn_kernels.cost_network import BASE_WIDTHS
from xattn_models import op_by_op
from xattn_models.sca_mtl import SCAMTL, sca_mtl

from .problems import IMAGE, TASKS, as_if_trained

NUM_OUTPUTS = {"semseg": 40, "depth": 1, "normals": 3, "edge": 1}
MORE_OUTPUTS = NUM_OUTPUTS | {"sal": 1}
"""With what a fifth task has."""
BACKBONE = "hrnet_w18_small_v2"
OP_BY_OP, COMPILED, OURS, CONVERTED = "op by op", "compiled", "ours", "converted"
FROZEN = "ours, frozen"
"""With folded weights kept, by `xattn_kernels.freeze_`; the other ways keep nothing."""
ERROR = 1e-5
"""Largest relative L2 error of an output in float32."""
Size = tuple[int, int]


class FixedPyramid(nn.Module):
    """In place of a backbone: the same features whatever the image."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.feature_info = SimpleNamespace(channels=list(BASE_WIDTHS).copy)
        generator = torch.Generator().manual_seed(0)
        for s, (width, stride) in enumerate(zip(BASE_WIDTHS, STRIDES, strict=True)):
            shape = (1, width, size[0] // stride, size[1] // stride)
            self.register_buffer(f"scale_{s}", torch.randn(shape, generator=generator))

    def forward(self, image: Tensor) -> list[Tensor]:
        return [self.get_buffer(f"scale_{s}") for s in range(len(STRIDES))]


def make(
    way: str,
    size: Size = IMAGE,
    *,
    backbone: bool | str = False,
    tasks: Sequence[str] = TASKS,
) -> nn.Module:
    """A network in eval mode; all ways have the same parameters.

    Args:
        way: one of the above.
        size: (H, W) of the images.
        backbone: a name of timm's; True: that of the published network; False: none.
        tasks: the first of `MORE_OUTPUTS`.
    """
    name = BACKBONE if backbone is True else backbone
    outputs = {task: MORE_OUTPUTS[task] for task in tasks}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        source = op_by_op.SCAMTL(tasks, outputs, name or FixedPyramid(size))
        as_if_trained(source)
    model: nn.Module = source
    if way in (OURS, FROZEN):
        model = (
            sca_mtl(tasks, outputs, name) if name else SCAMTL(FixedPyramid(size), tasks, outputs)
        )
        model.load_state_dict(source.state_dict())
    elif way == CONVERTED:
        left = convert_(source).left
        assert not left, left
    return freeze_(model.eval()) if way == FROZEN else model.eval()


def image(size: Size = IMAGE, batch: int = 1) -> Tensor:
    """(B, 3, H, W), standard normal."""
    return torch.randn((batch, 3, *size), generator=torch.Generator().manual_seed(2))


def targets(output: Mapping[str, Any]) -> dict[str, Tensor]:
    """The outputs of the tasks alone."""
    return {task: output[task] for task in MORE_OUTPUTS if task in output}


def check_outputs(
    way: str, found: Mapping[str, Tensor], exact: Mapping[str, Tensor], allowed: float = ERROR
) -> None:
    """Raises AssertionError for a relative L2 error above `allowed`."""
    for name, truth in exact.items():
        error = float((found[name] - truth).norm() / truth.norm())
        if not error <= allowed:
            raise AssertionError(
                f"{way}, {name}: relative L2 error {error:.1e}, allowed {allowed:.0e}"
            )


def in_inference(model: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """A call without gradients."""
    return torch.no_grad()(lambda: model(*arguments))
