"""Batch norm without calling its module: which statistics apply, and updating the running ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xattn_kernels import collectives
from xattn_kernels.collectives import Reduction
from xattn_kernels.ops.features import ACCUMULATORS
from xattn_kernels.ops.library import forbid_double_backward
from xattn_kernels.ops.tracing import is_observed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: `SyncBatchNorm` differs from `BatchNorm2d` in training with several processes only.
BatchNorm = nn.BatchNorm2d | nn.SyncBatchNorm
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def uses_batch(bn: BatchNorm) -> bool:
    """Whether `bn` normalises with statistics of the batch rather than running ones."""
    return bn.training or bn.running_mean is None or bn.running_var is None


def statistics_group(bn: BatchNorm, rows: ProcessGroup | None = None) -> ProcessGroup | None:
    """The ranks whose batch `bn` normalises with; None: that of this process, or running ones.

    Those of its process group if it is a `torch.nn.SyncBatchNorm` in training, else those that
    share the rows of its input.

    Args:
        bn: a batch norm.
        rows: the ranks that share the rows of its input, if any do.

    Raises:
        ValueError: if the process group does not contain them.
    """
    if not uses_batch(bn):
        return None
    if not isinstance(bn, nn.SyncBatchNorm) or not bn.training:
        return rows
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group: ProcessGroup | None = bn.process_group or dist.group.WORLD
    assert group is not None
    if rows is not None:
        outside = {*dist.get_process_group_ranks(rows)} - {*dist.get_process_group_ranks(group)}
        if outside:
            raise ValueError(
                f"SyncBatchNorm: its process group lacks the ranks {sorted(outside)}, expected all "
                "that share the rows of its input"
            )
    return group if group.size() > 1 else None


def reduction_of(bn: BatchNorm, rows: ProcessGroup | None = None) -> Reduction:
    """What completes sums over tokens where all batch norms are as `bn`, see `norms_agree`."""
    return collectives.reduction(statistics_group(bn, rows), rows)


def norms_agree(norms: Sequence[BatchNorm]) -> bool:
    """Whether the norms agree in eps, in the kind of statistics and in whose batch these are."""
    eps, batch, group = norms[0].eps, uses_batch(norms[0]), statistics_group(norms[0])
    return all(
        bn.eps == eps and uses_batch(bn) == batch and statistics_group(bn) is group for bn in norms
    )


def own_parameters(module: nn.Module) -> Iterable[Tensor | None]:
    """The parameters of a module itself, also of a replica that `nn.DataParallel` made of it."""
    if getattr(module, "_is_replica", False):
        copies: dict[str, Tensor] = module._former_parameters  # type: ignore[assignment]
        return copies.values()
    return module._parameters.values()


def first_parameter(module: nn.Module) -> Tensor:
    """The first parameter below a module or a replica: features have its dtype and device."""
    return next(p for m in module.modules() for p in own_parameters(m) if p is not None)


def is_inference(blocks: Iterable[nn.Module], features: Iterable[Tensor]) -> bool:
    """Whether no gradient can be asked for and every batch norm below uses running statistics."""
    gradient = torch.is_grad_enabled()
    if gradient and any(x.requires_grad for x in features):
        return False
    stack = list(blocks)
    while stack:
        module = stack.pop()
        if isinstance(module, BATCH_NORMS) and uses_batch(module):
            return False
        if gradient and any(p is not None and p.requires_grad for p in own_parameters(module)):
            return False
        stack += [child for child in module._modules.values() if child is not None]
    return True


def fold(
    convolution: nn.Conv2d,
    norm: BatchNorm,
    dtype: torch.dtype,
    change: Callable[[Tensor], Tensor] = lambda weight: weight,
) -> tuple[Tensor, Tensor]:
    """A convolution and a norm with running statistics behind it as one affine map.

    Args:
        convolution: of any size.
        norm: what follows it.
        dtype: of the results.
        change: of the weight's inputs, before it is scaled.

    Returns:
        Weight (C_out, C_in, kH, kW) and bias (C_out) in `dtype`.
    """
    scale, shift = scale_and_shift(norm, convolution.bias, dtype)
    return change(convolution.weight.to(dtype)) * scale[:, None, None, None], shift


def scale_and_shift(
    norm: BatchNorm, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A norm with running statistics, of what a convolution leaves before its `bias` is added.

    Returns:
        Scale and shift, (C) in `dtype`.
    """
    gamma, beta, mean, var = (x.to(dtype) for x in affine_tensors(norm))
    scale = gamma * torch.rsqrt(var + norm.eps)
    shift = torch.addcmul(beta, mean, scale, value=-1)
    if bias is not None:
        shift = torch.addcmul(shift, bias.to(dtype), scale)
    return scale, shift


