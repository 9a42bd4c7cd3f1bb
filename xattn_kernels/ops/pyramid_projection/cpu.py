"""The pyramid projection on the native CPU module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xattn_kernels.engines.native import DTYPE_CODES, core, cpu_refusals, views
from xattn_kernels.ops.features import ACCUMULATORS
from xattn_kernels.ops.pyramid_projection.op import Results, allocate, allocate_gradients
from xattn_kernels.problem import Problem

_core = core()
_NOTHING: tuple[int, ...] = (0, 0, 0, 0, 0)


def refusals(problem: Problem) -> list[str]:
    """Why this engine cannot run a problem."""
    return cpu_refusals(problem)


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
    results = allocate(features, classifier, batch_statistics, save or batch_statistics)
    if features[0].numel() == 0:
        return results
    problem = _Problem.of(features, weights, classifier)
    dtype = problem.dtype
    scale, shift, bias = (x.to(dtype).contiguous() for x in (scale, shift, classifier_bias))
    output = views([results.output.flatten(2)])[0]
    hidden = results.hidden.data_ptr() if save or batch_statistics else 0
    mean, var = results.mean, results.var
    if batch_statistics:
        problem.call(_core.pyramid_forward, _NOTHING, scale, shift, bias, hidden, mean, var)
        count = features[0].numel() // features[0].size(1)
        var /= count
        scale = scale * (var + eps).rsqrt()
        shift = torch.addcmul(shift, mean, scale, value=-1)
        problem.call(_core.pyramid_classify, output, scale, shift, bias, hidden)
    else:
        problem.call(_core.pyramid_forward, output, scale, shift, bias, hidden)
    if not save:
        results = results._replace(hidden=results.hidden.new_empty(0))
    return results


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
    problem = _Problem.of(features, weights, classifier)
    dtype, levels = problem.dtype, len(features)
    factor, offset = scale.to(dtype), shift.to(dtype)
    deviation_inverse = torch.ones_like(factor)
    if batch_statistics:
        deviation_inverse = (var + eps).rsqrt()
        factor = factor * deviation_inverse
        offset = torch.addcmul(offset, mean, factor, value=-1)
    else:
        mean = torch.zeros_like(factor)
    vectors = [x.contiguous() for x in (factor, offset, mean)]
    sums, map_sums = torch.empty_like(factor), torch.empty_like(factor)
    grad_classifier = torch.empty_like(problem.classifier)
    grad = grad_output.flatten(2)
    none = ([_NOTHING] * levels, [0] * levels)
    arguments = (problem, vectors, hidden, grad)
    _call_backward(_core.pyramid_sums, *arguments, (), (sums, map_sums, grad_classifier), *none)
    if any(wanted[: 2 * levels]):
        slope, constant = torch.zeros_like(sums), torch.zeros_like(sums)
        if batch_statistics:
            count = hidden.size(0) * hidden.size(2)
            slope = factor * deviation_inverse.square() * map_sums * (-1 / count)
            constant = factor * sums * (-1 / count)
        found = iter(gradients)
        grads = [next(found) if want else None for want in wanted[: 2 * levels]]
        # The kernel writes weights' gradients in its own type, contiguously.
        flat = [None if x is None else x.flatten(2) for x in grads[:levels]]
        full = [None if x is None else torch.empty(x.shape, dtype=dtype) for x in grads[levels:]]
        _call_backward(
            _core.pyramid_backward,
            *arguments,
            (slope, constant),
            (),
            [_NOTHING if x is None else views([x])[0] for x in flat],
            [0 if x is None else x.data_ptr() for x in full],
        )
        for x, y in zip(grads, [*flat, *full], strict=True):
            if x is not None and y is not None and x.data_ptr() != y.data_ptr():
                x.copy_(y.view_as(x))
    parameters = (
        map_sums * deviation_inverse,
        sums,
        grad_classifier.t(),
        grad.sum(dim=(0, 2), dtype=dtype),
    )
    places = gradients[sum(wanted[: 2 * levels]) :]
    values = [x for x, want in zip(parameters, wanted[2 * levels :], strict=True) if want]
    for place, value in zip(places, values, strict=True):
        place.copy_(value)
    return gradients


class _Problem(NamedTuple):
    """What all entry points take; holds the tensors whose addresses it has."""

    head: tuple[int, int, int, int]
    levels: list[tuple[int, ...]]
    features: list[Tensor]
    weights: list[Tensor]
    classifier: Tensor
    dtype: torch.dtype

    @classmethod
    def of(
        cls, features: Sequence[Tensor], weights: Sequence[Tensor], classifier: Tensor
    ) -> _Problem:
        """Lay weights out as the kernels read them: transposed. A view of such takes no copy."""
        dtype = ACCUMULATORS[features[0].dtype]
        flat = [x.flatten(2) for x in features]
        transposed = [w.t().to(dtype).contiguous() for w in weights]
        levels = [
            (*view, x.size(1), *x.shape[2:], w.data_ptr())
            for view, x, w in zip(views(flat), features, transposed, strict=True)
        ]
        outputs, hidden = classifier.shape
        head = (DTYPE_CODES[features[0].dtype], features[0].size(0), hidden, outputs)
        rows = classifier.t().to(dtype).contiguous()
        return cls(head, levels, flat, transposed, rows, dtype)

    def call(
        self,
        kernel: object,
        output: tuple[int, ...],
        scale: Tensor,
        shift: Tensor,
        bias: Tensor,
        hidden: int,
        mean: Tensor | None = None,
        deviations: Tensor | None = None,
    ) -> None:
        assert callable(kernel)
        kernel(
            *self.head,
            self.levels,
            scale.data_ptr(),
            shift.data_ptr(),
            self.classifier.data_ptr(),
            bias.data_ptr(),
            output,
            hidden,
            0 if mean is None else mean.data_ptr(),
            0 if deviations is None else deviations.data_ptr(),
            torch.get_num_threads(),
        )


def _call_backward(
    kernel: object,
    problem: _Problem,
    vectors: Sequence[Tensor],
    hidden: Tensor,
    grad: Tensor,
    corrections: Sequence[Tensor],
    sums: Sequence[Tensor],
    grad_features: list[tuple[int, ...]],
    grad_weights: list[int],
) -> None:
    assert callable(kernel)
    factor, offset, mean = vectors
    corrections = [x.contiguous() for x in corrections]
    kernel(
        *problem.head,
        problem.levels,
        factor.data_ptr(),
        offset.data_ptr(),
        problem.classifier.data_ptr(),
        hidden.data_ptr(),
        views([grad])[0],
        mean.data_ptr(),
        *([x.data_ptr() for x in corrections] or [0, 0]),
        *([x.data_ptr() for x in sums] or [0, 0, 0]),
        grad_features,
        grad_weights,
        torch.get_num_threads(),
    )
