"""What metadata may say: data from a list."""

from __future__ import annotations

import json
from typing import Any

import pytest
from torch import nn

from xattn_models import metadata

SETTINGS: dict[str, Any] = {
    "tasks": ["semseg", "depth"],
    "num_outputs": {"semseg": 5, "depth": 1},
    "backbone": "resnet18",
    "auxiliary_tasks": None,
    "kind": "linear",
    "heads": 1,
    "recompute": "auto",
    "task_softmax": False,
    "backbone_arguments": None,
}
ARGUMENTS = {
    "norm_layer": "groupnorm",
    "drop_path_rate": 0.1,
    "img_size": [384, 512],
    "strict_img_size": False,
    "act_layer": None,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"backbone_arguments": ARGUMENTS},
        {"auxiliary_tasks": ["depth", "semseg"], "kind": "softmax", "heads": 2, "recompute": False},
        {"backbone": "swin_tiny_patch4_window7_224.ms_in22k", "tasks": ["semantic seg", "größe-2"]},
    ],
)
def test_round_trip(changes: dict[str, Any]) -> None:
    settings = {**SETTINGS, **changes}
    text, left = metadata.note(settings)
    assert metadata.parse(text) == settings and left == ""


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tasks", "semseg"),
        ("tasks", []),
        ("tasks", [f"task{i}" for i in range(2000)]),
        ("tasks", ["x" * 10_000]),
        ("tasks", ["../x", "depth"]),
        ("tasks", ["/etc/x", "depth"]),
        ("tasks", ["a\n", "depth"]),
        ("tasks", ["\ud800", "depth"]),
        ("tasks", [1, 2]),
        ("num_outputs", [5, 1]),
        ("num_outputs", {"semseg": 10**9, "depth": 1}),
        ("num_outputs", {"semseg": 0, "depth": 1}),
        ("num_outputs", {"semseg": 5.0, "depth": 1}),
        ("num_outputs", {"semseg": True, "depth": 1}),
        ("num_outputs", {"semseg": int("9" * 4000), "depth": 1}),
        ("auxiliary_tasks", {"semseg": 1}),
        ("kind", "cosine"),
        ("kind", ["linear"]),
        ("heads", 10**9),
        ("heads", "1"),
        ("recompute", "yes"),
        ("task_softmax", 1),
        ("backbone", "hf-hub:timm/resnet18"),
        ("backbone", "hf_hub:timm/resnet18"),
        ("backbone", "local-dir:/tmp/model"),
        ("backbone", "/tmp/model"),
        ("backbone", "resnet18.a/b"),
        ("backbone", "resnet18.a.b"),
        ("backbone", "https://host/model"),
        ("backbone", 3),
        ("backbone", ""),
        ("backbone_arguments", "checkpoint_path=side.pth"),
        ("left_out", "norm_layer"),
        ("left_out", [1]),
    ],
)
def test_other_values_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}: got .*, expected") as error:
        metadata.parse(json.dumps({**SETTINGS, field: value}))
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "field", ["pretrained", "checkpoint_path", "pretrained_cfg", "num_classes", "__class__"]
)
def test_other_fields_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"fields '{field}', which no checkpoint has"):
        metadata.parse(json.dumps({**SETTINGS, field: True}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("checkpoint_path", "side.pth"),
        ("pretrained", True),
        ("pretrained_cfg", {"url": "https://host/model.pth"}),
        ("pretrained_cfg_overlay", {"file": "side.pth"}),
        ("cache_dir", "/tmp"),
        ("features_only", True),
        ("in_chans", 4),
        ("norm_layer", "/tmp/x"),
        ("norm_layer", "torch.nn:Linear"),
        ("norm_layer", {"a": 1}),
        ("act_layer", 3),
        ("embed_dim", 10**9),
        ("depths", [2, 2, 10**6, 2]),
        ("depths", [2] * 1000),
        ("depths", [[2, 2], [2, 2]]),
        ("window_size", True),
        ("drop_rate", float("nan")),
        ("drop_rate", float("inf")),
        ("drop_rate", "0.1"),
        ("strict_img_size", 1),
        ("x" * 10_000, 1),
    ],
)
def test_other_backbone_arguments_are_refused(name: str, value: object) -> None:
    noted = {**SETTINGS, "backbone_arguments": {"drop_path_rate": 0.1, name: value}}
    with pytest.raises(ValueError, match=r"backbone_arguments\['" + name[:30]) as error:
        metadata.parse(json.dumps(noted))
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged JSON"),
        ("[" * 60_000, "damaged JSON"),
        ("1" * 5000, "damaged JSON"),
        ("[]", "expected an object with tasks"),
        ("null", "expected an object with tasks"),
        ('{"tasks": ["a"]}', "expected an object with tasks"),
        (json.dumps({**SETTINGS, "kind": " " * 100_000}), "at most 65,536"),
    ],
)
def test_damaged_text(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metadata.parse(text)


@pytest.mark.parametrize(
    "arguments",
    [
        {"norm_layer": nn.BatchNorm2d},
        {"norm_layer": nn.BatchNorm2d, "drop_path_rate": 0.1},
        {"block_args": object(), "drop_path_rate": float("nan")},
        {"checkpoint_path": "side.pth"},
    ],
)
def test_arguments_that_cannot_be_noted_are_named(arguments: dict[str, Any]) -> None:
    text, left = metadata.note({**SETTINGS, "backbone_arguments": arguments})
    noted = metadata.parse(text)
    kept = {"drop_path_rate": 0.1} if arguments.get("drop_path_rate") == 0.1 else None
    assert noted.pop("backbone_arguments") == kept
    assert noted.pop(metadata.LEFT_OUT) == [name for name in arguments if name not in (kept or ())]
    assert noted.items() <= SETTINGS.items()
    assert left.startswith(f"backbone_arguments '{next(iter(arguments))}'")


@pytest.mark.parametrize(
    "changes",
    [
        {"tasks": ["a/b", "depth"]},
        {"heads": object()},
        {"backbone_arguments": {3: "x"}},
        {"num_outputs": {"semseg": 10**6, "depth": 1}},
    ],
)
def test_settings_that_cannot_be_noted_at_all(changes: dict[str, Any]) -> None:
    """Said when they are saved, and again when they are read: no default is taken for them."""
    text, left = metadata.note({**SETTINGS, **changes})
    assert left.startswith("the network's settings")
    with pytest.raises(ValueError, match="make the network by sca_mtl, then load_checkpoint"):
        metadata.parse(text)
