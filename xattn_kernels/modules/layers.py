"""Parameter containers under the names of the reference implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn_kernels.distributed import check_rows, rows_of
from xattn_kernels.modules import normalisation
from xattn_kernels.modules.cache import CacheOwner, DerivedCache
from xattn_kernels.modules.checks import cast_for_autocast, without_autocast
from xattn_kernels.modules.normalisation import BatchNorm, normalise
from xattn_kernels.modules.rows import convolve3x3
from xattn_kernels.ops.features import ACCUMULATORS, is_transformed


class Projection(nn.Module):
    """1x1 convolution without bias, then batch norm: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        nn.init.xavier_uniform_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        [normalised] = normalise(self.bn, [self.conv(x)], rows_of(self))
        return normalised


class ProjectionSet(nn.Module):
    """The five projections of one cross-attention: 5 C^2 + 10 C parameters."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query_project = nn.ModuleList(Projection(channels) for _ in range(2))
        self.key_project = nn.ModuleList(Projection(channels) for _ in range(2))
        self.value_project = Projection(channels)

    def projections(self) -> list[Projection]:
        """In the order of `functional.cross_attention_block`: 2 query, 2 key, 1 value layers."""
        modules = [*self.query_project, *self.key_project, self.value_project]
        return [module for module in modules if isinstance(module, Projection)]


class FoldedBlock(NamedTuple):
    """A `BasicBlock` in inference, its batch norms folded into the convolutions."""

    conv1: Tensor
    bias1: Tensor
    conv2: Tensor
    bias2: Tensor
    """With that of the shortcut."""
    shortcut: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        hidden = F.conv2d(x, self.conv1, self.bias1, padding=1).relu_()
        residual = F.conv2d(hidden, self.conv2, self.bias2, padding=1)
        residual += x if self.shortcut is None else F.conv2d(x, self.shortcut)
        return residual.relu_()

    def to(self, dtype: torch.dtype) -> FoldedBlock:
        """In `dtype`, the weights in the memory format in which convolutions take them fastest."""
        last = torch.channels_last
        conv1, conv2 = (w.to(dtype, memory_format=last) for w in (self.conv1, self.conv2))
        shortcut = None if self.shortcut is None else self.shortcut.to(dtype, memory_format=last)
        return FoldedBlock(conv1, self.bias1.to(dtype), conv2, self.bias2.to(dtype), shortcut)


class BasicBlock(CacheOwner):
    """Two 3x3 convolutions and a shortcut: (B, C_in, H, W) -> (B, C_out, H, W).

    He et al., "Deep Residual Learning for Image Recognition" (2015), fig. 5. In inference the batch
    norms are folded into the convolutions, and the output is in channels_last.

    Args:
        in_channels: width C_in.
        out_channels: width C_out.
        momentum: of both batch norms; that of the shortcut has torch's default.
        shortcut: have the shortcut projected by a 1x1 convolution and batch norm; without, it is
            the input itself and C_in = C_out.
    """

    def __init__(
        self, in_channels: int, out_channels: int, momentum: float, *, shortcut: bool = True
    ) -> None:
        super().__init__()
        self._cache = DerivedCache()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels, momentum=momentum)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels, momentum=momentum)
        self.downsample: nn.Sequential | None = None
        if shortcut:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        rows = rows_of(self)
        if rows is not None:
            check_rows([x], rows)
            return self.over_processes([x])[0]
        traced = torch.compiler.is_compiling() or is_transformed()
        stock = not traced and is_stock(self)
        if not (traced or stock) and is_stock(self, synchronised=True):
            return self.over_processes([x])[0]
        if stock and normalisation.is_inference([self], [x]):
            x = cast_for_autocast(x).contiguous(memory_format=torch.channels_last)
            with without_autocast(x):
                return self.cached("block", x.dtype)(x)
        hidden = F.relu(self.bn1(self.conv1(x)), inplace=True)
        residual = self.bn2(self.conv2(hidden))
        residual += x if self.downsample is None else self.downsample(x)
        return F.relu(residual, inplace=True)

    def over_processes(
        self,
        inputs: Sequence[Tensor],
        change: Callable[[Tensor], Tensor] = lambda weight: weight,
    ) -> list[Tensor]:
        """Outputs for one input after the other, whose batches or maps may span processes.

        Args:
            inputs: their number is the same on all ranks.
            change: of the weights of the convolutions that read the input.

        Raises:
            RuntimeError: unless `is_stock` but for synchronised batch norms.
        """
        rows = rows_of(self)
        check_stock(self)
        convolution = self.conv1
        hidden = convolve3x3(inputs, change(convolution.weight), convolution.bias, rows)
        hidden = [F.relu(x, inplace=True) for x in normalise(self.bn1, hidden, rows)]
        hidden = convolve3x3(hidden, self.conv2.weight, self.conv2.bias, rows)
        outputs = normalise(self.bn2, hidden, rows)
        shortcuts = list(inputs)
        if self.downsample is not None:
            convolution, norm = self.projected_shortcut()
            weight = change(convolution.weight)
            shortcuts = [F.conv2d(x, weight, convolution.bias) for x in inputs]
            shortcuts = normalise(norm, shortcuts, rows)
        return [F.relu(x.add_(y), inplace=True) for x, y in zip(outputs, shortcuts, strict=True)]

    def cached(
        self,
        name: str,
        dtype: torch.dtype,
        change: Callable[[FoldedBlock], FoldedBlock] = lambda folded: folded,
    ) -> FoldedBlock:
        """The folded block in `dtype` after `change`, kept under `name`. Needs `is_stock`."""
        pairs: list[tuple[nn.Conv2d, BatchNorm]]
        pairs = [(self.conv1, self.bn1), (self.conv2, self.bn2)]
        if self.downsample is not None:
            pairs.append(self.projected_shortcut())

        def make() -> FoldedBlock:
            folded = [normalisation.fold([c], [bn], ACCUMULATORS[dtype]) for c, bn in pairs]
            (w1, b1), (w2, b2), *rest = ((w[0], b[0]) for w, b in folded)
            for w3, b3 in rest:
                return change(FoldedBlock(w1, b1, w2, b2 + b3, w3)).to(dtype)
            return change(FoldedBlock(w1, b1, w2, b2, None)).to(dtype)

        sources = [x for conv, bn in pairs for x in normalisation.tensors(conv, bn)]
        return self._cache.get(name, sources, (dtype, *(bn.eps for _, bn in pairs)), make)

    def projected_shortcut(self) -> tuple[nn.Conv2d, BatchNorm]:
        """Convolution and batch norm of the shortcut. Needs `is_stock` and a projected one."""
        assert self.downsample is not None
        convolution, norm = self.downsample
        assert isinstance(convolution, nn.Conv2d)
        assert isinstance(norm, normalisation.KINDS)
        return convolution, norm


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, Projection, ProjectionSet, BasicBlock)

_LAYERS = (nn.Conv2d, nn.Linear, nn.ReLU)


def is_stock(*modules: nn.Module, synchronised: bool = False) -> bool:
    """Whether modules and all below them do what their parameters say and nothing else.

    Then others may compute it for them. False with hooks or where a layer was replaced (a
    quantised, pruned or parametrised convolution): those have to be called. False as well for a
    `nn.SyncBatchNorm` whose batch spans processes, except for a caller that sees to it:
    `synchronised`.
    """
    stack = list(modules)
    while stack:
        module = stack.pop()
        kind = type(module)
        if normalisation.is_hooked(module):
            return False
        if kind in normalisation.KINDS:
            assert isinstance(module, normalisation.KINDS)
            if module.weight is None:
                return False
            if not synchronised and normalisation.statistics_group(module) is not None:
                return False
        elif issubclass(kind, _CONTAINERS):
            stack += [child for child in module._modules.values() if child is not None]
        elif kind not in _LAYERS:
            return False
    return True


def check_stock(module: nn.Module) -> None:
    """Refuse to compute on split maps what would have to be called.

    Raises:
        RuntimeError: unless `module` is stock but for synchronised batch norms.
    """
    if not is_stock(module, synchronised=True):
        raise RuntimeError(
            f"{type(module).__name__}: got hooks or layers other than the built-in ones, expected "
            "none where maps are split over processes: they would not know of the other rows"
        )


def call_sequence(layers: nn.Module, x: Tensor) -> Tensor:
    """`layers` of `x`, an `nn.Sequential` of pointwise ones, whose batches may span processes."""
    if isinstance(layers, nn.Sequential) and is_stock(layers, synchronised=True):
        for layer in layers:
            [x] = normalise(layer, [x], rows_of(layers))
        return x
    output: Tensor = layers(x)
    return output


def sum_repeats(weight: Tensor, channels: int) -> Tensor:
    """Weights for [x, c_1, ..., c_n] from those for [x, c_1, x, c_2, ..., x, c_n].

    All parts have `channels` channels. A convolution is linear in its input: those of the repeats
    of x add up.
    """
    parts = weight.unflatten(1, (-1, 2, channels))
    return torch.cat([parts[:, :, 0].sum(dim=1), parts[:, :, 1].flatten(1, 2)], dim=1)
