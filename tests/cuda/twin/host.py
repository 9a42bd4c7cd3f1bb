"""The CUDA engine's kernels in this process, on the CPU; and which of their barriers are needed.

For processes that were started for it: see run.py.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

#: What twin_drop takes: kind, file, line.
Place = tuple[str, str, int]


def load() -> Any:
    """Load the module named by XATTN_TWIN_MODULE in place of ``xattn_kernels._cuda``."""
    # AddressSanitizer is in this process; programs that it starts do without.
    os.environ.pop("LD_PRELOAD", None)
    path = os.environ.get("XATTN_TWIN_MODULE")
    assert path, "start this with tests/cuda/twin/run.py"
    spec = importlib.util.spec_from_file_location("xattn_kernels._cuda", path)
    assert spec is not None and spec.loader is not None
    sys.setdlopenflags(os.RTLD_LAZY)  # for a module that was built without some of its sources
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["xattn_kernels._cuda"] = module
    return module


def not_needed(
    twin: Any,
    runs: Mapping[str, Callable[[], Sequence[Tensor]]],
    seeds: Sequence[int] = range(4),
    processors: int = 1,
) -> tuple[set[Place], set[Place]]:
    """Drop every barrier and wait in turn, and see whether any result changes.

    Args:
        twin: the module.
        runs: what to run, by name: functions of no argument that return the same tensors whenever
            they are called, as all kernels do, bit for bit.
        seeds: orders to try.
        processors: of the device; few, so that a block has several works.

    Returns:
        All places that were passed, and those of them without which every run gave the same bits
        in every order and, in a module that was built for it, no two threads raced.
    """
    places: set[Place] = set()
    changing: set[Place] = set()
    for name, run in runs.items():
        twin.twin_configure(seed=0, processors=processors)
        expected = [x.clone() for x in run()]
        here = [place[:3] for place in twin.twin_places()]
        for seed in seeds:
            twin.twin_configure(seed=seed, processors=processors)
            assert _same(run(), expected), f"{name}: depends on the order of threads"
        for place in here:
            places.add(place)
            for seed in seeds:
                if place in changing:
                    break
                twin.twin_configure(seed=seed, processors=processors)
                twin.twin_drop(*place)
                try:
                    if not _same(run(), expected):
                        changing.add(place)
                except RuntimeError:  # a race, threads that no longer meet, copies not waited for
                    changing.add(place)
    twin.twin_configure(processors=processors)
    return places, places - changing


def _same(results: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(
        torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        for x, y in zip(results, expected, strict=True)
    )
