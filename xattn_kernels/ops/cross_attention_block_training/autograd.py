"""The passes of the cross-attention block strung together, forward and backward.

The passes work on features and know no batch norm; what lies between them is algebra on C x C
matrices, the same for all engines, and here. With mu and Sigma the moments of a slot's features,
mean2 and var2 those of W_2 h for a hidden layer h, and r = 1 / sqrt(var + eps), D = gamma r::

    first layers     mean1 = W_1 mu    var1 = diag(W_1 Sigma W_1^T)
                     bn(W_1 x) = diag(D) W_1 (x - mu) + beta
    second layers    bn(W_2 h) = gamma y + beta,  y = diag(r) W_2 h - r mean2

No layer is stored: forward keeps features, parameters, statistics and the states S and Z. In
backward, n is the number of (sample, token) of a slot, and sums are over these. With s0 = sum da,
s1 = sum da y of a second layer::

    coefficients     c0 = gamma s0 / n    c1 = gamma s1 / n
                     dgamma = s1    dbeta = s0    dW_2 = diag(r) sum e h^T

and with b = sum da1, R = sum da1 x'^T of a first layer, for x' = x - mu, g = r diag(W_1 R^T)::

    dgamma = g    dbeta = b    dW_1 = diag(D) (R - diag(g r / n) W_1 sum x' x'^T)
    dx = W_1^T diag(D) da1 - W_1^T diag(D g r / n) W_1 x' - W_1^T (D b / n)

whose last two terms are affine in x and merge into one matrix and one vector for each slot. With
running statistics mu is zero, c0, c1 and these terms vanish, and g = r (diag(W_1 R^T) - mean1 b).
Where a batch is spread over processes, mu, n and the sums in c0, c1, dW_1 and dx are those of all;
then sum x' of one process is not zero, and its share of dW_1, with n' of its own, has also::

    diag(D) (- (b / n) sum x'^T + (sum da1 - n' b / n - diag(g r / n) W_1 sum x') mu^T)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xattn_kernels.distributed import Reduction
from xattn_kernels.ops import library
from xattn_kernels.ops.autocast import no_autocast
from xattn_kernels.ops.cross_attention_block_training import op
from xattn_kernels.ops.cross_attention_block_training.layers import (
    Gradients,
    Layers,
    Parameters,
    Row,
    Rows,
    first_layers,
    gather,
    joint,
    second_layers,
    take,
)
from xattn_kernels.ops.cross_attention_block_training.op import Pair, Pairs, pairs_of
from xattn_kernels.ops.features import ACCUMULATORS, new_output


class Settings(NamedTuple):
    """What is not a tensor."""

    edges: tuple[int, ...]
    """Flat (query, source, output, weight) quadruples."""
    sizes: tuple[int, ...]
    """Numbers of features and of each of the `Parameters`."""
    bn_eps: float
    eps: float
    reduction: Reduction
    engine: str

    def unpack(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Parameters]:
        """Features and parameters."""
        groups, start = [], 0
        for size in self.sizes:
            groups.append(list(tensors[start : start + size]))
            start += size
        return groups[0], Parameters(*groups[1:])


class BlockStatistics(NamedTuple):
    """What the batch norms of the block normalise with.

    Attributes:
        rows: (slot, weight id, layer) of every row of `mean` and `var`, each once. Layers are
            numbered as in the weights: query 1, query 2, key 1, key 2, value.
        mean: (R, C), in float32 (float64 for float64 features).
        var: (R, C), biased.
        counts: (S), the number of (sample, token) of every slot, in the dtype of `mean`.
    """

    rows: tuple[Row, ...]
    mean: Tensor
    var: Tensor
    counts: Tensor


class _Kept(NamedTuple):
    """What backward needs besides features and parameters."""

    center: Tensor
    """(S, C) subtracted from the features."""
    total: Tensor
    """(S, C) sums of x' over the tokens of this process; empty if zero."""
    product: Tensor
    """(S, C, C) sums of x' x'^T over the tokens of this process; empty if nobody needs them."""
    counts: Tensor
    """(S) numbers of (sample, token) of all processes."""
    mean: Tensor
    """(R, C) of all layers' outputs, those of the first layers first."""
    var: Tensor
    """(R, C), biased."""
    state_s: Tensor
    """(O, B, C, C)."""
    state_z: Tensor
    """(O, B, C)."""


