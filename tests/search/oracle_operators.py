"""The operators by their equations, op by op in plain PyTorch, in the dtype of their arguments.

Nothing here comes from the package: features are (B, C, N), edges are tuples of integers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_generators: list[tuple[torch.Generator, bool]] = []


@contextlib.contextmanager
def rounded_otherwise(seed: int) -> Iterator[None]:
    """Have results of layers, and their gradients, changed in their last digit; not for seed 0.

    Odd seeds have maps in channels_last, where some of torch's layers are less exact.
    """
    if not seed:
        yield
        return
    _generators.append((torch.Generator().manual_seed(seed), seed % 2 == 1))
    try:
        yield
    finally:
        _generators.pop()


def rounded(x: Tensor) -> Tensor:
    """The result of a layer, see `rounded_otherwise`.

    Its gradient will be contiguous: some of torch's layers go wrong by odd strides.
    """
    if _generators:
        generator, last = _generators[-1]
        x = x * _factor(x, generator)
        if last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
    if x.requires_grad:
        x.register_hook(_rounded_gradient)
    return x


def _rounded_gradient(gradient: Tensor) -> Tensor:
    gradient = gradient.clone(memory_format=torch.contiguous_format)
    return gradient * _factor(gradient, _generators[-1][0]) if _generators else gradient


def _factor(x: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(-1, 2, x.shape, generator=generator)
    return (1 + torch.finfo(x.dtype).eps * signs).to(x.dtype)


Edges = Sequence[tuple[int, int, int, int]]
"""(query, source, output, set of weights)."""

FEATURE_MAPS = {
    "softplus": F.softplus,
    "relu": F.relu,
    # elu(x) + 1; the sum of -1 + exp(x) and 1 would have no digits of small ones
    "elu": lambda x: torch.where(x > 0, x + 1, x.clamp_max(0).exp()),
    "identity": lambda x: x,
}


def groups(edges: Edges) -> list[tuple[int, int, list[int]]]:
    """Query, set of weights and sources of every output."""
    found: dict[int, tuple[int, int, list[int]]] = {}
    for query, source, output, weight in edges:
        found.setdefault(output, (query, weight, []))[2].append(source)
    return [found[output] for output in sorted(found)]


class Linear(NamedTuple):
    outputs: list[Tensor]
    s: Tensor
    z: Tensor


def linear(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    edges: Edges,
    feature_map: str = "softplus",
    eps: float = 1e-12,
    state: tuple[Tensor, Tensor] | None = None,
) -> Linear:
    """out_m = S phi(q_m) / max(Z . phi(q_m), eps), S = sum v phi(k)^T, Z = sum phi(k)."""
    phi = FEATURE_MAPS[feature_map]
    outputs, states_s, states_z = [], [], []
    for number, (q, _, sources) in enumerate(groups(edges)):
        keys = torch.cat([phi(key[j]) for j in sources], dim=2)
        values = torch.cat([value[j] for j in sources], dim=2)
        # A product, as the sum of v phi(k)^T is: torch's sums are more exact than any product.
        ones = keys.new_ones(*keys.shape[::2]).unsqueeze(1)
        s, z = (v @ keys.transpose(1, 2) for v in (values, ones))
        z = z.squeeze(1)
        s, z = rounded(s), rounded(z)
        if state is not None:
            s, z = s + state[0][number], z + state[1][number]
        mapped = phi(query[q])
        # Of a state in float32 beside features of 16 bits.
        mapped = mapped.to(s.dtype)
        denominator = (z.unsqueeze(1) @ mapped).clamp_min(eps)
        outputs.append(rounded(s @ mapped / denominator))
        states_s.append(s)
        states_z.append(z)
    return Linear(outputs, torch.stack(states_s), torch.stack(states_z))


def softmax(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    edges: Edges,
    heads: int = 1,
    scale: float | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and log-sum-exp of scaled dot-product attention, all scores stored."""
    outputs, sums = [], []
    for q, _, sources in groups(edges):
        x = query[q].unflatten(1, (heads, -1))
        keys = torch.cat([key[j] for j in sources], dim=2).unflatten(1, (heads, -1))
        values = torch.cat([value[j] for j in sources], dim=2).unflatten(1, (heads, -1))
        factor = x.shape[2] ** -0.5 if scale is None else scale
        scores = rounded(x.transpose(2, 3) @ keys * factor)
        weights = rounded(scores.softmax(dim=-1))
        outputs.append(rounded(values @ weights.transpose(2, 3)).flatten(1, 2))
        sums.append(scores.logsumexp(dim=-1))
    return outputs, sums


