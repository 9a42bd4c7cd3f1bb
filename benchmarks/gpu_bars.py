"""What is promised for one H200: bf16, B=8, T=4, NYUD-v2 sizes, ratios within one run.

`BARS` are the promises, none measured; `measured` fills in what results of record have of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from .core import Bar

_COMPILED = "torch.compile(max-autotune)"
_FLOOR = "share of the memory floor"

#: Promises of the engine triton; those of cuda have `CUDA` before their names.
CUDA = "engine cuda: "
_NAMED = (
    (
        ("CTAM CAM set, four scales, op by op / fused", 10.0, ">=", "x"),
        (f"CTAM CAM set, four scales, {_COMPILED} / fused", 3.0, ">=", "x"),
        ("CTAM CAM set, four scales, share of the 0.2 ms roofline", 35.0, ">=", "%"),
        ("CSAM CAM set, share of the 78 us memory floor", 50.0, ">=", "%"),
        ("linear core, forward + backward, scale 0, share of the memory floor", 60.0, ">=", "%"),
        ("linear core, forward + backward, torch.compile / fused", 2.0, ">=", "x"),
        *(
            (f"softmax core, C={c}, N={n}, best of torch's SDPA / fused", 1.0, ">=", "x")
            for c in (72, 144)
            for n in (4800, 19200)
        ),
        ("softmax core, C=36, best of torch's SDPA / fused", 1.3, ">=", "x"),
        ("softmax core, C=288, best of torch's SDPA / fused", 1.3, ">=", "x"),
        ("kernel launches for one CTAM in inference", 3, "<=", ""),
        ("training CTAM, four scales, forward + backward, op by op / ours", 4.0, ">=", "x"),
        (f"training CTAM, forward + backward, {_COMPILED} / ours", 2.0, ">=", "x"),
        ("training CTAM, bytes saved for backward, ours / op by op", 0.05, "<=", "x"),
    ),
    (
        (f"{CUDA}CTAM CAM set, four scales, share of the 0.2 ms roofline", 50.0, ">=", "%"),
        (f"{CUDA}CTAM CAM set, four scales, Triton / fused", 1.3, ">=", "x"),
        (f"{CUDA}CTAM CAM set, four scales, op by op / fused", 15.0, ">=", "x"),
        *(
            (f"{CUDA}linear core, forward + backward, scale 0, {layout}, {_FLOOR}", 70.0, ">=", "%")
            for layout in ("NCHW", "channels_last")
        ),
        (f"{CUDA}softmax core, C=36, best of torch's SDPA / fused", 1.5, ">=", "x"),
        *(
            (f"{CUDA}softmax core, C={c}, N={n}, best of torch's SDPA / fused", 1.0, ">=", "x")
            for c in (72, 144)
            for n in (4800, 19200)
        ),
    ),
)
BARS = tuple(
    Bar(name, target, relation, None, unit)
    for named in _NAMED
    for name, target, relation, unit in named
)


def name_for(engine: str, name: str) -> str | None:
    """What a promise is called for an engine; None if it is another engine's alone.

    Raises:
        ValueError: if no engine promises that.
    """
    known = {bar.name for bar in BARS}
    if not {name, CUDA + name} & known:
        raise ValueError(f"name: got {name!r}, expected that of a bar in gpu_bars")
    wanted = CUDA + name if engine == "cuda" else name
    return wanted if wanted in known else None


def measured(suites: Iterable[Mapping[str, Any]]) -> list[Bar]:
    """The bars, with the values that suites of a run on the GPU give under the same names."""
    values = {
        bar["name"]: bar["value"]
        for result in suites
        if result["failure"] is None
        for bar in result["bars"]
    }
    return [replace(bar, value=values.get(bar.name)) for bar in BARS]
