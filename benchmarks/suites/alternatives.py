"""The attention cores against what people use instead: forward, backward, and both."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from xattn_kernels.functional import softmax_cross_attention
from xattn_kernels.testing import cases, compositions
from xattn_kernels.testing.cases import Case
from xattn_kernels.testing.device import graphed
from xattn_kernels.testing.measure import Timing

from .. import environment
from ..core import TIMES, Bar, Plot, Preset, Result, Series, measured, milliseconds
from ..operators import (
    LINEAR,
    SOFTMAX,
    Attend,
    Judge,
    Tensors,
    backward,
    both,
    composed,
    forward,
    operands,
    ours,
    split,
)

MULTIHEAD = "multi-head attention"
OURS, OP_BY_OP = "ours", "op by op"
COMPILED, TUNED = "torch.compile", "torch.compile, max-autotune"
FLEX, MODULE, FLA = "FlexAttention, block mask", "nn.MultiheadAttention", "flash-linear-attention"
PASSES: dict[str, Callable[[Attend, Tensors], Callable[[], Any]]] = {
    "forward": forward,
    "backward": backward,
    "forward + backward": both,
}
GRAPH = "forward, CUDA graph"
PROBLEMS: tuple[tuple[str, Case], ...] = (
    (LINEAR, cases.SCALES[0]),
    (SOFTMAX, cases.SCALES[2]),
    (MULTIHEAD, cases.SCALES[2]),
)
BACKENDS = {
    "cpu": (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH),
    "cuda": (
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ),
}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
SHARE = 0.25
"""Of the preset's time for one comparison, for each of the nine here."""


@dataclass
class Ways:
    """What computes the same from the same operands, and what cannot and why."""

    calls: dict[str, Attend] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    forward_only: set[str] = field(default_factory=set)


def run(
    preset: Preset,
    say: Callable[[str], None],
    problems: Sequence[tuple[str, Case]] = PROBLEMS,
) -> Result:
    """Check and time all ways of all operators."""
    dtype = DTYPES[preset.device]
    result = Result(
        "Attention cores, 12 pairs, T=4, B=1, one head, "
        f"{str(dtype).removeprefix('torch.')}: what people use, and ours",
        ["operator", "tokens", "channels", "way", *PASSES, GRAPH, "forward / ours", "both / ours"],
        question=2,
        notes=[
            f"{TIMES}. backward: of a forward pass that has run, not a difference of other times. "
            f"{LINEAR}, {SOFTMAX}: on given queries, keys and values. {MULTIHEAD}: with the four "
            f"projections of {MODULE}. {FLEX}: all pairs in one call."
        ],
    )
    for operator, case in problems:
        xs, judge, ways = _problem(operator, case, dtype, preset, say)
        _refuse(ways, judge, xs, say)
        result.notes += [f"{operator}, without {way}: {why}." for way, why in ways.reasons.items()]
        timings = _time(ways, xs, preset, lambda text, name=operator: say(f"{name}: {text}"))
        _report(result, operator, case, timings)
    return result


def _problem(
    operator: str, case: Case, dtype: torch.dtype, preset: Preset, say: Callable[[str], None]
) -> tuple[Tensors, Judge, Ways]:
    say(f"{operator}: reference")
    if operator == MULTIHEAD:
        weights = _multihead_weights(case, dtype, preset.device)
        xs = operands(SOFTMAX, case, dtype, preset.device)[: len(case.query_tokens)]
        exact = [w.cpu() for w in weights]
        judge = Judge(partial(_multihead_composed, case, exact), xs, gradients=True)
        return xs, judge, _multihead_ways(case, weights)
    xs = operands(operator, case, dtype, preset.device)
    judge = Judge(composed(operator, case), xs, gradients=True)
    ways = Ways({OURS: ours(operator, case, dtype, preset.device)})
    ways.calls[OP_BY_OP] = composed(operator, case)
    if operator == SOFTMAX:
        _add_sdpa(ways, case, preset.device)
    else:
        ways.reasons[FLA] = _no_fla()
    _add_compiled(ways, operator, case, preset)
    return xs, judge, ways


def _refuse(ways: Ways, judge: Judge, xs: Tensors, say: Callable[[str], None]) -> None:
    """Check every way; one of torch's that raises or is not accepted is left out, and why."""
    for name, attend in list(ways.calls.items()):
        say(f"checking {name}")
        try:
            results = both(attend, xs)()
        except Exception as error:
            if name == OURS:
                raise
            try:
                results = forward(attend, xs)()
            except Exception as again:
                del ways.calls[name]
                ways.reasons[name] = _first_line(again)
                continue
            ways.forward_only.add(name)
            ways.reasons[f"{name}, backward"] = _first_line(error)
        try:
            judge(name, results)
        except AssertionError as error:
            if name in (OURS, OP_BY_OP):
                raise
            del ways.calls[name]
            ways.reasons[name] = f"its results are not accepted, {error}"


