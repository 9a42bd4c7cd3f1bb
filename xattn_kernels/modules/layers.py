"""Parameter containers under the names of the reference implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn_kernels.modules.freezing import Freezable, refuse_proxies
from xattn_kernels.modules.normalisation import (
    BATCH_NORMS,
    BatchNorm,
    fold,
    is_hooked,
    is_inference,
    normalise,
    statistics_group,
)
from xattn_kernels.modules.row_sharding import check_rows, convolve3x3, rows_of
from xattn_kernels.ops.autocast import cast_for_autocast, no_autocast
from xattn_kernels.ops.features import ACCUMULATORS
from xattn_kernels.ops.gradients import CHANNELS_LAST, in_order, with_plain_gradient
from xattn_kernels.ops.tracing import is_observed


class Projection(nn.Module):
    """1x1 convolution without bias, then batch norm: (B, C, H, W) -> (B, C, H, W)."""

    _stock: ClassVar[bool] = True

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        nn.init.xavier_uniform_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        [normalised] = normalise(self.bn, [self.conv(x)], rows_of(self))
        return normalised


class ProjectionSet(Freezable):
    """The five projections of one cross-attention: 5 C^2 + 10 C parameters."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query_project = nn.ModuleList(Projection(channels) for _ in range(2))
        self.key_project = nn.ModuleList(Projection(channels) for _ in range(2))
        self.value_project = Projection(channels)

    def projections(self) -> list[Projection]:
        """In the order of `functional.cross_attention_block`: 2 query, 2 key, 1 value layers."""
        return [*self.query_project, *self.key_project, self.value_project]


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

    def to(self, dtype: torch.dtype, memory_format: torch.memory_format) -> FoldedBlock:
        """In `dtype`, the weights in this memory format."""
        conv1, conv2 = (w.to(dtype, memory_format=memory_format) for w in (self.conv1, self.conv2))
        shortcut = self.shortcut
        if shortcut is not None:
            shortcut = shortcut.to(dtype, memory_format=memory_format)
        return FoldedBlock(conv1, self.bias1.to(dtype), conv2, self.bias2.to(dtype), shortcut)


class BasicBlock(Freezable):
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

    _stock: ClassVar[bool] = True

    def __init__(
        self, in_channels: int, out_channels: int, momentum: float, *, shortcut: bool = True
    ) -> None:
        super().__init__()
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
        refuse_proxies(self, x)
        rows = rows_of(self)
        if rows is not None:
            check_rows([x], rows)
            return self.over_processes([x])[0]
        observed = is_observed()
        stock = not observed and is_stock(self, own=True)
        if not (observed or stock) and is_stock(self, own=True, synchronised=True):
            return self.over_processes([x])[0]
        if (stock or observed) and is_inference([self], [x]):
            x = in_order(cast_for_autocast(x), CHANNELS_LAST)
            if stock and self._pays_to_fold(x):
                with no_autocast(x.device.type):
                    return self.folded("block", x.dtype)(x)
        x = with_plain_gradient(x)
        # In place only what nobody else holds: hooks and layers of others may keep what they gave.
        hidden = F.relu(self.bn1(self.conv1(x)), inplace=stock)
        residual = self.bn2(self.conv2(hidden))
        shortcut = x if self.downsample is None else self.downsample(x)
        residual = residual.add_(shortcut) if stock else residual + shortcut
        return F.relu(residual, inplace=True)

    def _pays_to_fold(self, x: Tensor) -> bool:
        """Whether folding takes less than batch norms: once, or of fewer weights than outputs."""
        return self._frozen is not None or self.conv1.weight.numel() <= x.numel()

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

    def folded(
        self,
        name: str,
        dtype: torch.dtype,
        change: Callable[[Tensor], Tensor] = lambda weight: weight,
    ) -> FoldedBlock:
        """The folded block in `dtype`; frozen under `name`. Needs `is_stock`.

        Args:
            name: for what it is frozen.
            dtype: of the result.
            change: of the weights of the convolutions that read the input.
        """
        # Convolutions take weights in channels_last fastest, but to bring them there takes longer.
        layout = torch.preserve_format if self._frozen is None else torch.channels_last
        work = ACCUMULATORS[dtype]

        def make() -> FoldedBlock:
            w1, b1 = fold(self.conv1, self.bn1, work, change)
            w2, b2 = fold(self.conv2, self.bn2, work)
            w3 = None
            if self.downsample is not None:
                w3, b3 = fold(*self.projected_shortcut(), work, change)
                b2 = b2 + b3
            return FoldedBlock(w1, b1, w2, b2, w3).to(dtype, layout)

        return self.derived((name, dtype), make)

    def projected_shortcut(self) -> tuple[nn.Conv2d, BatchNorm]:
        """Convolution and batch norm of the shortcut. Needs `is_stock` and a projected one."""
        assert self.downsample is not None
        convolution, norm = self.downsample
        assert isinstance(convolution, nn.Conv2d)
        assert isinstance(norm, BATCH_NORMS)
        return convolution, norm


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)

