"""Training in several processes: batch statistics over ranks, feature maps split over ranks.

Data parallelism needs nothing from here: `torch.nn.SyncBatchNorm.convert_sync_batchnorm` and
`torch.nn.parallel.DistributedDataParallel` work as with any module. Images too large for one device
are split by rows of their feature maps: see `shard_rows`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from xattn_kernels.collectives import sum_over
from xattn_kernels.modules import CrossAttention, CrossScaleAttention, CrossTaskAttention
from xattn_kernels.modules.layers import BasicBlock
from xattn_kernels.modules.row_sharding import set_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["shard_rows", "sum_gradients"]

SUPPORTED = (CrossAttention, CrossTaskAttention, CrossScaleAttention, BasicBlock)


def shard_rows(module: nn.Module, group: ProcessGroup | None) -> nn.Module:
    """Have attention modules take their features to be some rows of maps split over `group`.

    Rank r of the group then passes its rows of every feature map, which follow those of rank r - 1,
    and gets its rows of the outputs. Outputs and gradients are those of the whole maps: attention
    states and batch statistics are summed over the ranks, the 3x3 convolutions of residual blocks
    read the neighbours' rows. How many rows a rank has may differ between ranks and between maps;
    at least one of each. All ranks have to run forward, backward and changes between train and eval
    mode alike.

    The loss of the whole maps is the sum of the ranks' losses, and so are the gradients of the
    parameters: `sum_gradients` sums them. Under DistributedDataParallel, which averages, multiply
    the loss by the size of the group instead. Batch norms other than `torch.nn.SyncBatchNorm` use
    the statistics of the group. Softmax attention and `CrossScaleHead` need whole maps.

    Args:
        module: a `CrossAttention`, `CrossTaskAttention`, `CrossScaleAttention` or `BasicBlock`, or
            nested `ModuleList`, `ModuleDict` and `Sequential` of these.
        group: the ranks that share the rows. None: maps are whole again.

    Returns:
        `module`, changed in place.

    Raises:
        TypeError: for other modules.
        ValueError: for softmax attention, and if this process is not of the group.
    """
    if group is not None and dist.get_rank(group) < 0:
        raise ValueError("group: this process is not one of its ranks")
    stack, found = [("module", module)], []
    while stack:
        name, child = stack.pop()
        if isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            stack += [(f"{name}.{key}", x) for key, x in child.named_children()]
        elif not isinstance(child, SUPPORTED):
            raise TypeError(
                f"{name}: got a {type(child).__name__}, expected one of "
                f"{[kind.__name__ for kind in SUPPORTED]} or containers of these"
            )
        elif getattr(child, "kind", "linear") != "linear":
            raise ValueError(f"{name}: got kind {child.kind!r}, expected 'linear'")
        else:
            found.append(child)
    for child in found:
        set_rows(child, group)
    return module


def sum_gradients(module: nn.Module, group: ProcessGroup | None = None) -> None:
    """Sum the parameters' gradients over ranks, in place, in one all-reduce per dtype.

    A gradient that a rank lacks counts as zero if another rank has it.

    Args:
        module: its parameters that require a gradient are the same on all ranks.
        group: the ranks; default: all.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        return
    group = group or dist.group.WORLD
    assert group is not None
    device = parameters[0].device
    present = torch.tensor([p.grad is not None for p in parameters], device=device)
    known = sum_over(present.long(), group).tolist()
    parameters = [p for p, count in zip(parameters, known, strict=True) if count]
    for dtype in dict.fromkeys(p.dtype for p in parameters):
        part = [p for p in parameters if p.dtype == dtype]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in part]
        total = sum_over(torch.cat([g.flatten() for g in gradients]), group)
        sizes = [g.numel() for g in gradients]
        for p, g, new in zip(part, gradients, total.split(sizes), strict=True):
            g.copy_(new.view_as(g))
            p.grad = g
