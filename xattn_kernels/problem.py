"""What there is to run: operators, engines, and what an engine is told of a call."""

from __future__ import annotations

from operator import index
from typing import NamedTuple

import torch
from torch import Tensor

#: Every engine, in the order in which ``"auto"`` tries those without measurements.
ENGINES = ("cuda", "triton", "cpu", "reference")
#: Engines that ``"auto"`` takes only for problems that they were measured on.
MEASURED_ENGINES = ("cuda", "triton")
TRAINING = "cross_attention_block_training"
OPERATORS = (
    "linear_cross_attention",
    "softmax_cross_attention",
    "cross_attention_block",
    TRAINING,
    "pyramid_projection",
)


class Problem(NamedTuple):
    """What an engine is told when it is asked whether it can run an operator.

    Attributes:
        op: one of :data:`OPERATORS`.
        dtype: element type of the features.
        device: device type, such as ``"cpu"``.
        channels: width C of queries and keys; of the finest level for ``pyramid_projection``.
        value_channels: width of values or, for ``pyramid_projection``, of outputs.
        heads: heads of the softmax operator, else 1.
        transformed: whether a ``torch.func`` transform or forward-mode differentiation is active.
        gradient: whether a backward pass may follow; always for the block in training.
        device_index: number of the device where there are several of its type, else None.
    """

    op: str
    dtype: torch.dtype
    device: str
    channels: int
    value_channels: int
    heads: int = 1
    transformed: bool = False
    gradient: bool = False
    device_index: int | None = None

    @classmethod
    def of(
        cls,
        op: str,
        x: Tensor,
        channels: int,
        value_channels: int,
        *,
        heads: int = 1,
        transformed: bool = False,
        gradient: bool = False,
    ) -> Problem:
        """The problem of an operator on features such as `x`; the rest as in the attributes."""
        return cls(
            op,
            x.dtype,
            x.device.type,
            index(channels),  # a compiler fixes the widths that it compiles for
            index(value_channels),
            index(heads),
            transformed,
            gradient,
            x.device.index,
        )
