"""Operations of this library's operators, for `torch.utils.flop_counter.FlopCounterMode`.

Counted as torch counts its own: 2 for a multiply-add of a matrix product, nothing for what is done
element by element. With d = C and Cv channels, per sample:

===========================  =====================================================================
linear cross-attention       2 Cv C N_k per edge; 2 (Cv + 1) C N_q per output, its divisor included
softmax cross-attention      2 (C + Cv) N_q N_k per edge
cross-attention block        those of linear cross-attention; 4 C^2 N_q per (target, weight) and
                             6 C^2 N_k per (source, weight) for the projections
the same for training        2 C^2 N times a number for each pass over the features: `_PASSES`
pyramid projection           2 M C_s N_s per scale, 2 O M N_0 for the classifier
===========================  =====================================================================

`count` counts a call. For a `FlopCounterMode` of one's own, `register` tells torch the formulas
first: `import xattn_kernels` leaves torch as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from xattn_kernels.ops.features import group_by_output
from xattn_kernels.ops.library import NAMESPACE

Shape = Sequence[int]


def count(call: Callable[[], Any]) -> int:
    """Operations of a call, forward and backward passes within it alike.

    As `FlopCounterMode` counts, and with the kernel of `scaled_dot_product_attention` for CPUs,
    which torch (2.13) leaves out.
    """
    from torch.utils.flop_counter import FlopCounterMode

    register()
    mapping = {getattr(torch.ops.aten, name): formula for name, formula in _MISSING.items()}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        call()
    total: int = counter.get_total_flops()
    return total


def register() -> None:
    """Tell torch's flop counter the formulas; nothing happens to those it knows.

    Before a `FlopCounterMode` is made, which would count nothing for this library's operators.
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for name, formula in _FORMULAS.items():
        operator = getattr(getattr(torch.ops, NAMESPACE), name, None)
        if operator is not None and operator not in flop_registry:
            register_flop_formula(operator)(formula)


def linear_core(
    query: Sequence[Shape], key: Sequence[Shape], value: Sequence[Shape], edges: Sequence[int]
) -> int:
    """FLOP of the linear core: states of all sources, their use at the targets."""
    total = 0
    for target, sources in group_by_output(edges):
        batch, channels, tokens = query[target]
        width = value[sources[0]][1]
        total += 2 * batch * (width + 1) * channels * tokens
        total += sum(2 * batch * width * channels * key[source][2] for source in sources)
    return total


def _linear(query: Any, key: Any, value: Any, edges: Any, *args: Any, out_shape: Any = None) -> int:
    return linear_core(query, key, value, edges)


def _linear_backward(
    query: Any, key: Any, value: Any, edges: Any, *args: Any, out_shape: Any = None
) -> int:
    wanted: Sequence[bool] = args[-2]
    by_query, by_key, by_value = _thirds(wanted, len(query), len(key))
    total = 0
    for target, sources in group_by_output(edges):
        batch, channels, tokens = query[target]
        width = value[sources[0]][1]
        product = 2 * batch * width * channels
        vector = 2 * batch * channels * tokens
        # The divisor again; the gradients of S and Z; that of the query.
        total += vector + product * tokens + vector + product * tokens * by_query[target]
        total += sum(product * key[a][2] * (by_key[a] + by_value[a]) for a in sources)
    return total


def _softmax(
    query: Any, key: Any, value: Any, edges: Any, *args: Any, out_shape: Any = None
) -> int:
    total = 0
    for target, sources in group_by_output(edges):
        batch, channels, tokens = query[target]
        total += sum(2 * batch * (channels + value[a][1]) * tokens * key[a][2] for a in sources)
    return total


def _softmax_backward(
    query: Any, key: Any, value: Any, output: Any, edges: Any, *args: Any, out_shape: Any = None
) -> int:
    wanted: Sequence[bool] = args[-2]
    by_query, by_key, by_value = _thirds(wanted, len(query), len(key))
    total = 0
    for target, sources in group_by_output(edges):
        batch, channels, tokens = query[target]
        for a in sources:
            # Scores again and the gradient of the query and key; of the scores and of the value.
            products = channels * (1 + by_query[target] + by_key[a])
            products += value[a][1] * (1 + by_value[a])
            total += 2 * batch * products * tokens * key[a][2]
    return total


def _thirds(wanted: Sequence[bool], queries: int, keys: int) -> tuple[Sequence[bool], ...]:
    return wanted[:queries], wanted[queries : queries + keys], wanted[queries + keys :]


