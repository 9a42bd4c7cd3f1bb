"""Pairs and operations of sequential and all-pairs attention, by formula and as counted."""

from __future__ import annotations

from collections.abc import Callable

from xattn_kernels import cost, flops

from ..core import Bar, Preset, Result
from ..patterns import ALL_PAIRS, LINEAR, SEQUENTIAL, SOFTMAX, STORED, Grid, Runner

COLUMNS = ("pairs", "softmax core, GFLOP", "stored scores in fp16, GiB", "linear, GFLOP")
PUBLISHED = {
    "NYUD-v2": {
        "cross-task": (48, 727.8, 8.79, 16.72),
        "cross-scale": (24, 78.8, 0.96, 4.72),
        "sequential": (72, 806.6, 9.75, 21.44),
        "all pairs": (240, 1872.5, 16.45, 411.4),
    },
    "PASCAL-Context": {
        "sequential": (110, 955.0, 11.54, 28.81),
        "all pairs": (380, 2185.7, 19.38, 550.0),
    },
}
"""What the formulas have to give, to the digits that are there."""
RESOLUTION = (96, 128)
COUNTED = (
    (SEQUENTIAL, LINEAR),
    (SEQUENTIAL, SOFTMAX),
    (ALL_PAIRS, LINEAR),
    (ALL_PAIRS, SOFTMAX),
    (ALL_PAIRS, STORED),
)


def run(preset: Preset, say: Callable[[str], None]) -> Result:
    """Compare the formulas with the published table, and with operations counted in calls."""
    result = Result(
        "Cost of attention between all tasks and scales, one image, by formula",
        ["setting", "pattern", *COLUMNS],
        question=1,
        notes=[
            "Two operations for a multiply-add. softmax core: scores and mixing. linear: core, "
            "projections and adapters. NYUD-v2: T=4, 480x640; PASCAL-Context: T=5, 512x512; four "
            "scales."
        ],
    )
    say("formulas")
    wrong = 0
    for setting in (cost.NYUD_V2, cost.PASCAL_CONTEXT):
        for pattern, found in cost.comparison(setting).items():
            values = (
                found.pairs,
                found.softmax_core_flops / 1e9,
                found.score_bytes / 2**30,
                found.linear_flops / 1e9,
            )
            row = {"setting": setting.name, "pattern": pattern}
            result.rows.append(row | dict(zip(COLUMNS, values, strict=True)))
            for value, expected in zip(
                values, PUBLISHED[setting.name].get(pattern, values), strict=True
            ):
                wrong += float(f"{value:.{_digits(expected)}f}") != expected
    say("counting operations")
    deviation = max(_deviation(pattern, kind) for pattern, kind in COUNTED)
    result.notes.append(
        f"Counted while the calls of `scaling` ran at {RESOLUTION[0]}x{RESOLUTION[1]}, where "
        "projections and adapters that serve several pairs run once: at most "
        f"{deviation:.1%} fewer than by formula."
    )
    result.bars = [
        Bar("complexity table, figures that differ from the published ones", 0, "<=", wrong),
        Bar("complexity table, |operations counted / by formula - 1|", 0.06, "<=", deviation),
    ]
    costs = cost.comparison(cost.NYUD_V2)
    one, all_ = costs["sequential"], costs["all pairs"]
    result.answers = [
        f"Attending across tasks and then across scales, {one.pairs} pairs of maps take the place "
        f"of {all_.pairs}: with linear attention {one.linear_flops / 1e9:.1f} GFLOP an image "
        f"instead of {all_.linear_flops / 1e9:.0f} ({all_.linear_flops / one.linear_flops:.0f}x "
        f"less), and instead of {all_.softmax_flops / 1e9:.0f} with softmax attention between all "
        f"pairs ({all_.softmax_flops / one.linear_flops:.0f}x less), on four tasks at 480x640."
    ]
    return result


def _digits(number: float) -> int:
    return len(str(number).partition(".")[2]) if isinstance(number, float) else 0


def _deviation(pattern: str, kind: str) -> float:
    """How far the operations of a call are from the formula, relative to it."""
    grid = Grid.of(RESOLUTION)
    counted = flops.count(Runner(grid, pattern, kind))
    expected = grid.model(pattern, kind).flops
    return abs(counted / expected - 1)
