"""What is said about torchvision's operators is so."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from xattn_kernels.compat import torchvision_ops_error

FindSpec = Callable[[str], importlib.machinery.ModuleSpec | None]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torchvision_ops_error.cache_clear()
    yield
    torchvision_ops_error.cache_clear()


def _installed_at(folder: Path) -> FindSpec:
    spec = importlib.machinery.ModuleSpec("torchvision", None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    return lambda name: spec


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert torchvision_ops_error() == "torchvision is not installed"


def test_installed_without_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", _installed_at(tmp_path))
    assert torchvision_ops_error() == "torchvision was installed without its C++ operators"


def test_library_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_C.so").write_bytes(b"not a library")
    monkeypatch.setattr(importlib.util, "find_spec", _installed_at(tmp_path))
    error = torchvision_ops_error()
    assert error is not None and error.startswith("_C.so of torchvision does not load: ")
    assert "invalid ELF header" in error or "too short" in error
