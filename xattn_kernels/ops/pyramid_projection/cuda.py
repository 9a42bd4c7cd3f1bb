"""The pyramid projection in CUDA C++: forward in two launches, z stored only where it is needed.

The coarse levels are projected at their own resolution; a second kernel interpolates them by tensor
cores and does everything else, a tile of pixels and a block of hidden channels at a time. Batch
statistics store z, as a backward pass does, and the classifier then reads it.

The backward pass has no kernels of its own: torch computes it from the stored z, products in
bfloat16 for such features and else in float32, sums in float32, and slices of samples of bounded
size at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from xattn_kernels.engines import native_cuda
from xattn_kernels.engines.native import DTYPE_CODES, views
from xattn_kernels.ops import library
from xattn_kernels.ops.pyramid_projection.adjoint import LevelGradients
from xattn_kernels.ops.pyramid_projection.op import Results, allocate, allocate_gradients
from xattn_kernels.problem import Problem

_cuda = native_cuda.module()
_NOTHING: tuple[int, ...] = (0, 0, 0, 0, 0)
#: Bytes of float32 that a slice of z takes in the backward pass, a sample at least.
_SLICE = 2**28


def refusals(problem: Problem) -> list[str]:
    """Why this engine cannot run a problem."""
    return native_cuda.refusals(problem)


def forward(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    scale: Tensor,
    shift: Tensor,
    classifier: Tensor,
    classifier_bias: Tensor,
    batch_statistics: bool,
    eps: float,
    save: bool,
) -> Results:
    """Output, statistics and, for a backward pass, z. Without either z is never stored."""
    keep = save or batch_statistics
    results = allocate(features, classifier, batch_statistics, keep)
    if features[0].numel() == 0:
        return results
    scale, shift, bias = (x.float().contiguous() for x in (scale, shift, classifier_bias))
    flat = [x.flatten(2) for x in features]
    output = views([results.output.flatten(2)])[0]
    hidden = results.hidden.data_ptr() if keep else 0

    def call(
        kernel: Any, scale: Tensor, shift: Tensor, output: tuple[int, ...], *moments: Tensor
    ) -> None:
        kernel(
            native_cuda.context(features[0]),
            DTYPE_CODES[features[0].dtype],
            features[0].size(0),
            classifier.size(1),
            classifier.size(0),
            [
                (*view, x.size(1), *x.shape[2:], 0)
                for view, x in zip(views(flat), features, strict=True)
            ],
            DTYPE_CODES[classifier.dtype],
            views([w.unsqueeze(0) for w in weights]),
            views([classifier.unsqueeze(0)])[0],
            scale.data_ptr(),
            shift.data_ptr(),
            bias.data_ptr(),
            output,
            hidden,
            *([x.data_ptr() for x in moments] or [0, 0]),
        )

    if not batch_statistics:
        call(_cuda.pyramid_forward, scale, shift, output)
        return results
    mean, var = results.mean, results.var
    call(_cuda.pyramid_forward, scale, shift, _NOTHING, mean, var)
    var /= features[0].numel() // features[0].size(1)
    scale = scale * (var + eps).rsqrt()
    shift = torch.addcmul(shift, mean, scale, value=-1)
    call(_cuda.pyramid_classify, scale, shift, output)
    return results if save else results._replace(hidden=results.hidden.new_empty(0))


def backward(
    grad_output: Tensor,
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    scale: Tensor,
    shift: Tensor,
    classifier: Tensor,
    mean: Tensor,
    var: Tensor,
    hidden: Tensor,
    batch_statistics: bool,
    eps: float,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """The wanted gradients of features, weights, scale, shift, classifier and its bias."""
    gradients = allocate_gradients(features, weights, scale, classifier, wanted)
    if features[0].numel() == 0:
        return [x.zero_() for x in gradients]
    of_levels = 2 * len(features)
    places = library.place_gradients(gradients, wanted)
    factor, offset = scale.float(), shift.float()
    inverse = torch.ones_like(factor)
    if batch_statistics:
        inverse = (var + eps).rsqrt()
        factor = factor * inverse
        offset = torch.addcmul(offset, mean, factor, value=-1)
    else:
        mean = torch.zeros_like(factor)
    mean, factor, offset = (x[:, None] for x in (mean, factor, offset))
    work = torch.bfloat16 if hidden.dtype is torch.bfloat16 else torch.float32
    grad, rows = grad_output.flatten(2).to(work), classifier.to(work)

    def slices() -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Of a few samples: z - mean, scale z + shift, and the gradient of the latter."""
        step = max(1, _SLICE // (4 * hidden[0].numel()))
        for start in range(0, hidden.size(0), step):
            part = slice(start, min(start + step, hidden.size(0)))
            z = hidden[part].float()
            active = torch.addcmul(offset, z, factor)
            g = (rows.t() @ grad[part]).float()
            yield part, z - mean, active, g.masked_fill_(active <= 0, 0)

    with torch.autocast(hidden.device.type, enabled=False):
        sums, map_sums = torch.zeros_like(scale, dtype=torch.float32), torch.zeros_like(inverse)
        grad_classifier = torch.zeros_like(classifier, dtype=torch.float32)
        if batch_statistics or any(wanted[of_levels:]):
            for part, z, active, g in slices():
                sums += g.sum(dim=(0, 2))
                map_sums += (g * z).sum(dim=(0, 2))
                product = grad[part] @ active.relu_().to(work).transpose(1, 2)
                grad_classifier += product.sum(dim=0, dtype=torch.float32)
        if any(wanted[:of_levels]):
            levels = LevelGradients(features, weights, places[:of_levels], work)
            count = hidden.size(0) * hidden.size(2)
            for part, z, _, g in slices():
                dz = g.mul_(factor)
                if batch_statistics:
                    dz -= factor * (inverse.square() * map_sums / count)[:, None] * z
                    dz -= factor * (sums / count)[:, None]
                levels.add(part, dz.to(work))
            levels.finish()
    bias = grad_output.sum(dim=(0, 2, 3), dtype=torch.float32)
    parameters = (map_sums * inverse, sums, grad_classifier, bias)
    for place, value in zip(places[of_levels:], parameters, strict=True):
        if place is not None:
            place.copy_(value)
    return gradients
