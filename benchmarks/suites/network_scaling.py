"""The whole network by batch, tasks, resolution and backbone: images a second, and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from xattn_kernels.testing.measure import Timing, in_fresh_process, peak_memory

from ..core import Plot, Preset, Result, Series, measured, seconds_of
from ..networks import (
    BACKBONE,
    ERROR,
    MORE_OUTPUTS,
    OP_BY_OP,
    OURS,
    Size,
    check_outputs,
    image,
    in_inference,
    make,
    targets,
)

WAYS = (OP_BY_OP, OURS)
BASE: Size = (256, 320)
LARGER: tuple[Size, ...] = ((384, 480), (480, 640))
FACTOR = 3.0
"""Allowed is this often the relative L2 error of op by op in float32, and `ERROR` anyway."""
SHARE = 0.5
"""Of the preset's time for one comparison, for each of the many here."""
MIB = 2**20


@dataclass(frozen=True)
class Setting:
    """A network and its images."""

    varied: str
    value: str | int
    batch: int = 1
    tasks: int = 4
    size: Size = BASE
    backbone: str = BACKBONE


def settings(base: Size = BASE) -> list[Setting]:
    """What is measured."""
    return [
        *(Setting("batch", b, batch=b) for b in (1, 2, 4)),
        *(Setting("tasks", t, tasks=t) for t in (2, 3, 4, 5)),
        *(
            Setting("resolution", f"{h}x{w}", size=(h, w))
            for h, w in (base, (384, 480), (480, 640))
        ),
        *(Setting("backbone", b, backbone=b) for b in (BACKBONE, "hrnet_w18", "resnet18")),
    ]


def run(
    preset: Preset, say: Callable[[str], None], which: Sequence[Setting] | None = None
) -> Result:
    """Check and time all settings, then count memory."""
    result = Result(
        "Whole network, fp32, inference, by batch, tasks, resolution and backbone",
        ["varied", "value", "op by op, images/s", "ours, images/s", "gain"]
        + [f"{way}: rise at peak, MiB" for way in WAYS],
        question=3,
        notes=[
            "Images a second: median, with the quartiles as spread. Unless varied: B=1, T=4, "
            f"{BASE[0]}x{BASE[1]}, {BACKBONE}. Backbone included, weights random. rise at peak: "
            "resident memory in a later call of a process beyond that before it, outputs included; "
            "ours is not frozen: it keeps no folded weights."
        ],
    )
    known: dict[Setting, tuple[dict[str, Timing], dict[str, int]]] = {}
    for setting in settings() if which is None else which:
        say(f"{setting.varied} {setting.value}")
        same = replace(setting, varied="", value="")
        if same not in known:
            known[same] = _timings(setting, preset), _rises(setting)
        timings, rises = known[same]
        row: dict[str, Any] = {"varied": setting.varied, "value": setting.value}
        for way in WAYS:
            row[f"{way}, images/s"] = _rate(setting, timings[way])
            row[f"{way}: rise at peak, MiB"] = rises[way] / MIB
        row["gain"] = timings[OP_BY_OP].median / timings[OURS].median
        result.rows.append(row)
    gains = [row["gain"] for row in result.rows]
    last = max(result.rows, key=lambda row: row["gain"])
    result.answers = [
        f"The whole network is {min(gains):.1f} to {max(gains):.1f} times as fast as op by op in "
        f"all {len(gains)} settings; most at {last['varied']} {last['value']}, "
        f"{last['ours, images/s'][0]:.1f} instead of {last['op by op, images/s'][0]:.1f} images a "
        "second."
    ]
    result.plots = [
        _plot(name, [row for row in result.rows if row["varied"] == name])
        for name in dict.fromkeys(row["varied"] for row in result.rows)
    ]
    return result


def _timings(setting: Setting, preset: Preset) -> dict[str, Timing]:
    calls = {way: _call(way, setting) for way in WAYS}
    x = image(setting.size, setting.batch)
    exact = targets(in_inference(_model(OP_BY_OP, setting).double(), x.double())())
    seconds, outputs = 0.0, {}
    for way, call in calls.items():
        found: list[Any] = []
        seconds += seconds_of(lambda call=call, found=found: found.append(call()))
        outputs[way] = targets(found[0])
    for name, truth in exact.items():
        rounding = float((outputs[OP_BY_OP][name] - truth).norm() / truth.norm())
        check_outputs(OURS, outputs[OURS], {name: truth}, max(ERROR, FACTOR * rounding))
    return measured(calls, preset, warmup=0, seconds=seconds, share=SHARE)


def _rises(setting: Setting) -> dict[str, int]:
    return {way: in_fresh_process(rise_bytes, way, setting) for way in WAYS}


def rise_bytes(way: str, setting: Setting) -> int:
    """Resident bytes at the peak of this process's second call beyond those before it."""
    call = _call(way, setting)
    call()
    return peak_memory(call).rise


def _model(way: str, setting: Setting) -> Any:
    tasks = list(MORE_OUTPUTS)[: setting.tasks]
    return make(way, setting.size, backbone=setting.backbone, tasks=tasks)


def _call(way: str, setting: Setting) -> Callable[[], Any]:
    return in_inference(_model(way, setting), image(setting.size, setting.batch))


def _rate(setting: Setting, timing: Timing) -> list[float]:
    """Images a second: median, lower and upper quartile."""
    fast, slow = timing.quartiles
    return [setting.batch / seconds for seconds in (timing.median, slow, fast)]


def _plot(varied: str, rows: Sequence[dict[str, Any]]) -> Plot:
    series = [
        Series(
            way,
            [str(row["value"]) for row in rows],
            *([row[f"{way}, images/s"][i] for row in rows] for i in range(3)),
        )
        for way in WAYS
    ]
    return Plot("bars", f"Whole network by {varied}", varied, "images a second", series)
