"""The operators as functions: they validate, document the contract, pick an engine and call it.

Engines with kernels are called through ``torch.ops.xattn_kernels``; the ``reference`` engine is
plain PyTorch and is called directly, so that its gradients are those of plain autograd. The block
for training has the backward pass of its equations on every engine.

Shapes: B samples, C channels of queries and keys, Cv channels of values and outputs, N tokens.
Feature tensors are (B, C, N) or (B, C, H, W) of any strides; channels_last runs without a copy.
"""

from xattn_kernels.functional.attention import linear_cross_attention, softmax_cross_attention
from xattn_kernels.functional.block import (
    cross_attention_block,
    cross_attention_block_training,
    pack_block_weights,
)
from xattn_kernels.functional.pyramid import pyramid_projection
from xattn_kernels.ops.cross_attention_block_training.autograd import BlockStatistics

__all__ = [
    "BlockStatistics",
    "cross_attention_block",
    "cross_attention_block_training",
    "linear_cross_attention",
    "pack_block_weights",
    "pyramid_projection",
    "softmax_cross_attention",
]
