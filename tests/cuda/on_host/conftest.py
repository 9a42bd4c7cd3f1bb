"""Tests of the CUDA engine on the CPU, in processes that `test_on_host.py` starts.

The module that stands for ``xattn_kernels._cuda`` has the same kernels, compiled for the host, and
takes tensors of the CPU (tests/cuda/twin). What it cannot show: speed, and what nvcc makes of the
sources.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from twin import host

MODULE = host.load()


@pytest.fixture
def twin() -> Any:
    """The module itself: ``twin_configure``, ``twin_drop``, ``twin_places``, ``twin_launches``."""
    return MODULE


@pytest.fixture(autouse=True)
def engine(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ask for the engine by name, on three processors, in an order of the test's own."""
    from xattn_kernels import registry

    assert registry.unavailable("cuda") is None, registry.unavailable("cuda")
    seed = zlib.crc32(request.node.nodeid.encode()) + int(os.environ.get("XATTN_TWIN_SEED", "0"))
    MODULE.twin_configure(seed=seed, processors=3)
    with registry.backend("cuda"):
        yield