def _time(
    ways: Ways, xs: Tensors, preset: Preset, say: Callable[[str], None]
) -> dict[str, dict[str, Timing]]:
    timings = {}
    for name, make in PASSES.items():
        say(f"timing, {name}")
        calls = {
            way: make(attend, xs)
            for way, attend in ways.calls.items()
            if make is forward or way not in ways.forward_only
        }
        timings[name] = measured(calls, preset, share=SHARE)
    if preset.device == "cuda":
        replays = {}
        for way, attend in ways.calls.items():
            try:
                replays[way] = graphed(forward(attend, xs))
            except RuntimeError as error:
                ways.reasons[f"{way}, {GRAPH}"] = _first_line(error)
        timings[GRAPH] = measured(replays, preset, share=SHARE)
    return timings


def _report(
    result: Result, operator: str, case: Case, timings: Mapping[str, Mapping[str, Timing]]
) -> None:
    medians = {
        name: {way: timing.median for way, timing in found.items()}
        for name, found in timings.items()
    }
    ways = list(medians["forward"])
    for way in ways:
        row: dict[str, Any] = {
            "operator": operator,
            "tokens": case.query_tokens[0],
            "channels": case.channels,
            "way": way,
        }
        row |= {n: milliseconds(found[way]) for n, found in timings.items() if way in found}
        for column, name in (("forward / ours", "forward"), ("both / ours", "forward + backward")):
            if way in medians[name]:
                row[column] = medians[name][way] / medians[name][OURS]
        result.rows.append(row)
    for name in ("forward", "forward + backward"):
        others = {way: t for way, t in medians[name].items() if way != OURS}
        best = min(others, key=lambda way: others[way])
        gain = others[best] / medians[name][OURS]
        if operator != MULTIHEAD:
            result.bars.append(
                Bar(f"{operator}, {name}, fastest alternative / ours", 1.0, ">=", gain, "x")
            )
        result.answers.append(
            f"{operator.capitalize()}, {name}: ours takes {1e3 * medians[name][OURS]:.1f} ms; the "
            f"fastest alternative, {best}, takes {gain:.2f} times as long"
            + (
                f", and op by op {others[OP_BY_OP] / medians[name][OURS]:.1f} times."
                if OP_BY_OP in others
                else "."
            )
        )
    result.plots.append(
        Plot(
            "bars",
            f"{operator.capitalize()}: N={case.query_tokens[0]}, C={case.channels}",
            "",
            "ms",
            [
                Series(
                    way,
                    [name for name, _ in found],
                    [1e3 * timing.median for _, timing in found],
                    [1e3 * timing.quartiles[0] for _, timing in found],
                    [1e3 * timing.quartiles[1] for _, timing in found],
                )
                for way in ways
                for found in [[(n, timings[n][way]) for n in timings if way in timings[n]]]
            ],
        )
    )


# The ways


def _add_compiled(ways: Ways, operator: str, case: Case, preset: Preset) -> None:
    missing = environment.compiler_error() if preset.device == "cpu" else None
    if missing is not None:
        ways.reasons |= dict.fromkeys((COMPILED, TUNED), missing)
        if operator == SOFTMAX:
            ways.reasons[FLEX] = missing
        return
    # A graph is kept for backward alone, so what it holds may not be overwritten.
    torch._functorch.config.donated_buffer = False
    if operator == LINEAR or preset.thorough:
        ways.calls[COMPILED] = torch.compile(composed(operator, case))
    else:
        ways.reasons[COMPILED] = "it is left to the full preset, for the time that compiling takes"
    if preset.thorough:
        from torch._inductor import select_algorithm

        select_algorithm.PRINT_AUTOTUNE = False
        ways.calls[TUNED] = torch.compile(composed(operator, case), mode=_tuned(preset.device))
    else:
        ways.reasons[TUNED] = "it is left to the full preset, for the time that compiling takes"
    if operator == SOFTMAX:
        ways.calls[FLEX] = _flex(case, preset.device)


def _tuned(device: str) -> str:
    # Graphs are measured apart.
    return "max-autotune" if device == "cpu" else "max-autotune-no-cudagraphs"


def _add_sdpa(ways: Ways, case: Case, device: str) -> None:
    for backend in BACKENDS[device]:
        name = backend.name.lower().replace("_attention", "")
        ways.calls[f"scaled_dot_product_attention, {name}"] = partial(_sdpa, case, backend)


