"""The passes of the cross-attention block strung together, forward and backward.

The passes work on features and know no batch norm; what lies between them is algebra on C x C
matrices in float64, the same for all engines, and here. With x' = x - mu for mu the rounded mean of
a slot's features, m and Sigma the moments of x' (m is what the rounding left), mean2 and var2 those
of W_2 h for a hidden layer h, and r = 1 / sqrt(var + eps), D = gamma r::

    first layers     mean1 = W_1 m    var1 = diag(W_1 Sigma W_1^T)
                     bn(W_1 x) = D (W_1 x' - mean1) + beta
    second layers    bn(W_2 h) = D y + beta,  y = W_2 h - mean2

No layer is stored: forward keeps features, parameters, statistics and the states S and Z. In
backward, n is the number of (sample, token) of a slot, and sums are over these. With s0 = sum da,
s1 = sum da y of a second layer::

    coefficients     c0 = D s0 / n    c1 = D r^2 s1 / n
                     dgamma = r s1    dbeta = s0    dW_2 = sum e h^T

and with b = sum da1, R = sum da1 x'^T of a first layer, g = r (diag(W_1 R^T) - mean1 b)::

    dgamma = g    dbeta = b
    dW_1 = diag(D) (R - (b / n) sum x'^T - diag(g r / n) W_1 sum (x' - m) x'^T)
    dx = W_1^T diag(D) da1 - W_1^T diag(D g r / n) W_1 (x' - m) - W_1^T (D b / n)

whose last two terms are affine in x and merge into one matrix and one vector for each slot. With
running statistics mu is zero, mean1 is theirs, and c0, c1 and what is divided by n vanish. Where a
batch is spread over processes, mu, m, n and the sums in c0, c1, dW_1 and dx are those of all; then
the terms of one process do not cancel, and its share of dW_1, with n' of its own, has also::

    diag(D) (sum da1 - n' b / n - diag(g r / n) W_1 sum (x' - m)) mu^T

Where channels have much in common, W_1 may take nearly all of the features away. Then var1 is that
of the exact products, but not of the rounded ones that the passes compute, and a layer that is not
normalised by its own variance has a gradient that is not orthogonal to it. The engine measures the
products of such rows (`layers.closed_form` tells which), and makes R, of which little is left in
dW_1, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xattn_kernels.collectives import Reduction
from xattn_kernels.ops import library
from xattn_kernels.ops.autocast import no_autocast
from xattn_kernels.ops.cross_attention_block_training import op
from xattn_kernels.ops.cross_attention_block_training.layers import (
    Gradients,
    Layers,
    Parameters,
    Row,
    Rows,
    apply_rows,
    by_row,
    by_slot,
    closed_form,
    counts_of,
    first_layers,
    gather,
    joint,
    normalisation,
    scaled,
    second_layers,
    take,
    ungrouped,
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
    """What backward needs besides features and parameters; in float64 but for `center`, S and Z.

    With running statistics `total`, `product`, `offset` and `closed_var` are empty.
    """

    center: Tensor
    """(S, C) subtracted from the features."""
    total: Tensor
    """(S, C) sums of x' over the tokens of this process."""
    product: Tensor
    """(S, C, C) sums of x' x'^T over the tokens of this process."""
    offset: Tensor
    """(S, C) means of x' over all processes."""
    counts: Tensor
    """(S) numbers of (sample, token) of all processes."""
    mean: Tensor
    """(R, C) of W x' and of W h for all layers, the first ones first, as they are normalised."""
    var: Tensor
    """(R, C), biased."""
    closed_var: Tensor
    """(R, C) of first layers in closed form."""
    precise: Tensor
    """(R) booleans, of first layers that are to be measured and summed in float64."""
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
    rows, dtype = Rows.of(pairs_of(edges)), kept.center.dtype
    with torch.no_grad():
        mean = kept.mean
        if parameters.batch:
            weight = gather(parameters.weight, rows.first, torch.float64)
            center = take(kept.center, [slot for slot, _, _ in rows.first]).double()
            of_center = apply_rows(weight, center)
            mean = mean + torch.cat([of_center, mean.new_zeros(len(rows.second), mean.size(1))])
        statistics = (x.to(dtype) for x in (mean, kept.var, kept.counts))
        return outputs, BlockStatistics((*rows.first, *rows.second), *statistics)


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
    statistics = _first_statistics(settings, features, parameters, rows.first)
    center, mean1, var1 = statistics.center, statistics.mean, statistics.var
    first = first_layers(parameters, rows.first, mean1, var1, settings.bn_eps)
    if parameters.batch:
        slots = [slot for slot, _, _ in rows.second]
        inputs = first.part(0, len(slots))
        weight = gather(parameters.weight, rows.second, center.dtype)
        hidden_mean, deviations = op.hidden_moments(
            features, center, slots, inputs.weight, inputs.affine, weight, engine
        )
        own_counts = take(counts_of(features), slots)
        mean2, deviations, counts = reduction.moments(hidden_mean, deviations, own_counts)
        var2 = deviations / counts.clamp_min(1).unsqueeze(1)
    else:
        mean2, var2 = (gather(x, rows.second, torch.float64) for x in parameters[3:])
    second = second_layers(parameters, rows.second, mean2, var2, settings.bn_eps)

    target, source = _sides(features, center, pairs, first, second)
    states = op.states(*source, engine)
    state_s, state_z = reduction.states(*(joint(x, pairs.members) for x in states))
    queries = [features[pairs.targets[pair][0]] for pair in pairs.target_of_output]
    outputs = [new_output(query, query.size(1)) for query in queries]
    op.attend(*target, pairs.target_of_output, state_s, state_z, settings.eps, outputs, engine)
    kept = statistics._replace(
        mean=torch.cat([mean1, mean2]),
        var=torch.cat([var1, var2]),
        state_s=state_s,
        state_z=state_z,
    )
    return (*outputs, *kept)


