"""The cross-attentions of one scale, T=4, 12 edges, inference: op by op, compiled, fused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import geometric_mean
from typing import Any

import torch
from torch import Tensor

from xattn_kernels.cost import MapSize, attention_cost
from xattn_kernels.engines import native
from xattn_kernels.functional import cross_attention_block, pack_block_weights
from xattn_kernels.functional.block import attend_packed
from xattn_kernels.modules.attend import pack_projections
from xattn_kernels.testing import compositions
from xattn_kernels.testing.compare import check

from .. import environment
from ..checks import truths_in_one_order
from ..core import TIMES, Bar, Plot, Preset, Result, Series, measured, milliseconds
from ..problems import SCALES, SCHEDULE, OpByOpSet, Scale

OP_BY_OP, COMPILED, FUSED, BF16 = "op by op", "compiled", "fused", "fused bf16"
FOLDING = "fused, folding"
VS_OP_BY_OP, VS_COMPILED, GAIN = "vs op by op", "vs compiled", "bf16 vs fp32"
VS_FROZEN = "folding / frozen"

SHARE = 0.6
"""Of the preset's time for one comparison, for each scale."""

Call = Callable[[], Any]


def run(preset: Preset, say: Callable[[str], None]) -> Result:
    """Check and time all scales."""
    result = Result(
        "CAM set: 12 edges, T=4, B=1, inference, NCHW",
        [
            *("scale", OP_BY_OP, COMPILED, FUSED, VS_OP_BY_OP, VS_COMPILED, "GFLOP/s", BF16, GAIN),
            *(FOLDING, VS_FROZEN),
        ],
        question=2,
        notes=[
            f"{TIMES}; every call allocates its outputs. compiled: torch.compile of op by op, all "
            "edges in one graph. fused: with packed weights, as frozen modules keep them; folding: "
            "batch norms folded and packed in every call, as modules do that are not frozen."
        ],
    )
    missing = {
        COMPILED: environment.compiler_error(),
        BF16: _bf16_error(),
    }
    result.notes += [f"Without {name}: {reason}." for name, reason in missing.items() if reason]
    # Compiling takes most of the time.
    scales = SCALES if preset.thorough else SCALES[::2]
    for number in scales:
        scale = Scale(number)
        say(f"scale {number}: checking")
        calls = _calls(scale, [name for name, reason in missing.items() if reason is None], say)
        say(f"scale {number}: timing")
        timings = measured(calls, preset, share=SHARE)
        medians = {name: timing.median for name, timing in timings.items()}
        row: dict[str, Any] = {"scale": str(scale)}
        row |= {name: milliseconds(timing) for name, timing in timings.items()}
        row[VS_OP_BY_OP] = medians[OP_BY_OP] / medians[FUSED]
        row["GFLOP/s"] = _flops(scale) / medians[FUSED] / 1e9
        if COMPILED in medians:
            row[VS_COMPILED] = medians[COMPILED] / medians[FUSED]
        row[VS_FROZEN] = medians[FOLDING] / medians[FUSED]
        if BF16 in medians:
            row[GAIN] = medians[FUSED] / medians[BF16]
        result.rows.append(row)
    of = "" if scales == SCALES else f" of scales {', '.join(map(str, scales))}"
    result.bars = _bars(result.rows, missing, of)
    result.answers = [_answer(result.rows)]
    result.plots = [_plot(result.rows)]
    return result


def _answer(rows: Sequence[dict[str, Any]]) -> str:
    gains = [row[VS_OP_BY_OP] for row in rows]
    text = (
        "The 12 cross-attentions of a scale, projections included, are "
        f"{geometric_mean(gains):.1f} times as fast fused as op by op ({min(gains):.1f} to "
        f"{max(gains):.1f} by scale)"
    )
    compiled = [row[VS_COMPILED] for row in rows if VS_COMPILED in row]
    if compiled:
        text += f" and {geometric_mean(compiled):.1f} times as fast as under torch.compile"
    return f"{text}: no map between input and output is written."


def _plot(rows: Sequence[dict[str, Any]]) -> Plot:
    series = [
        Series(
            way,
            [row["scale"] for row in rows],
            *([row[way][i] for row in rows] for i in range(3)),
        )
        for way in (OP_BY_OP, COMPILED, FUSED, BF16)
        if all(way in row for row in rows)
    ]
    return Plot("bars", "The 12 cross-attentions of a scale, inference", "scale", "ms", series)


