"""How far the kernels are from what this machine can do: against a GEMM and a copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xattn_kernels import flops
from xattn_kernels.testing import cases
from xattn_kernels.testing.cases import Case
from xattn_kernels.testing.measure import tensor_bytes

from ..core import TIMES, Plot, Preset, Result, Series, measured, milliseconds
from ..operators import BLOCK, LINEAR, SOFTMAX, Judge, block_weights, composed, operands, ours

GEMM, COPY = "GEMM", "copy"
GEMM_SIDES = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**32}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
PROBLEMS: tuple[tuple[str, Case], ...] = (
    *((BLOCK, case) for case in cases.SCALES),
    (LINEAR, cases.SCALES[0]),
    (LINEAR, cases.CROSS_SCALE),
    (SOFTMAX, cases.SCALES[2]),
)
NS = 1e-9


@dataclass(frozen=True)
class Work:
    """One call, and the least it has to do."""

    call: Callable[[], Any]
    flops: int
    bytes: int
    """Operands and results, once each."""


def run(
    preset: Preset,
    say: Callable[[str], None],
    problems: Sequence[tuple[str, Case]] = PROBLEMS,
    gemm_side: int | None = None,
    copy_bytes: int | None = None,
) -> Result:
    """Check, then time all kernels by turns with a GEMM and a copy."""
    dtype = DTYPES[preset.device]
    result = Result(
        f"Distance from the limits of this machine, B=1, {str(dtype).removeprefix('torch.')}",
        ["call", "time", "GFLOP/s", "GB/s", "FLOP per byte", "of the limit"],
        question=4,
        notes=[
            f"{TIMES}. GFLOP/s: operations of matrix products alone. GB/s: operands and results "
            "moved once, the least there is. of the limit: time that the GEMM's rate and the "
            "copy's allow, whichever is longer, over the time taken; what exponentials and "
            "softplus cost is in the time and not in the limit."
        ],
    )
    work = {
        GEMM: _gemm(gemm_side or GEMM_SIDES[preset.device], dtype, preset.device),
        COPY: _copy(copy_bytes or COPY_BYTES[preset.device], preset.device),
    }
    for operator, case in problems:
        say(f"checking {operator}, {case.name}")
        work[f"{operator}, {case.name}"] = _checked(operator, case, dtype, preset.device)
    say("timing")
    timings = measured({name: w.call for name, w in work.items()}, preset, share=1.5)
    seconds = {name: timing.median for name, timing in timings.items()}
    peak, bandwidth = work[GEMM].flops / seconds[GEMM], work[COPY].bytes / seconds[COPY]
    limits = {n: max(w.flops / peak, w.bytes / bandwidth) / seconds[n] for n, w in work.items()}
    for name, w in work.items():
        row: dict[str, Any] = {"call": name, "time": milliseconds(timings[name])}
        row["GB/s"] = NS * w.bytes / seconds[name]
        row["of the limit"] = limits[name]
        if w.flops:
            row["GFLOP/s"] = NS * w.flops / seconds[name]
            row["FLOP per byte"] = w.flops / w.bytes
        result.rows.append(row)
    kernels = [name for name in work if name not in (GEMM, COPY)]
    result.answers = _answers(kernels, limits, peak, bandwidth, work, seconds)
    result.plots = [_roofline(kernels, work, seconds, peak, bandwidth)]
    return result


def _gemm(side: int, dtype: torch.dtype, device: str) -> Work:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator).to(device, dtype) for _ in range(2))
    out = torch.empty_like(a)
    return Work(lambda: torch.mm(a, b, out=out), 2 * side**3, tensor_bytes([a, b, out]))


def _copy(size: int, device: str) -> Work:
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    return Work(lambda: target.copy_(source), 0, 2 * size)


def _checked(operator: str, case: Case, dtype: torch.dtype, device: str) -> Work:
    xs = operands(operator, case, dtype, device)
    attend = ours(operator, case, dtype, device)
    judge = Judge(composed(operator, case), xs, gradients=False)
    outputs: list[Tensor] = []

    def call() -> list[Tensor]:
        with torch.no_grad():
            return attend(xs)

    counted = flops.count(lambda: outputs.extend(call()))
    judge(f"{operator}, {case.name}", outputs)
    weights = block_weights(case) if operator == BLOCK else ()
    moved = tensor_bytes([*xs, *outputs])
    moved += sum(x.numel() * xs[0].element_size() for x in weights)
    return Work(call, counted, moved)


def _answers(
    kernels: Sequence[str],
    limits: dict[str, float],
    peak: float,
    bandwidth: float,
    work: dict[str, Work],
    seconds: dict[str, float],
) -> list[str]:
    best, worst = (pick(kernels, key=lambda name: limits[name]) for pick in (max, min))
    return [
        f"A large matrix product reached {NS * peak:.0f} GFLOP/s and a copy {NS * bandwidth:.0f} "
        f"GB/s here. Of the time these allow, our kernels take "
        f"{1 / limits[best]:.1f} times ({best}: {NS * work[best].flops / seconds[best]:.0f} "
        f"GFLOP/s) to {1 / limits[worst]:.1f} times ({worst}: "
        f"{NS * work[worst].flops / seconds[worst]:.0f} GFLOP/s)."
    ]


def _roofline(
    kernels: Sequence[str],
    work: dict[str, Work],
    seconds: dict[str, float],
    peak: float,
    bandwidth: float,
) -> Plot:
    reached = [
        Series(name, [work[name].flops / work[name].bytes], [NS * work[name].flops / seconds[name]])
        for name in kernels
    ]
    intensities = [peak / bandwidth, *(series.x[0] for series in reached)]
    ends = min(intensities) / 2, max(intensities) * 2
    corners = [ends[0], peak / bandwidth, ends[1]]
    bound = [NS * min(peak, bandwidth * x) for x in corners]
    return Plot(
        "roofline",
        "What the kernels reach of what this machine can do",
        "FLOP per byte",
        "GFLOP/s",
        [Series("GEMM and copy, measured", corners, bound), *reached],
        x_log=True,
        y_log=True,
        note="The line is what a large matrix product and a copy reached in the same run.",
    )
