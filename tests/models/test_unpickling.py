"""What training programs keep beside the parameters, and what is not read."""

from __future__ import annotations

import argparse
import sys
import types
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch

from xattn_models.unpickling import Placeholder, read_pickle

BEST = {
    "mIoU": np.float64(41.5),
    "epoch": np.int64(7),
    "per class": np.arange(3, dtype=np.float32),
    "done": np.bool_(True),
    "name": np.str_("best"),
    "table": np.zeros(2, dtype=[("x", "f4"), ("what", "O")]),
}
WEIGHTS = {"weight": torch.arange(3.0)}


def written(path: Path, content: object, *, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_values_beside_the_parameters(tmp_path: Path, zipped: bool) -> None:
    """Those of numpy and of the standard library stand in nobody's way, and nothing is made."""
    content = {
        "model": WEIGHTS,
        "best_result": {"semseg": BEST},
        "random": np.random.get_state(),
        "args": argparse.Namespace(lr=0.1, out=Path("out")),
        "folder": PurePosixPath("out"),
        "log": defaultdict(list, {"loss": [1.0]}),
        "epoch": 3,
    }
    found = read_pickle(written(tmp_path / "a.pth", content, zipped=zipped))
    assert list(found) == list(content) and found["epoch"] == 3
    assert torch.equal(found["model"]["weight"], WEIGHTS["weight"])
    assert {type(x) for x in found["best_result"]["semseg"].values()} == {Placeholder}
    assert isinstance(found["args"], Placeholder) and found["log"] == {"loss": [1.0]}


def test_scalars_written_with_numpy_1(tmp_path: Path) -> None:
    path = written(tmp_path / "a.pth", {"model": WEIGHTS, "best": np.float64(1)}, zipped=False)
    data = path.read_bytes()
    assert b"numpy._core.multiarray" in data or b"numpy.core.multiarray" in data
    for name in (b"numpy._core", b"numpy.core"):
        changed = data.replace(b"numpy._core", b"numpy.core").replace(b"numpy.core", name)
        path.write_bytes(changed)
        assert isinstance(read_pickle(path)["best"], Placeholder)


def pretend(monkeypatch: pytest.MonkeyPatch, path: str, *bases: type) -> Any:
    """A class of a package that is not installed, importable while it is pickled."""
    parts = path.split(".")
    made = type(parts[-1], bases, {"__module__": ".".join(parts[:-1])})
    for i in range(1, len(parts)):
        name = ".".join(parts[:i])
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules[".".join(parts[:-1])], parts[-1], made, raising=False)
    return made


def test_settings_of_packages_that_are_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a checkpoint of Lightning: OmegaConf's and EasyDict's, as pickles have them."""
    settings = pretend(monkeypatch, "omegaconf.dictconfig.DictConfig")()
    node = pretend(monkeypatch, "omegaconf.nodes.AnyNode")()
    settings.__dict__.update(_content={"lr": node}, _parent=None, _metadata={"ref_type": Any})
    easy = pretend(monkeypatch, "easydict.EasyDict", dict)
    nested = easy(lr=easy(value=0.1))
    nested.__dict__["lr"] = nested["lr"]
    content = {"state_dict": WEIGHTS, "hyper_parameters": settings, "more": nested}
    path = written(tmp_path / "last.ckpt", content)
    monkeypatch.undo()
    found = read_pickle(path)
    assert isinstance(found["hyper_parameters"], Placeholder)
    assert found["more"] == {"lr": {"value": 0.1}}
    assert torch.equal(found["state_dict"]["weight"], WEIGHTS["weight"])


class Unknown:
    """A class that is on no list."""


def test_other_classes_are_named(tmp_path: Path) -> None:
    path = written(tmp_path / "a.pth", {"model": WEIGHTS, "x": Unknown()})
    with pytest.raises(ValueError, match=rf"a\.pth: not read.* needs {__name__}\.Unknown") as error:
        read_pickle(path)
    assert "weights_only=False" not in str(error.value)


def test_names_of_classes_do_not_fill_the_screen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = pretend(monkeypatch, f"package.{'Class' * 2_000}")
    with pytest.raises(ValueError, match="needs package") as error:
        read_pickle(written(tmp_path / "a.pth", {"x": made()}))
    assert len(str(error.value)) < 1000


def test_what_the_user_has_allowed_stays_allowed(tmp_path: Path) -> None:
    path = written(tmp_path / "a.pth", {"best": np.float64(1), "x": Unknown()})
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([Unknown, np.dtype])
    try:
        found = read_pickle(path)
        assert type(found["x"]) is Unknown and type(found["best"]) is Placeholder
        assert set(torch.serialization.get_safe_globals()) == {*before, Unknown, np.dtype}
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def test_nothing_is_allowed_afterwards(tmp_path: Path) -> None:
    path = written(tmp_path / "a.pth", {"x": argparse.Namespace()})
    before = set(torch.serialization.get_safe_globals())
    read_pickle(path)
    path.write_bytes(b"PK" * 40)
    with pytest.raises(ValueError, match=r"a\.pth: truncated, corrupt or no") as error:
        read_pickle(path)
    assert "weights_only" not in str(error.value)
    assert set(torch.serialization.get_safe_globals()) == before


class Bomb:
    """A number of bytes that no machine has."""

    def __reduce__(self) -> tuple[type[bytearray], tuple[int]]:
        return bytearray, (1 << 60,)


def test_absurd_sizes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.pth: truncated or corrupt checkpoint: MemoryError"):
        read_pickle(written(tmp_path / "a.pth", {"x": Bomb()}))


def test_content_that_holds_itself(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    assert read_pickle(written(tmp_path / "a.pth", content)).keys() == {"model"}
