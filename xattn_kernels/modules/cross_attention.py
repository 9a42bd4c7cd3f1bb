"""Cross-attention between two feature maps."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from xattn_kernels import functional
from xattn_kernels.modules.attend import Wiring, attend, attend_folded, choose_way
from xattn_kernels.modules.checks import (
    as_inputs,
    check_features,
    check_kind,
    check_recompute,
    check_width,
    in_format_of,
)
from xattn_kernels.modules.freezing import refuse_proxies
from xattn_kernels.modules.layers import ProjectionSet, check_stock
from xattn_kernels.modules.normalisation import first_parameter, is_inference
from xattn_kernels.modules.row_sharding import check_rows, linear_cross_attention, rows_of
from xattn_kernels.ops.gradients import with_plain_gradient

_ONE_EDGE = Wiring(((0, 1, 0),), 2)


class CrossAttention(ProjectionSet):
    r"""A target attends to a source: the cross-attention module (CAM) of SCA-MTL.

    With x_t the target, x_a the source and bn(W .) a 1x1 convolution with batch norm::

        q = bn(W_q2 relu(bn(W_q1 x_t)))   k = bn(W_k2 relu(bn(W_k1 x_a)))   v = relu(bn(W_v x_a))
        linear:  out_m = sum_n v_n (phi(k_n) . phi(q_m)) / max(sum_n phi(k_n) . phi(q_m), 1e-12)
        softmax: out_m = sum_n v_n softmax_n(k_n . q_m / sqrt(C / heads))   per head

    with phi the softplus. Kim, Choi, Min, "Sequential Cross Attention Based Multi-task Learning"
    (arXiv 2209.02518), whose kind is "linear".

    Parameters and buffers are named ``{query,key}_project.{0,1}.{conv,bn}.*`` and
    ``value_project.{conv,bn}.*``. In inference, batch norms are folded into the weights in every
    call, unless `xattn_kernels.freeze_` has them kept.

    Args:
        channels: width C of target, source and output.
        kind: "linear" or "softmax".
        heads: heads of kind "softmax"; divides C.
        recompute: whether training with kind "linear" computes the projections again in the
            backward pass, by `xattn_kernels.cross_attention_block_training`, rather than keep
            ten maps of the size of its features: less memory, and with kernels for it less time.
            "auto": where there are kernels for it.

    Raises:
        ValueError: for other values of these.
    """

    _stock: ClassVar[bool] = True

    def __init__(
        self,
        channels: int,
        *,
        kind: str = "linear",
        heads: int = 1,
        recompute: bool | str = "auto",
    ) -> None:
        channels = check_width("channels", channels)
        heads = check_kind(kind, heads, [channels])
        check_recompute(recompute, kind)
        super().__init__(channels)
        self.channels = channels
        self.kind = kind
        self.heads = heads
        self.recompute = recompute

    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        """Attend.

        Args:
            target: (B, C, H, W) in the parameters' dtype (under autocast, any).
            source: (B, C, H', W').

        Returns:
            (B, C, H, W) in the memory format of `target` and its dtype (under autocast, that of
            autocast).

        Raises:
            TypeError: for tensors of another dtype.
            ValueError: for other shapes or devices; in training, for a single value per channel.
        """
        refuse_proxies(self, target, source)
        widths = self.channels
        check_features(
            [("target", target, widths), ("source", source, widths)], first_parameter(self)
        )
        check_rows([target, source], rows_of(self))
        features = as_inputs([target, source])
        inference = is_inference([self], features)
        way = choose_way([self], features, self.kind, self.recompute, inference, own=True)
        if way == "layers":
            output = self._call_layers(*features)
        elif way == "folded":
            [output] = attend_folded(self, "block", [self], _ONE_EDGE, features)
        else:
            [output] = attend(way, [self], _ONE_EDGE, features)
        return in_format_of(output, target)

    def _call_layers(self, target: Tensor, source: Tensor) -> Tensor:
        """The same with every layer called."""
        rows = rows_of(self)
        if rows is not None:
            check_stock(self)
        query = with_plain_gradient(self.query_project[1](F.relu(self.query_project[0](target))))
        key = with_plain_gradient(self.key_project[1](F.relu(self.key_project[0](source))))
        value = with_plain_gradient(F.relu(self.value_project(source)))
        output: Tensor
        if rows is not None:
            output = linear_cross_attention(query, key, value, rows)
        elif self.kind == "linear":
            output = functional.linear_cross_attention(query, key, value)
        else:
            output = functional.softmax_cross_attention(query, key, value, heads=self.heads)
        return output

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, kind={self.kind!r}, heads={self.heads}, recompute={self.recompute!r}"
        )
