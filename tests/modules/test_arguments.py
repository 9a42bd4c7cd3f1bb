"""What the modules refuse, and that the errors say what was expected."""

from __future__ import annotations

import pytest
import torch

from xattn_kernels.modules import (
    CrossAttention,
    CrossScaleAttention,
    CrossScaleHead,
    CrossTaskAttention,
)


@pytest.mark.parametrize("channels", [0, -3, 1.5, True, None])
def test_channels(channels: object) -> None:
    for make in (
        lambda: CrossAttention(channels),
        lambda: CrossTaskAttention(["a", "b"], channels),
        lambda: CrossScaleAttention([8, channels]),
        lambda: CrossScaleHead([8, 16], channels),
    ):
        with pytest.raises(ValueError, match=f"got {channels!r}, expected a positive integer"):
            make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "cosine"}, "kind: got 'cosine'"),
        ({"kind": "linear", "heads": 2}, "expected 1 for kind 'linear'"),
        ({"kind": "softmax", "heads": 0}, "heads: got 0"),
        ({"kind": "softmax", "heads": 5}, "a divisor of the 8 channels"),
    ],
)
def test_kind_and_heads(options: dict, message: str) -> None:
    for make in (
        lambda: CrossAttention(8, **options),
        lambda: CrossTaskAttention(["a", "b"], 8, **options),
        lambda: CrossScaleAttention([8, 16], **options),
        lambda: CrossScaleHead([8, 16], 3, **options),
    ):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize(
    ("tasks", "auxiliary", "message"),
    [
        (["a"], None, "at least two sources"),
        ([], None, "expected a target"),
        ([], ["a", "b"], "expected a target"),
        (["a"], ["a"], "at least two sources"),
        (["a", "a"], None, r"tasks\[1\]: got 'a' a second time"),
        (["a", "b"], ["a", "b", "a"], r"auxiliary_tasks\[2\]: got 'a' a second time"),
        (["a", "b"], ["a", "c"], r"\['b'\] are not"),
        (["a.b", "c"], None, "no dots"),
        (["keys", "c"], None, "no attribute of torch.nn.ModuleDict"),
        ("ab", None, "expected a sequence of names"),
        ([0, 1], None, r"tasks\[0\]: got 0"),
    ],
)
def test_tasks(tasks: list, auxiliary: list | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrossTaskAttention(tasks, 8, auxiliary)


def test_one_target_with_auxiliary_sources() -> None:
    block = CrossTaskAttention(["a"], 8, ["b", "a", "c"])
    assert block.tasks == ("a",)
    assert list(block.cross_attention["a"]) == ["b", "c"]


@pytest.mark.parametrize("channels", [[], [8], 8])
def test_scales(channels: object) -> None:
    with pytest.raises(ValueError, match="at least two widths"):
        CrossScaleAttention(channels)
    with pytest.raises(ValueError, match="at least two widths"):
        CrossScaleHead(channels, 3)


def test_features_of_tasks() -> None:
    block = CrossTaskAttention(["a", "b"], 8)
    x = torch.zeros(1, 8, 4, 4)
    for features in ({"a": x}, {"a": x, "c": x}, {"a": x, "b": x, "c": x}, {}):
        with pytest.raises(ValueError, match=r"features: got tasks .* expected \['a', 'b'\]"):
            block(features)
    with pytest.raises(ValueError, match=r"features\['b'\]: .* with B = 1 and C = 8"):
        block({"a": x, "b": x.expand(2, -1, -1, -1)})


def test_number_of_scales() -> None:
    x = torch.zeros(1, 8, 4, 4)
    for block in (CrossScaleAttention([8, 8]), CrossScaleHead([8, 8], 2)):
        for features in ([x], [x, x, x]):
            with pytest.raises(ValueError, match="expected a sequence of 2, finest first"):
                block(features)
        for features in (x, {"a": x, "b": x}, None):
            with pytest.raises(TypeError, match=r"features: got .*, expected a sequence") as error:
                block(features)
            assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (torch.zeros(8, 4, 4), ValueError, r"expected \(B, C, H, W\)"),
        (torch.zeros(1, 9, 4, 4), ValueError, "C = 8"),
        (torch.zeros(1, 8, 4, 4, dtype=torch.float64), TypeError, "expected torch.float32"),
        (torch.zeros(1, 8, 4, 4, dtype=torch.bfloat16), TypeError, "expected torch.float32"),
        (torch.zeros(1, 8, 4, 4, dtype=torch.int64), TypeError, "int64"),
        (torch.zeros(1, 8, 4, 4, dtype=torch.complex64), TypeError, "complex64"),
        (torch.zeros(1, 8, 4, 4).to_sparse(), TypeError, "sparse"),
        (torch.zeros(1, 8, 4, 4, device="meta"), ValueError, "meta"),
        (None, TypeError, "NoneType"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_feature(wrong: object, error: type[Exception], message: str, training: bool) -> None:
    x = torch.zeros(1, 8, 4, 4)
    with torch.no_grad():
        with pytest.raises(error, match=f"(?s)source: got .*{message}"):
            CrossAttention(8).train(training)(x, wrong)
        with pytest.raises(error, match=rf"(?s)features\['b'\]: got .*{message}"):
            CrossTaskAttention(["a", "b"], 8).train(training)({"a": x, "b": wrong})
        with pytest.raises(error, match=rf"(?s)features\[1\]: got .*{message}"):
            CrossScaleHead([8, 8], 2).train(training)([x, wrong])


def test_repr() -> None:
    assert "8, kind='softmax', heads=2" in repr(CrossAttention(8, kind="softmax", heads=2))
    assert "[8, 16], kind='linear'" in repr(CrossScaleAttention([8, 16]))
