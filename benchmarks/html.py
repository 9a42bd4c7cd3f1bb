"""One page that tells a newcomer what a run found, with nothing to load from elsewhere."""

from __future__ import annotations

import base64
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from . import environment, plots, report
from .core import PRESETS, QUESTIONS

TEMPLATE = "report.html.jinja"
AT_ONCE = 4
"""Answers to a question that are read at once; of more, the first of every suite is."""

WHY = {
    1: "If every map of every task and scale reads every other, 4 tasks at 4 scales make 240 "
    "pairs. Reading across tasks first (CTAM) and across scales then (CSAM) connects the same maps "
    "by 72. Within a pair, softmax attention compares every pixel with every pixel, so its work "
    "grows with the square of their number; linear attention sums up a source once, in a matrix of "
    "C x C numbers, and its work grows with the number itself.",
    2: "Called op by op, each step of each pair writes a map to memory, and the next reads it "
    "again. A fused operator takes all pairs of a pass at once, reads a map for all pairs that "
    "need it, and keeps what lies between in registers and caches. A compiler fuses some "
    "neighbouring steps, but not over the sum that linear attention needs in the middle.",
    3: "A network also has a backbone, which is the same for all ways, and a head. The gain of the "
    "attention passes is therefore diluted, and the head gains by projecting every scale at its "
    "own resolution instead of in one wide map at full resolution.",
    4: "A kernel can be no faster than its arithmetic allows, nor than its data come from memory. "
    "The yardsticks are measured in the same run: the arithmetic of a large matrix product, and "
    "the bytes that a copy moves. They are what good code reaches, not what nothing can exceed.",
}
"""Why there is something to find, by question. What was found is said by the suites."""

WORDS = {
    "CTAM": "cross-task attention module: at one scale, every task reads all others",
    "CSAM": "cross-scale attention module: within a task, every scale reads the coarser ones",
    "CAM": "cross-attention module: one map reads another; CTAM and CSAM consist of these",
    "B, C, N, H, W, T": "batch, channels, pixels (tokens) of a map, its height and width, tasks",
    "op by op": "one call of PyTorch after the other, as in the published code",
    "compiled": "the same under torch.compile",
    "fused, ours": "the operators and modules of this library",
    "modelled": "not run, for want of memory or time, but extrapolated; drawn hollow",
    "±": "half the interquartile range: half of all repetitions lie within this distance or so",
    "bar": "a figure that was promised beforehand, and what was measured of it",
}


def page(found: dict[str, Any]) -> str:
    """The page of a run, as HTML.

    Args:
        found: of `report.to_json` or `report.read`.
    """
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template(TEMPLATE)
    suites = [_suite(name, result) for name, result in found["suites"].items()]
    return template.render(
        found=found,
        machine=environment.to_text(found["environment"]),
        warnings=report.warnings(found),
        sections=[_section(number, suites) for number in QUESTIONS],
        others=[suite for suite in suites if suite["question"] not in QUESTIONS],
        sure=_sure(found, suites),
        bars=_table(*report.bar_cells(found)),
        words=WORDS,
    )


def _section(number: int, suites: list[dict[str, Any]]) -> dict[str, Any]:
    own = [suite for suite in suites if suite["question"] == number]
    answers = [answer for suite in own for answer in suite["answers"]]
    if len(answers) > AT_ONCE:
        answers = [answer for suite in own for answer in suite["answers"][:1]]
    return {
        "number": number,
        "question": QUESTIONS[number],
        "why": WHY[number],
        "answers": answers,
        "suites": own,
        "presets": [name for name in PRESETS if name != "smoke"],
    }


def _suite(name: str, result: dict[str, Any]) -> dict[str, Any]:
    spreads = [report.spread(timing) for _, _, timing in report.timings(result)]
    return {
        "name": name,
        "title": result["title"],
        "question": result["question"],
        "failure": result["failure"],
        "answers": result["answers"],
        "table": _table(*report.suite_cells(result)),
        "plots": [
            {**plot, "data": base64.b64encode(plots.png(plot)).decode()} for plot in result["plots"]
        ],
        "notes": result["notes"],
        "spread": median(spreads) if spreads else None,
        "largest_spread": max(spreads, default=None),
        "times": len(spreads),
        "bars": _table(*report.bar_cells({"suites": {name: result}})),
    }


def _sure(found: dict[str, Any], suites: list[dict[str, Any]]) -> dict[str, Any]:
    bars = [bar for result in found["suites"].values() for bar in result["bars"]]
    return {
        "suites": len(suites),
        "failed": [suite["name"] for suite in suites if suite["failure"] is not None],
        "times": sum(suite["times"] for suite in suites),
        "spread": report.median_spread(found),
        "bars": len(bars),
        "met": sum(bar["met"] is True for bar in bars),
        "not_measured": sum(bar["met"] is None for bar in bars),
    }


def _table(headings: list[str], rows: list[list[str]]) -> dict[str, Any]:
    right = [
        bool(number) and all(report.is_number(row[number]) for row in rows)
        for number in range(len(headings))
    ]
    return {"headings": headings, "rows": rows, "right": right}
