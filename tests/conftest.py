"""Shared by all tests: the pinned number of tests, and memory that hides no omission."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import expected_tests
from expected_tests import pytest_addoption

__all__ = ["pytest_addoption"]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill every uninitialised tensor with NaN, so that an element nobody wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)


def pytest_configure(config: pytest.Config) -> None:
    expected_tests.pytest_configure(config)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
