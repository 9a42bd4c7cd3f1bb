"""Metadata is in pyproject.toml; this adds the packages and the native modules CMake builds."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import find_packages, setup

# Already importable under the PEP 517 hooks; not when this file is run by itself.
sys.path.insert(0, str(Path(__file__).resolve().parent / "build_backend"))

from xattn_build.native import BuildNative, NativeDistribution

kernels = find_packages(include=["xattn_kernels", "xattn_kernels.*"])
# models/ and benchmarks/ install under names of ours: users' own repositories often have packages
# of these.
models = ["xattn_models", *(f"xattn_models.{name}" for name in find_packages("models"))]
benchmarks = [
    "xattn_benchmarks",
    *(f"xattn_benchmarks.{name}" for name in find_packages("benchmarks")),
]

setup(
    distclass=NativeDistribution,
    cmdclass={"build_ext": BuildNative},
    packages=[*kernels, *models, *benchmarks],
    package_dir={"xattn_models": "models", "xattn_benchmarks": "benchmarks"},
)
