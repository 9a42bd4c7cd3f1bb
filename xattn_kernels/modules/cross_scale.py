"""Cross-attention of one task's scales to its coarser ones, and the head that aggregates them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn_kernels import functional
from xattn_kernels.modules.attend import Wiring, attend, attend_folded, choose_way
from xattn_kernels.modules.checks import (
    as_inputs,
    check_features,
    check_kind,
    check_recompute,
    check_width,
    in_format_of,
    shown,
)
from xattn_kernels.modules.cross_attention import CrossAttention
from xattn_kernels.modules.freezing import Freezable, refuse_proxies
from xattn_kernels.modules.layers import call_sequence, is_stock, keeps_size, sum_repeats
from xattn_kernels.modules.normalisation import (
    BATCH_NORMS,
    check_size,
    first_parameter,
    is_inference,
    scale_and_shift,
    update_running,
    uses_batch,
)
from xattn_kernels.modules.row_sharding import check_rows, rows_of
from xattn_kernels.ops.autocast import no_autocast
from xattn_kernels.ops.features import ACCUMULATORS
from xattn_kernels.ops.gradients import CHANNELS_LAST, in_order


class _Scales(Freezable):
    """Adapters and blocks of cross-scale attention, under the names of the reference."""

    def _add_scales(
        self, channels: tuple[int, ...], kind: str, heads: int, recompute: bool | str
    ) -> None:
        self.channels = channels
        self.kind = kind
        self.heads = heads
        self.recompute = recompute
        self._wirings = [
            Wiring(tuple((0, 1 + i, 0) for i in range(count)), 1 + count)
            for count in reversed(range(1, len(channels)))
        ]
        for target in reversed(range(len(channels) - 1)):
            block = CrossAttention(channels[target], kind=kind, heads=heads, recompute=recompute)
            self.add_module(f"cross_scale_attention{target}", block)
            for source in range(target + 1, len(channels)):
                adapter = nn.Sequential(
                    nn.Conv2d(channels[source], channels[target], 1, bias=False),
                    nn.BatchNorm2d(channels[target]),
                )
                self.add_module(f"upsample{source}{target}", adapter)

    def _check(self, features: Sequence[Tensor]) -> None:
        refuse_proxies(self, features, *(features if isinstance(features, list | tuple) else ()))
        if isinstance(features, Tensor | Mapping) or not isinstance(features, Sequence):
            raise TypeError(f"features: got {shown(features)}, expected a sequence of tensors")
        if len(features) != len(self.channels):
            raise ValueError(
                f"features: got {len(features)} tensors, expected a sequence of "
                f"{len(self.channels)}, finest first"
            )
        named = [
            (f"features[{s}]", x, width)
            for s, (x, width) in enumerate(zip(features, self.channels, strict=True))
        ]
        check_features(named, first_parameter(self))
        check_rows(features, rows_of(self))

    def _attend(self, features: Sequence[Tensor]) -> list[list[Tensor]]:
        """Attended maps [target][source - target - 1]."""
        coarse = [in_order(x, CHANNELS_LAST) for x in features[1:]]
        return [self._attend_target(t, features[t], coarse[t:]) for t in range(len(coarse))]

    def _attend_target(self, t: int, target: Tensor, sources: Sequence[Tensor]) -> list[Tensor]:
        """One target's maps; the sources share its block, which projects the target once."""
        block = self.get_submodule(f"cross_scale_attention{t}")
        adapters = [self.get_submodule(f"upsample{t + 1 + i}{t}") for i in range(len(sources))]
        adapted = [call_sequence(a, x) for a, x in zip(adapters, sources, strict=True)]
        cells = [target, *as_inputs(adapted)]  # some layers give float32 under autocast
        inference = is_inference([block], cells)
        way = choose_way([block], cells, self.kind, self.recompute, inference)
        if way == "folded":
            return attend_folded(self, f"block{t}", [block], self._wirings[t], cells)
        return attend(way, [block], self._wirings[t], cells)

    def extra_repr(self) -> str:
        options = f"kind={self.kind!r}, heads={self.heads}, recompute={self.recompute!r}"
        return f"{list(self.channels)}, {options}"


