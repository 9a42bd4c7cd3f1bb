"""Checkpoints of every kind that comes, and what must be refused."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import pytest
import torch
from network_support import pair
from torch import Tensor, nn

from xattn_models import load_checkpoint, read_checkpoint, save_checkpoint


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


def same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    found = model.state_dict()
    return list(found) == list(state) and all(torch.equal(found[k], state[k]) for k in state)


def other(model: nn.Module) -> dict[str, Tensor]:
    """Another state of the same model."""
    return {
        name: torch.rand(x.shape) if x.is_floating_point() else x + 3
        for name, x in model.state_dict().items()
    }


def test_network_round_trip(tmp_path: Path) -> None:
    """Between our network and the op-by-op one, in both directions."""
    ours, theirs = pair(("semseg", "depth"))
    theirs.load_state_dict(other(theirs))
    save_checkpoint(theirs, tmp_path / "a.safetensors")
    assert load_checkpoint(ours, tmp_path / "a.safetensors") == ([], [])
    assert same(ours, theirs.state_dict())
    ours.load_state_dict(other(ours))
    save_checkpoint(ours, tmp_path / "a.safetensors")
    load_checkpoint(theirs, tmp_path / "a.safetensors")
    assert same(theirs, ours.state_dict())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_pickles(
    model: nn.Module, tmp_path: Path, wrapper: str | None, prefix: str, zipped: bool
) -> None:
    """`torch.save`, in its present and its former format, with what training programs add."""
    state = other(model)
    content = {prefix + name: x for name, x in state.items()}
    if wrapper:
        content = {"epoch": 3, "optimizer": {"state": {}}, wrapper: content}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    load_checkpoint(model, str(tmp_path / "a.pth"))
    assert same(model, state)


def test_prefix_of_only_some_names_stays(tmp_path: Path) -> None:
    model = nn.ModuleDict({"module": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    save_checkpoint(model, tmp_path / "a.safetensors")
    assert set(read_checkpoint(tmp_path / "a.safetensors")) == set(model.state_dict())


class Payload:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.mkdir, (str(self.path), 0o700)


@pytest.mark.parametrize("form", ["torch", "legacy", "pickle"])
def test_code_in_pickles_is_not_run(model: nn.Module, tmp_path: Path, form: str) -> None:
    content = {"state_dict": model.state_dict(), "extra": Payload(tmp_path / "made")}
    path = tmp_path / "a.pth"
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(ValueError, match=r"a\.pth: "):
        load_checkpoint(model, path)
    assert not (tmp_path / "made").exists()


def test_names_and_shapes_that_do_not_fit(model: nn.Module, tmp_path: Path) -> None:
    state = other(model)
    del state["1.running_mean"]
    state["0.extra"] = torch.zeros(1)
    state["0.bias"] = torch.zeros(5)
    path = tmp_path / "a.pth"
    torch.save(state, path)
    with pytest.raises(RuntimeError) as caught:
        load_checkpoint(model, path)
    for part in ("a.pth", "1.running_mean", "0.extra", "0.bias", "[5]"):
        assert part in str(caught.value)
    state["0.bias"] = torch.ones(4)
    torch.save(state, path)
    assert load_checkpoint(model, path, strict=False) == (["1.running_mean"], ["0.extra"])
    assert torch.equal(model[0].bias, torch.ones(4))


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("keep", [0, 1, 7, 9, 40, 0.5, 0.99])
def test_truncated_files(model: nn.Module, tmp_path: Path, kind: str, keep: float) -> None:
    """Named in the error; the model is as before."""
    path = tmp_path / "broken.ckpt"
    if kind == "safetensors":
        save_checkpoint(model, path)
    else:
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"broken\.ckpt"):
        load_checkpoint(model, path)
    assert same(model, before)


@pytest.mark.parametrize(
    "content", [b"no checkpoint at all", bytes(range(256)) * 4, b"\x80" * 64, b"PK" * 40]
)
def test_files_of_another_kind(model: nn.Module, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"image\.png"):
        load_checkpoint(model, path)


@pytest.mark.parametrize(
    "content", [torch.zeros(3), [1, 2], {}, {"epoch": 3}, {1: torch.zeros(1)}, {"model": {"a": 1}}]
)
def test_pickles_of_something_else(model: nn.Module, tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth: .*expected names and tensors"):
        load_checkpoint(model, tmp_path / "a.pth")


def test_missing_file(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pth: no such file"):
        load_checkpoint(model, tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_checkpoint(model, tmp_path)


def test_interrupted_write_leaves_the_old_file(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(model, path)
    before = path.read_bytes()
    model.load_state_dict(other(model))

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(model, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_values_take_the_models_dtype_and_layout(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    model.to(memory_format=torch.channels_last)
    save_checkpoint(model, path)
    double = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).double()
    load_checkpoint(double, path)
    assert torch.equal(double[0].weight, model[0].weight.double())


def test_shared_tensors_are_saved_once_each(tmp_path: Path) -> None:
    linear = nn.Linear(2, 2)
    model = nn.ModuleList([linear, linear])
    save_checkpoint(model, tmp_path / "a.safetensors")
    assert set(read_checkpoint(tmp_path / "a.safetensors")) == set(model.state_dict())


def test_a_file_object_is_no_path(model: nn.Module) -> None:
    with pytest.raises(TypeError):
        load_checkpoint(model, io.BytesIO())