def _first_statistics(
    settings: Settings, features: Sequence[Tensor], parameters: Parameters, rows: Sequence[Row]
) -> _Kept:
    """What is known before any layer is computed, with the mean and variance of first layers."""
    reduction, engine = settings.reduction, settings.engine
    dtype, own_count = ACCUMULATORS[features[0].dtype], counts_of(features)

    def nothing() -> Tensor:
        """Each time another tensor: compilers want results to differ."""
        return own_count.new_empty(0)

    if not parameters.batch:
        center = features[0].new_zeros((len(features), features[0].size(1)), dtype=dtype)
        mean, var = (gather(x, rows, torch.float64) for x in parameters[3:])
        precise = torch.zeros(len(rows), dtype=torch.bool, device=center.device)
        return _Kept(
            *(center, nothing(), nothing(), nothing(), own_count, mean, var),
            *(nothing(), precise, nothing(), nothing()),
        )
    own_mean, deviations = op.moments(features, engine)
    overall, covariance, count = reduction.moments(own_mean, deviations, own_count)
    center = overall.to(dtype)
    offset = overall - center
    own_offset = (own_mean - center).where(own_count.unsqueeze(1) > 0, 0)
    total = own_count.unsqueeze(1) * own_offset
    product = deviations + total.unsqueeze(2) * own_offset.unsqueeze(1)
    covariance = covariance / count.clamp_min(1)[:, None, None]
    closed = closed_form(parameters, rows, offset, covariance, settings.bn_eps)

    slots = [slot for slot, _, _ in rows]
    weight = gather(parameters.weight, rows, dtype)
    measured = op.first_moments(features, center, slots, weight, closed.precise, engine)
    mean, deviations, counts = reduction.moments(*measured)
    known, counts = counts.unsqueeze(1) > 0, counts.clamp_min(1).unsqueeze(1)
    mean = torch.where(known, mean, closed.mean)
    var = torch.where(known, deviations / counts, closed.var)
    of_features = (center, total, product, offset, count)
    return _Kept(*of_features, mean, var, closed.var, closed.precise, nothing(), nothing())


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
    precise = take(kept.precise, _places(settings, rows.first))
    target, source = _sides(features, kept.center, pairs, first, second)
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
    sums_first: list[list[Tensor]] = []
    targets, sources = len(pairs.targets), len(pairs.sources)
    precise_queries, precise_keys, precise_values = precise.split([targets, sources, sources])
    state_s, state_z = take(kept.state_s, used), take(kept.state_z, used)
    gradients = [gradient for gradient in grad_outputs if gradient is not None]
    target = (*target, pairs.target_of_output, state_s, state_z, settings.eps, gradients)
    grad_s, grad_z, sums = op.target_sums(*target, engine)
    if wants(pairs.targets):
        part, layers = rows.second[:targets], second.part(0, targets)
        coefficients = _coefficients(settings, parameters, layers, sums, by_row(kept.counts, part))
        product, *first_sums = op.target_gradients(
            *target, coefficients, precise_queries, grad_features, engine
        )
        found.add(part, product, layers.inverse_sigma * sums[:, 1], sums[:, 0])
        sums_first.append(first_sums)
    if wants(pairs.sources):
        states = reduction.states(grad_s, grad_z)
        outputs_of: list[list[int]] = [[] for _ in pairs.sources]
        for output, group in enumerate(pairs.members):
            for member in group:
                outputs_of[member].append(output)
        source = (*source, *(joint(x, outputs_of) for x in states))
        sums, *values = op.source_sums(*source, precise_values, grad_features, engine)
        part, layers = rows.second[targets:], second.part(targets, len(rows.second))
        coefficients = _coefficients(settings, parameters, layers, sums, by_row(kept.counts, part))
        product, *first_sums = op.source_gradients(
            *source, coefficients, precise_keys, grad_features, engine
        )
        found.add(part, product, layers.inverse_sigma * sums[:, 1], sums[:, 0])
        sums_first += [first_sums, values]
    if sums_first:
        start = 0 if wants(pairs.targets) else targets
        stop = len(rows.first) if wants(pairs.sources) else targets
        part, layers = rows.first[start:stop], first.part(start, stop)
        products = [x for sums, _ in sums_first for x in sums]
        biases = torch.cat([sums for _, sums in sums_first])
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
    products: Sequence[Tensor],
    bias: Tensor,
    found: Gradients,
    grad_features: Sequence[Tensor],
) -> None:
    """From the sums da1 x'^T, one (C, C) a row in float64, and da1 (R, C) over tokens."""
    reduction, bias, groups = settings.reduction, bias.double(), by_slot(rows)
    places, batch = _places(settings, rows), parameters.batch
    var = take(kept.closed_var if batch else kept.var, places)
    _, inverse_sigma, scale = normalisation(parameters, rows, var, settings.bn_eps)
    mean, overlaps = take(kept.mean, places), []
    for slot, numbers in groups:
        weight = take(layers.weight, numbers).double()
        mean1 = weight @ kept.offset[slot] if batch else take(mean, numbers)
        overlap = (weight * torch.stack([products[i] for i in numbers])).sum(dim=2)
        overlaps.append(overlap - mean1 * take(bias, numbers))
    gamma = inverse_sigma * ungrouped(overlaps, groups)
    dtype = layers.weight.dtype
    if not batch:
        weights = scaled(scale, torch.stack(list(products))).to(dtype)
        found.add(rows, weights, gamma, bias)
        return
    sums = reduction.sums(torch.stack([gamma, bias])) / by_row(kept.counts, rows)
    slope, constant = inverse_sigma * sums[0], sums[1]
    own_counts = counts_of(features)
    matrix, vector = torch.zeros_like(kept.product), torch.zeros_like(kept.offset)
    for slot, numbers in groups:
        weight = take(layers.weight, numbers).double()
        slopes, constants, scales = (take(x, numbers) for x in (slope, constant, scale))
        total, offset = kept.total[slot], kept.offset[slot]
        product = torch.stack([products[i] for i in numbers]) - constants.unsqueeze(2) * total
        about_mean = kept.product[slot] - torch.outer(offset, total)
        product = product - scaled(slopes, weight @ about_mean)
        biases = take(bias, numbers)
        if not reduction.is_local:
            own = own_counts[slot]
            rest = biases - own * constants - slopes * (weight @ (total - own * offset))
            product = product + rest.unsqueeze(2) * kept.center[slot].double()
        weights = scaled(scales, product).to(dtype)
        found.add([rows[i] for i in numbers], weights, take(gamma, numbers), biases)
        # By row, not in one product: that would add in an order which depends on the threads.
        transposed = scaled(scales, weight).mT
        matrix[slot] = -(transposed @ scaled(slopes, weight)).sum(dim=0)
        vector[slot] = -apply_rows(transposed, constants).sum(dim=0) - matrix[slot] @ offset
    if any(gradient.numel() for gradient in grad_features):
        affine = (matrix.to(dtype), vector.to(dtype))
        op.input_gradient(features, kept.center, *affine, grad_features, settings.engine)


