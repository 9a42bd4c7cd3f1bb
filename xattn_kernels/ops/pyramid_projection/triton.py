"""The pyramid projection in Triton: two launches, and the full-resolution map z is never stored.

Products of the coarse levels, which are small, are computed at their own resolution; a second
kernel interpolates them and does everything else, a tile of pixels and a block of hidden channels
at a time. Batch statistics take a pass of their own before it: centred in every tile, then merged.
For a backward pass z is stored once, and read where it is needed again.

Backward, kernels compute the sums over pixels and dz, which needs z and the outputs' gradient side
by side. What follows are plain matrix products, which torch computes (`adjoint.py`), of dz in
slices of samples of bounded size.

Levels past the fourth are interpolated by torch, in float32 and at full resolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn_kernels.engines.triton import runtime
from xattn_kernels.engines.triton.launch import launch
from xattn_kernels.engines.triton.pyramid_tiles import (
    BLOCK,
    gradient_tiles,
    output_groups,
    output_pieces,
    pixel_tiles,
    project_tiles,
    stored_tiles,
)
from xattn_kernels.engines.triton.runtime import (
    ROW,
    Table,
    ceil_div,
    layout,
    layout_constants,
    pieces,
)
from xattn_kernels.engines.triton.states import chunk_of
from xattn_kernels.ops import library
from xattn_kernels.ops.pyramid_projection.adjoint import LevelGradients
from xattn_kernels.ops.pyramid_projection.op import Results, allocate, allocate_gradients
from xattn_kernels.problem import Problem

#: Levels that the kernels take, the finest included.
_LEVELS = 4
#: Bytes of dz that there are at a time, a sample at least.
_SLICE = 2**28


def refusals(problem: Problem) -> list[str]:
    """Why this engine cannot run a problem."""
    return runtime.refusals(problem)


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
    """Output, statistics and, for a backward pass, z. Without one z is never stored."""
    results = allocate(features, classifier, batch_statistics, save)
    if features[0].numel() == 0:
        return results
    scale, shift, bias = (x.float().contiguous() for x in (scale, shift, classifier_bias))
    with runtime.device_of(features[0]):
        pixels = _Pixels(features, weights, classifier, results)
        if batch_statistics:
            pixels.moments(results.mean, results.var)
            scale = scale * (results.var + eps).rsqrt()
            shift = torch.addcmul(shift, results.mean, scale, value=-1)
        # What the pass of the statistics has stored is read, not computed again.
        stored = save and batch_statistics
        pixels.launch(scale, shift, bias, PROJECT=not stored, STORE=save and not stored)
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
    factor, offset = scale.float(), shift.float()
    deviation_inverse = torch.ones_like(factor)
    if batch_statistics:
        deviation_inverse = (var + eps).rsqrt()
        factor = factor * deviation_inverse
        offset = torch.addcmul(offset, mean, factor, value=-1)
    else:
        mean = torch.zeros_like(factor)
    grad = grad_output.flatten(2)
    levels, of_levels = len(features), sum(wanted[: 2 * len(features)])
    with runtime.device_of(hidden):
        vectors = [factor, offset, mean]
        sums, map_sums, grad_classifier = _sums(grad, hidden, classifier, vectors)
        if of_levels:
            vectors += [torch.zeros_like(sums), torch.zeros_like(sums)]
            if batch_statistics:
                count = hidden.size(0) * hidden.size(2)
                vectors[3] = factor * deviation_inverse.square() * map_sums * (-1 / count)
                vectors[4] = factor * sums * (-1 / count)
            places = library.place_gradients(gradients[:of_levels], wanted[: 2 * levels])
            _levels(grad, hidden, classifier, vectors, features, weights, places)
    parameters = (
        map_sums * deviation_inverse,
        sums,
        grad_classifier,
        grad.sum(dim=(0, 2), dtype=torch.float32),
    )
    values = [x for x, want in zip(parameters, wanted[2 * levels :], strict=True) if want]
    for place, value in zip(gradients[of_levels:], values, strict=True):
        place.copy_(value)
    return gradients


class _Pixels:
    """Launches over tiles of pixels, of levels whose coarse ones are projected already."""

    def __init__(
        self,
        features: Sequence[Tensor],
        weights: Sequence[Tensor],
        classifier: Tensor,
        results: Results,
    ) -> None:
        first = features[0]
        self.batch, channels, self.height, self.width = first.shape
        self.outputs, self.hidden = classifier.shape
        dot = runtime.precision(first.dtype)
        work = _work_type(dot)
        tiles = pixel_tiles(channels, self.outputs, dot)
        self.tokens, self.tiles = tiles.tokens, tiles
        self.count = ceil_div(self.height * self.width, tiles.tokens)
        whole = len(features) if len(features) <= _LEVELS else _LEVELS - 1
        flat = [x.flatten(2) for x in features[:whole]]
        matrices = [w.to(work).unsqueeze(0) for w in weights[:whole]]
        rows = [classifier.to(work).unsqueeze(0)]
        sizes = [x.shape[2:] for x in features[1:whole]]
        if whole < len(features):
            sizes.append(first.shape[2:])
        padded = ceil_div(self.hidden, BLOCK) * BLOCK
        products = [
            rows[0].new_empty(self.batch, size.numel(), padded).transpose(1, 2) for size in sizes
        ]
        if whole < len(features):
            products[-1][:, : self.hidden] = _interpolated(features[whole:], weights[whole:], first)
            products[-1][:, self.hidden :] = 0
        output = [results.output.flatten(2)]
        map_ = [results.hidden if results.hidden.numel() else None]

        table = Table()
        feature, weight = table.add_slots(flat), table.add_slots(matrices)
        product = table.add_slots(products)
        geometry = table.add([length for size in sizes for length in size])
        self.places = [feature, weight, product, geometry]
        self.places += [table.add_slots(x) for x in (rows, map_, output)]
        self.constants: dict[str, Any] = {
            "M": self.hidden,
            "PM": padded,
            "DOT": dot,
            "P_WIDE": any(x.size(2) * padded >= 2**31 for x in products),
            **_types(first.dtype, work),
        }
        project = project_tiles(dot)
        starts = [0]
        for x in flat[1:]:
            programs = padded // project.hidden * self.batch * ceil_div(x.size(2), project.tokens)
            starts.append(starts[-1] + programs)
        start = table.add(starts)
        self.table = table.on(first.device)
        if whole > 1:
            from xattn_kernels.engines.triton.pyramid_kernels import project_kernel

            launch(
                project_kernel,
                starts[-1],
                self.table,
                feature + ROW,
                weight + ROW,
                product,
                start,
                whole - 1,
                **self.constants,
                **layout_constants(X=layout(flat[1:]), W=layout(matrices[1:])),
                BH=project.hidden,
                BN=project.tokens,
                BK=project.channels,
                warps=project.warps,
            )
        first_piece, second_piece = pieces(channels)
        outputs = output_pieces(self.outputs)
        self.constants |= {
            "C": channels,
            "C0": first_piece,
            "C1": second_piece,
            "CO": self.outputs,
            "O0": outputs[0],
            "O1": outputs[1],
            "BN": tiles.tokens,
            "LEVELS": 1 + len(products),
            "N_VECTOR": math.gcd(self.height * self.width, 16),
            **layout_constants(
                X=layout(flat[:1]),
                W=layout(matrices[:1]),
                V=layout(rows),
                Z=layout(map_),
                Y=layout(output),
            ),
        }
        # Addresses are in the table: what they are of must live as long.
        self.kept = (flat, matrices, rows, products, output, map_)

    def moments(self, mean: Tensor, var: Tensor) -> None:
        """Mean and biased variance of every hidden channel; stores z if that is asked for.

        Tiles are centred by themselves and merged in float64, in an order of its own.
        """
        parts = mean.new_empty(self.batch, self.count, 2, self.hidden)
        store = self.kept[-1][0] is not None
        # Without outputs, so that heads of different outputs share a kernel.
        none: dict[str, Any] = {"CO": 1, "O0": 16, "O1": 0}
        none |= layout_constants(V=layout([]), Y=layout([]))
        self.launch(mean, mean, mean, parts, STORE=store, MOMENTS=True, CLASSIFY=False, **none)
        pixels = self.height * self.width
        counts = torch.full((self.count, 1), self.tokens, device=mean.device, dtype=torch.float64)
        counts[-1] = pixels - (self.count - 1) * self.tokens
        means, deviations = parts.double().unbind(2)
        middle = (means * counts).sum(dim=(0, 1)) / (self.batch * pixels)
        mean.copy_(middle)
        deviations = deviations + (means - middle).square() * counts
        var.copy_(deviations.sum(dim=(0, 1)) / (self.batch * pixels))

    def launch(
        self,
        scale: Tensor,
        shift: Tensor,
        bias: Tensor,
        moments: Tensor | None = None,
        *,
        PROJECT: bool = True,
        STORE: bool = False,
        MOMENTS: bool = False,
        CLASSIFY: bool = True,
        **others: Any,
    ) -> None:
        """Run the kernel for what is asked for."""
        from xattn_kernels.engines.triton.pyramid_kernels import pixel_kernel

        tiles = self.tiles if PROJECT else stored_tiles(self.tiles, self.constants["DOT"])
        launch(
            pixel_kernel,
            self.count * self.batch * (output_groups(self.outputs) if CLASSIFY else 1),
            self.table,
            scale,
            shift,
            bias,
            scale if moments is None else moments,
            *self.places,
            self.batch,
            self.count,
            self.height,
            self.width,
            **self.constants | others,
            PROJECT=PROJECT,
            STORE=STORE,
            MOMENTS=MOMENTS,
            CLASSIFY=CLASSIFY,
            BH=tiles.hidden,
            warps=tiles.warps,
        )


def _types(dtype: torch.dtype, work: torch.dtype) -> dict[str, Any]:
    """Constants: types of features, and of weights and intermediate results."""
    return {
        "DT": runtime.language_type(dtype),
        "SIZE": dtype.itemsize,
        "DW": runtime.language_type(work),
        "DW_SIZE": work.itemsize,
    }


def _work_type(dot: str) -> torch.dtype:
    """What products are computed from and stored in: float16 has not the range."""
    return torch.bfloat16 if dot == "bf16" else torch.float32


def _interpolated(features: Sequence[Tensor], weights: Sequence[Tensor], like: Tensor) -> Tensor:
    """(B, M, N_0): the sum of interpolated levels."""
    total: Tensor | None = None
    for x, weight in zip(features, weights, strict=True):
        product = torch.matmul(weight.float(), x.flatten(2).float()).unflatten(2, x.shape[2:])
        fine = F.interpolate(product, size=like.shape[2:], mode="bilinear", align_corners=False)
        total = fine if total is None else total.add_(fine)
    assert total is not None
    return total.flatten(2)


def _gradient_launch(
    grad: Tensor,
    hidden: Tensor,
    classifier: Tensor,
    vectors: Tensor,
    result: Tensor | None,
    chunk: int,
    sums: Tensor,
    products: Tensor,
) -> None:
    from xattn_kernels.engines.triton.pyramid_gradient_kernels import gradient_kernel

    batch, width, tokens = hidden.shape
    outputs = grad.size(1)
    dot = runtime.precision(hidden.dtype)
    tiles, first_second = gradient_tiles(dot), output_pieces(outputs)
    rows = [classifier.unsqueeze(0)]
    table = Table()
    places = [table.add_slots([x]) for x in (rows[0], hidden, grad, result)]
    splits = ceil_div(tokens, chunk)
    groups = output_groups(outputs) if result is None else 1
    launch(
        gradient_kernel,
        ceil_div(width, tiles.hidden) * splits * batch * groups,
        table.on(hidden.device),
        vectors,
        sums,
        products,
        *places,
        tokens,
        batch,
        splits,
        chunk,
        M=width,
        CO=outputs,
        O0=first_second[0],
        O1=first_second[1],
        BH=tiles.hidden,
        BN=tiles.tokens,
        SUMS=result is None,
        DOT=dot,
        **_types(hidden.dtype, classifier.dtype),
        **layout_constants(V=layout(rows), Z=layout([hidden]), G=layout([grad])),
        warps=tiles.warps,
    )


def _sums(
    grad: Tensor, hidden: Tensor, classifier: Tensor, vectors: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over samples and pixels of g (M), g (z - mean) (M) and G h^T (O, M)."""
    batch, width, tokens = hidden.shape
    chunk = chunk_of(batch, tokens)
    parts = batch * ceil_div(tokens, chunk)
    sums = vectors[0].new_empty(parts, 2, width)
    products = vectors[0].new_empty(parts, width, grad.size(1))
    rows = classifier.to(_work_type(runtime.precision(hidden.dtype)))
    _gradient_launch(grad, hidden, rows, torch.stack(list(vectors)), None, chunk, sums, products)
    sum_g, sum_gz = sums.sum(dim=0).unbind(0)
    return sum_g, sum_gz, products.sum(dim=0).t()


def _levels(
    grad: Tensor,
    hidden: Tensor,
    classifier: Tensor,
    vectors: Sequence[Tensor],
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    places: Sequence[Tensor | None],
) -> None:
    """Write the gradients of features and weights, those that are not None."""
    work = _work_type(runtime.precision(hidden.dtype))
    batch = hidden.size(0)
    stacked, rows = torch.stack(list(vectors)), classifier.to(work)
    levels = LevelGradients(features, weights, places, work)
    step = max(1, _SLICE // (hidden[0].numel() * work.itemsize))
    chunk = chunk_of(min(step, batch), hidden.size(2))
    for start in range(0, batch, step):
        part = slice(start, min(start + step, batch))
        dz = rows.new_empty(hidden[part].shape)
        _gradient_launch(grad[part], hidden[part], rows, stacked, dz, chunk, dz, dz)
        levels.add(part, dz)
    levels.finish()
