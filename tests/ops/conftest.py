"""Tests of the operators run on every engine and, where they can, on both attention cores."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from xattn_kernels import registry

from .harness import CORES, Core


@pytest.fixture(params=["reference", "cpu"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """An engine, asked for by name: where it is missing the test fails."""
    with registry.backend(request.param):
        yield request.param


@pytest.fixture(params=list(CORES))
def core(request: pytest.FixtureRequest) -> Core:
    return CORES[request.param]
