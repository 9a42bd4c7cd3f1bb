"""One cross-scale head, 40 outputs, inference: op by op, compiled, ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from xattn_kernels import modules
from xattn_kernels.cost import STRIDES, WIDTHS
from xattn_kernels.testing import op_by_op
from xattn_kernels.testing.measure import in_fresh_process, peak_memory

from .. import environment
from ..core import TIMES, Bar, Preset, Result, measured, milliseconds
from ..networks import (
    COMPILED,
    OP_BY_OP,
    OURS,
    Size,
    check_outputs,
    in_inference,
)
from ..problems import IMAGE, as_if_trained

OUTPUTS = 40
MIB = 2**20
VS_OURS, RISE = "/ ours", "rise at peak, MiB"


def run(preset: Preset, say: Callable[[str], None], size: Size = IMAGE) -> Result:
    """Check and time, then count memory."""
    result = Result(
        f"Head: CSAM and aggregation of 4 scales, {size[0]}x{size[1]}, B=1, {OUTPUTS} outputs, "
        "fp32, inference",
        ["way", "forward", VS_OURS, RISE],
        question=3,
        notes=[
            f"{TIMES}. compiled: torch.compile of op by op. rise at peak: resident memory in a "
            "process's first call beyond that before it, outputs and folded weights included."
        ],
    )
    missing = environment.compiler_error()
    if missing is not None:
        result.notes.append(f"Without {COMPILED}: {missing}.")
    say("checking")
    features = pyramid(size)
    calls = {way: in_inference(make(way), features) for way in (OP_BY_OP, OURS)}
    if missing is None:
        compiled: Any = torch.compile(make(OP_BY_OP))
        calls[COMPILED] = in_inference(compiled, features)
    exact = in_inference(make(OP_BY_OP).double(), [x.double() for x in features])()
    for way, call in calls.items():
        if way == COMPILED:
            say("compiling the op-by-op version")
        check_outputs(way, {"output": call()}, {"output": exact})
    say("timing")
    timings = measured(calls, preset)
    say("memory")
    rises = {way: in_fresh_process(rise_bytes, way, size) for way in (OP_BY_OP, OURS)}
    gains = {way: timing.median / timings[OURS].median for way, timing in timings.items()}
    for way, timing in timings.items():
        row: dict[str, Any] = {"way": way, "forward": milliseconds(timing), VS_OURS: gains[way]}
        if way in rises:
            row[RISE] = rises[way] / MIB
        result.rows.append(row)
    result.answers = [
        f"One head with its cross-scale attention is {gains[OP_BY_OP]:.1f} times as fast as op by "
        f"op, and at its peak takes {rises[OURS] / MIB:.0f} MiB instead of "
        f"{rises[OP_BY_OP] / MIB:.0f}: scales are projected before they are upsampled."
    ]
    result.bars = [
        Bar("head, op by op / ours", 4.0, ">=", gains[OP_BY_OP], "x"),
        Bar("head, torch.compile / ours", 2.5, ">=", gains.get(COMPILED), "x", missing or ""),
        Bar("head, peak memory, ours / op by op", 1 / 3, "<=", rises[OURS] / rises[OP_BY_OP], "x"),
    ]
    return result


def make(way: str) -> nn.Module:
    """The head in eval mode; both ways have the same parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        source = op_by_op.CrossScaleHead(WIDTHS, OUTPUTS)
        as_if_trained(source)
    model: nn.Module = source
    if way == OURS:
        model = modules.CrossScaleHead(WIDTHS, OUTPUTS)
        model.load_state_dict(source.state_dict())
    return model.eval()


def pyramid(size: Size) -> list[Tensor]:
    """(1, C_s, H_s, W_s) of an image's four scales, standard normal."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn((1, width, size[0] // stride, size[1] // stride), generator=generator)
        for width, stride in zip(WIDTHS, STRIDES, strict=True)
    ]


def rise_bytes(way: str, size: Size) -> int:
    """Resident bytes at the peak of this process's first call beyond those before it."""
    classes = {OP_BY_OP: op_by_op.CrossScaleHead, OURS: modules.CrossScaleHead}
    tiny = [torch.zeros(1, 4, side, side) for side in (8, 4, 2, 1)]
    in_inference(classes[way]((4, 4, 4, 4), 2).eval(), tiny)()
    return peak_memory(in_inference(make(way), pyramid(size))).rise
