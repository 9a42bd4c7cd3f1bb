"""The linear core: how its time grows with the tokens, and what a call costs by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log
from statistics import linear_regression
from typing import Any

import torch
from torch import Tensor

from xattn_kernels.functional import linear_cross_attention
from xattn_kernels.registry import explain
from xattn_kernels.testing import compositions
from xattn_kernels.testing.compare import check
from xattn_kernels.testing.measure import interleaved

from ..checks import truths_in_one_order
from ..core import TIMES, Bar, Plot, Preset, Result, Series, measured, milliseconds
from ..problems import SCHEDULE, TASKS

CHANNELS = 36
TOKENS = tuple(1200 * 2**i for i in range(7))
TINY = (1, 8, 8)
"""(B, C, N) of the call whose time is all overhead."""


def run(preset: Preset, say: Callable[[str], None], all_tokens: Sequence[int] = TOKENS) -> Result:
    """Check and time all numbers of tokens, then tiny calls."""
    result = Result(
        f"Linear core: 12 edges, T=4, B=1, C={CHANNELS}, fp32",
        ["tokens", "forward", "ns per edge and token"],
        question=1,
        notes=[f"{TIMES}."],
    )
    medians = []
    for tokens in all_tokens:
        say(f"{tokens} tokens")
        call = _checked_call(tokens)
        [timing] = measured({"": call}, preset).values()
        medians.append(timing.median)
        each = 1e9 * timing.median / (SCHEDULE.num_edges * tokens)
        result.rows.append(
            {"tokens": tokens, "forward": milliseconds(timing), "ns per edge and token": each}
        )
    exponent = linear_regression([log(n) for n in all_tokens], [log(t) for t in medians]).slope
    say("overhead of a call")
    overhead = {name: 1e6 * timing.median for name, timing in _tiny(preset).items()}
    result.notes += [
        f"Tiny call {TINY}: {name} {value:.1f} us." for name, value in overhead.items()
    ]
    span = f"N={all_tokens[0]} to {all_tokens[-1]}"
    result.notes.append(f"The time grows as N^{exponent:.3f}.")
    result.answers = [
        f"The linear core's time grows as the number of tokens to the power {exponent:.2f} "
        f"({span}): {result.rows[-1]['ns per edge and token']:.1f} ns for a token of a pair."
    ]
    result.plots = [
        Plot(
            "lines",
            "Growth of the linear core",
            "tokens",
            "ms",
            [
                Series(
                    f"12 pairs, C={CHANNELS}",
                    list(all_tokens),
                    *([row["forward"][i] for row in result.rows] for i in range(3)),
                )
            ],
            x_log=True,
            y_log=True,
        )
    ]
    result.bars = [
        Bar(f"linear core, {span}, |growth exponent - 1|", 0.1, "<=", abs(exponent - 1)),
        Bar(
            "linear core, overhead of a call of the registered operator",
            25.0,
            "<=",
            overhead[REGISTERED],
            "us",
        ),
    ]
    return result


REGISTERED, PUBLIC, TRAINING = (
    "registered operator",
    "public function",
    "public function, forward and backward",
)


def _tiny(preset: Preset) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(TINY, generator=generator) for _ in range(3))
    engine = explain("linear_cross_attention", q).engine
    arguments = ([q], [k], [v], [0, 0, 0], None, None, "softplus", 1e-12, engine)
    leaves = a, b, c = [x.clone().requires_grad_() for x in (q, k, v)]
    gradient = torch.ones_like(v)

    def training() -> None:
        torch.autograd.grad(linear_cross_attention(a, b, c), leaves, gradient)

    calls: dict[str, Callable[[], Any]] = {
        PUBLIC: lambda: linear_cross_attention(q, k, v),
        TRAINING: training,
    }
    if engine != "reference":
        # Defined once the public function has been imported.
        op = torch.ops.xattn_kernels.linear_cross_attention.default
        calls[REGISTERED] = lambda: op(*arguments)
    return interleaved(
        calls, repetitions=preset.repetitions, min_sample_s=preset.sample_seconds, warmup=50
    )


def _checked_call(tokens: int) -> Callable[[], Any]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, CHANNELS, tokens)
    count = len(TASKS)
    slots = [torch.randn(shape, generator=generator) for _ in range(3 * count)]

    def thirds(xs: Sequence[Tensor]) -> tuple[Sequence[Tensor], ...]:
        return xs[:count], xs[count : 2 * count], xs[2 * count :]

    def call() -> list[Tensor]:
        query, key, value = thirds(slots)
        outputs: list[Tensor] = linear_cross_attention(query, key, value, SCHEDULE)
        return outputs

    def evaluate(xs: Sequence[Tensor]) -> list[Tensor]:
        query, key, value = thirds(xs)
        return compositions.linear_cross_attention(query, key, value, SCHEDULE)[0]

    expected = truths_in_one_order(evaluate, slots, torch.float32)
    for number, (x, truth) in enumerate(zip(call(), expected, strict=True)):
        check(f"{tokens} tokens, edge {number}", x, truth)
    return call
