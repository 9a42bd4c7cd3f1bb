"""The native CPU module ``xattn_kernels._core``: loaded when first asked for, never at import."""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import pathlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xattn_kernels import build_record
from xattn_kernels._version import __version__
from xattn_kernels.problem import Problem

#: Codes that the native modules use for element types.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
#: Codes that the native modules use for feature maps.
FEATURE_MAP_CODES = {"softplus": 0, "relu": 1, "elu": 2, "identity": 3}


@functools.cache
def _load() -> tuple[Any, str | None]:
    try:
        build = build_record.read()
        if build is not None and build["version"] != __version__:
            return None, (
                f"the native module _core was built for version {build['version']}, this is "
                f"{__version__}: install again"
            )
        return importlib.import_module("xattn_kernels._core"), None
    except ModuleNotFoundError as error:
        others = _built_for_other_pythons()
        why = f", there is only {', '.join(others)} of another Python" if others else ""
        return None, f"the native module is missing{why}: install with `pip install .` ({error})"
    except (ImportError, RuntimeError) as error:
        return None, f"the native module _core does not load: {error}"


def _built_for_other_pythons() -> list[str]:
    """Native CPU modules beside the package that this interpreter does not take."""
    package = pathlib.Path(__file__).parent.parent
    ours = {f"_core{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES}
    return sorted(path.name for path in package.glob("_core.*.so") if path.name not in ours)


def load_error() -> str | None:
    """Return why the native CPU module cannot be used; None if it can."""
    return _load()[1]


def core() -> Any:
    """Return the native CPU module.

    Raises:
        RuntimeError: if it cannot be loaded.
    """
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module


def cpu_refusals(problem: Problem) -> list[str]:
    """Why the CPU kernels, which all have the same limits, cannot run a problem."""
    reasons = []
    if problem.device != "cpu":
        reasons.append(f"runs on CPU tensors, not on {problem.device}")
    if problem.transformed:
        reasons.append("kernels have no rules for torch.func transforms and forward-mode gradients")
    return reasons


def pointer(x: Tensor | None) -> int:
    """Address of a contiguous tensor; 0 for None."""
    return 0 if x is None else x.data_ptr()


def views(slots: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """(B, C, N) tensors as the native modules take them: address, strides in elements, tokens."""
    return [(x.data_ptr(), *x.stride(), x.size(2)) for x in slots]


def optional_views(slots: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """As :func:`views`; a missing tensor has address 0 and the token count of its ``like``."""
    return [
        (0, 0, 0, 0, y.size(2)) if x is None else (x.data_ptr(), *x.stride(), x.size(2))
        for x, y in zip(slots, like, strict=True)
    ]
