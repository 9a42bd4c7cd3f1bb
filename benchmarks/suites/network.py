"""The network after its backbone, T=4, inference: op by op, compiled, ours, frozen, converted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from xattn_kernels import flops
from xattn_kernels.cost_network import network_flops
from xattn_kernels.testing.measure import in_fresh_process, peak_memory

from .. import environment
from ..core import TIMES, Bar, Preset, Result, measured, milliseconds
from ..networks import (
    COMPILED,
    CONVERTED,
    FROZEN,
    NUM_OUTPUTS,
    OP_BY_OP,
    OURS,
    Size,
    check_outputs,
    image,
    in_inference,
    make,
    targets,
)
from ..problems import IMAGE

MIB = 2**20
VS_OURS, GFLOP = "/ ours", "GFLOP with backbone"
FIRST, LATER = "rise in first call, MiB", "rise in a later call, MiB"


def run(preset: Preset, say: Callable[[str], None], size: Size = IMAGE) -> Result:
    """Check and time, then count memory and operations."""
    result = Result(
        f"Network without backbone: T=4, {size[0]}x{size[1]}, B=1, fp32, inference",
        ["way", "forward", VS_OURS, FIRST, LATER, GFLOP],
        question=3,
        notes=[
            f"{TIMES}. compiled: torch.compile of op by op. frozen: after freeze_, with folded "
            "weights kept; ours keeps none. converted: op by op after convert_. rise: resident "
            "memory at the peak of a process's first call of this size or the next, beyond that "
            "before it, outputs included. GFLOP: counted by torch while the whole network ran, 2 "
            "for a multiply-add."
        ],
    )
    missing = environment.compiler_error()
    if missing is not None:
        result.notes.append(f"Without {COMPILED}: {missing}.")
    say("checking")
    x = image(size)
    calls = {way: in_inference(make(way, size), x) for way in (OP_BY_OP, OURS, FROZEN, CONVERTED)}
    if missing is None:
        compiled: Any = torch.compile(make(OP_BY_OP, size))
        calls[COMPILED] = in_inference(compiled, x)
    exact = targets(in_inference(make(OP_BY_OP, size).double(), x.double())())
    for way, call in calls.items():
        if way == COMPILED:
            say("compiling the op-by-op version")
        check_outputs(way, targets(call()), exact)
    say("counting operations")
    counted = {way: count(way, size) for way in (OP_BY_OP, OURS)}
    say("timing")
    timings = measured(calls, preset)
    say("memory")
    rises = {way: in_fresh_process(rise_bytes, way, size) for way in (OP_BY_OP, OURS, FROZEN)}
    gains = {way: timing.median / timings[OURS].median for way, timing in timings.items()}
    for way, timing in timings.items():
        row: dict[str, Any] = {"way": way, "forward": milliseconds(timing), VS_OURS: gains[way]}
        if way in rises:
            first, later = rises[way]
            row |= {FIRST: first / MIB, LATER: later / MIB}
        if way in counted:
            row[GFLOP] = counted[way] / 1e9
        result.rows.append(row)
    result.answers = [
        f"After its backbone, the network is {gains[OP_BY_OP]:.1f} times as fast as op by op, with "
        f"{counted[OURS] / 1e9:.0f} instead of {counted[OP_BY_OP] / 1e9:.0f} GFLOP for the same "
        f"outputs and {rises[OURS][1] / MIB:.0f} instead of {rises[OP_BY_OP][1] / MIB:.0f} MiB at "
        "the peak."
    ]
    result.bars = [
        Bar("network, op by op / ours", 2.2, ">=", gains[OP_BY_OP], "x"),
        Bar("network, torch.compile / ours", 1.5, ">=", gains.get(COMPILED), "x", missing or ""),
        Bar(
            "network, ours / frozen",
            1.05,
            "<=",
            timings[OURS].median / timings[FROZEN].median,
            "x",
        ),
        Bar("network, converted / ours", 1.1, "<=", gains[CONVERTED], "x"),
        *(
            Bar(
                f"network, peak memory of {which} call, ours / op by op",
                0.5,
                "<=",
                rises[OURS][number] / rises[OP_BY_OP][number],
                "x",
            )
            for number, which in enumerate(("the first", "a later"))
        ),
        Bar("network, counted operations", 190.0, "<=", counted[OURS] / 1e9, " GFLOP"),
    ]
    return result


def count(way: str, size: Size) -> int:
    """FLOP of the whole network, counted, which have to be those of the cost model.

    Raises:
        AssertionError: if they are not.
    """
    found = flops.count(in_inference(make(way, size, backbone=True), image(size)))
    cost = network_flops([*NUM_OUTPUTS.values()], size, rewritten=way == OURS)
    if found != cost.total:
        raise AssertionError(f"{way}: {found} FLOP counted, {cost.total} by the cost model")
    return found


def rise_bytes(way: str, size: Size) -> tuple[int, int]:
    """Resident bytes at the peak of two calls beyond those before each, in this process."""
    in_inference(make(way, (32, 32)), image((32, 32)))()
    call = in_inference(make(way, size), image(size))
    return peak_memory(call).rise, peak_memory(call).rise
