"""Launches of kernels: one function for all, so that they can be recorded, and only compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple


class Launch(NamedTuple):
    """What a kernel was called with."""

    kernel: Any
    grid: int
    args: tuple[Any, ...]
    """Tensors and numbers, in the order of the kernel's arguments."""
    constants: dict[str, Any]
    warps: int
    stages: int


#: Fusion of products and sums, said because the default depends on Triton's version.
OPTIONS = {"enable_fp_fusion": True}

_recorded: list[Launch] | None = None


def launch(
    kernel: Any, grid: int, *args: Any, warps: int = 4, stages: int = 2, **constants: Any
) -> None:
    """Run ``grid`` programs of a kernel on the current stream; nothing if there are none."""
    if grid == 0:
        return
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, constants, warps, stages))
        return
    kernel[(grid,)](*args, **constants, num_warps=warps, num_stages=stages, **OPTIONS)


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Have launches listed and not run, in the whole process: for tools that only compile."""
    global _recorded
    _recorded, before = [], _recorded
    try:
        yield _recorded
    finally:
        _recorded = before