_LAYERS = (nn.Linear, nn.ReLU)


def is_stock(*modules: nn.Module, own: bool = False, synchronised: bool = False) -> bool:
    """Whether modules and all below them do what their parameters say and nothing else.

    Then others may compute it for them. Stock are the very classes of this package and of torch,
    not classes derived from them, with the settings that they were made with: 1x1 and 3x3
    convolutions that keep the size of a map. False with hooks, with a `forward` of an instance, or
    where a layer was replaced (a quantised, pruned, parametrised or dilated convolution): those
    have to be called. False as well for a `nn.SyncBatchNorm` whose batch spans processes, except
    for a caller that sees to it: `synchronised`.

    Args:
        modules: what to look at.
        own: whether `modules` ask for themselves, in their `forward`: then only what is below them
            counts.
        synchronised: see above.
    """
    stack = list(modules)
    count = len(stack) if own else 0
    while stack:
        module = stack.pop()
        kind = type(module)
        mine = len(stack) < count
        count = min(count, len(stack))
        if not mine and is_hooked(module):
            return False
        if kind in BATCH_NORMS:
            assert isinstance(module, BATCH_NORMS)
            if module.weight is None or module.bias is None:
                return False
            if not synchronised and statistics_group(module) is not None:
                return False
        elif kind is nn.Conv2d:
            if not keeps_size(module):
                return False
        elif kind in _CONTAINERS or "_stock" in kind.__dict__ or (mine and _is_block(module)):
            if _is_block(module) and not _is_complete(module):
                return False
            stack += [child for child in module._modules.values() if child is not None]
        elif kind not in _LAYERS:
            return False
    return True


def keeps_size(module: nn.Module, kernel: int | None = None) -> bool:
    """Whether a module is a dense 1x1 or 3x3 convolution with as many outputs as positions.

    Args:
        module: any module.
        kernel: the size of the kernel, if it has to be a certain one.
    """
    if type(module) is not nn.Conv2d or module.kernel_size not in ((1, 1), (3, 3)):
        return False
    padding = module.kernel_size[0] // 2
    return (
        (kernel is None or module.kernel_size == (kernel, kernel) == tuple(module.weight.shape[2:]))
        and module.padding in ((padding, padding), "same")
        and module.stride == module.dilation == (1, 1)
        and module.groups == 1
        and module.padding_mode == "zeros"
    )


def is_pointwise_norm(layers: nn.Module | None) -> bool:
    """Whether `layers` are a 1x1 convolution and a batch norm, in sequence."""
    return (
        type(layers) is nn.Sequential
        and len(layers) == 2
        and keeps_size(layers[0], 1)
        and type(layers[1]) in BATCH_NORMS
    )


def _is_block(module: nn.Module) -> bool:
    return isinstance(module, Projection | ProjectionSet | BasicBlock)


def _is_complete(module: nn.Module) -> bool:
    """Whether a block has the layers that it is made with."""
    if isinstance(module, Projection):
        return keeps_size(module.conv, 1) and type(module.bn) in BATCH_NORMS
    if isinstance(module, BasicBlock):
        return (
            keeps_size(module.conv1, 3)
            and keeps_size(module.conv2, 3)
            and (module.downsample is None or is_pointwise_norm(module.downsample))
        )
    assert isinstance(module, ProjectionSet)
    projections = module.projections()
    return len(projections) == 5 and all(type(p) is Projection for p in projections)


def check_stock(module: nn.Module) -> None:
    """Refuse to compute on split maps what would have to be called.

    Raises:
        RuntimeError: unless `module` is stock but for synchronised batch norms.
    """
    if not is_stock(module, own=True, synchronised=True):
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
