"""What `import xattn_kernels` offers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import xattn_kernels


@pytest.mark.parametrize("name", xattn_kernels.__all__)
def test_names(name: str) -> None:
    assert getattr(xattn_kernels, name) is not None
    assert name in dir(xattn_kernels)


def test_what_is_loaded_late_is_declared_for_editors_and_type_checkers() -> None:
    tree = ast.parse(Path(xattn_kernels.__file__).read_text())
    [declared] = [
        {alias.name: node.module for node in block.body for alias in node.names}
        for block in tree.body
        if isinstance(block, ast.If)
    ]
    places = xattn_kernels._MODULE_OF
    assert declared == {name: f"xattn_kernels.{place}" for name, place in places.items()}
    assert declared.keys() < set(xattn_kernels.__all__)


def test_modules_are_loaded_when_they_are_asked_for() -> None:
    program = (
        "import sys, xattn_kernels\n"
        "assert 'xattn_kernels.convert' not in sys.modules\n"
        "from xattn_kernels import convert_\n"
        "assert 'xattn_kernels.convert' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="'xattn_kernels' has no attribute 'nothing'"):
        _ = xattn_kernels.nothing
