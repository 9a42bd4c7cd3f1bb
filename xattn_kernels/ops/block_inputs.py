"""Features, folded weights and outputs of the cross-attention block, checked against each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xattn_kernels.ops.autocast import autocast_dtype, cast_for_autocast
from xattn_kernels.ops.cross_attention_block_training.layers import LAYERS, Parameters
from xattn_kernels.ops.features import (
    ACCUMULATORS,
    as_list,
    check_first,
    describe,
    flatten,
)
from xattn_kernels.ops.overlap import first_overlap
from xattn_kernels.ops.tracing import is_observed
from xattn_kernels.schedule import Schedule


class BlockInputs(NamedTuple):
    """Checked slots, flattened to (B, C, N)."""

    features: list[Tensor]
    spatial: list[torch.Size]
    """The shape of each slot after its channels, as the caller gave it."""


def check_block_inputs(
    features: Sequence[Tensor], weight: Tensor, bias: Tensor, schedule: Schedule
) -> BlockInputs:
    """Check types, shapes and slot counts; cast under autocast; flatten to (B, C, N).

    Raises:
        TypeError: for tensors that the operator cannot work on, or of mixed dtypes.
        ValueError: for shapes, devices or numbers of slots that do not fit each other, and for an
            output whose edges differ in weight id: they share one query projection.
    """
    inputs = check_slots(features, schedule)
    check_block_weights(weight, bias, inputs.features[0].dtype, inputs.features[0])
    if weight.size(0) != schedule.num_weights:
        raise ValueError(
            f"weight: got {weight.size(0)} sets of projections, the schedule has "
            f"{schedule.num_weights}"
        )
    return inputs


def check_training_inputs(
    features: Sequence[Tensor],
    weight: Tensor | Sequence[Tensor],
    gamma: Tensor | Sequence[Tensor],
    beta: Tensor | Sequence[Tensor],
    running_mean: Tensor | Sequence[Tensor] | None,
    running_var: Tensor | Sequence[Tensor] | None,
    schedule: Schedule,
) -> tuple[BlockInputs, Parameters]:
    """As `check_block_inputs`, with batch norms; parameters are returned layer by layer.

    Raises:
        TypeError: for tensors that the operator cannot work on, or of mixed dtypes.
        ValueError: for shapes, devices or numbers of slots or layers that do not fit each other,
            and for a running mean without variance, or the reverse.
    """
    inputs = check_slots(features, schedule)
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(f"{missing}: got None, expected both running statistics or neither")
    first, count = inputs.features[0], schedule.num_weights
    vectors = {
        "gamma": gamma,
        "beta": beta,
        "running_mean": () if running_mean is None else running_mean,
        "running_var": () if running_var is None else running_var,
    }
    channels = first.size(1)
    matrices = ((channels, channels), (channels, channels, 1, 1))
    groups = [_layers("weight", weight, matrices, count, first)]
    groups += [
        [] if isinstance(x, tuple) and not x else _layers(name, x, ((channels,),), count, first)
        for name, x in vectors.items()
    ]
    return inputs, Parameters(*groups)


def _layers(
    name: str,
    group: Tensor | Sequence[Tensor],
    shapes: Sequence[tuple[int, ...]],
    count: int,
    features: Tensor,
) -> list[Tensor]:
    """Check parameters of 5 `count` layers, stacked or one by one; return them one by one."""
    stacked = (count, LAYERS, *shapes[0])
    if isinstance(group, Tensor):
        if group.shape != stacked:
            raise ValueError(f"{name}: got {describe(group)}, expected shape {stacked}")
        layers = list(group.flatten(0, 1).unbind())
    else:
        layers = as_list(name, group)
        if len(layers) != count * LAYERS:
            raise ValueError(
                f"{name}: got {len(layers)} tensors, expected {count * LAYERS}, or one of shape "
                f"{stacked}"
            )
    dtypes = (features.dtype, ACCUMULATORS[features.dtype])
    for i, x in enumerate(layers):
        if not isinstance(x, Tensor) or x.layout is not torch.strided or x.dtype not in dtypes:
            expected = " or ".join(dict.fromkeys(str(dtype) for dtype in dtypes))
            raise TypeError(f"{name}[{i}]: got {describe(x)}, expected a dense {expected} tensor")
        if tuple(x.shape) not in shapes or x.device != features.device:
            raise ValueError(
                f"{name}[{i}]: got {describe(x)}, expected shape "
                f"{' or '.join(map(str, shapes))} on {features.device}"
            )
    return layers


def check_slots(features: Sequence[Tensor], schedule: Schedule) -> BlockInputs:
    """`check_block_inputs` without the weights."""
    slots = as_list("features", features)
    first = slots[0]
    check_first("features[0]", first)
    if autocast_dtype(first.device.type) is not None:
        slots = [cast_for_autocast(x) if isinstance(x, Tensor) else x for x in slots]
        first = slots[0]
    spatial = [x.shape[2:] for x in slots]
    (slots,) = flatten(("features",), (slots,), first)
    for slot, x in enumerate(slots):
        if x.size(1) != first.size(1):
            raise ValueError(
                f"features[{slot}]: got {x.size(1)} channels, expected {first.size(1)} as the "
                "first tensor has"
            )
    count = max(schedule.num_queries, schedule.num_sources)
    if len(slots) != count:
        raise ValueError(f"features: got {len(slots)} slots, the schedule has {count}")
    for number, edge in enumerate(schedule.edges):
        expected = schedule.groups[edge.output][0].weight
        if edge.weight != expected:
            raise ValueError(
                f"schedule: edge {number} {tuple(edge)}: got weight id {edge.weight}, expected "
                f"{expected} as the other edges of output slot {edge.output}"
            )
    return BlockInputs(slots, spatial)


def check_block_weights(
    weight: Tensor, bias: Tensor, dtype: torch.dtype | None, features: Tensor | None = None
) -> None:
    """Check folded projections: (W, 5, C, C) and (W, 5, C), of one dtype and device.

    Args:
        weight: the weights.
        bias: the biases.
        dtype: that of the features, None for that of the weights.
        features: a slot, to have its width and device.

    Raises:
        TypeError: unless both have the dtype of the features or, for 16-bit features, float32.
        ValueError: for other shapes or devices.
    """
    for name, x in (("weight", weight), ("bias", bias)):
        if not isinstance(x, Tensor) or x.layout is not torch.strided:
            raise TypeError(f"{name}: got {describe(x)}, expected a dense tensor")
    if dtype not in (None, *ACCUMULATORS) or weight.dtype not in ACCUMULATORS:
        raise TypeError(
            f"dtype: got {dtype or weight.dtype}, expected float32, float64, bfloat16 or float16"
        )
    dtype = dtype or weight.dtype
    if weight.dtype not in (dtype, ACCUMULATORS[dtype]):
        expected = " or ".join(dict.fromkeys(str(x) for x in (dtype, ACCUMULATORS[dtype])))
        raise TypeError(f"weight: got {describe(weight)}, expected {expected}")
    if bias.dtype is not weight.dtype:
        raise TypeError(f"bias: got {describe(bias)}, expected {weight.dtype} as weight has")
    if weight.dim() != 4:
        raise ValueError(f"weight: got {describe(weight)}, expected shape (W, 5, C, C)")
    channels = weight.size(3) if features is None else features.size(1)
    device = weight.device if features is None else features.device
    shape = (weight.size(0), 5, channels)
    for name, x, expected_shape in (("weight", weight, (*shape, channels)), ("bias", bias, shape)):
        if x.shape != expected_shape:
            raise ValueError(f"{name}: got {describe(x)}, expected shape {expected_shape}")
        if x.device != device or x.is_meta:
            raise ValueError(f"{name}: got {describe(x)}, expected a tensor on {device}")


def check_outputs(
    out: Sequence[Tensor], inputs: BlockInputs, others: Sequence[Tensor], schedule: Schedule
) -> list[Tensor]:
    """Return given outputs as (B, C, N).

    Args:
        out: what the caller gave.
        inputs: the features.
        others: what is read besides.
        schedule: the edges.

    Raises:
        TypeError: for outputs of another dtype than the features.
        ValueError: for another number, shape or device of outputs; for outputs whose spatial
            dimensions have no common stride; for memory that is shared with an input, with
            another output, or within an output.
    """
    queries = schedule.output_queries
    if isinstance(out, Tensor) or len(out) != len(queries):
        raise ValueError(
            f"out: got {describe(out) if isinstance(out, Tensor) else f'{len(out)} tensors'}, "
            f"expected a sequence of {len(queries)} tensors"
        )
    flat = []
    for slot, (x, q) in enumerate(zip(out, queries, strict=True)):
        query = inputs.features[q]
        shape = (*query.shape[:2], *inputs.spatial[q])
        if not isinstance(x, Tensor) or x.dtype is not query.dtype:
            raise TypeError(f"out[{slot}]: got {describe(x)}, expected a {query.dtype} tensor")
        if x.layout is not torch.strided or x.device != query.device or x.shape != shape:
            raise ValueError(
                f"out[{slot}]: got {describe(x)}, expected shape {shape} on {query.device}"
            )
        if not is_observed() and x.is_neg():
            raise ValueError(f"out[{slot}]: got a tensor with the negative bit, expected none")
        try:
            flat.append(x.view(query.shape))
        except RuntimeError:
            raise ValueError(
                f"out[{slot}]: got strides {x.stride()}, expected spatial dimensions with a "
                "common stride"
            ) from None
    if not is_observed():  # tensors that stand for others have no addresses
        _check_memory(flat, [*inputs.features, *others])
    return flat


def _check_memory(outputs: list[Tensor], inputs: list[Tensor]) -> None:
    overlap = first_overlap(outputs, inputs)
    if overlap is None:
        return
    i, j = overlap
    if i == j:
        raise ValueError(f"out[{i}]: got strides {outputs[i].stride()}: its elements share memory")
    other = f"out[{j}]" if j < len(outputs) else "an input"
    raise ValueError(f"out[{i}]: shares memory with {other}, expected its own")
