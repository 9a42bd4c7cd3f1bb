"""The native CPU module ``xattn_kernels._core``: loaded when first asked for, never at import."""

from __future__ import annotations

import functools
import importlib
import pathlib
from typing import Any

import torch

#: Codes that the native modules use for element types.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
#: Codes that the native modules use for feature maps, in this order.
FEATURE_MAPS = ("softplus", "relu", "elu", "identity")


@functools.cache
def _load() -> tuple[Any, str | None]:
    try:
        return importlib.import_module("xattn_kernels._core"), None
    except ModuleNotFoundError as error:
        if error.name != "xattn_kernels._core":
            return None, f"the native module _core does not load: {error}"
        package = pathlib.Path(__file__).resolve().parent.parent
        others = sorted(path.name for path in package.glob("_core*.so"))
        if others:
            return None, f"the native module was built for another Python: {', '.join(others)}"
        return None, "the native module _core is missing: install with `pip install .`"
    except (ImportError, OSError) as error:
        return None, f"the native module _core does not load: {error}"


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
