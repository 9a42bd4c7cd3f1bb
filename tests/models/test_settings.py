"""The network of a checkpoint: what the file tells, what it must not, and what contradicts it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from xattn_models import SCAMTL, save_checkpoint, sca_mtl
from xattn_models.predict import from_checkpoint
from xattn_models.settings import check_given, read_settings

BACKBONE = "test_efficientnet"
TASKS = ("semseg", "normals", "depth")
NUM_OUTPUTS = {"semseg": 5, "normals": 3, "depth": 1}
NOTED: dict[str, Any] = {"tasks": TASKS, "num_outputs": NUM_OUTPUTS, "backbone": BACKBONE}


@pytest.fixture(scope="module")
def model() -> SCAMTL:
    torch.manual_seed(0)
    return sca_mtl(TASKS, NUM_OUTPUTS, BACKBONE).eval()


def outline(tasks: Iterable[str] = TASKS, sources: Iterable[str] = TASKS) -> dict[str, Tensor]:
    """As much of a state as tells tasks and outputs."""
    outputs = {**dict.fromkeys([*tasks, *sources], 2), **NUM_OUTPUTS}
    state = {
        f"scale_0.decoders.{task}.weight": torch.ones(outputs[task], 1, 1, 1) for task in sources
    }
    heads = {
        f"heads.{task}.last_layer.3.weight": torch.ones(outputs[task], 1, 1, 1) for task in tasks
    }
    return {**state, **heads}


def noted(path: Path, **changes: object) -> Path:
    """Safetensors with metadata."""
    save_file(outline(), path, {"sca_mtl": json.dumps({**NOTED, **changes})})
    return path


# What files tell


def test_tasks_from_a_pickle(model: SCAMTL, tmp_path: Path) -> None:
    torch.save({"state_dict": model.state_dict()}, tmp_path / "net.pth")
    told = read_settings(tmp_path / "net.pth")
    assert told.arguments == {"num_outputs": NUM_OUTPUTS, "tasks": list(TASKS)}
    loaded = from_checkpoint(tmp_path / "net.pth", backbone=BACKBONE)
    assert loaded.tasks == TASKS
    state = model.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in loaded.state_dict().items())
    with pytest.raises(RuntimeError, match="does not tell its backbone: give backbone"):
        from_checkpoint(tmp_path / "net.pth")


def test_auxiliary_tasks_from_a_pickle(tmp_path: Path) -> None:
    own = sca_mtl(("semseg",), NUM_OUTPUTS, BACKBONE, auxiliary_tasks=TASKS)
    torch.save(own.state_dict(), tmp_path / "net.pth")
    loaded = from_checkpoint(tmp_path / "net.pth", backbone=BACKBONE)
    assert loaded.tasks == ("semseg",) and loaded.auxiliary_tasks == TASKS


@pytest.mark.parametrize("prefix", ["model.", "module.", "module._orig_mod.", "_orig_mod."])
def test_prefixes(tmp_path: Path, prefix: str) -> None:
    state = {prefix + name: x for name, x in outline().items()}
    torch.save({"model": state, "model_ema": state}, tmp_path / "net.pth")
    told = read_settings(tmp_path / "net.pth", "model_ema")
    assert list(told.state) == list(outline()) and told.arguments["tasks"] == list(TASKS)


def test_safetensors_do_not_tell_the_order(model: SCAMTL, tmp_path: Path) -> None:
    """Nor do pickles of what was read from them."""
    state = {name: x.contiguous() for name, x in sorted(model.state_dict().items())}
    save_file(state, tmp_path / "net.safetensors")
    torch.save(state, tmp_path / "net.pth")
    for name in ("net.safetensors", "net.pth"):
        with pytest.raises(ValueError, match=rf"{name}: has the tasks 'depth', 'normals', 'sem"):
            from_checkpoint(tmp_path / name, backbone=BACKBONE)
    given: dict[str, Any] = {"tasks": iter(TASKS), "backbone": BACKBONE}
    assert from_checkpoint(tmp_path / "net.safetensors", **given).tasks == TASKS
    for tasks in (("semseg", "sal"), (*TASKS, "sal"), TASKS[1:]):
        with pytest.raises(
            ValueError, match=r"tasks: got .*, but the checkpoint has \['depth', 'n"
        ):
            from_checkpoint(tmp_path / "net.safetensors", tasks=tasks, backbone=BACKBONE)


def test_order_of_auxiliary_tasks_is_asked_for(tmp_path: Path) -> None:
    save_file(outline(("semseg", "depth"), TASKS), tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="auxiliary tasks 'depth', 'normals', 'semseg'"):
        from_checkpoint(tmp_path / "net.safetensors", tasks=("semseg", "depth"))


def test_settings_in_safetensors(model: SCAMTL, tmp_path: Path) -> None:
    save_checkpoint(model, tmp_path / "net.safetensors")
    loaded = from_checkpoint(str(tmp_path / "net.safetensors"), recompute=False)
    assert loaded.tasks == TASKS and loaded.settings == {
        **(model.settings or {}),
        "recompute": False,
    }


def test_other_checkpoints(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "net.pth")
    with pytest.raises(ValueError, match=r"net\.pth: no checkpoint of SCA-MTL"):
        read_settings(tmp_path / "net.pth")
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", {"sca_mtl": json.dumps(NOTED)})
    with pytest.raises(ValueError, match=r"a\.safetensors: no checkpoint of SCA-MTL"):
        read_settings(tmp_path / "a.safetensors")


# What files must not


def test_metadata_that_would_run_code(tmp_path: Path) -> None:
    """A pickle beside the checkpoint, named in its metadata, is not even opened."""
    torch.save(Payload(tmp_path / "made"), tmp_path / "side.pth")
    for changes in (
        {"backbone_arguments": {"checkpoint_path": str(tmp_path / "side.pth")}},
        {"backbone_arguments": {"pretrained_cfg": {"file": str(tmp_path / "side.pth")}}},
        {"backbone_arguments": {"pretrained_cfg_overlay": {"file": str(tmp_path / "side.pth")}}},
        {"pretrained": True},
        {"backbone": f"local-dir:{tmp_path}"},
    ):
        with pytest.raises(ValueError, match=r"net\.safetensors: settings in the metadata: "):
            from_checkpoint(noted(tmp_path / "net.safetensors", **changes))
    assert not (tmp_path / "made").exists()


class Payload:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.mkdir, (self.path,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_outputs": {**NUM_OUTPUTS, "semseg": 65_000}}, "num_outputs: got .*65000"),
        ({"tasks": TASKS[:2]}, "tasks: got .*, but the parameters are those of"),
        ({"tasks": [*TASKS, "sal"]}, "tasks: got .*'sal'"),
        ({"tasks": ["semseg", "semseg", "depth"]}, "tasks: got"),
        ({"auxiliary_tasks": [*TASKS, "sal"]}, "auxiliary_tasks: got .*'sal'"),
    ],
)
def test_metadata_that_contradicts_the_parameters(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"net.safetensors: settings in the metadata: {message}"):
        read_settings(noted(tmp_path / "net.safetensors", **changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"backbone": "resnet50"}, RuntimeError, "does not fit the model: .*'backbone.conv1"),
        ({"backbone": "lynx"}, ValueError, "backbone: got 'lynx', expected a model of timm"),
        ({"backbone_arguments": {"window_size": 7}}, ValueError, "window_size.* does not take"),
        ({"backbone_arguments": {"act_layer": "x"}}, ValueError, "act_layer.* does not take"),
    ],
)
def test_networks_that_the_parameters_do_not_fit(
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Refused before memory is allocated: one of these networks has ten thousand million values."""
    made: list[str] = []
    empty = nn.Module.register_parameter

    def register(self: nn.Module, name: str, value: nn.Parameter | None) -> None:
        if value is not None:
            made.append(value.device.type)
        empty(self, name, value)

    monkeypatch.setattr(nn.Module, "register_parameter", register)
    path = noted(tmp_path / "net.safetensors", **changes)
    with pytest.raises(error, match=r"net\.safetensors: ") as caught:
        from_checkpoint(path)
    assert set(made) <= {"meta"}
    assert caught.match(message) and len(str(caught.value)) < 2000


