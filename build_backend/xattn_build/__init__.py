"""In-tree build backend: setuptools, plus the CUDA compiler from PyPI where that makes sense."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from xattn_build.cuda import extra_build_requirements

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

build_editable = build_meta.build_editable


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [
        *build_meta.get_requires_for_build_wheel(config_settings),
        *extra_build_requirements(os.environ),
    ]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [
        *build_meta.get_requires_for_build_editable(config_settings),
        *extra_build_requirements(os.environ),
    ]


def build_wheel(
    wheel_directory: str,
    config_settings: Any = None,
    metadata_directory: str | None = None,
) -> str:
    """Build a wheel; setuptools would pack what an earlier build left in build/lib as well."""
    for stale in Path("build").glob("lib*"):
        shutil.rmtree(stale)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
