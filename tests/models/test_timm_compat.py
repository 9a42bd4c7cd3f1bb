"""timm can be imported whether or not torchvision's operators are there."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import ModuleType

import pytest

from xattn_models.timm_compat import import_timm


def test_networks_of_timm_run_in_a_new_process() -> None:
    program = """
import torch
from xattn_models.timm_compat import import_timm
timm = import_timm()
assert import_timm() is timm
model = timm.create_model("resnet10t", num_classes=3).eval()
assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=240)


@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(wanted: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match=rf"{name} is not installed: pip install") as info:
        import_timm()
    assert info.value.name == name


def test_other_missing_packages_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(wanted: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'yaml'", name="yaml")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match="'yaml'"):
        import_timm()