def test_few_values_seen_as_many(tmp_path: Path) -> None:
    name = "scale_0.decoders.semseg.weight"
    state = {**outline(), name: torch.ones(1, 1, 1, 1).expand(60_000, 4, 1, 1)}
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(ValueError, match=r"net\.pth: claims 960,\d+ bytes of parameters, but has"):
        read_settings(tmp_path / "net.pth")


@pytest.mark.parametrize("task", ["/tmp/x", "a\\b", "x" * 100_000, "a\x1b[2J"])
def test_tasks_that_no_file_can_be_named_after(task: str, tmp_path: Path) -> None:
    torch.save(outline((task, "depth"), (task, "depth")), tmp_path / "net.pth")
    with pytest.raises(ValueError, match=r"net\.pth: tasks: got ") as error:
        read_settings(tmp_path / "net.pth")
    assert len(str(error.value)) < 1000 and "\x1b" not in str(error.value)


def test_thousands_of_tasks(tmp_path: Path) -> None:
    tasks = [f"task{i}" for i in range(2000)]
    torch.save(outline(tasks, tasks), tmp_path / "net.pth")
    with pytest.raises(ValueError, match=r"net\.pth: tasks: got .* and 1,996 more"):
        read_settings(tmp_path / "net.pth")


# What contradicts files


