"""The passes of the cross-attention block in training on the native CPU module.

`reference.py` says what each computes, and with which shapes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xattn_kernels.engines.native import DTYPE_CODES, core, cpu_refusals, pointer, views
from xattn_kernels.ops.features import ACCUMULATORS
from xattn_kernels.problem import Problem

_core = core()
_View = tuple[int, ...]


def refusals(problem: Problem) -> list[str]:
    """Why this engine cannot run a problem."""
    return cpu_refusals(problem)


def moments(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Means (S, C) and sums of squared deviations (S, C, C)."""
    slots, channels = len(features), features[0].size(1)
    mean, deviations = (
        _double(features, slots, channels),
        _double(features, slots, channels, channels),
    )
    _run("moments", features, results=(mean, deviations))
    return mean, deviations


def first_moments(
    features: Sequence[Tensor],
    center: Tensor,
    slots: Sequence[int],
    weight: Tensor,
    precise: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Means and sums of squared deviations, (P, C) both, and counts (P)."""
    mean, deviations = (_double(features, *weight.shape[:2]) for _ in range(2))
    operands = (center, weight, None, None, None, None, None, None, precise)
    _run("first_moments", features, slots, operands, results=(mean, deviations))
    counts = [features[slot].size(0) * features[slot].size(2) for slot in slots]
    return mean, deviations, mean.new_tensor(counts) * precise


def hidden_moments(
    features: Sequence[Tensor],
    center: Tensor,
    slots: Sequence[int],
    first: Tensor,
    first_affine: Tensor,
    second: Tensor,
) -> tuple[Tensor, Tensor]:
    """Means and sums of squared deviations, (P, C) both."""
    mean, deviations = (_double(features, *second.shape[:2]) for _ in range(2))
    operands = (center, first, first_affine, second)
    _run("hidden_moments", features, slots, operands, results=(mean, deviations))
    return mean, deviations


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
    batch, channels, _ = features[0].shape
    state_s = _new(features, len(slots), batch, channels, channels)
    state_z = _new(features, len(slots), batch, channels)
    operands = (center, first, first_affine, second, affine)
    _run("states", features, slots, operands, results=(None, None, state_s, state_z))
    return state_s, state_z


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
    operands = (center, first, first_affine, second, affine, state_s, state_z)
    _run("attend", features, slots, operands, target_of_output, eps, views(outputs))


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
    """Gradients dS (O, B, C, C), dZ (O, B, C) of the states, and sums (P, 2, C)."""
    grad_s, grad_z = torch.empty_like(state_s), torch.empty_like(state_z)
    sums = _new(features, len(slots), 2, features[0].size(1))
    _run(
        "target_sums",
        features,
        slots,
        (center, first, first_affine, second, affine, state_s, state_z),
        target_of_output,
        eps,
        views(grad_outputs),
        results=(None, None, grad_s, grad_z, sums),
    )
    return grad_s, grad_z, sums


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
    """Sums for the second (P, C, C) and the first (P, C, C), (P, C) layer of queries."""
    results = _layer_results(features, len(slots))
    _run(
        "target_gradients",
        features,
        slots,
        (center, first, first_affine, second, affine, state_s, state_z, coefficients, precise),
        target_of_output,
        eps,
        views(grad_outputs),
        grad_features,
        (None, None, None, None, None, *results),
    )
    return results


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
    """Sums (P, 2, C) for the keys, and (P, C, C), (P, C) for the value layer."""
    pairs, channels = len(slots), features[0].size(1)
    sums = _new(features, pairs, 2, channels)
    product = _double(features, pairs, channels, channels)
    bias = _new(features, pairs, channels)
    _run(
        "source_sums",
        features,
        slots,
        (center, first, first_affine, second, affine, grad_s, grad_z, None, precise),
        grad_features=grad_features,
        results=(None, None, None, None, sums, None, product, bias),
    )
    return sums, product, bias


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
    """As :func:`target_gradients`, for the layers of keys."""
    results = _layer_results(features, len(slots))
    _run(
        "source_gradients",
        features,
        slots,
        (center, first, first_affine, second, affine, grad_s, grad_z, coefficients, precise),
        grad_features=grad_features,
        results=(None, None, None, None, None, *results),
    )
    return results


def input_gradient(
    features: Sequence[Tensor],
    center: Tensor,
    matrix: Tensor,
    vector: Tensor,
    grad_features: Sequence[Tensor],
) -> None:
    """Add matrix x' + vector to the gradients of the features."""
    operands = (center, matrix, vector)
    _run("input_gradient", features, operands=operands, grad_features=grad_features)


def _new(features: Sequence[Tensor], *shape: int) -> Tensor:
    return features[0].new_empty(shape, dtype=ACCUMULATORS[features[0].dtype])


def _double(features: Sequence[Tensor], *shape: int) -> Tensor:
    return features[0].new_empty(shape, dtype=torch.float64)


def _layer_results(features: Sequence[Tensor], pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (pairs, features[0].size(1))
    first = _double(features, *shape, shape[1])
    return _new(features, *shape, shape[1]), first, _new(features, *shape)


def _run(
    phase: str,
    features: Sequence[Tensor],
    slots: Sequence[int] = (),
    operands: Sequence[Tensor | None] = (),
    target_of_output: Sequence[int] = (),
    eps: float = 0.0,
    maps: Sequence[_View] = (),
    grad_features: Sequence[Tensor] = (),
    results: Sequence[Tensor | None] = (),
) -> None:
    """Call a pass with operands and results in the order that the module lists them in."""
    batch, channels, _ = features[0].shape
    contiguous = [None if x is None else x.contiguous() for x in operands]  # held during the call
    gradients = [
        (0, 0, 0, 0, x.size(2)) if gradient.numel() == 0 else views([gradient])[0]
        for x, gradient in zip(features, grad_features, strict=len(grad_features) > 0)
    ]
    getattr(_core, f"training_{phase}")(
        DTYPE_CODES[features[0].dtype],
        batch,
        channels,
        eps,
        views(features),
        slots,
        target_of_output,
        [pointer(x) for x in contiguous] + [0] * (9 - len(operands)),
        maps,
        gradients,
        [pointer(x) for x in results] + [0] * (8 - len(results)),
        torch.get_num_threads(),
    )
