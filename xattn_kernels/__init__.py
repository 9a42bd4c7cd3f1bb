"""Multi-task cross-attention as fused operators: exact, one call for all edges of a schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xattn_kernels import flops
from xattn_kernels._version import __version__
from xattn_kernels.functional import (
    cross_attention_block,
    cross_attention_block_training,
    linear_cross_attention,
    pack_block_weights,
    pyramid_projection,
    softmax_cross_attention,
)
from xattn_kernels.registry import backend, explain, list_backends, set_backend
from xattn_kernels.schedule import Edge, Schedule

if TYPE_CHECKING:
    from xattn_kernels.convert import ConversionReport, convert_, revert_
    from xattn_kernels.modules.freezing import freeze_, frozen, unfreeze_

__all__ = [
    "ConversionReport",
    "Edge",
    "Schedule",
    "__version__",
    "backend",
    "convert_",
    "cross_attention_block",
    "cross_attention_block_training",
    "explain",
    "freeze_",
    "frozen",
    "linear_cross_attention",
    "list_backends",
    "pack_block_weights",
    "pyramid_projection",
    "revert_",
    "set_backend",
    "softmax_cross_attention",
    "unfreeze_",
]

flops.register_when_imported()


def __getattr__(name: str) -> Any:
    """What works on models is loaded when it is first asked for."""
    if name in ("ConversionReport", "convert_", "revert_"):
        from xattn_kernels import convert

        return getattr(convert, name)
    if name in ("freeze_", "frozen", "unfreeze_"):
        from xattn_kernels.modules import freezing

        return getattr(freezing, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
