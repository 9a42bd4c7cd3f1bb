"""Blocks that cannot be swapped exactly are left, and the report says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn_kernels.convert import convert_, revert_
from xattn_kernels.testing import op_by_op
from xattn_models import op_by_op as network

from .support import (
    TASKS,
    GlobalContextAttentionBlock,
    Layer,
    distance,
    image,
    inference,
    pair,
    tree,
    whole_network,
)


def with_submodule(module: nn.Module, name: str, child: nn.Module) -> nn.Module:
    module.add_module(name, child)
    return module


def with_parameter(module: nn.Module) -> nn.Module:
    module.gamma = nn.Parameter(torch.zeros(1))
    return module


def with_eps(eps: float) -> nn.Module:
    module = GlobalContextAttentionBlock(8)
    module.eps = eps
    return module


def hooked(path: str) -> nn.Module:
    module = GlobalContextAttentionBlock(8)
    module.get_submodule(path).register_forward_hook(lambda *_: None)
    return module


def with_forward() -> nn.Module:
    module = GlobalContextAttentionBlock(8)
    module.forward = lambda target, source: target
    return module


def compiled_in_place() -> nn.Module:
    module = GlobalContextAttentionBlock(8)
    module.compile(backend="eager")
    return module


def parametrised() -> nn.Module:
    module = GlobalContextAttentionBlock(8)
    nn.utils.parametrizations.weight_norm(module.value_project.conv)
    return module


class Masked(GlobalContextAttentionBlock):
    def forward(self, target: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(target, source)


class Broken(GlobalContextAttentionBlock):
    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        raise RuntimeError("only for images of the moon")


class Tuple(GlobalContextAttentionBlock):
    def forward(self, target: Tensor, source: Tensor) -> Any:
        return (super().forward(target, source),)


class NoisyInTraining(GlobalContextAttentionBlock):
    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        y = super().forward(target, source)
        return y * 1.01 if self.training else y


def state_hooked() -> nn.Module:
    module = GlobalContextAttentionBlock(8)
    module.register_state_dict_pre_hook(lambda *_: None)
    return module


REFUSALS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "width": (
        lambda: GlobalContextAttentionBlock(8, 5),
        r"its key_project.0.conv.weight is \(5, 8, 1, 1\), where \(5, 5, 1, 1\) is expected",
    ),
    "affine": (
        lambda: GlobalContextAttentionBlock(8, affine=False),
        "it has no value_project.bn.weight, value_project.bn.bias$",
    ),
    "output projection": (
        lambda: with_submodule(GlobalContextAttentionBlock(8), "out_project", nn.Conv2d(8, 8, 1)),
        "further parameters or buffers: out_project.weight, out_project.bias",
    ),
    "parameter": (lambda: with_parameter(GlobalContextAttentionBlock(8)), "buffers: gamma"),
    "dropout": (
        lambda: with_submodule(GlobalContextAttentionBlock(8), "drop", nn.Dropout2d(0.1)),
        r"unknown submodule drop \(Dropout2d\)",
    ),
    "value without relu": (
        lambda: GlobalContextAttentionBlock(8, value=nn.Identity()),
        "its results differ from those of ConvertedCrossAttention by .*allowed 1e-06",
    ),
    "query by relu": (
        lambda: GlobalContextAttentionBlock(8, query=nn.ReLU()),
        "its results differ",
    ),
    "only in training": (lambda: NoisyInTraining(8), "its code reads training: it may"),
    "softmax": (
        lambda: network.GlobalContextAttentionBlock(8, kind="softmax"),
        "it computes mul with the number 0.35.*, where a tensor is expected",
    ),
    "eps": (lambda: with_eps(1e-6), "eps of the block itself is 1e-06, where 1e-12"),
    "hook inside": (lambda: hooked("query_project.1"), "hooks on query_project.1 would not run"),
    "hook on an activation": (
        lambda: hooked("query_project.1.activate"),
        "hooks on query_project.1.activate would not run",
    ),
    "hook on the state": (state_hooked, "hooks on the block itself would not run"),
    "forward of the instance": (with_forward, "forward was replaced on the instance"),
    "compiled": (compiled_in_place, "compiled; convert before compiling"),
    "compiled by itself": (
        lambda: torch.compile(GlobalContextAttentionBlock(8), backend="eager"),
        "compiled by itself; convert before compiling",
    ),
    "parametrised": (parametrised, "it has no value_project.conv.weight"),
    "mask": (lambda: Masked(8), r"forward takes \(.*mask.*\), where 2 arguments are expected"),
    "error": (lambda: Broken(8), "did not run on random features: RuntimeError: only for images"),
    "tuple": (lambda: Tuple(8), "it returned a tuple"),
    "instance norm": (
        lambda: with_norm(nn.InstanceNorm2d(8, affine=True, track_running_stats=True)),
        "value_project.bn is InstanceNorm2d, where BatchNorm2d is expected",
    ),
    "other names": (
        lambda: type("GlobalContextAttentionBlock", (nn.Identity,), {})(),
        "it has no query_project.0.conv.weight",
    ),
    "one layer": (
        lambda: replaced("query_project", nn.Sequential(Layer(8, 8, nn.Softplus()))),
        "it has no query_project.1.conv.weight, query_project.1.bn.weight, "
        "query_project.1.bn.bias$",
    ),
    "quantised": (lambda: replaced("value_project", nn.Identity()), "no value_project.conv.weight"),
}


def with_norm(norm: nn.Module) -> nn.Module:
    module = GlobalContextAttentionBlock(8)
    module.value_project.bn = norm
    return module


def replaced(name: str, child: nn.Module) -> nn.Module:
    module = GlobalContextAttentionBlock(8)
    setattr(module, name, child)
    return module


@pytest.mark.parametrize("name", REFUSALS)
def test_left_with_a_reason(name: str) -> None:
    make, reason = REFUSALS[name]
    model = pair(make())
    before = tree(model)
    report = convert_(model)
    [entry] = report
    assert entry.replacement is None and report.left == (entry,)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(entry.reason)
    assert tree(model) == before
    assert str(report) == f"0 swapped, 1 left\nleft     {entry.name} ({entry.class_name}): " + (
        entry.reason
    )


def test_attention_blocks_of_a_module_that_is_left() -> None:
    model = whole_network()
    ctam, head = model.distillation_scale_2, model.heads["depth"]
    ctam.scale = nn.Parameter(torch.ones(()))
    head.last_layer[2] = nn.GELU()
    ctam.cross_attention["depth"]["normals"].eps = 1e-8
    expected = inference(model, image())
    report = convert_(model)
    assert {e.name: e.reason for e in report.left} == {
        "distillation_scale_2": "it has further parameters or buffers: scale",
        "distillation_scale_2.cross_attention.depth.normals": (
            "the eps of the block itself is 1e-08, where 1e-12 is expected"
        ),
        "heads.depth": "its last_layer.2 is GELU, where ReLU is expected",
    }
    swapped = [e.name for e in report.converted]
    assert sum(name.startswith("distillation_scale_2.cross") for name in swapped) == 5
    assert sum(name.startswith("heads.depth.") for name in swapped) == 3
    assert distance(inference(model, image()), expected) <= 1e-5
    revert_(model)
    assert model.distillation_scale_2 is ctam and model.heads["depth"] is head


def test_rows_in_different_orders() -> None:
    block = network.MultiTaskDistillationModule(TASKS, TASKS, 4)
    row = block.cross_attention["depth"]
    row._modules = dict(reversed(row._modules.items()))
    [entry, *inner] = convert_(nn.ModuleList([block]))
    assert "its targets do not attend to the same tasks in one order" in entry.reason
    assert sorted(e.kind for e in inner) == ["cross_attention"] * 6 + ["residual_block"]
    assert all(e.replacement for e in inner)


class FirstComesFirst(network.MultiTaskDistillationModule):
    """Samples in reverse order: other results from the same parameters."""

    def forward(self, x: Any) -> Any:
        swapped = {f"features_{t}": x[f"features_{t}"] for t in self.tasks}
        return {t: y.flip(0) for t, y in super().forward(swapped).items()}


def test_other_composition_of_a_module() -> None:
    [entry, *_] = convert_(nn.ModuleList([FirstComesFirst(TASKS, TASKS, 4)]))
    assert entry.reason == "its code calls torch.Tensor.flip, which its replacement does not"


class InPixels(op_by_op.CrossScaleHead):
    """A head that brings its output to the size of the image."""

    def forward(self, features: Any) -> Tensor:
        return F.interpolate(super().forward(features), scale_factor=4)


def test_other_size_of_an_output() -> None:
    [entry, *inner] = convert_(nn.ModuleList([InPixels((4, 6), 2)]))
    assert entry.reason == "it computes aten::upsample_nearest2d, which its replacement does not"
    assert [e.replacement for e in inner] == ["ConvertedCrossAttention"]