class CrossScaleAttention(_Scales):
    r"""Every scale of one task attends to every coarser one: the CSAM of SCA-MTL.

    For target scale s and each r > s, with A_rs a 1x1 convolution with batch norm to the target's
    width and one `CrossAttention` per target scale, used for all its sources::

        c_sr = CAM_s(x_s, A_rs x_r)       (B, C_s, H_s, W_s)

    Sources keep their resolution. The coarsest scale attends to nothing. Kim, Choi, Min,
    "Sequential Cross Attention Based Multi-task Learning" (arXiv 2209.02518).

    Parameters and buffers are named ``cross_scale_attention<s>.*`` (`CrossAttention`) and
    ``upsample<r><s>.{0,1}.*``. In training a block's query batch norms see the same statistics
    once per source, as calling the block for one source after the other does.

    Args:
        channels: widths C_s, finest scale first; at least two.
        kind: "linear" or "softmax", see `CrossAttention`.
        heads: heads of kind "softmax"; divides all widths but the last.
        recompute: "auto", True or False, see `CrossAttention`.

    Raises:
        ValueError: for fewer than two scales, or other values of these.
    """

    def __init__(
        self,
        channels: Sequence[int],
        *,
        kind: str = "linear",
        heads: int = 1,
        recompute: bool | str = "auto",
    ) -> None:
        channels, heads = _check_channels(channels, kind, heads)
        check_recompute(recompute, kind)
        super().__init__()
        self._add_scales(channels, kind, heads, recompute)

    def forward(self, features: Sequence[Tensor]) -> list[list[Tensor]]:
        """Attend.

        Args:
            features: (B, C_s, H_s, W_s) for every scale, finest first, in the parameters' dtype
                (under autocast, any).

        Returns:
            For every scale s but the coarsest, the maps c_sr for r = s+1, s+2, ..., each
            (B, C_s, H_s, W_s) in the memory format of features[s] and its dtype (under autocast,
            that of autocast).

        Raises:
            TypeError: for tensors of another dtype.
            ValueError: for another number of scales, other shapes or devices; in training, for a
                single value per channel.
        """
        self._check(features)
        maps = self._attend(as_inputs(features))
        return [[in_format_of(y, x) for y in row] for x, row in zip(features, maps, strict=False)]


