"""Arguments as people write them, and what `sca_mtl` makes of them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from xattn_models import sca_mtl
from xattn_models.arguments import plain_integer, plain_names, plain_outputs

BACKBONE = "test_efficientnet"


@pytest.mark.parametrize(
    "names",
    [
        ("a", "b"),
        ["a", "b"],
        {"a": 1, "b": 2},
        {"a": 1, "b": 2}.keys(),
        iter("ab"),
        np.array(["a", "b"]),
    ],
)
def test_names(names: Any) -> None:
    assert plain_names("tasks", names) == ["a", "b"]


@pytest.mark.parametrize("names", ["ab", b"ab", {"a", "b"}, frozenset("ab"), 3, None])
def test_names_without_order_are_refused(names: object) -> None:
    with pytest.raises(ValueError, match=r"tasks: got .*, expected a sequence of names"):
        plain_names("tasks", names)


def test_outputs() -> None:
    found = plain_outputs("num_outputs", {"a": np.int64(3), "b": 4, "c": torch.tensor(5)})
    assert found == {"a": 3, "b": 4, "c": 5} and {type(x) for x in found.values()} == {int}
    for wrong in ([3, 4], 3, "ab"):
        with pytest.raises(TypeError, match=r"num_outputs: got .*, expected a dict"):
            plain_outputs("num_outputs", wrong)


@pytest.mark.parametrize("value", [True, 1.5, "3", None])
def test_what_is_no_integer_stays(value: object) -> None:
    assert plain_integer(value) is value


def test_network_of_any_iterables() -> None:
    """Noted as plain data, which a checkpoint can hold."""
    outputs = {"semseg": np.int64(5), "depth": np.uint8(1)}
    with torch.device("meta"):
        model = sca_mtl(
            outputs.keys(),
            outputs,
            BACKBONE,
            auxiliary_tasks=iter(["depth", "semseg"]),
            kind="softmax",
            heads=np.int64(2),
        )
    assert model.tasks == ("semseg", "depth") and model.auxiliary_tasks == ("depth", "semseg")
    assert json.loads(json.dumps(model.settings)) == model.settings
    assert model.settings is not None and model.settings["num_outputs"] == {"semseg": 5, "depth": 1}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tasks": {"semseg", "depth"}}, ValueError, "tasks: got {.*expected a sequence"),
        ({"tasks": 5}, ValueError, "tasks: got 5, expected a sequence"),
        ({"num_outputs": [1, 2]}, TypeError, r"num_outputs: got \[1, 2\], expected a dict"),
        (
            {"tasks": ["semseg", "depth"], "num_outputs": {"semseg": True, "depth": 1}},
            ValueError,
            r"num_outputs\['semseg'\]: got True",
        ),
        ({"backbone": None}, TypeError, "backbone: got None, expected the name"),
        ({"backbone": "x" * 9000}, ValueError, "backbone: got 'xxx.*9,002 characters"),
        ({"backbone_arguments": [1]}, TypeError, r"backbone_arguments: got \[1\], expected a dict"),
        (
            {"backbone_arguments": {"pretrained": True}},
            ValueError,
            r"backbone_arguments: got \['pretrained'\]",
        ),
        (
            {"backbone_arguments": {"nonsense": 1}},
            ValueError,
            "backbone_arguments: got {'nonsense': 1}, which test_efficientnet does not take",
        ),
    ],
)
def test_other_arguments_are_named(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        sca_mtl(**{"backbone": BACKBONE, **arguments})
    assert len(str(caught.value)) < 2000
