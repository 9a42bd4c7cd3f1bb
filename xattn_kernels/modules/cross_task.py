"""Cross-attention between the tasks of one scale, and the block that fuses what they find."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from xattn_kernels.modules.attend import Wiring, attend, attend_folded, choose_way
from xattn_kernels.modules.checks import (
    as_inputs,
    check_features,
    check_kind,
    check_names,
    check_recompute,
    check_width,
    in_format_of,
    shown,
    some,
)
from xattn_kernels.modules.cross_attention import CrossAttention
from xattn_kernels.modules.freezing import Freezable, refuse_proxies
from xattn_kernels.modules.fuse import FusionInputs, fuse
from xattn_kernels.modules.layers import BasicBlock, is_stock
from xattn_kernels.modules.normalisation import first_parameter, is_inference
from xattn_kernels.modules.row_sharding import check_rows, rows_of
from xattn_kernels.ops.autocast import no_autocast
from xattn_kernels.ops.gradients import with_plain_gradient
from xattn_kernels.ops.tracing import is_observed


class CrossTaskAttention(Freezable):
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
        recompute: "auto", True or False, see `CrossAttention`.

    Raises:
        ValueError: for duplicate names, a target that is no source, fewer than two sources, or
            other values of `channels`, `kind`, `heads` and `recompute`.
    """

    def __init__(
        self,
        tasks: Iterable[str],
        channels: int,
        auxiliary_tasks: Iterable[str] | None = None,
        *,
        kind: str = "linear",
        heads: int = 1,
        recompute: bool | str = "auto",
    ) -> None:
        tasks = check_names("tasks", tasks)
        channels = check_width("channels", channels)
        heads = check_kind(kind, heads, [channels])
        check_recompute(recompute, kind)
        sources = list(tasks)
        if auxiliary_tasks is not None:
            sources = list(check_names("auxiliary_tasks", auxiliary_tasks))
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
        self.tasks = tasks
        self.auxiliary_tasks = tuple(sources)
        self.channels = channels
        self.kind = kind
        self.heads = heads
        self.recompute = recompute
        others = {task: [a for a in sources if a != task] for task in self.tasks}
        self.dimensionality_reduction = BasicBlock(
            2 * (len(sources) - 1) * channels, channels, momentum=0.01
        )
        self.cross_attention = nn.ModuleDict(
            {
                task: nn.ModuleDict(
                    {
                        a: CrossAttention(channels, kind=kind, heads=heads, recompute=recompute)
                        for a in row
                    }
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

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Attend and fuse.

        Args:
            features: (B, C, H, W) for every source task, by name, in the parameters' dtype (under
                autocast, any). Sizes may differ between tasks.

        Returns:
            (B, C, H, W) for every target task in the order of `tasks`, in the size, dtype and
            memory format of the task's features.

        Raises:
            TypeError: for what is no dict, and for tensors of another dtype.
            ValueError: for missing or unknown tasks, other shapes or devices; in training, for a
                single value per channel.
        """
        refuse_proxies(self, features)
        if not isinstance(features, Mapping):
            raise TypeError(f"features: got {shown(features)}, expected a dict of tensors by task")
        missing = [task for task in self.auxiliary_tasks if task not in features]
        if missing or len(features) != len(self.auxiliary_tasks):
            raise ValueError(
                f"features: got tasks {some(features)}, expected {some(self.auxiliary_tasks)}"
            )
        sources = [features[name] for name in self.auxiliary_tasks]
        check_features(
            [
                (f"features[{name!r}]", x, self.channels)
                for name, x in zip(self.auxiliary_tasks, sources, strict=True)
            ],
            first_parameter(self),
        )
        check_rows(sources, rows_of(self))
        cast = as_inputs(sources)
        targets = [cast[self.auxiliary_tasks.index(task)] for task in self.tasks]
        others = len(sources) - 1
        blocks, block = self._blocks(), self.dimensionality_reduction
        inference = is_stock(block) and is_inference([self], cast)
        way = choose_way(blocks, cast, self.kind, self.recompute, inference)
        if way == "folded" and not is_observed():
            inputs = FusionInputs(targets, others)
            attend_folded(self, "blocks", blocks, self._wiring, cast, inputs.places)
            with no_autocast(sources[0].device.type):
                fused = inputs.fuse(block)
        else:
            if way == "folded":
                attended = attend_folded(self, "blocks", blocks, self._wiring, cast)
            else:
                attended = attend(way, blocks, self._wiring, cast)
            rows = [attended[i : i + others] for i in range(0, len(attended), others)]
            fused = fuse(block, [[x, *row] for x, row in zip(targets, rows, strict=True)])
        return {
            task: in_format_of(with_plain_gradient(features[task]) + y, features[task])
            for task, y in zip(self.tasks, fused, strict=True)
        }

    def _blocks(self) -> list[nn.Module]:
        """In the order of the edges."""
        rows = [*self.cross_attention.values()]
        return [block for row in rows for block in [*row.values()][::-1]]  # type: ignore[operator]

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, heads={self.heads}, recompute={self.recompute!r}"
