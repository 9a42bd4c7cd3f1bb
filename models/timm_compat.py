"""timm, also where torchvision's C++ operators cannot be loaded."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

import torch

from xattn_kernels.compat import TORCHVISION_OPS, torchvision_ops_error

# Only schemas, so that torchvision can register its Python functions for them: a call still fails.
_SCHEMA = "(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor"
_library: torch.library.Library | None = None


def import_timm() -> ModuleType:
    """Import timm and return it.

    timm imports torchvision, whose import fails where its C++ operators cannot be loaded: with a
    torchvision built for another torch, or for CUDA on a machine without it. In that case this
    declares the operators that torchvision looks for; box suppression (``torchvision.ops.nms``)
    stays unusable, which no network of timm needs. ``python -m xattn_kernels info`` tells whether
    that is so here.

    Raises:
        ModuleNotFoundError: if timm or torchvision is not installed; says how to install them.
        ImportError: if timm cannot be imported for another reason.
    """
    try:
        error = None if "torchvision" in sys.modules else torchvision_ops_error()
        if error is not None and importlib.util.find_spec("torchvision") is not None:
            _declare_torchvision_ops()
        return importlib.import_module("timm")
    except ModuleNotFoundError as missing:
        if missing.name not in ("timm", "torchvision"):
            raise
        raise ModuleNotFoundError(
            f"{missing.name} is not installed: pip install 'xattn_kernels[models]'",
            name=missing.name,
        ) from missing


def _declare_torchvision_ops() -> None:
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for name in TORCHVISION_OPS:
        if not hasattr(torch.ops.torchvision, name):
            _library.define(name + _SCHEMA)
