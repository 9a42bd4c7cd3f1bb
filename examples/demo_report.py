"""What the demo found: as JSON values, and as a table."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from demo_inputs import TASKS
from demo_measure import Run
from rich.console import Console
from rich.table import Table

from xattn_kernels import explain, info

COLUMNS = ("", "scales", "pairs", "GFLOP", "ms", "peak memory, MiB", "largest error")
MIB = 2**20
BUSY = 0.7
"""Load average from which times are not to be trusted."""


def make_report(image: str, run: Run, seconds: float, load: float) -> dict[str, Any]:
    """Everything the demo found, as plain JSON values; `load` is the load average before it."""
    cpu = info.collect()["cpu"]
    facts = {
        "image": image,
        "tasks": list(TASKS),
        "dtype": "float32",
        "processor": cpu["model"],
        "isa": cpu["native"] and cpu["native"]["isa"],
        "threads": cpu["threads"],
        "torch": torch.__version__,
        "engine": explain("cross_attention_block", torch.empty(1, 36, 1)).engine,
        "load": load,
        "seconds": round(seconds, 1),
    }
    points = [asdict(point) for point in run.points]
    size = max(run.points, key=lambda point: point.size).size
    return {
        "facts": facts,
        "title": f"CTAM and CSAM at {size[0]}x{size[1]}, {len(TASKS)} tasks, batch 1, fp32",
        "columns": list(COLUMNS),
        "rows": [_row(point) for point in points if point["size"] == size],
        "notes": _notes(facts, run),
        "points": points,
    }


def show(console: Console, report: dict[str, Any]) -> None:
    """Print the table and what its figures mean."""
    table = Table(title=report["title"], title_justify="left")
    for column in report["columns"]:
        table.add_column(column, justify="right" if column else "left")
    for row in report["rows"]:
        table.add_row(*row, style="dim" if "modelled" in row[0] else "")
    console.print(table)
    for note in report["notes"]:
        console.print(note, highlight=False, markup=False)


def _row(point: dict[str, Any]) -> list[str]:
    first, last = point["scales"]
    about = "" if point["measured"] else "~"
    error = point["error"]
    return [
        point["way"] + ("" if point["measured"] else " (modelled)"),
        f"{first}-{last}",
        str(point["pairs"]),
        f"{point['gflop']:,.0f}",
        f"{about}{point['seconds'] * 1e3:,.0f}",
        f"{about}{point['peak_bytes'] / MIB:,.0f}",
        "-" if error is None else f"{error:.1e}",
    ]


def _notes(facts: dict[str, Any], run: Run) -> list[str]:
    notes = [
        f"{facts['processor']} ({facts['isa']}), threads: {facts['threads']}, torch "
        f"{facts['torch']}; the fused blocks run on the engine {facts['engine']!r}.",
        "Counted are attention passes with their projections, fuse blocks and adapters; not the "
        "backbone and the heads, which are the same for all.",
        "GFLOP by the cost model, 2 per multiply-add. ms: median of runs by turns (naive: one "
        "run).",
        f"Peak memory: rise of the resident set during a call ({run.memory_method}, in a process "
        "of its own), that is, outputs and intermediates. The fused way also keeps "
        f"{run.folded_bytes / MIB:.0f} MiB of folded weights beside its parameters.",
        "Largest error: difference from float64, relative to the largest value. The naive way "
        "computes something else.",
    ]
    if any(not point.measured for point in run.points):
        notes.append(
            "modelled: not run, for want of memory or time; scaled by the cost model from the "
            "largest resolution that was."
        )
    if facts["load"] > BUSY:
        notes.append(
            f"The machine was busy (load average {facts['load']:.1f} before the start): take the "
            "times with care."
        )
    return notes
