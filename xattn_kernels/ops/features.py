"""Feature lists: what every operator checks and does with its (B, C, N) tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xattn_kernels.ops.gradients import with_plain_gradient

#: Element types of features, and the type in which states, sums and divisions are kept.
ACCUMULATORS = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}

#: One tensor, or one per slot.
Features = Tensor | Sequence[Tensor]


def as_list(name: str, features: Features) -> list[Tensor]:
    """Return the slots of an argument that may be one tensor or a sequence of them."""
    if isinstance(features, Tensor):
        return [features]
    if isinstance(features, list) and features:
        return features
    if not isinstance(features, Sequence) or isinstance(features, str) or not features:
        raise TypeError(
            f"{name}: got {describe(features)}, expected a tensor or a non-empty sequence of them"
        )
    return list(features)


def check_first(name: str, x: Tensor) -> None:
    """Check that the tensor that the others are compared with is one to work on.

    Raises:
        TypeError: if it is not a Tensor or its dtype is not one of the four floating-point types.
        ValueError: if it is on the meta device or not (B, C, N) or (B, C, H, W).
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {describe(x)}, expected a Tensor")
    if x.dtype not in ACCUMULATORS:
        raise TypeError(
            f"{name}: got {describe(x)}, expected float32, float64, bfloat16 or float16"
        )
    if x.is_meta:
        raise ValueError(f"{name}: got {describe(x)}, expected a tensor with data")
    if x.dim() not in (3, 4):
        raise ValueError(f"{name}: got {describe(x)}, expected shape (B, C, N) or (B, C, H, W)")


def flatten(
    names: Sequence[str], slots: Sequence[list[Tensor]], first: Tensor
) -> list[list[Tensor]]:
    """Check the slots of each argument against the first tensor of all; return them as (B, C, N).

    A list without 4-D tensors or gradients is returned itself. A 4-D tensor is copied only when its
    two spatial dimensions have no common stride. Gradients will have the strides of what was given.

    Raises:
        TypeError: for anything but strided tensors of the dtype of ``first``.
        ValueError: for another batch size or device than that of ``first``, no channels, or other
            shapes.
    """
    dtype, device, batch = first.dtype, first.device, first.size(0)
    flat = []
    gradient = torch.is_grad_enabled()
    for argument in slots:
        changed = False
        for x in argument:
            if (
                not isinstance(x, Tensor)
                or x.dtype is not dtype
                or x.layout is not torch.strided
                or x.device != device
                or (dims := x.dim()) not in (3, 4)
                or x.size(0) != batch
                or x.size(1) == 0
            ):
                _reject(names, slots, first)
            changed = changed or dims == 4 or (gradient and x.requires_grad)
        flat.append([_tokens(x) for x in argument] if changed else argument)
    return flat


def _tokens(x: Tensor) -> Tensor:
    """(B, C, N) or (B, C, H, W) as (B, C, N)."""
    x = with_plain_gradient(x)
    return x.flatten(2) if x.dim() == 4 else x


def is_token_major(x: Tensor) -> bool:
    """Whether the channels of one token of a (B, C, N) tensor lie together, as in channels_last."""
    return x.stride(1) == 1 and x.stride(2) > 1


def new_output(query: Tensor, channels: int) -> Tensor:
    """An uninitialised (B, channels, N) output for ``query``, in its memory format."""
    batch, _, tokens = query.shape
    if is_token_major(query):
        return query.new_empty(batch, tokens, channels).transpose(1, 2)
    return query.new_empty(batch, channels, tokens)


def new_state(query: Tensor, *shape: int) -> Tensor:
    """An uninitialised tensor of the type in which ``query`` is accumulated."""
    dtype = ACCUMULATORS[query.dtype]
    if dtype is query.dtype:  # a third faster
        return query.new_empty(*shape)
    return query.new_empty(shape, dtype=dtype)


def in_format_of(query: Tensor, output: Tensor) -> Tensor:
    """``output`` as the operators return it: in the dtype and the memory format of ``query``."""
    output = output.to(query.dtype)
    if is_token_major(query):
        return output.transpose(1, 2).contiguous().transpose(1, 2)
    return output.contiguous()


def group_by_output(edges: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Turn flat (query, source, output) triples into one (query, sources) per output slot."""
    if len(edges) == 3:
        return [(edges[0], [edges[1]])]
    groups: dict[int, tuple[int, list[int]]] = {}
    for query, source, output in zip(edges[0::3], edges[1::3], edges[2::3], strict=True):
        groups.setdefault(output, (query, []))[1].append(source)
    return [groups[output] for output in sorted(groups)]


def describe(x: object) -> str:
    """What was given, for error messages."""
    if not isinstance(x, Tensor):
        return type(x).__name__
    layout = "" if x.layout is torch.strided else f" {str(x.layout).removeprefix('torch.')}"
    dtype = str(x.dtype).removeprefix("torch.")
    return f"a{layout} {dtype} tensor of shape {tuple(x.shape)} on {x.device}"


def _reject(names: Sequence[str], slots: Sequence[list[Tensor]], first: Tensor) -> None:
    for name, argument in zip(names, slots, strict=True):
        for slot, x in enumerate(argument):
            _check(f"{name}[{slot}]", x, first)


def _check(name: str, x: object, first: Tensor) -> None:
    got = f"{name}: got {describe(x)}, expected"
    if not isinstance(x, Tensor):
        raise TypeError(f"{got} a Tensor")
    if x.layout is not torch.strided:
        raise TypeError(f"{got} a dense (strided) tensor")
    if x.dtype is not first.dtype:
        dtype = str(first.dtype).removeprefix("torch.")
        raise TypeError(f"{got} {dtype} as the first tensor has; dtypes are not promoted")
    if x.device != first.device:
        raise ValueError(f"{got} a tensor on {first.device}, where the first tensor is")
    if x.dim() not in (3, 4):
        raise ValueError(f"{got} shape (B, C, N) or (B, C, H, W)")
    if x.size(0) != first.size(0):
        raise ValueError(f"{got} batch size {first.size(0)} as the first tensor has")
    if x.size(1) == 0:
        raise ValueError(f"{got} at least one channel")