def block(
    features: Sequence[Tensor], weight: Tensor, bias: Tensor, edges: Edges, eps: float = 1e-12
) -> list[Tensor]:
    """Attention of projected features; `weight` (W, 5, C, C): query 1, 2, key 1, 2, value."""

    def project(x: Tensor, w: int, layer: int) -> Tensor:
        return rounded(weight[w, layer] @ x + bias[w, layer].unsqueeze(1))

    outputs = []
    for q, w, sources in groups(edges):
        query = project(F.relu(project(features[q], w, 0)), w, 1)
        key = [project(F.relu(project(features[a], w, 2)), w, 3) for a in sources]
        value = [F.relu(project(features[a], w, 4)) for a in sources]
        joint = [(0, j, 0, 0) for j in range(len(sources))]
        outputs += linear([query], key, value, joint, eps=eps).outputs
    return outputs


class Training(NamedTuple):
    outputs: list[Tensor]
    means: dict[tuple[int, int, int], Tensor]
    """By slot, set of weights and layer: of what the batch norm of the layer gets."""
    variances: dict[tuple[int, int, int], Tensor]
    """Biased."""


def training_block(
    features: Sequence[Tensor],
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    edges: Edges,
    running: tuple[Tensor, Tensor] | None = None,
    bn_eps: float = 1e-5,
    eps: float = 1e-12,
) -> Training:
    """As `block`, of convolutions without bias and batch norms, with statistics of the batch."""
    means: dict[tuple[int, int, int], Tensor] = {}
    variances: dict[tuple[int, int, int], Tensor] = {}

    def project(x: Tensor, slot: int, w: int, layer: int) -> Tensor:
        y = rounded(weight[w, layer] @ x)
        affine = gamma[w, layer], beta[w, layer]
        if running is not None:
            mean, var = running[0][w, layer], running[1][w, layer]
            return rounded(F.batch_norm(y, mean, var, *affine, training=False, eps=bn_eps))
        means[slot, w, layer] = y.detach().mean(dim=(0, 2))
        variances[slot, w, layer] = y.detach().var(dim=(0, 2), correction=0)
        return rounded(F.batch_norm(y, None, None, *affine, training=True, eps=bn_eps))

    outputs = []
    for q, w, sources in groups(edges):
        query = project(F.relu(project(features[q], q, w, 0)), q, w, 1)
        key = [project(F.relu(project(features[a], a, w, 2)), a, w, 3) for a in sources]
        value = [F.relu(project(features[a], a, w, 4)) for a in sources]
        joint = [(0, j, 0, 0) for j in range(len(sources))]
        outputs += linear([query], key, value, joint, eps=eps).outputs
    return Training(outputs, means, variances)


def pyramid(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    scale: Tensor,
    shift: Tensor,
    classifier: Tensor,
    classifier_bias: Tensor | None,
    batch_statistics: bool,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Upsample, concatenate, convolve, normalise, relu, classify; with mean and variance."""
    size = features[0].shape[2:]
    levels = [F.interpolate(x, size, mode="bilinear", align_corners=False) for x in features]
    z = F.conv2d(torch.cat(levels, dim=1), torch.cat(list(weights), dim=1)[:, :, None, None])
    z = rounded(z)
    mean = var = None
    if batch_statistics:
        mean = z.detach().mean(dim=(0, 2, 3))
        var = z.detach().var(dim=(0, 2, 3), correction=0)
        y = rounded(F.batch_norm(z, None, None, scale, shift, training=True, eps=eps))
    else:
        y = rounded(scale[:, None, None] * z + shift[:, None, None])
    return F.conv2d(F.relu(y), classifier[:, :, None, None], classifier_bias), mean, var