class CrossScaleHead(_Scales):
    """`CrossScaleAttention` of one task and the aggregation of all its scales into an output.

    With ^ the bilinear interpolation to the size of scale 0 (align_corners=False) and L a 1x1
    convolution, batch norm, relu and a 1x1 convolution, for four scales::

        y = L([x_0, c_01, x_0, c_02, x_0, c_03, ^(x_1, c_12), ^(x_1, c_13), ^(x_2, c_23), ^x_3])

    The first convolution of L is applied before the interpolation, with which it commutes, at each
    scale's own resolution, and the weights of repeated inputs are summed. Kim, Choi, Min,
    "Sequential Cross Attention Based Multi-task Learning" (arXiv 2209.02518).

    Parameters and buffers are named as in `CrossScaleAttention`, and ``last_layer.{0,1,3}.*``.

    Args:
        channels: widths C_s, finest scale first; at least two.
        num_outputs: channels of the output.
        kind: "linear" or "softmax", see `CrossAttention`.
        heads: heads of kind "softmax"; divides all widths but the last.
        recompute: "auto", True or False, see `CrossAttention`.

    Raises:
        ValueError: for fewer than two scales, or other values of these.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_outputs: int,
        *,
        kind: str = "linear",
        heads: int = 1,
        recompute: bool | str = "auto",
    ) -> None:
        channels, heads = _check_channels(channels, kind, heads)
        check_recompute(recompute, kind)
        num_outputs = check_width("num_outputs", num_outputs)
        super().__init__()
        coarser = range(len(channels) - 1, 0, -1)
        self._widths = [2 * n * c for n, c in zip(coarser, channels, strict=False)] + [channels[-1]]
        width = sum(self._widths)
        self.num_outputs = num_outputs
        self.last_layer = nn.Sequential(
            nn.Conv2d(width, width, 1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, num_outputs, 1),
        )
        self._add_scales(channels, kind, heads, recompute)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Attend and aggregate.

        Args:
            features: (B, C_s, H_s, W_s) for every scale, finest first, in the parameters' dtype
                (under autocast, any).

        Returns:
            (B, num_outputs, H_0, W_0) in the memory format of features[0] and its dtype (under
            autocast, that of autocast).

        Raises:
            TypeError: for tensors of another dtype.
            ValueError: for another number of scales, other shapes or devices; in training, for a
                single value per channel.
        """
        self._check(features)
        cast = as_inputs(features)
        rows = [[x, *row] for x, row in zip(cast, [*self._attend(cast), []], strict=True)]
        if not _is_aggregation(self.last_layer) or cast[0].numel() == 0:
            return self._call_layers(rows)
        levels = [torch.cat(row, dim=1) if len(row) > 1 else row[0] for row in rows]
        with no_autocast(cast[0].device.type):
            return in_format_of(self._aggregate(levels), features[0])

    def _aggregate(self, levels: Sequence[Tensor]) -> Tensor:
        """The last layer's output from [x_s, c_s..] of every scale."""
        first, norm, _, classifier = self.last_layer
        assert isinstance(first, nn.Conv2d) and isinstance(norm, BATCH_NORMS)
        assert isinstance(classifier, nn.Conv2d)
        dtype = ACCUMULATORS[levels[0].dtype]

        def fold() -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor | None]:
            """Weights, scale, shift and classifier of `pyramid_projection`."""
            weights = self._by_scale(first.weight.flatten(1).to(dtype))
            if uses_batch(norm):
                scale, shift = norm.weight.to(dtype), norm.bias.to(dtype)
                if first.bias is not None:  # does not matter, and has gradient zero
                    shift = torch.add(shift, first.bias.to(dtype), alpha=0)
            else:
                scale, shift = scale_and_shift(norm, first.bias, dtype)
            labels = None if classifier.bias is None else classifier.bias.to(dtype)
            return weights, scale, shift, classifier.weight.flatten(1).to(dtype), labels

        if uses_batch(norm):
            check_size(levels[0])
            output, mean, var = functional.pyramid_projection(
                levels, *fold(), batch_statistics=True, eps=norm.eps
            )
            with torch.no_grad():
                values = levels[0].numel() // levels[0].shape[1]
                mean = mean if first.bias is None else mean + first.bias
                update_running(norm, mean, var * (values / (values - 1)))
            return output
        if not is_inference([self.last_layer], levels):
            return functional.pyramid_projection(levels, *fold())

        def make() -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor | None]:
            weights, scale, shift, labels, bias = fold()
            return [_transposed(w) for w in weights], scale, shift, _transposed(labels), bias

        return functional.pyramid_projection(levels, *self.derived(("last_layer", dtype), make))

    def _by_scale(self, weight: Tensor) -> list[Tensor]:
        """The first convolution's weights for [x_s, c_s..] of each scale, without the repeats."""
        *parts, coarsest = weight.split(self._widths, dim=1)
        folded = [sum_repeats(w, c) for w, c in zip(parts, self.channels, strict=False)]
        return [*folded, coarsest]

    def _call_layers(self, rows: Sequence[Sequence[Tensor]]) -> Tensor:
        """The aggregation with every layer called, for layers that are not the stock ones."""
        parts = [torch.cat([x, y], dim=1) for x, *row in rows[:-1] for y in row]
        size = rows[0][0].shape[2:]
        resized = [_resize(part, size) for part in (*parts, rows[-1][0])]
        return call_sequence(self.last_layer, torch.cat(resized, dim=1))


def _is_aggregation(layers: nn.Module) -> bool:
    """Whether `layers` are those that `CrossScaleHead` is made with, to be computed for them."""
    if type(layers) is not nn.Sequential or not is_stock(layers):
        return False
    return (
        len(layers) == 4
        and keeps_size(layers[0], 1)
        and type(layers[1]) in BATCH_NORMS
        and type(layers[2]) is nn.ReLU
        and keeps_size(layers[3], 1)
    )


def _transposed(weight: Tensor) -> Tensor:
    """`weight` with its rows along the fastest dimension, as kernels read it."""
    return weight.t().contiguous().t()


def _resize(x: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _check_channels(channels: Sequence[int], kind: str, heads: int) -> tuple[tuple[int, ...], int]:
    """Widths and heads as integers."""
    if not isinstance(channels, Iterable) or len(channels) < 2:
        raise ValueError(
            f"channels: got {shown(channels)}, expected at least two widths, finest first"
        )
    widths = tuple(check_width(f"channels[{s}]", width) for s, width in enumerate(channels))
    return widths, check_kind(kind, heads, widths[:-1])
