"""The passes of the cross-attention block in training, in plain PyTorch: the equations themselves.

With x' = x - center for the center of a slot (the rounded mean of its batch; zeros where the batch
norms use running statistics), a pair of slot and set of weights is projected as::

    h = relu(diag(D1) W1 x' + b1)    first layer, `first_affine` = [D1, b1]; D1 may be zero
    y = W2 h + b2                    second layer
    a = diag(D2) y + beta            `affine` = [b2, D2, beta]; D2 may be zero
    q^, k^ = softplus(a)             v = relu(diag(Dv) Wv x' + bv)

where D1, D2, Dv are factor over standard deviation of batch norms, which are not folded into the
weights: the moments of W1 x' and of W2 h are then those of the very same products.

and for every output o, whose states S and Z are sums over its source pairs::

    S = sum_n v_n k^_n^T    Z = sum_n k^_n    d = max(Z . q^, eps)    out = S q^ / d

What all functions have in common:

- `features`: one (B, C, N_s) tensor a slot, of any strides. Everything else is contiguous and in
  the dtype of computation (float32; float64 for float64 features) but `outputs` and
  `grad_outputs`, which have the dtype of the features and any strides, and what is said to be in
  float64.
- `slots`: the slot of each of P pairs. A slot without tokens adds nothing to sums.
- `target_of_output`: the pair of each output; every pair has one or more.
- `precise`: (P) booleans. Where true, most of sums with x' is taken away when a batch norm passes
  its gradient on, and an engine should make them in float64, x' included. It may do so elsewhere.
- `grad_features`: one (B, C, N_s) tensor a slot, the channels of a token together, to be *added*
  to; one without elements where the gradient of a slot's features is not wanted.
- Sums over samples and tokens are in a fixed order: results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn_kernels.problem import Problem

THRESHOLD = 20.0
"""Above it torch's softplus is the identity."""


def refusals(problem: Problem) -> list[str]:
    """Nothing is refused."""
    return []


