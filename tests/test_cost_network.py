"""The cost model of the network against published numbers and against torch's flop counter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from xattn_kernels import flops
from xattn_kernels.cost_network import hrnet_flops, network_flops
from xattn_models import op_by_op
from xattn_models.sca_mtl import sca_mtl

OUTPUTS = {"semseg": 40, "depth": 1, "normals": 3, "edge": 1}
NYUD = (480, 640)


def counted(model: nn.Module, size: tuple[int, int], batch: int = 1) -> int:
    image = torch.zeros(batch, 3, *size)
    with torch.no_grad():
        return flops.count(lambda: model.eval()(image))


@pytest.mark.parametrize(
    ("outputs", "size", "gmac"),
    [
        ((40, 1), NYUD, 78.6),
        ((40, 1, 3, 1), NYUD, 170.7),
        ((21, 7, 1), (512, 512), 103.7),
        ((21, 7, 1, 3, 1), (512, 512), 193.5),
    ],
)
def test_published(outputs: tuple[int, ...], size: tuple[int, int], gmac: float) -> None:
    assert network_flops(outputs, size).total / 2e9 == pytest.approx(gmac, abs=0.06)


def test_whole_network_op_by_op() -> None:
    model = op_by_op.SCAMTL([*OUTPUTS], OUTPUTS)
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = counted(model, NYUD)
        assert counted(model.backbone, NYUD) == hrnet_flops(NYUD)
    assert found == network_flops([*OUTPUTS.values()], NYUD).total == 341_483_542_752


def test_rewrites() -> None:
    cost = network_flops([*OUTPUTS.values()], NYUD, rewritten=True)
    assert cost.total == 181_126_894_080
    published = network_flops([*OUTPUTS.values()], NYUD)
    for part in ("backbone", "initial_prediction", "cross_task"):
        assert getattr(cost, part) == getattr(published, part)
    assert cost.fuse / 1e9 == pytest.approx(39.0, abs=0.05)
    assert published.fuse / 1e9 == pytest.approx(54.9, abs=0.05)


MODELS: dict[bool, Callable[..., nn.Module]] = {
    False: lambda tasks, **options: op_by_op.SCAMTL(tasks, OUTPUTS, **options),
    True: lambda tasks, **options: sca_mtl(
        tasks, {t: OUTPUTS[t] for t in options.get("auxiliary_tasks", tasks)}, **options
    ),
}


@pytest.mark.parametrize("rewritten", [False, True])
def test_small_image(rewritten: bool) -> None:
    model = MODELS[rewritten](("depth", "semseg"))
    cost = network_flops((1, 40), (96, 64), rewritten=rewritten, batch=2)
    assert counted(model, (96, 64), batch=2) == cost.total


@pytest.mark.parametrize("rewritten", [False, True])
def test_auxiliary_tasks_and_another_backbone(rewritten: bool) -> None:
    model = MODELS[rewritten](
        ("depth",), auxiliary_tasks=("semseg", "depth", "edge"), backbone="resnet10t"
    )
    cost = network_flops(
        (1,),
        (64, 64),
        (64, 128, 256, 512),
        auxiliary_outputs=(40, 1),
        backbone=counted(model.backbone, (64, 64)),
        rewritten=rewritten,
    )
    assert counted(model, (64, 64)) == cost.total


def test_wrong_sizes() -> None:
    with pytest.raises(ValueError, match="base_widths: got 3, expected 4"):
        network_flops((1, 1), (64, 64), (8, 16, 32))
    with pytest.raises(ValueError, match="image_size: expected multiples of stride 8"):
        network_flops((1, 1), (68, 64))
    with pytest.raises(ValueError, match="num_tasks"):
        network_flops((1,), (64, 64))
