"""The passes of the cross-attention block in training in Triton, each for all pairs at once.

`reference.py` says what each computes. A pass is one launch (`source_sums`: two, keys and values)
that computes everything it needs from the features and, where it sums over tokens, a second one
that adds what chunks of tokens gave, in a fixed order. Nothing of the size of a feature map is
stored but what a pass is to write.

Kernels that sum (C, C) products for a group of rows compute all else again for every group. Where
groups are needed, gradients of features are left to a launch of their own.

Products of bfloat16 features are of bfloat16 operands, those of float16 features of tf32 operands;
states, statistics and sums are float32. Where a block is too wide for its precision to have a tile
in registers (:func:`is_fused`), a pass is made of matrix products of torch in float32: the
reference, one pair at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xattn_kernels.engines.triton import runtime
from xattn_kernels.engines.triton.launch import launch
from xattn_kernels.engines.triton.runtime import blocks, ceil_div, layout, layout_constants
from xattn_kernels.engines.triton.training_calls import Call, Gradients
from xattn_kernels.engines.triton.training_tiles import Tiles, is_fused, tiles_of
from xattn_kernels.ops.cross_attention_block_training import reference
from xattn_kernels.problem import Problem

#: Center, first layer and its bias, second layer, affine map.
_Layers = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def refusals(problem: Problem) -> list[str]:
    """Why this engine cannot run a problem."""
    return runtime.refusals(problem)


def moments(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Means (S, C) and deviations (S, C, C), computed in float32."""
    call = Call(features, range(len(features)))
    if not is_fused("moments", call.channels, call.dot):
        return reference.moments(features)
    tiles = tiles_of("moments", call.channels, call.dot)
    chunks = call.chunks(call.channels)
    with call.running():
        from xattn_kernels.engines.triton.training_kernels import moments_kernel

        call.launch(
            moments_kernel,
            chunks,
            chunks.sums,
            call.rows,
            **_rows(tiles),
            BN=tiles.tokens,
            warps=tiles.warps,
        )
        mean, deviations = call.merge(chunks)
        return mean.double(), deviations.double()