CONTRADICTIONS: dict[str, Any] = {
    "tasks": ["depth", "normals", "semseg"],
    "num_outputs": {**NUM_OUTPUTS, "semseg": 6},
    "auxiliary_tasks": ["depth", "normals", "semseg"],
    "kind": "softmax",
    "heads": 2,
    "task_softmax": True,
    "backbone": "resnet18",
    "backbone_arguments": {"drop_path_rate": 0.2},
}
SAME: dict[str, Any] = {
    "tasks": TASKS,
    "num_outputs": {task: np.int64(count) for task, count in NUM_OUTPUTS.items()},
    "auxiliary_tasks": TASKS,
    "kind": "linear",
    "heads": 1,
    "task_softmax": False,
    "backbone": BACKBONE,
    "backbone_arguments": {},
    "recompute": True,
    "pretrained": True,
}


@pytest.fixture(scope="module")
def complete(model: SCAMTL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("complete") / "net.safetensors"
    save_file(outline(), path, {"sca_mtl": json.dumps(model.settings)})
    return path


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_name_both_values(complete: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"net\.safetensors: {name}: got ") as error:
        from_checkpoint(complete, **{name: CONTRADICTIONS[name]})
    told = (read_settings(complete).arguments | {"auxiliary_tasks": list(TASKS)})[name]
    assert f"got {CONTRADICTIONS[name]!r}, but the checkpoint has {told!r};" in str(error.value)


def test_what_the_file_says_may_be_said_again(complete: Path) -> None:
    check_given(complete, read_settings(complete), SAME)


def test_what_the_file_does_not_say_is_taken(tmp_path: Path) -> None:
    torch.save(outline(), tmp_path / "net.pth")
    told = read_settings(tmp_path / "net.pth")
    unsaid = ("kind", "heads", "task_softmax", "backbone", "backbone_arguments")
    check_given("net.pth", told, {name: CONTRADICTIONS[name] for name in unsaid})
    for name in ("tasks", "num_outputs", "auxiliary_tasks"):
        with pytest.raises(ValueError, match=f"{name}: got "):
            check_given("net.pth", told, {name: CONTRADICTIONS[name]})


# Backbone arguments that are no data


def test_backbone_arguments_that_are_classes(tmp_path: Path) -> None:
    """Saved with a warning; asked for, and then right."""
    arguments = {"act_layer": nn.SiLU, "drop_path_rate": 0.25}
    own = sca_mtl(TASKS[:2], {"semseg": 5, "normals": 3}, BACKBONE, backbone_arguments=arguments)
    path = tmp_path / "net.safetensors"
    with pytest.warns(
        UserWarning, match=r"does not note backbone_arguments 'act_layer': give them"
    ):
        save_checkpoint(own, path)
    with pytest.raises(ValueError, match="does not hold, 'act_layer': give backbone_arguments"):
        from_checkpoint(path)
    again = from_checkpoint(path, backbone_arguments=arguments)
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected, actual = (network.eval()(image)["semseg"] for network in (own, again))
    assert torch.equal(actual, expected)


def test_plain_backbone_arguments_are_noted(tmp_path: Path) -> None:
    arguments = {"act_layer": "silu", "drop_path_rate": 0.25}
    own = sca_mtl(TASKS[:2], {"semseg": 5, "normals": 3}, BACKBONE, backbone_arguments=arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_checkpoint(own, tmp_path / "net.safetensors")
    again = from_checkpoint(tmp_path / "net.safetensors")
    assert again.settings == own.settings
    assert any(isinstance(module, nn.SiLU) for module in again.backbone.modules())
