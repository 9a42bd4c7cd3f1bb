"""Multi-task cross-attention as fused operators: exact, one call for all edges of a schedule."""

from xattn_kernels._version import __version__
from xattn_kernels.functional import (
    cross_attention_block,
    linear_cross_attention,
    pack_block_weights,
    pyramid_projection,
    softmax_cross_attention,
)
from xattn_kernels.registry import backend, explain, list_backends, set_backend
from xattn_kernels.schedule import Edge, Schedule

__all__ = [
    "Edge",
    "Schedule",
    "__version__",
    "backend",
    "cross_attention_block",
    "explain",
    "linear_cross_attention",
    "list_backends",
    "pack_block_weights",
    "pyramid_projection",
    "set_backend",
    "softmax_cross_attention",
]
