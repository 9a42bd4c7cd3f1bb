"""Cross-attention between the tasks of one scale, and the block that fuses what they find."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn_kernels.modules import normalisation
from xattn_kernels.modules.attend import Wiring, attend, attend_folded, can_pack, is_inference
from xattn_kernels.modules.cache import CacheOwner, DerivedCache
from xattn_kernels.modules.checks import (
    cast_for_autocast,
    check_features,
    check_kind,
    check_names,
    check_width,
    in_format_of,
    without_autocast,
)
from xattn_kernels.modules.cross_attention import CrossAttention
from xattn_kernels.modules.layers import BasicBlock, is_stock, sum_repeats
from xattn_kernels.ops.features import ACCUMULATORS

T = TypeVar("T")


class CrossTaskAttention(CacheOwner):
    """Every task attends to every other at one scale: the CTAM of SCA-MTL, its fuse block included.

    With a_1 .. a_n the other tasks of target t in their order and R one residual block for all::

        u_t = [x_t, CAM_ta_n(x_t, x_a_n), ..., x_t, CAM_ta_1(x_t, x_a_1)]      (B, 2nC, H, W)
        y_t = x_t + R(u_t)

    u_t is never formed: R's convolutions are linear, so the weights of the repeats of x_t are
    summed and x_t is read once. Kim, Choi, Min, "Sequential Cross Attention Based Multi-task
    Learning" (arXiv 2209.02518); reversed order and shared R as in the released code.

    Parameters and buffers are named ``cross_attention.<t>.<a>.*`` (`CrossAttention`) and
    ``dimensionality_reduction.{conv1,bn1,conv2,bn2,downsample.0,downsample.1}.*``. The running
    statistics of R are updated once per target task and forward, in the order of `tasks`.

    Args:
        tasks: names of the target tasks, which are the outputs.
        channels: width C.
        auxiliary_tasks: names of the tasks that are attended to, in the order of the sources.
            Contains the target tasks. Default: `tasks`.
        kind: "linear" or "softmax", see `CrossAttention`.
        heads: heads of kind "softmax"; divides C.

    Raises:
        ValueError: for duplicate names, a target that is no source, fewer than two sources, or
            other values of `channels`, `kind` and `heads`.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        channels: int,
        auxiliary_tasks: Sequence[str] | None = None,
        *,
        kind: str = "linear",
        heads: int = 1,
    ) -> None:
        check_names("tasks", tasks)
        check_width("channels", channels)
        check_kind(kind, heads, [channels])
        sources = list(tasks if auxiliary_tasks is None else auxiliary_tasks)
        if auxiliary_tasks is not None:
            check_names("auxiliary_tasks", auxiliary_tasks)
            missing = [task for task in tasks if task not in sources]
            if missing:
                raise ValueError(
                    f"auxiliary_tasks: got {sources}, expected the target tasks among them; "
                    f"{missing} are not"
                )
        if not tasks or len(sources) < 2:
            raise ValueError(
                f"tasks: got {list(tasks)} with sources {sources}, expected a target and at least "
                "two sources: a task does not attend to itself"
            )
        super().__init__()
        self.tasks = tuple(tasks)
        self.auxiliary_tasks = tuple(sources)
        self.channels = channels
        self.kind = kind
        self.heads = heads
        others = {task: [a for a in sources if a != task] for task in self.tasks}
        self.dimensionality_reduction = BasicBlock(
            2 * (len(sources) - 1) * channels, channels, momentum=0.01
        )
        self.cross_attention = nn.ModuleDict(
            {
                task: nn.ModuleDict(
                    {a: CrossAttention(channels, kind=kind, heads=heads) for a in row}
                )
                for task, row in others.items()
            }
        )
        # Sources in reverse order, as the fuse block reads them.
        pairs = [(task, a) for task, row in others.items() for a in reversed(row)]
        self._wiring = Wiring(
            tuple((sources.index(t), sources.index(a), i) for i, (t, a) in enumerate(pairs)),
            len(sources),
        )
        self._cache = DerivedCache()

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Attend and fuse.

        Args:
            features: (B, C, H, W) for every source task, by name, in the parameters' dtype (under
                autocast, any). Sizes may differ between tasks.

        Returns:
            (B, C, H, W) for every target task in the order of `tasks`, in the size, dtype and
            memory format of the task's features.

        Raises:
            TypeError: for tensors of another dtype.
            ValueError: for missing or unknown tasks, other shapes or devices; in training, for a
                single value per channel.
        """
        if set(features) != set(self.auxiliary_tasks):
            raise ValueError(
                f"features: got tasks {list(features)}, expected {list(self.auxiliary_tasks)}"
            )
        sources = [features[name] for name in self.auxiliary_tasks]
        check_features(
            [
                (f"features[{name!r}]", x, self.channels)
                for name, x in zip(self.auxiliary_tasks, sources, strict=True)
            ],
            self.dimensionality_reduction.conv1.weight,
        )
        cast = [cast_for_autocast(x) for x in sources]
        blocks = self._blocks()
        stock = can_pack(blocks, cast) and is_stock(self.dimensionality_reduction)
        if stock and self.kind == "linear" and is_inference([self], cast):
            with without_autocast(sources[0]):
                fused = self._infer(blocks, cast)
        else:
            if can_pack(blocks, cast):
                with without_autocast(sources[0]):
                    attended = attend(blocks, self._wiring, cast, self.kind, self.heads)
            else:
                attended = [
                    blocks[b](cast[target], cast[source])
                    for target, source, b in self._wiring.edges
                ]
            fused = self._fuse(cast, attended)
        return {
            task: in_format_of(features[task] + y, features[task])
            for task, y in zip(self.tasks, fused, strict=True)
        }

    def _blocks(self) -> list[CrossAttention]:
        """In the order of the edges."""
        modules = [m for row in self.cross_attention.values() for m in [*row.children()][::-1]]
        return [block for block in modules if isinstance(block, CrossAttention)]

    def _fuse(self, features: Sequence[Tensor], attended: Sequence[Tensor]) -> list[Tensor]:
        """R(u_t) of every target, differentiably, with R's statistics of each in turn."""
        block = self.dimensionality_reduction
        convolution, norm = block.downsample
        assert isinstance(convolution, nn.Conv2d)
        stock = is_stock(block)
        weight = sum_repeats(block.conv1.weight, self.channels)
        shortcut = sum_repeats(convolution.weight, self.channels)
        fused = []
        for x, row in self._by_target(features, attended):
            if not stock:
                fused.append(block(torch.cat([part for y in row for part in (x, y)], dim=1)))
                continue
            parts = [part.contiguous(memory_format=torch.channels_last) for part in (x, *row)]
            u = torch.cat(parts, dim=1)
            hidden = F.relu(
                block.bn1(F.conv2d(u, weight, block.conv1.bias, padding=1)), inplace=True
            )
            residual = block.bn2(block.conv2(hidden))
            residual += norm(F.conv2d(u, shortcut, convolution.bias))
            fused.append(F.relu(residual, inplace=True))
        return fused

    def _infer(self, blocks: Sequence[CrossAttention], features: Sequence[Tensor]) -> list[Tensor]:
        """R(u_t) of every target with all batch norms folded, attended maps written in place."""
        block = self.dimensionality_reduction
        shortcut, shortcut_norm = block.downsample
        assert isinstance(shortcut, nn.Conv2d) and isinstance(shortcut_norm, nn.BatchNorm2d)
        pairs = [(block.conv1, block.bn1), (block.conv2, block.bn2), (shortcut, shortcut_norm)]
        dtype = features[0].dtype

        def make() -> tuple[Tensor, ...]:
            folded = [normalisation.fold([c], [bn], ACCUMULATORS[dtype]) for c, bn in pairs]
            (w1, b1), (w2, b2), (w3, b3) = ((w[0], b[0]) for w, b in folded)
            w1, w3 = (sum_repeats(w, self.channels) for w in (w1, w3))
            parts = (w1, b1, w2, b2 + b3, w3)
            return tuple(part.to(dtype) for part in parts)

        sources = [x for conv, bn in pairs for x in normalisation.tensors(conv, bn)]
        eps = tuple(bn.eps for _, bn in pairs)
        w1, b1, w2, b2, w3 = self._cache.get("fuse", sources, (dtype, eps), make)

        width = self.channels
        buffers, outputs = [], []
        for x, row in self._by_target(features, self._wiring.edges):
            channels = (1 + len(row)) * width
            buffer = x.new_empty((x.shape[0], *x.shape[2:], channels)).permute(0, 3, 1, 2)
            buffer[:, :width] = x
            outputs += buffer.split(width, dim=1)[1:]
            buffers.append(buffer)
        attend_folded(blocks, self._wiring, features, self._cache, "blocks", outputs)
        fused = []
        for buffer in buffers:
            hidden = F.conv2d(buffer, w1, b1, padding=1).relu_()
            residual = F.conv2d(hidden, w2, b2, padding=1)
            fused.append(residual.add_(F.conv2d(buffer, w3)).relu_())
        return fused

    def _by_target(
        self, features: Sequence[Tensor], per_edge: Sequence[T]
    ) -> list[tuple[Tensor, Sequence[T]]]:
        """The features of every target with what belongs to its edges."""
        others = len(self.auxiliary_tasks) - 1
        return [
            (features[self.auxiliary_tasks.index(task)], per_edge[i * others : (i + 1) * others])
            for i, task in enumerate(self.tasks)
        ]

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, heads={self.heads}"