def _calls(scale: Scale, wanted: Sequence[str], say: Callable[[str], None]) -> dict[str, Call]:
    """What to time, by name, each accepted before it is returned."""
    model, features = OpByOpSet(scale.width), scale.features()
    weight, bias = model.folded()
    calls: dict[str, Call] = {OP_BY_OP: torch.no_grad()(lambda: model(features))}
    if COMPILED in wanted:
        compiled: Any = torch.compile(model)
        calls[COMPILED] = torch.no_grad()(lambda: compiled(features))
    calls[FUSED] = _fused(features, weight, bias)
    layers = model.layers()
    calls[FOLDING] = torch.no_grad()(
        lambda: attend_packed(features, pack_projections(layers, features[0].dtype), SCHEDULE)
    )

    def by_module(xs: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return [x.flatten(2) for x in OpByOpSet(scale.width).to(xs[0].dtype)(xs)]

    expected = truths_in_one_order(by_module, features, torch.float32)
    for name, call in calls.items():
        if name == COMPILED:
            say(f"scale {scale.number}: compiling the op-by-op version")
        for number, (x, truth) in enumerate(zip(call(), expected, strict=True)):
            check(f"{name}, scale {scale.number}, edge {number}", x.flatten(2), truth)
    if BF16 in wanted:
        calls[BF16] = _bf16(scale, features, weight, bias)
    return calls


def _fused(features: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Call:
    packed = pack_block_weights(weight, bias, features[0].dtype)
    return lambda: cross_attention_block(features, weight, bias, SCHEDULE, packed=packed)


def _bf16(scale: Scale, features: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Call:
    """The fused call on bf16 features, accepted by the rounding of bf16."""
    rounded = [x.bfloat16() for x in features]
    call = _fused(rounded, weight, bias)

    def evaluate(xs: Sequence[Tensor]) -> list[Tensor]:
        w, b = weight.to(xs[0].dtype), bias.to(xs[0].dtype)
        return compositions.cross_attention_block([x.flatten(2) for x in xs], w, b, SCHEDULE)

    expected = truths_in_one_order(evaluate, rounded, torch.bfloat16)
    for number, (x, truth) in enumerate(zip(call(), expected, strict=True)):
        check(f"{BF16}, scale {scale.number}, edge {number}", x.flatten(2), truth)
    return call


def _bars(rows: Sequence[dict[str, Any]], missing: dict[str, str | None], of: str) -> list[Bar]:
    by_op = [row[VS_OP_BY_OP] for row in rows]
    compiled = [row[VS_COMPILED] for row in rows if VS_COMPILED in row]
    gains = [row[GAIN] for row in rows if GAIN in row]
    no_compile, no_bf16 = missing[COMPILED] or "", missing[BF16] or ""
    return [
        Bar(
            f"CAM set, op by op / fused, geometric mean{of}", 2.0, ">=", geometric_mean(by_op), "x"
        ),
        Bar(
            f"CAM set, torch.compile / fused, geometric mean{of}",
            1.5,
            ">=",
            geometric_mean(compiled) if compiled else None,
            "x",
            no_compile,
        ),
        Bar(
            f"CAM set, folding / frozen, geometric mean{of}",
            1.1,
            "<=",
            geometric_mean([row[VS_FROZEN] for row in rows]),
            "x",
        ),
        Bar("CAM set, op by op / fused at scale 0", 4.0, ">=", by_op[0], "x"),
        Bar(f"CAM set, smallest gain over either{of}", 1.1, ">=", min(by_op + compiled), "x"),
        Bar(
            f"CAM set, fused fp32 / fused bf16, geometric mean{of}",
            2.0,
            ">=",
            geometric_mean(gains) if gains else None,
            "x",
            no_bf16,
        ),
    ]


def _bf16_error() -> str | None:
    if native.load_error() is not None:
        return "the native module is not there"
    isa = native.core().cpu_info()["isa"]
    return None if "bf16" in isa else f"this CPU has no bf16 dot products ({isa})"


def _flops(scale: Scale) -> int:
    height, width = scale.shape
    sizes = [MapSize(height * width, scale.width)] * SCHEDULE.num_sources
    return attention_cost(SCHEDULE, sizes).linear_flops