def _block(
    features: Any, packed: Any, num_weights: Any, edges: Any, *args: Any, out_shape: Any = None
) -> int:
    quadruples = list(zip(*(edges[i::4] for i in range(4)), strict=True))
    batch, channels, _ = features[0]
    targets = {(query, weight) for query, _, _, weight in quadruples}
    sources = {(source, weight) for _, source, _, weight in quadruples}
    total = sum(4 * batch * channels**2 * features[query][2] for query, _ in targets)
    total += sum(6 * batch * channels**2 * features[source][2] for source, _ in sources)
    triples = [slot for quadruple in quadruples for slot in quadruple[:3]]
    return int(total) + linear_core(features, features, features, triples)


def _pass(per_slot: int = 0, per_pair: int = 0, per_output: int = 0) -> Callable[..., int]:
    """Counts products of a (C, C) matrix with the tokens of a slot, or of tokens with tokens."""

    def formula(features: Any, *args: Any, out_shape: Any = None) -> int:
        batch, channels, _ = features[0]
        tokens = sum(per_slot * x[2] for x in features)
        if per_pair:
            tokens += sum(per_pair * features[slot][2] for slot in args[1])
        if per_output:
            tokens += sum(per_output * features[args[1][pair]][2] for pair in args[6])
        return int(2 * batch * channels**2 * tokens)

    return formula


_PASSES = {
    "_moments": _pass(per_slot=1),
    "_hidden_moments": _pass(per_pair=2),
    "_states": _pass(per_pair=4),  # three projections, S
    "": _pass(per_pair=2, per_output=1),
    "_target_sums": _pass(per_pair=2, per_output=2),  # S^T g, dS
    "_target_gradients": _pass(per_pair=6, per_output=1),  # through two layers, to both and x
    "_source_sums": _pass(per_pair=7),  # dS with keys and values; to the values' layer and x
    "_source_gradients": _pass(per_pair=8),
    "_input_gradient": _pass(per_slot=1),
}


def _pyramid(
    features: Any,
    weights: Any,
    scale: Any,
    shift: Any,
    classifier: Any,
    *args: Any,
    out_shape: Any = None,
) -> int:
    levels, last = _pyramid_products(features, weights, classifier)
    return sum(levels) + last


def _pyramid_backward(
    grad_output: Any,
    features: Any,
    weights: Any,
    scale: Any,
    shift: Any,
    classifier: Any,
    *args: Any,
    out_shape: Any = None,
) -> int:
    wanted: Sequence[bool] = args[-2]
    levels, last = _pyramid_products(features, weights, classifier)
    count = len(levels)
    by_features, by_weights, by_classifier = wanted[:count], wanted[count : 2 * count], wanted[-2]
    total = last * (1 + by_classifier)
    for product, feature, weight in zip(levels, by_features, by_weights, strict=True):
        total += product * (feature + weight)
    return total


def _pyramid_products(
    features: Sequence[Shape], weights: Sequence[Shape], classifier: Shape
) -> tuple[list[int], int]:
    levels = [2 * _product(x) * weight[0] for x, weight in zip(features, weights, strict=True)]
    batch, _, *size = features[0]
    return levels, 2 * batch * _product(classifier[:2]) * _product(size)


def _product(numbers: Iterable[int]) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result


def _attention(query: Shape, key: Shape, value: Shape, *args: Any, **options: Any) -> int:
    batch, heads, tokens, channels = query
    return 2 * batch * heads * tokens * key[2] * (channels + value[3])


def _attention_backward(
    grad_output: Shape, query: Shape, key: Shape, value: Shape, *args: Any, **options: Any
) -> int:
    batch, heads, tokens, channels = query
    return 2 * batch * heads * tokens * key[2] * (3 * channels + 2 * value[3])


_FORMULAS: dict[str, Callable[..., int]] = {
    "linear_cross_attention": _linear,
    "linear_cross_attention_backward": _linear_backward,
    "softmax_cross_attention": _softmax,
    "softmax_cross_attention_backward": _softmax_backward,
    "cross_attention_block": _block,
    "cross_attention_block_out": _block,
    **{f"cross_attention_block_training{name}": formula for name, formula in _PASSES.items()},
    "pyramid_projection": _pyramid,
    "pyramid_projection_backward": _pyramid_backward,
}
_MISSING: dict[str, Callable[..., int]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
}