def _sdpa(case: Case, backend: SDPBackend, xs: Sequence[Tensor]) -> Tensors:
    """One pair after the other, on contiguous (B, 1, N, C): other views get slower kernels."""
    slots = [
        [x.transpose(1, 2).unsqueeze(1).contiguous() for x in part] for part in split(case, xs)
    ]
    with sdpa_kernel(backend):
        return [
            F.scaled_dot_product_attention(
                slots[0][edge.query], slots[1][edge.source], slots[2][edge.source]
            )
            .squeeze(1)
            .transpose(1, 2)
            for edge in case.schedule.edges
        ]


def _flex(case: Case, device: str) -> Attend:
    """All pairs at once: queries once per pair, each of which may attend to its source alone."""
    edges, tokens = case.schedule.edges, case.query_tokens[0]
    sources = torch.tensor([edge.source for edge in edges], device=device)
    q_len, k_len = len(edges) * tokens, len(case.source_tokens) * tokens

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return sources[q // tokens] == k // tokens

    block_mask = create_block_mask(mask, None, None, q_len, k_len, device=device)
    compiled: Any = torch.compile(flex_attention)

    def attend(xs: Sequence[Tensor]) -> Tensors:
        q, k, v = split(case, xs)
        query = torch.cat([q[edge.query] for edge in edges], dim=2)
        operands = (query, torch.cat(k, dim=2), torch.cat(v, dim=2))
        output = compiled(
            *(x.transpose(1, 2).unsqueeze(1).contiguous() for x in operands), block_mask=block_mask
        )
        return list(output.squeeze(1).transpose(1, 2).split(tokens, dim=2))

    return attend


def _no_fla() -> str:
    if importlib.util.find_spec("fla") is None:
        return "it is not installed"
    return (
        "its chunked linear attention is causal, with no softplus and no denominator: another "
        "operation"
    )


# Multi-head attention as torch's module has it: four projections of one layer, (B, N, C)


def _multihead_weights(case: Case, dtype: torch.dtype, device: str) -> Tensors:
    """Per pair (4 C, C): of queries, keys, values and outputs."""
    generator = torch.Generator().manual_seed(3)
    c = case.channels
    return [
        (torch.randn(4 * c, c, generator=generator) * c**-0.5).to(device, dtype)
        for _ in case.schedule.edges
    ]


def _multihead_ways(case: Case, weights: Sequence[Tensor]) -> Ways:
    module_list = [_module(case.channels, weight) for weight in weights]

    def module(xs: Sequence[Tensor]) -> Tensors:
        slots = [x.transpose(1, 2) for x in xs]
        return [
            m(slots[edge.query], slots[edge.source], slots[edge.source], need_weights=False)[
                0
            ].transpose(1, 2)
            for m, edge in zip(module_list, case.schedule.edges, strict=True)
        ]

    return Ways(
        {
            OURS: lambda xs: _multihead(softmax_cross_attention, case, weights, xs),
            OP_BY_OP: lambda xs: _multihead(_composed_softmax, case, weights, xs),
            MODULE: module,
        }
    )


def _multihead(
    attend: Callable[..., Tensors], case: Case, weights: Sequence[Tensor], xs: Sequence[Tensor]
) -> Tensors:
    c, identity = case.channels, cases.Schedule.identity(len(weights))
    edges = case.schedule.edges
    query = [torch.matmul(w[:c], xs[e.query]) for w, e in zip(weights, edges, strict=True)]
    # Keys and values of a source in one product.
    both_of = [
        torch.matmul(w[c : 3 * c], xs[e.source]) for w, e in zip(weights, edges, strict=True)
    ]
    key, value = ([x[:, part] for x in both_of] for part in (slice(0, c), slice(c, None)))
    attended = attend(query, key, value, identity)
    return [torch.matmul(w[3 * c :], x) for w, x in zip(weights, attended, strict=True)]


def _composed_softmax(*operands: Any) -> Tensors:
    return compositions.softmax_cross_attention(*operands)[0]


def _multihead_composed(case: Case, weights: Sequence[Tensor], xs: Sequence[Tensor]) -> Tensors:
    return _multihead(_composed_softmax, case, [w.to(xs[0].dtype) for w in weights], xs)


def _module(channels: int, weight: Tensor) -> nn.Module:
    module = nn.MultiheadAttention(channels, 1, bias=False, batch_first=True)
    module.to(weight)
    with torch.no_grad():
        module.in_proj_weight.copy_(weight[: 3 * channels])
        module.out_proj.weight.copy_(weight[3 * channels :])
    return module.requires_grad_(False)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}".rstrip(".")
