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
_recorded_for = 90


def launch(
    kernel: Any, grid: int, *args: Any, warps: int = 4, stages: int = 2, **constants: Any
) -> Any:
    """Run ``grid`` programs of a kernel on the current stream; nothing if there are none.

    Returns:
        The compiled kernel; None where none ran, or the kernel is interpreted.
    """
    if grid == 0:
        return None
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, constants, warps, stages))
        return None
    return kernel[(grid,)](*args, **constants, num_warps=warps, num_stages=stages, **OPTIONS)


@contextlib.contextmanager
def recorded(capability: int = 90) -> Iterator[list[Launch]]:
    """Have launches listed and not run, in the whole process: for tools that only compile.

    Args:
        capability: the compute capability of the GPU they are for.
    """
    global _recorded, _recorded_for
    before = _recorded, _recorded_for
    _recorded, _recorded_for = [], capability
    try:
        yield _recorded
    finally:
        _recorded, _recorded_for = before


def recording() -> int | None:
    """The compute capability for which launches are listed; None if they run."""
    return None if _recorded is None else _recorded_for