def _coefficients(
    settings: Settings, parameters: Parameters, layers: Layers, sums: Tensor, count: Tensor
) -> Tensor:
    """(c0, c1) of second layers, (R, 2, C), from the sums over the tokens of this process."""
    if not parameters.batch:
        return torch.zeros_like(sums)
    mean0, mean1 = (settings.reduction.sums(sums.double()) / count.unsqueeze(1)).unbind(dim=1)
    c1 = layers.scale * layers.inverse_sigma.square() * mean1
    return torch.stack([layers.scale * mean0, c1], dim=1).to(sums.dtype)


def _layers_again(
    settings: Settings, parameters: Parameters, rows: Rows, kept: _Kept
) -> tuple[Layers, Layers]:
    """The layers of `rows`, which may be a part of those of the forward pass."""
    first, second = (_places(settings, part) for part in rows)
    return (
        first_layers(
            parameters, rows.first, take(kept.mean, first), take(kept.var, first), settings.bn_eps
        ),
        second_layers(
            parameters,
            rows.second,
            take(kept.mean, second),
            take(kept.var, second),
            settings.bn_eps,
        ),
    )


def _places(settings: Settings, rows: Sequence[Row]) -> list[int]:
    """Where rows are among those of the forward pass."""
    of_forward = Rows.of(pairs_of(settings.edges))
    numbers = {row: number for number, row in enumerate((*of_forward.first, *of_forward.second))}
    return [numbers[row] for row in rows]


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
            queries.weight,
            queries.affine,
            second_queries.weight,
            second_queries.affine,
        ),
        (
            features,
            center,
            [slot for slot, _ in pairs.sources],
            torch.stack([keys.weight, values.weight], dim=1),
            torch.stack([keys.affine, values.affine], dim=1),
            second_keys.weight,
            second_keys.affine,
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


def _zeros(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, C, N) like `x`, with the channels of a token together."""
    return x.new_zeros((x.size(0), x.size(2), x.size(1)), dtype=dtype).transpose(1, 2)
