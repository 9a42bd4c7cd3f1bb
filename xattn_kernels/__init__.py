"""Multi-task cross-attention as fused operators: exact, one call for all edges of a schedule."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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
    from xattn_kernels.distributed import shard_rows, sum_gradients
    from xattn_kernels.modules import (
        CrossAttention,
        CrossScaleAttention,
        CrossScaleHead,
        CrossTaskAttention,
    )
    from xattn_kernels.modules.freezing import freeze_, frozen, unfreeze_

__all__ = [
    "ConversionReport",
    "CrossAttention",
    "CrossScaleAttention",
    "CrossScaleHead",
    "CrossTaskAttention",
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
    "shard_rows",
    "softmax_cross_attention",
    "sum_gradients",
    "unfreeze_",
]

_MODULE_OF = {
    "ConversionReport": "convert",
    "CrossAttention": "modules",
    "CrossScaleAttention": "modules",
    "CrossScaleHead": "modules",
    "CrossTaskAttention": "modules",
    "convert_": "convert",
    "freeze_": "modules.freezing",
    "frozen": "modules.freezing",
    "revert_": "convert",
    "shard_rows": "distributed",
    "sum_gradients": "distributed",
    "unfreeze_": "modules.freezing",
}
"""Where to find what works on models; it is loaded when it is first asked for."""


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