def moments(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Means (S, C) over samples and tokens, and sums of (x - mean) (x - mean)^T, (S, C, C).

    Both are in float64.
    """
    means, deviations = [], []
    for x in features:
        x = x.double()
        mean = x.sum(dim=(0, 2)) / _tokens(x)
        means.append(mean)
        deviations.append(_outer(x - mean[:, None], x - mean[:, None]))
    return torch.stack(means), torch.stack(deviations)


def first_moments(
    features: Sequence[Tensor],
    center: Tensor,
    slots: Sequence[int],
    weight: Tensor,
    precise: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of W1 x' where `precise` is true, in float64; zeros elsewhere.

    Returns:
        Means (P, C), sums of squared deviations from them (P, C), and the numbers of (sample,
        token) that were measured (P). An engine may measure nothing.
    """
    products = [weight[pair] @ x for pair, x in _each(features, center, slots)]
    counts = torch.tensor([y.size(0) * y.size(2) for y in products], device=precise.device)
    mean, deviations = (x * precise.unsqueeze(1) for x in _moments(products))
    return mean, deviations, counts.double() * precise


def hidden_moments(
    features: Sequence[Tensor],
    center: Tensor,
    slots: Sequence[int],
    first: Tensor,
    first_affine: Tensor,
    second: Tensor,
) -> tuple[Tensor, Tensor]:
    """Means (P, C) of W2 h, and sums of squared deviations from them, (P, C), in float64."""
    products = [
        second[pair] @ _first(x, first[pair], first_affine[pair])
        for pair, x in _each(features, center, slots)
    ]
    return _moments(products)


def states(
    features: Sequence[Tensor],
    center: Tensor,
    slots: Sequence[int],
    first: Tensor,
    first_affine: Tensor,
    second: Tensor,
    affine: Tensor,
) -> tuple[Tensor, Tensor]:
    """S (P, B, C, C), rows of values and columns of keys, and Z (P, B, C) of every pair.

    Args:
        features: see above.
        center: (S, C).
        slots: see above.
        first: (P, 2, C, C), W1 of keys and Wv.
        first_affine: (P, 2, 2, C).
        second: (P, C, C), W2 of keys.
        affine: (P, 3, C).
    """
    all_s, all_z = [], []
    for pair, x in _each(features, center, slots):
        source = _project_source(x, first, first_affine, second, affine, pair)
        all_s.append(source.values @ source.keys.mT)
        all_z.append(source.keys.sum(dim=2))
    return torch.stack(all_s), torch.stack(all_z)


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
    """Write the outputs, one (B, C, N) each.

    Args:
        features: see above.
        center: (S, C).
        slots: see above.
        first: (P, C, C), W1 of queries.
        first_affine: (P, 2, C).
        second: (P, C, C), W2 of queries.
        affine: (P, 3, C).
        target_of_output: see above.
        state_s: (O, B, C, C).
        state_z: (O, B, C).
        eps: lower bound of the denominator.
        outputs: to be written.
    """
    for pair, x in _each(features, center, slots):
        target = _project(x, first[pair], first_affine[pair], second[pair], affine[pair])
        query = F.softplus(target.activation)
        for o in _outputs(target_of_output, pair):
            denominator = (state_z[o].unsqueeze(1) @ query).clamp_min(eps)
            outputs[o].copy_(state_s[o] @ query / denominator)


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
    """Gradients dS (O, B, C, C), dZ (O, B, C) of the states, and (P, 2, C) sums of da and da y.

    With g the gradient of an output and c = g . out (0 where the clamp is active)::

        dS = sum g q^^T / d      dZ = - sum c q^ / d
        dq^ = (S^T g - c Z) / d      da = dq^ softplus'(a), summed over the outputs of a pair
    """
    grad_s, grad_z = torch.empty_like(state_s), torch.empty_like(state_z)
    sums = []
    for pair, x in _each(features, center, slots):
        target = _project(x, first[pair], first_affine[pair], second[pair], affine[pair])
        gradient = torch.zeros_like(x)
        for o in _outputs(target_of_output, pair):
            output = _attention_backward(target, state_s[o], state_z[o], eps, grad_outputs[o])
            grad_s[o], grad_z[o] = output.state_s, output.state_z
            gradient += output.activation
        sums.append(_sums(gradient, target.second))
    return grad_s, grad_z, torch.stack(sums)


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
    """Sums for the gradients of the query layers; adds to those of the features.

    With da as in :func:`target_sums` and (c0, c1) the `coefficients` (P, 2, C), by which batch
    statistics pass gradients on (zero for running statistics)::

        e = D2 da - c0 - c1 y      da1 = (W2^T e) [h > 0]      dx += W1^T diag(D1) da1

    Returns:
        Sums of e h^T (P, C, C), da1 x'^T (P, C, C), in float64, and da1 (P, C) for every pair.
    """
    results = []
    for pair, x in _each(features, center, slots):
        target = _project(x, first[pair], first_affine[pair], second[pair], affine[pair])
        gradient = torch.zeros_like(x)
        for o in _outputs(target_of_output, pair):
            output = _attention_backward(target, state_s[o], state_z[o], eps, grad_outputs[o])
            gradient += output.activation
        layers = (first[pair], first_affine[pair], second[pair], affine[pair], coefficients[pair])
        exact, grad = _exact(features, center, slots[pair]), grad_features[slots[pair]]
        results.append(_layers_backward(exact, target, gradient, *layers, grad))
    return _stacked(results)


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
    """Sums (P, 2, C) of da and da y for keys, and those of the value layer, da_v x'^T and da_v.

    With `first` to `affine` as in :func:`states`, and dS (P, B, C, C), dZ (P, B, C) of the pairs::

        dk^ = dS^T v + dZ    da = dk^ softplus'(a)
        da_v = (dS k^) [v > 0]    dx += Wv^T diag(Dv) da_v

    Those of da_v x'^T are in float64.
    """
    sums, results = [], []
    for pair, x in _each(features, center, slots):
        source = _project_source(x, first, first_affine, second, affine, pair)
        gradient = _key_gradient(source, grad_s[pair], grad_z[pair])
        sums.append(_sums(gradient, source.layers.second))
        values = torch.where(source.values > 0, grad_s[pair] @ source.keys, 0)
        exact = _exact(features, center, slots[pair])
        results.append((_outer(values.double(), exact), values.sum(dim=(0, 2))))
        _add(grad_features[slots[pair]], _scaled(first[pair, 1], first_affine[pair, 1]).T @ values)
    product, bias = (torch.stack(parts) for parts in zip(*results, strict=True))
    return torch.stack(sums), product, bias


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
    """As :func:`target_gradients`, for the key layers and with da as in :func:`source_sums`."""
    results = []
    for pair, x in _each(features, center, slots):
        source = _project_source(x, first, first_affine, second, affine, pair)
        gradient = _key_gradient(source, grad_s[pair], grad_z[pair])
        keys = (first[pair, 0], first_affine[pair, 0])
        layers = (*keys, second[pair], affine[pair], coefficients[pair])
        exact, grad = _exact(features, center, slots[pair]), grad_features[slots[pair]]
        results.append(_layers_backward(exact, source.layers, gradient, *layers, grad))
    return _stacked(results)


def input_gradient(
    features: Sequence[Tensor],
    center: Tensor,
    matrix: Tensor,
    vector: Tensor,
    grad_features: Sequence[Tensor],
) -> None:
    """Add matrix x' + vector, (S, C, C) and (S, C), to the gradients of the features."""
    for slot in range(len(features)):
        x = _centred(features, center, slot)
        _add(grad_features[slot], matrix[slot] @ x + vector[slot, :, None])


class _Layers(NamedTuple):
    """The two layers of a query or key, (B, C, N) each."""

    hidden: Tensor
    second: Tensor
    activation: Tensor


class _Source(NamedTuple):
    layers: _Layers
    keys: Tensor
    values: Tensor


class _Output(NamedTuple):
    """Gradients that one output gives."""

    state_s: Tensor
    state_z: Tensor
    activation: Tensor


def _project(
    x: Tensor, first: Tensor, first_affine: Tensor, second: Tensor, affine: Tensor
) -> _Layers:
    bias, scale, beta = affine.unsqueeze(2)
    hidden = _first(x, first, first_affine)
    y = second @ hidden + bias
    return _Layers(hidden, y, scale * y + beta)


def _first(x: Tensor, weight: Tensor, affine: Tensor) -> Tensor:
    scale, shift = affine.unsqueeze(2)
    return F.relu(scale * (weight @ x) + shift)


def _project_source(
    x: Tensor, first: Tensor, first_affine: Tensor, second: Tensor, affine: Tensor, pair: int
) -> _Source:
    layers = _project(x, first[pair, 0], first_affine[pair, 0], second[pair], affine[pair])
    values = _first(x, first[pair, 1], first_affine[pair, 1])
    return _Source(layers, F.softplus(layers.activation), values)


def _attention_backward(
    target: _Layers, state_s: Tensor, state_z: Tensor, eps: float, gradient: Tensor
) -> _Output:
    gradient = gradient.to(state_s.dtype)
    query = F.softplus(target.activation)
    total = state_z.unsqueeze(1) @ query
    denominator = total.clamp_min(eps)
    through = state_s.mT @ gradient
    share = torch.where(total >= eps, (through * query).sum(1, keepdim=True) / denominator, 0)
    scaled = query / denominator
    return _Output(
        gradient @ scaled.mT,
        -(share * scaled).sum(dim=2),
        (through - share * state_z.unsqueeze(2)) / denominator * _slope(target.activation),
    )


def _key_gradient(source: _Source, grad_s: Tensor, grad_z: Tensor) -> Tensor:
    gradient = grad_s.mT @ source.values + grad_z.unsqueeze(2)
    return gradient * _slope(source.layers.activation)


def _layers_backward(
    x: Tensor,
    layers: _Layers,
    gradient: Tensor,
    first: Tensor,
    first_affine: Tensor,
    second: Tensor,
    affine: Tensor,
    coefficients: Tensor,
    grad_features: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    constant, slope = coefficients.unsqueeze(2)
    e = affine[1, :, None] * gradient - constant - slope * layers.second
    before = torch.where(layers.hidden > 0, second.T @ e, 0)
    _add(grad_features, _scaled(first, first_affine).T @ before)
    products = _outer(e, layers.hidden), _outer(before.double(), x)
    return *products, before.sum(dim=(0, 2))


def _scaled(weight: Tensor, affine: Tensor) -> Tensor:
    return affine[0, :, None] * weight


def _slope(x: Tensor) -> Tensor:
    """The derivative of torch's softplus."""
    return torch.where(x > THRESHOLD, 1, torch.sigmoid(x))


def _sums(gradient: Tensor, y: Tensor) -> Tensor:
    return torch.stack([gradient.sum(dim=(0, 2)), (gradient * y).sum(dim=(0, 2))])


def _moments(products: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    means, deviations = [], []
    for y in products:
        y = y.double()
        means.append(y.sum(dim=(0, 2)) / _tokens(y))
        deviations.append((y - means[-1][:, None]).square().sum(dim=(0, 2)))
    return torch.stack(means), torch.stack(deviations)


def _tokens(x: Tensor) -> int:
    """The number of (sample, token), at least one."""
    return max(x.size(0) * x.size(2), 1)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Sums over samples and tokens of left right^T, (C, C)."""
    return (left @ right.mT).sum(dim=0)


def _add(grad_features: Tensor, gradient: Tensor) -> None:
    if grad_features.numel() > 0:
        grad_features += gradient


def _stacked(results: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    second, first, bias = (torch.stack(parts) for parts in zip(*results, strict=True))
    return second, first, bias


def _each(
    features: Sequence[Tensor], center: Tensor, slots: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    for pair, slot in enumerate(slots):
        yield pair, _centred(features, center, slot)


def _centred(features: Sequence[Tensor], center: Tensor, slot: int) -> Tensor:
    return features[slot].to(center.dtype) - center[slot, :, None]


def _exact(features: Sequence[Tensor], center: Tensor, slot: int) -> Tensor:
    """x' in float64."""
    return features[slot].double() - center[slot, :, None].double()


def _outputs(target_of_output: Sequence[int], pair: int) -> list[int]:
    return [output for output, target in enumerate(target_of_output) if target == pair]