def first_moments(
    features: Sequence[Tensor],
    center: Tensor,
    slots: Sequence[int],
    weight: Tensor,
    precise: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Nothing is measured."""
    mean, deviations = (weight.new_zeros(weight.shape[:2], dtype=torch.float64) for _ in range(2))
    return mean, deviations, mean.new_zeros(len(slots))


def hidden_moments(
    features: Sequence[Tensor],
    center: Tensor,
    slots: Sequence[int],
    first: Tensor,
    first_affine: Tensor,
    second: Tensor,
) -> tuple[Tensor, Tensor]:
    """Means and squared deviations (P, C) of the second layer, computed in float32."""
    call = Call(features, slots)
    if not is_fused("hidden_moments", call.channels, call.dot):
        return reference.hidden_moments(features, center, slots, first, first_affine, second)
    tiles = tiles_of("hidden_moments", call.channels, call.dot)
    chunks = call.chunks(1)
    with call.running():
        from xattn_kernels.engines.triton.training_kernels import hidden_kernel

        call.launch(
            hidden_kernel,
            chunks,
            center,
            *_first(call, first, first_affine),
            call.operand(second),
            chunks.sums,
            call.rows,
            call.pairs,
            BK=tiles.step,
            BN=tiles.tokens,
            warps=tiles.warps,
        )
        mean, deviations = call.merge(chunks)
        return mean.double(), deviations.squeeze(1).double()


def states(
    features: Sequence[Tensor],
    center: Tensor,
    slots: Sequence[int],
    first: Tensor,
    first_affine: Tensor,
    second: Tensor,
    affine: Tensor,
) -> tuple[Tensor, Tensor]:
    """S (P, B, C, C) and Z (P, B, C)."""
    call = Call(features, slots)
    if not is_fused("states", call.channels, call.dot):
        return reference.states(features, center, slots, first, first_affine, second, affine)
    tiles = tiles_of("states", call.channels, call.dot)
    chunks = call.chunks(call.channels)
    each = call.each()
    with call.running():
        from xattn_kernels.engines.triton.training_kernels import state_kernel

        call.launch(
            state_kernel,
            chunks,
            *_layers(call, center, first, first_affine, second, affine),
            chunks.sums,
            call.rows,
            call.pairs,
            **_rows(tiles),
            BK=tiles.step,
            BN=tiles.tokens,
            warps=tiles.warps,
        )
        return call.reduce(chunks, each, len(slots))


def attend(
    features: Sequence[Tensor],
    center: Tensor,
    slots: Sequence[int],
    first: Tensor,
    first_affine: Tensor,
    second: Tensor,
    affine: Tensor,
    target_of_output: Sequence[int],
    state_s: Tensor,
    state_z: Tensor,
    eps: float,
    outputs: Sequence[Tensor],
) -> None:
    """Write the outputs (B, C, N)."""
    call = Call(features, slots)
    if not is_fused("attend", call.channels, call.dot):
        reference.attend(
            features, center, slots, first, first_affine, second, affine, target_of_output, state_s,
            state_z, eps, outputs,
        )  # fmt: skip
        return
    lists = call.table.add_lists(_outputs_of(target_of_output, len(slots)))
    output_rows = call.table.add_slots(outputs)
    tiles = tiles_of("attend", call.channels, call.dot)
    steps = blocks(call.tokens, tiles.tokens)
    with call.running():
        from xattn_kernels.engines.triton.training_kernels import attend_kernel

        launch(
            attend_kernel,
            steps * call.batch * len(slots),
            call.device_table,
            *_layers(call, center, first, first_affine, second, affine),
            call.operand(state_s),
            state_z,
            call.rows,
            call.pairs,
            lists,
            output_rows,
            call.batch,
            steps,
            eps,
            **call.constants,
            **call.halves,
            **layout_constants(O=layout(outputs)),
            BR=tiles.rows[0],
            BK=tiles.step,
            BN=tiles.tokens,
            warps=tiles.warps,
        )


def target_sums(
    features: Sequence[Tensor],
    center: Tensor,
    slots: Sequence[int],
    first: Tensor,
    first_affine: Tensor,
    second: Tensor,
    affine: Tensor,
    target_of_output: Sequence[int],
    state_s: Tensor,
    state_z: Tensor,
    eps: float,
    grad_outputs: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients dS (O, B, C, C) and dZ (O, B, C), and sums (P, 2, C)."""
    call = Call(features, [slots[pair] for pair in target_of_output])
    if not is_fused("target_sums", call.channels, call.dot):
        return reference.target_sums(
            features, center, slots, first, first_affine, second, affine, target_of_output, state_s,
            state_z, eps, grad_outputs,
        )  # fmt: skip
    count = len(target_of_output)
    places = call.table.add(
        [x for both in zip(target_of_output, call.slots, strict=True) for x in both]
    )
    by_pair = call.table.add_lists(_outputs_of(target_of_output, len(slots)))
    each = call.each()
    gradient_rows = call.table.add_slots(grad_outputs)
    tiles = tiles_of("target_sums", call.channels, call.dot)
    chunks, sums = call.chunks(call.channels), call.chunks(1)
    with call.running():
        from xattn_kernels.engines.triton.training_sums_kernels import target_sums_kernel

        about_mean, mean = _about_mean(state_s, state_z)
        call.launch(
            target_sums_kernel,
            chunks,
            *_layers(call, center, first, first_affine, second, affine),
            call.operand(about_mean),
            state_z,
            mean,
            chunks.sums,
            sums.sums,
            call.rows,
            places,
            gradient_rows,
            eps,
            **layout_constants(G=layout(grad_outputs)),
            **_rows(tiles),
            BK=tiles.step,
            BN=tiles.tokens,
            warps=tiles.warps,
        )
        return *call.reduce(chunks, each, count), call.total(sums, by_pair, len(slots))


def target_gradients(
    features: Sequence[Tensor],
    center: Tensor,
    slots: Sequence[int],
    first: Tensor,
    first_affine: Tensor,
    second: Tensor,
    affine: Tensor,
    target_of_output: Sequence[int],
    state_s: Tensor,
    state_z: Tensor,
    eps: float,
    grad_outputs: Sequence[Tensor],
    coefficients: Tensor,
    precise: Tensor,
    grad_features: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums for the query layers (P, C, C), (P, C, C), (P, C); adds to `grad_features`."""
    call = Call(features, slots)
    if not is_fused("target_gradients", call.channels, call.dot):
        return reference.target_gradients(
            features, center, slots, first, first_affine, second, affine, target_of_output, state_s,
            state_z, eps, grad_outputs, coefficients, precise, grad_features,
        )  # fmt: skip
    lists = call.table.add_lists(_outputs_of(target_of_output, len(slots)))
    gradient_rows = call.table.add_slots(grad_outputs)
    with runtime.device_of(features[0]):
        about_mean, mean = _about_mean(state_s, state_z)
    return _gradients(
        call,
        (
            *_layers(call, center, first, first_affine, second, affine),
            call.operand(about_mean),
            state_z,
            mean,
        ),
        coefficients,
        (lists, gradient_rows, eps),
        grad_features,
        SOURCE=False,
        **layout_constants(G=layout(grad_outputs)),
    )


def source_sums(
    features: Sequence[Tensor],
    center: Tensor,
    slots: Sequence[int],
    first: Tensor,
    first_affine: Tensor,
    second: Tensor,
    affine: Tensor,
    grad_s: Tensor,
    grad_z: Tensor,
    precise: Tensor,
    grad_features: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums (P, 2, C), and those for the value layer (P, C, C), (P, C); adds to `grad_features`."""
    call = Call(features, slots)
    if not is_fused("source_sums", call.channels, call.dot):
        return reference.source_sums(
            features, center, slots, first, first_affine, second, affine, grad_s, grad_z,
            precise, grad_features,
        )  # fmt: skip
    each = call.each()
    chunks, sums = call.chunks(call.channels), call.chunks(1)
    launches = Gradients(
        call, chunks, tiles_of("values", call.channels, call.dot), grad_features, ["SUMS"]
    )
    with call.running():
        from xattn_kernels.engines.triton.training_gradient_kernels import value_gradient_kernel
        from xattn_kernels.engines.triton.training_sums_kernels import key_sums_kernel

        layers = _layers(call, center, first, first_affine, second, affine)
        states = call.operand(grad_s)
        tiles = tiles_of("key_sums", call.channels, call.dot)
        call.launch(
            key_sums_kernel,
            sums,
            *layers,
            states,
            grad_z,
            sums.sums,
            call.rows,
            call.pairs,
            BK=tiles.step,
            BN=tiles.tokens,
            warps=tiles.warps,
        )
        launches.run(value_gradient_kernel, *layers, states, chunks.sums, call.rows)
        product, bias = call.reduce(chunks, each, len(slots))
        return call.total(sums, each, len(slots)), product.sum(1).double(), bias.sum(1)


def source_gradients(
    features: Sequence[Tensor],
    center: Tensor,
    slots: Sequence[int],
    first: Tensor,
    first_affine: Tensor,
    second: Tensor,
    affine: Tensor,
    grad_s: Tensor,
    grad_z: Tensor,
    coefficients: Tensor,
    precise: Tensor,
    grad_features: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The same as :func:`target_gradients` for the key layers."""
    call = Call(features, slots)
    if not is_fused("source_gradients", call.channels, call.dot):
        return reference.source_gradients(
            features, center, slots, first, first_affine, second, affine, grad_s, grad_z,
            coefficients, precise, grad_features,
        )  # fmt: skip
    return _gradients(
        call,
        (
            *_layers(call, center, first, first_affine, second, affine),
            call.operand(grad_s),
            grad_z,
            grad_z,
        ),
        coefficients,
        (0, 0, 0.0),
        grad_features,
        SOURCE=True,
        **layout_constants(G=layout([])),
    )


def input_gradient(
    features: Sequence[Tensor],
    center: Tensor,
    matrix: Tensor,
    vector: Tensor,
    grad_features: Sequence[Tensor],
) -> None:
    """Add matrix x' + vector, (S, C, C) and (S, C), to `grad_features`."""
    call = Call(features, range(len(features)))
    wanted = [x if x.numel() > 0 else None for x in grad_features]
    tiles = tiles_of("input_gradient", call.channels, call.dot)
    rows = call.table.add_slots(wanted)
    steps = blocks(call.tokens, tiles.tokens)
    with call.running():
        from xattn_kernels.engines.triton.training_kernels import affine_kernel

        launch(
            affine_kernel,
            ceil_div(call.channels, tiles.rows[0]) * steps * call.batch * len(features),
            call.device_table,
            center,
            call.operand(matrix),
            vector,
            call.rows,
            rows,
            call.batch,
            steps,
            **call.constants,
            **layout_constants(D=layout(wanted)),
            P=sum(call.halves.values()),
            BR=tiles.rows[0],
            BK=tiles.step,
            BN=tiles.tokens,
            warps=tiles.warps,
        )


def _gradients(
    call: Call,
    tensors: Sequence[Tensor],
    coefficients: Tensor,
    numbers: Sequence[Any],
    grad_features: Sequence[Tensor],
    **constants: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the gradient kernel of a side."""
    each, pairs, channels = call.each(), len(call.slots), call.channels
    chunks = call.chunks(2 * channels)
    tiles = tiles_of("gradients", channels, call.dot)
    launches = Gradients(call, chunks, tiles, grad_features, ["FIRST", "SECOND"])
    with call.running():
        from xattn_kernels.engines.triton.training_gradient_kernels import gradient_kernel

        launches.run(
            gradient_kernel,
            *tensors,
            coefficients,
            chunks.sums,
            call.rows,
            *numbers,
            **constants,
        )
        products, bias = call.reduce(chunks, each, pairs)
        second, first = products.sum(1).view(pairs, 2, channels, channels).unbind(1)
        return second.mT.contiguous(), first.double(), bias.sum(1)


def _layers(
    call: Call,
    center: Tensor,
    first: Tensor,
    first_affine: Tensor,
    second: Tensor,
    affine: Tensor,
) -> _Layers:
    return center, *_first(call, first, first_affine), call.operand(second), affine


def _first(call: Call, weight: Tensor, affine: Tensor) -> tuple[Tensor, Tensor]:
    """The scale of first layers folded into their weights, and their shift."""
    scale, shift = affine.unbind(-2)
    return call.operand(scale.unsqueeze(-1) * weight), shift.contiguous()


def _rows(tiles: Tiles) -> dict[str, int]:
    return {"R0": tiles.rows[0], "R1": tiles.rows[1]}


def _outputs_of(target_of_output: Sequence[int], pairs: int) -> list[list[int]]:
    outputs: list[list[int]] = [[] for _ in range(pairs)]
    for output, pair in enumerate(target_of_output):
        outputs[pair].append(output)
    return outputs


def _about_mean(state_s: Tensor, state_z: Tensor) -> tuple[Tensor, Tensor]:
    """S - m Z^T and m, about the mean output m = S 1 / Z 1.

    Any m is right; where Z nearly sums to 0 it would be large, and is 0.
    """
    total = state_z.sum(-1, keepdim=True)
    usable = total > 0.5 * state_z.abs().sum(-1, keepdim=True)
    mean = torch.where(usable, state_s.sum(-1) / torch.where(usable, total, 1), 0)
    return state_s - mean.unsqueeze(-1) * state_z.unsqueeze(-2), mean
