"""The cross-attention block in training as torch operators: one for each pass over the features.

`autograd.py` strings them together. Their names here are those of the functions of an engine;
`reference.py` says what each computes, and with which shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xattn_kernels.ops import library
from xattn_kernels.ops.features import ACCUMULATORS

OP = "cross_attention_block_training"

Pair = tuple[int, int]


class Pairs(NamedTuple):
    """Projections to compute, each once, and who uses them."""

    targets: list[Pair]
    """(slot, weight id) of every distinct query projection, in order of first appearance."""
    sources: list[Pair]
    """The same of every distinct key and value projection."""
    target_of_output: list[int]
    """Number of the target pair of every output."""
    members: list[list[int]]
    """Numbers of the source pairs that every output sums."""


def pairs_of(edges: Sequence[int]) -> Pairs:
    """The pairs of flat (query, source, output, weight) quadruples."""
    targets: dict[Pair, int] = {}
    sources: dict[Pair, int] = {}
    target_of_output: dict[int, int] = {}
    members: dict[int, list[int]] = {}
    for query, source, output, weight in zip(*(edges[i::4] for i in range(4)), strict=True):
        number = targets.setdefault((query, weight), len(targets))
        target_of_output[output] = number
        number = sources.setdefault((source, weight), len(sources))
        members.setdefault(output, []).append(number)
    outputs = sorted(members)
    return Pairs(
        list(targets),
        list(sources),
        [target_of_output[output] for output in outputs],
        [members[output] for output in outputs],
    )


def _new(features: Sequence[Tensor], *shape: int) -> Tensor:
    return features[0].new_empty(shape, dtype=ACCUMULATORS[features[0].dtype])


def _double(features: Sequence[Tensor], *shape: int) -> Tensor:
    return features[0].new_empty(shape, dtype=torch.float64)


def _fake_moments(features: list[Tensor], engine: str) -> tuple[Tensor, Tensor]:
    slots, channels = len(features), features[0].size(1)
    return _double(features, slots, channels), _double(features, slots, channels, channels)


def _fake_first_moments(
    features: list[Tensor], center: Tensor, slots: list[int], *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    mean, deviations = _fake_hidden_moments(features, center, slots)
    return mean, deviations, _double(features, len(slots))


def _fake_hidden_moments(
    features: list[Tensor], center: Tensor, slots: list[int], *_: Any
) -> tuple[Tensor, Tensor]:
    shape = (len(slots), features[0].size(1))
    return _double(features, *shape), _double(features, *shape)


def _fake_states(
    features: list[Tensor], center: Tensor, slots: list[int], *_: Any
) -> tuple[Tensor, Tensor]:
    batch, channels, _tokens = features[0].shape
    shape = (len(slots), batch, channels)
    return _new(features, *shape, channels), _new(features, *shape)


def _fake_attend(*_: Any) -> None:
    return None


def _fake_target_sums(
    features: list[Tensor],
    center: Tensor,
    slots: list[int],
    first: Tensor,
    first_affine: Tensor,
    second: Tensor,
    affine: Tensor,
    target_of_output: list[int],
    state_s: Tensor,
    state_z: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    sums = _new(features, len(slots), 2, features[0].size(1))
    return torch.empty_like(state_s), torch.empty_like(state_z), sums


def _fake_gradients(
    features: list[Tensor], center: Tensor, slots: list[int], *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (len(slots), features[0].size(1))
    first = _double(features, *shape, shape[1])
    return _new(features, *shape, shape[1]), first, _new(features, *shape)


def _fake_source_sums(
    features: list[Tensor], center: Tensor, slots: list[int], *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    pairs, channels = len(slots), features[0].size(1)
    return (
        _new(features, pairs, 2, channels),
        _double(features, pairs, channels, channels),
        _new(features, pairs, channels),
    )


def _fake_input_gradient(*_: Any) -> None:
    return None


_SIDE = (
    "(Tensor[] features, Tensor center, int[] slots, Tensor first, Tensor first_affine,"
    " Tensor second, Tensor affine, "
)
_TARGET = _SIDE + "int[] target_of_output, Tensor state_s, Tensor state_z, float eps, "
_SOURCE = _SIDE + "Tensor grad_s, Tensor grad_z, "


def _define(phase: str, schema: str, fake: Any, mutated: int | None = None) -> Any:
    # What gives the outputs has the operator's own name.
    name = OP if phase == "attend" else f"{OP}_{phase}"
    op = library.define(name, schema, OP, phase, fake)
    if mutated is not None:
        library.bump_versions(op, outputs=mutated)
    return op


moments = _define("moments", "(Tensor[] features, str engine) -> (Tensor, Tensor)", _fake_moments)
first_moments = _define(
    "first_moments",
    "(Tensor[] features, Tensor center, int[] slots, Tensor weight, Tensor precise, str engine)"
    " -> (Tensor, Tensor, Tensor)",
    _fake_first_moments,
)
hidden_moments = _define(
    "hidden_moments",
    "(Tensor[] features, Tensor center, int[] slots, Tensor first, Tensor first_affine,"
    " Tensor second, str engine) -> (Tensor, Tensor)",
    _fake_hidden_moments,
)
states = _define("states", _SIDE + "str engine) -> (Tensor, Tensor)", _fake_states)
attend = _define(
    "attend", _TARGET + "Tensor(a!)[] outputs, str engine) -> ()", _fake_attend, mutated=11
)
target_sums = _define(
    "target_sums",
    _TARGET + "Tensor[] grad_outputs, str engine) -> (Tensor, Tensor, Tensor)",
    _fake_target_sums,
)
target_gradients = _define(
    "target_gradients",
    _TARGET + "Tensor[] grad_outputs, Tensor coefficients, Tensor precise,"
    " Tensor(a!)[] grad_features, str engine) -> (Tensor, Tensor, Tensor)",
    _fake_gradients,
    mutated=14,
)
source_sums = _define(
    "source_sums",
    _SOURCE + "Tensor precise, Tensor(a!)[] grad_features, str engine) -> (Tensor, Tensor, Tensor)",
    _fake_source_sums,
    mutated=10,
)
source_gradients = _define(
    "source_gradients",
    _SOURCE + "Tensor coefficients, Tensor precise, Tensor(a!)[] grad_features, str engine)"
    " -> (Tensor, Tensor, Tensor)",
    _fake_gradients,
    mutated=11,
)
input_gradient = _define(
    "input_gradient",
    "(Tensor[] features, Tensor center, Tensor matrix, Tensor vector,"
    " Tensor(a!)[] grad_features, str engine) -> ()",
    _fake_input_gradient,
    mutated=4,
)