def affine_tensors(norm: BatchNorm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight, bias, running mean and running variance of a norm that has all of them."""
    gamma, beta = tensor_of(norm, "weight"), tensor_of(norm, "bias")
    mean, var = norm._buffers["running_mean"], norm._buffers["running_var"]
    assert mean is not None and var is not None
    return gamma, beta, mean, var


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """A parameter of a module or a replica; several times as fast as asking for the attribute."""
    x: Tensor | None = module._parameters.get(name)
    return getattr(module, name) if x is None else x


def check_size(x: Tensor) -> None:
    """Refuse batch statistics of a single value as torch does.

    Raises:
        ValueError: if `x` (B, C, H, W) has one value per channel.
    """
    if x.numel() == x.shape[1]:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.shape}"
        )


def update_running(bn: BatchNorm, mean: Tensor, var: Tensor) -> None:
    """Update running statistics as one training forward of `bn` does.

    Args:
        bn: a batch norm; nothing happens unless it trains and tracks statistics.
        mean: (C), of the batch.
        var: (C), of the batch, unbiased.
    """
    if not (bn.training and bn.track_running_stats):
        return
    count = bn.num_batches_tracked
    if count is not None:
        count.add_(1)
    for running, new in ((bn.running_mean, mean), (bn.running_var, var)):
        if running is None:
            continue
        factor: float | Tensor = 0.0 if bn.momentum is None else bn.momentum
        if bn.momentum is None and count is not None:
            factor = count.to(running.dtype).reciprocal()  # of all batches alike
        with _uncounted(running):
            running.lerp_(new.to(running.dtype), factor)


def _uncounted(*running: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context in which running statistics are written to without counting a version.

    As torch's own batch norm does, whose backward pass has saved them and does not read them.
    """
    if is_observed():
        return contextlib.nullcontext()
    context: Any = torch.autograd.grad_mode._unsafe_preserve_version_counter
    return context(running)  # type: ignore[no-any-return]


def update_running_of_each(
    norms: Sequence[BatchNorm], means: Sequence[Tensor], variances: Sequence[Tensor]
) -> None:
    """`update_running` of several batch norms, none of them twice, in a few operations."""
    momentum = norms[0].momentum
    counts, running, new = [], [], []
    for bn, mean, var in zip(norms, means, variances, strict=True):
        count, buffers = bn.num_batches_tracked, (bn.running_mean, bn.running_var)
        if bn.training and bn.track_running_stats and count is not None:
            counts.append(count)
            for x, y in zip(buffers, (mean, var), strict=True):
                if x is not None:
                    running.append(x)
                    new.append(y.to(x.dtype))
    alike = all(bn.momentum == momentum for bn in norms)
    if momentum is None or not alike or len(counts) < len(norms):
        for bn, mean, var in zip(norms, means, variances, strict=True):
            update_running(bn, mean, var)
        return
    torch._foreach_add_(counts, 1)
    with _uncounted(*running):
        torch._foreach_lerp_(running, new, momentum)


def normalise(
    norm: nn.Module, inputs: Sequence[Tensor], rows: ProcessGroup | None = None
) -> list[Tensor]:
    """`norm` of one input (B, C, H, W) after the other, for batches that span processes as well.

    In place of calling it for rows of maps that are split over `rows`, and where
    `SyncBatchNorm` gets tensors on CPU, which torch's own refuses. Then the inputs share their
    reductions, so their number must be the same on all ranks; their sizes need not.
    """
    known = type(norm) is nn.BatchNorm2d or type(norm) is nn.SyncBatchNorm
    synchronised = isinstance(norm, nn.SyncBatchNorm)
    on_cpu = inputs[0].device.type == "cpu"
    if known and not is_hooked(norm) and (on_cpu if synchronised else rows is not None):
        assert isinstance(norm, BATCH_NORMS)
        group = statistics_group(norm, rows)
        if group is not None:
            outputs: list[Tensor] = _normalise_over(norm, inputs, group)
            return outputs
        return [nn.modules.batchnorm._BatchNorm.forward(norm, x) for x in inputs]
    return [norm(x) for x in inputs]


def is_hooked(module: nn.Module) -> bool:
    """Whether calling `module` does more than the `forward` of its class."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
    )


@torch.compiler.disable
def _normalise_over(bn: BatchNorm, inputs: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    """Each input with the batch statistics of all ranks of `group`."""
    reduction = collectives.reduction(group, None)
    results = _BatchNorm.apply(bn.weight, bn.bias, bn.eps, reduction, *inputs)  # type: ignore[no-untyped-call]
    mean, var, count = results[-3:]
    if bool((count <= 1).any()):
        raise ValueError(
            "Expected more than 1 value per channel when training, got "
            f"{[int(n) for n in count]} in all processes"
        )
    with torch.no_grad():
        unbiased = var * (count / (count - 1)).unsqueeze(1)
        for new in zip(mean, unbiased, strict=True):
            update_running(bn, *new)
    return [*results[:-3]]


class _BatchNorm(torch.autograd.Function):
    """Ioffe, Szegedy, "Batch Normalization" (2015), algorithm 1, of batches that span processes.

    Gradients of scale and shift are this rank's share, as those of `torch.nn.SyncBatchNorm`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        reduction: Reduction,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        dtype = ACCUMULATORS[inputs[0].dtype]
        values = [x.to(dtype) for x in inputs]
        local = [x.mean(dim=_TOKENS) for x in values]
        squares = [
            (x - _as_map(m)).square().sum(dim=_TOKENS) for x, m in zip(values, local, strict=True)
        ]
        count = values[0].new_tensor([x.numel() // x.shape[1] for x in values])
        mean, deviations, count = reduction.moments(torch.stack(local), torch.stack(squares), count)
        var = deviations / count.unsqueeze(1)
        inverse_sigma = torch.rsqrt(var + eps)
        factor = inverse_sigma if weight is None else inverse_sigma * weight.to(dtype)
        outputs = []
        for x, y, m, f in zip(inputs, values, mean, factor, strict=True):
            y = (y - _as_map(m)) * _as_map(f)
            outputs.append((y if bias is None else y + _as_map(bias.to(dtype))).to(x.dtype))
        ctx.reduction = reduction
        ctx.save_for_backward(weight, mean, inverse_sigma, factor, count, *inputs)
        ctx.mark_non_differentiable(mean, var, count)
        return *outputs, mean, var, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        with torch.no_grad():
            found = _BatchNorm._gradients(ctx, saved, gradients)
        return forbid_double_backward(
            "batch norm over processes", found, (*saved, *gradients), "that of one process can"
        )

    @staticmethod
    def _gradients(
        ctx: Any, saved: Sequence[Any], gradients: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        weight, mean, inverse_sigma, factor, count, *inputs = saved
        dtype = mean.dtype
        pairs = []
        for x, g, m, r in zip(inputs, gradients[: len(inputs)], mean, inverse_sigma, strict=True):
            pairs.append((g.to(dtype), (x.to(dtype) - _as_map(m)) * _as_map(r)))
        sums = torch.stack(
            [torch.stack([g.sum(dim=_TOKENS), (g * y).sum(dim=_TOKENS)]) for g, y in pairs]
        )
        means = ctx.reduction.sums(sums) / count[:, None, None]
        through = [
            ((g - _as_map(a) - y * _as_map(b)) * _as_map(f)).to(inputs[0].dtype)
            for (g, y), (a, b), f in zip(pairs, means, factor, strict=True)
        ]
        own: list[Tensor | None] = [None, None]
        if weight is not None:
            beta, gamma = sums.sum(dim=0).to(weight.dtype)
            own = [gamma, beta]
        return *own, None, None, *through


_TOKENS = (0, 2, 3)


def _as_map(x: Tensor) -> Tensor:
    """(C) to combine with (B, C, H, W)."""
    return x[:, None, None]