_KEPT = len(_Kept._fields)
_INSTEAD = "convolutions, batch norms and linear_cross_attention called one by one can"


def call(
    features: Sequence[Tensor],
    parameters: Parameters,
    edges: Sequence[int],
    bn_eps: float,
    eps: float,
    reduction: Reduction,
    engine: str,
) -> tuple[list[Tensor], BlockStatistics]:
    """Run the operator, recorded for a backward pass if one may come.

    Args:
        features: (B, C, N_s) for every slot.
        parameters: (C, C) or (C, C, 1, 1) and (C), for every layer of every set of weights; no
            running statistics for those of the batch.
        edges: flat (query, source, output, weight) quadruples.
        bn_eps: added to variances.
        eps: lower bound of the attention's denominator.
        reduction: completes sums over tokens.
        engine: the engine that makes the passes.

    Returns:
        An output (B, C, N) for every output slot, and the statistics of all layers in use.
    """
    groups = (features, *parameters)
    sizes = tuple(len(group) for group in groups)
    settings = Settings(tuple(edges), sizes, bn_eps, eps, reduction, engine)
    tensors = [x for group in groups for x in group]
    run = _apply if library.needs_gradient(tensors) else _Function.forward
    results = run(settings, *tensors)
    outputs, kept = list(results[:-_KEPT]), _Kept(*results[-_KEPT:])
    rows = Rows.of(pairs_of(edges))
    return outputs, BlockStatistics((*rows.first, *rows.second), kept.mean, kept.var, kept.counts)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(settings: Settings, *tensors: Tensor) -> tuple[Tensor, ...]:
        features, parameters = settings.unpack(tensors)
        with no_autocast(features[0].device.type):
            return _forward(settings, features, parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.settings, *tensors = inputs
        kept = output[-_KEPT:]
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        library.check_not_batched(op.OP, grads)
        saved = ctx.saved_tensors  # once: checkpoints compute them at every access
        tensors, kept = saved[:-_KEPT], _Kept(*saved[-_KEPT:])
        grad_outputs, wanted = grads[:-_KEPT], ctx.needs_input_grad[1:]
        with torch.no_grad(), no_autocast(tensors[0].device.type):
            gradients = _backward(ctx.settings, tensors, kept, grad_outputs, wanted)
        inputs = (*tensors, *grad_outputs)
        return (None, *library.forbid_double_backward(op.OP, gradients, inputs, _INSTEAD))


_apply: Callable[..., tuple[Tensor, ...]] = _Function.apply


def _forward(
    settings: Settings, features: Sequence[Tensor], parameters: Parameters
) -> tuple[Tensor, ...]:
    reduction, engine = settings.reduction, settings.engine
    pairs = pairs_of(settings.edges)
    rows = Rows.of(pairs)
    dtype = ACCUMULATORS[features[0].dtype]
    count = own_count = _counts(features, dtype)
    shape = (len(features), features[0].size(1))
    total, product = (features[0].new_empty(0, dtype=dtype) for _ in range(2))
    if parameters.batch:
        own_mean, product = op.moments(features, engine)
        center, deviations, count = reduction.moments(own_mean, product, own_count)
        if not reduction.is_local:
            offset = (own_mean - center).where(own_count.unsqueeze(1) > 0, 0)
            total = own_count.unsqueeze(1) * offset
            product = product + total.unsqueeze(2) * offset.unsqueeze(1)
        covariance = deviations / count.clamp_min(1)[:, None, None]
        slots = [slot for slot, _, _ in rows.first]
        weight = gather(parameters.weight, rows.first, dtype)
        mean1 = _apply_rows(weight, take(center, slots))
        # The sum of products that is never negative but for rounding.
        var1 = ((weight @ take(covariance, slots)) * weight).sum(dim=2).clamp_min(0)
    else:
        center = features[0].new_zeros(shape, dtype=dtype)
        mean1, var1 = (gather(x, rows.first, dtype) for x in parameters[3:])
    first = first_layers(parameters, rows.first, mean1, var1, settings.bn_eps)

    if parameters.batch:
        slots = [slot for slot, _, _ in rows.second]
        inputs = first.part(0, len(slots))
        weight = gather(parameters.weight, rows.second, dtype)
        hidden_mean, deviations = op.hidden_moments(
            features, center, slots, inputs.matrix, inputs.shift, weight, engine
        )
        mean2, deviations, counts = reduction.moments(
            hidden_mean, deviations, take(own_count, slots)
        )
        var2 = deviations / counts.clamp_min(1).unsqueeze(1)
    else:
        mean2, var2 = (gather(x, rows.second, dtype) for x in parameters[3:])
    second = second_layers(parameters, rows.second, mean2, var2, settings.bn_eps)

    target, source = _sides(features, center, pairs, first, second)
    states = op.states(*source, engine)
    state_s, state_z = reduction.states(*(joint(x, pairs.members) for x in states))
    queries = [features[pairs.targets[pair][0]] for pair in pairs.target_of_output]
    outputs = [new_output(query, query.size(1)) for query in queries]
    op.attend(*target, pairs.target_of_output, state_s, state_z, settings.eps, outputs, engine)
    mean, var = torch.cat([mean1, mean2]), torch.cat([var1, var2])
    return (*outputs, *_Kept(center, total, product, count, mean, var, state_s, state_z))


def _backward(
    settings: Settings,
    tensors: Sequence[Tensor],
    kept: _Kept,
    grad_outputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of features and parameters; None where not wanted or without any part in it.

    Outputs without a gradient, and what only they use, are left out.
    """
    features, parameters = settings.unpack(tensors)
    used = [o for o, gradient in enumerate(grad_outputs) if gradient is not None]
    if not used:
        return [None] * len(tensors)
    reduction, engine = settings.reduction, settings.engine
    pairs = pairs_of(_edges_of(settings.edges, used))
    rows = Rows.of(pairs)
    first, second = _layers_again(settings, parameters, rows, kept)
    target, source = _sides(features, kept.center, pairs, first, second)
    targets = len(pairs.targets)
    slots_used = {slot for slot, _, _ in rows.first}
    wanted_slots = [
        want and slot in slots_used for slot, want in enumerate(wanted[: len(features)])
    ]
    grad_features = [
        _zeros(x, kept.center.dtype) if want else kept.center.new_empty(0)
        for x, want in zip(features, wanted_slots, strict=True)
    ]

    def wants(group: Sequence[Pair]) -> bool:
        return any(wanted[len(features) :]) or any(wanted_slots[slot] for slot, _ in group)

    found = Gradients(parameters)
    sums_first: list[tuple[Tensor, Tensor]] = []
    state_s, state_z = take(kept.state_s, used), take(kept.state_z, used)
    gradients = [gradient for gradient in grad_outputs if gradient is not None]
    target = (*target, pairs.target_of_output, state_s, state_z, settings.eps, gradients)
    grad_s, grad_z, sums = op.target_sums(*target, engine)
    if wants(pairs.targets):
        part, layers = rows.second[:targets], second.part(0, targets)
        coefficients = _coefficients(settings, parameters, layers, sums, _by_row(kept.counts, part))
        product, *rest = op.target_gradients(*target, coefficients, grad_features, engine)
        found.add(part, _scaled(layers.inverse_sigma, product), sums[:, 1], sums[:, 0])
        sums_first.append((rest[0], rest[1]))
    if wants(pairs.sources):
        states = reduction.states(grad_s, grad_z)
        outputs_of: list[list[int]] = [[] for _ in pairs.sources]
        for output, group in enumerate(pairs.members):
            for member in group:
                outputs_of[member].append(output)
        source = (*source, *(joint(x, outputs_of) for x in states))
        sums, *values = op.source_sums(*source, grad_features, engine)
        part, layers = rows.second[targets:], second.part(targets, len(rows.second))
        coefficients = _coefficients(settings, parameters, layers, sums, _by_row(kept.counts, part))
        product, *rest = op.source_gradients(*source, coefficients, grad_features, engine)
        found.add(part, _scaled(layers.inverse_sigma, product), sums[:, 1], sums[:, 0])
        sums_first += [(rest[0], rest[1]), (values[0], values[1])]
    if sums_first:
        start = 0 if wants(pairs.targets) else targets
        stop = len(rows.first) if wants(pairs.sources) else targets
        part, layers = rows.first[start:stop], first.part(start, stop)
        products, biases = (torch.cat(parts) for parts in zip(*sums_first, strict=True))
        _first_layers_backward(
            settings,
            parameters,
            features,
            kept,
            part,
            layers,
            products,
            biases,
            found,
            grad_features,
        )
    return [
        *(
            gradient.to(x.dtype) if want else None
            for gradient, x, want in zip(grad_features, features, wanted_slots, strict=True)
        ),
        *_of_parameters(found, tensors, wanted, len(features)),
    ]


def _first_layers_backward(
    settings: Settings,
    parameters: Parameters,
    features: Sequence[Tensor],
    kept: _Kept,
    rows: Sequence[Row],
    layers: Layers,
    product: Tensor,
    bias: Tensor,
    found: Gradients,
    grad_features: Sequence[Tensor],
) -> None:
    """From the sums da1 x'^T (R, C, C) and da1 (R, C) over tokens of first layers."""
    gamma = (layers.weight * product).sum(dim=2)
    if not parameters.batch:
        gamma = layers.inverse_sigma * (gamma - layers.mean * bias)
        found.add(rows, _scaled(layers.scale, product), gamma, bias)
        return
    gamma = layers.inverse_sigma * gamma
    sums = settings.reduction.sums(torch.stack([gamma, bias]))
    slope, constant = sums / _by_row(kept.counts, rows)
    slope = slope * layers.inverse_sigma
    slots = [slot for slot, _, _ in rows]
    product = product - _scaled(slope, layers.weight @ take(kept.product, slots))
    if not settings.reduction.is_local:
        total, center = take(kept.total, slots), take(kept.center, slots)
        own = take(_counts(features, center.dtype), slots).unsqueeze(1)
        rest = bias - own * constant - slope * _apply_rows(layers.weight, total)
        product = product - constant.unsqueeze(2) * total.unsqueeze(1)
        product = product + rest.unsqueeze(2) * center.unsqueeze(1)
    found.add(rows, _scaled(layers.scale, product), gamma, bias)
    if not any(gradient.numel() for gradient in grad_features):
        return
    # Row by row and not as one product: that would add in an order which depends on the threads.
    transposed = layers.matrix.mT
    matrices = transposed @ _scaled(slope, layers.weight)
    vectors = _apply_rows(transposed, constant)
    matrix, vector = torch.zeros_like(kept.product), torch.zeros_like(kept.center)
    for number, slot in enumerate(slots):
        matrix[slot] -= matrices[number]
        vector[slot] -= vectors[number]
    op.input_gradient(features, kept.center, matrix, vector, grad_features, settings.engine)


def _coefficients(
    settings: Settings, parameters: Parameters, layers: Layers, sums: Tensor, count: Tensor
) -> Tensor:
    """(c0, c1) of second layers, (R, 2, C), from the sums over the tokens of this process."""
    if not parameters.batch:
        return torch.zeros_like(sums)
    means = settings.reduction.sums(sums) / count.unsqueeze(1)
    return layers.gamma.unsqueeze(1) * means


def _layers_again(
    settings: Settings, parameters: Parameters, rows: Rows, kept: _Kept
) -> tuple[Layers, Layers]:
    """The layers of `rows`, which may be a part of those of the forward pass."""
    of_forward = Rows.of(pairs_of(settings.edges))
    numbers = {row: number for number, row in enumerate((*of_forward.first, *of_forward.second))}

    def statistics(part: Sequence[Row]) -> tuple[Tensor, Tensor]:
        places = [numbers[row] for row in part]
        return take(kept.mean, places), take(kept.var, places)

    return (
        first_layers(parameters, rows.first, *statistics(rows.first), settings.bn_eps),
        second_layers(parameters, rows.second, *statistics(rows.second), settings.bn_eps),
    )


def _sides(
    features: Sequence[Tensor], center: Tensor, pairs: Pairs, first: Layers, second: Layers
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The first arguments of the passes over targets, and of those over sources."""
    count, targets, sources = len(first.weight), len(pairs.targets), len(pairs.sources)
    queries, keys = first.part(0, targets), first.part(targets, targets + sources)
    values = first.part(targets + sources, count)
    second_queries = second.part(0, targets)
    second_keys = second.part(targets, targets + sources)
    return (
        (
            features,
            center,
            [slot for slot, _ in pairs.targets],
            queries.matrix,
            queries.shift,
            second_queries.matrix,
            second_queries.shift,
        ),
        (
            features,
            center,
            [slot for slot, _ in pairs.sources],
            torch.stack([keys.matrix, values.matrix], dim=1),
            torch.stack([keys.shift, values.shift], dim=1),
            second_keys.matrix,
            second_keys.shift,
        ),
    )


def _of_parameters(
    found: Gradients, tensors: Sequence[Tensor], wanted: Sequence[bool], start: int
) -> list[Tensor | None]:
    """Gradients of `tensors` from number `start` on: parameters, then running statistics."""
    gradients: list[Tensor | None] = [*found.weight, *found.gamma, *found.beta]
    gradients += [None] * (len(tensors) - start - len(gradients))
    return [
        gradient.to(x.dtype).view(x.shape) if gradient is not None and want else None
        for gradient, x, want in zip(gradients, tensors[start:], wanted[start:], strict=True)
    ]


def _edges_of(edges: Sequence[int], outputs: Sequence[int]) -> list[int]:
    """The flat quadruples of these outputs."""
    quadruples = zip(*(edges[i::4] for i in range(4)), strict=True)
    return [x for edge in quadruples if edge[2] in outputs for x in edge]


def _counts(features: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    counts = [x.size(0) * x.size(2) for x in features]
    if all(count == counts[0] for count in counts):
        return features[0].new_full((len(counts),), counts[0], dtype=dtype)
    return torch.stack([features[0].new_full((), count, dtype=dtype) for count in counts])


def _by_row(count: Tensor, rows: Sequence[Row]) -> Tensor:
    """The number of (sample, token) of every row, at least one: (R, 1)."""
    return take(count, [slot for slot, _, _ in rows]).clamp_min(1).unsqueeze(1)


def _zeros(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, C, N) like `x`, with the channels of a token together."""
    return x.new_zeros((x.size(0), x.size(2), x.size(1)), dtype=dtype).transpose(1, 2)


def _scaled(scale: Tensor, matrix: Tensor) -> Tensor:
    """diag(scale) matrix, for (R, C) and (R, C, C)."""
    return scale.unsqueeze(2) * matrix


def _apply_rows(matrix: Tensor, vector: Tensor) -> Tensor:
    """Products of matrices (R, C, C) with vectors (R, C)."""
    return (matrix @ vector.unsqueeze(2)).squeeze(2)
