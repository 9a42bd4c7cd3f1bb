"""Peak memory of the fused call of `benchmarks.suites.cam`, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from xattn_kernels.functional import cross_attention_block, pack_block_weights
from xattn_kernels.testing.measure import in_fresh_process, peak_memory, tensor_bytes

from ..core import Bar, Preset, Result
from ..problems import SCALES, SCHEDULE, OpByOpSet, Scale

MIB = 2**20


def run(preset: Preset, say: Callable[[str], None]) -> Result:
    """Measure all scales; correctness is what `cam` checks."""
    result = Result(
        "Peak memory of the CAM set, fp32, MiB",
        [
            "scale",
            "features",
            "packed weights",
            "outputs",
            "rise",
            "op by op: rise",
            "ratio",
            "ratio without weights",
        ],
        question=2,
        notes=[
            "rise: resident memory at the peak of a process's first call of this size beyond that "
            "before it, outputs included. ratio: (inputs + rise) / (inputs + outputs); inputs are "
            "features and packed weights, or features alone."
        ],
    )
    for number in SCALES:
        say(f"scale {number}")
        fused = in_fresh_process(measure, number, True)
        by_op = in_fresh_process(measure, number, False)
        result.rows.append(
            {
                "scale": str(Scale(number)),
                **fused,
                "op by op: rise": by_op["rise"],
                "ratio": _ratio(fused, fused["features"] + fused["packed weights"]),
                "ratio without weights": _ratio(fused, fused["features"]),
            }
        )
    first = result.rows[0]
    result.answers = [
        f"At scale {first['scale']}, the fused call takes {first['rise']:.0f} MiB beyond its "
        f"inputs, of which {first['outputs']:.0f} are the results; op by op it is "
        f"{first['op by op: rise']:.0f} MiB."
    ]
    result.bars = [
        Bar(
            f"CAM set, peak memory / (inputs + outputs), worst scale{which}",
            1.15,
            "<=",
            max(row[column] for row in result.rows),
            "x",
        )
        for column, which in (
            ("ratio", ", packed weights among the inputs"),
            ("ratio without weights", ", packed weights not counted"),
        )
    ]
    return result


def _ratio(measured: dict[str, float], inputs: float) -> float:
    return (inputs + measured["rise"]) / (inputs + measured["outputs"])


def measure(number: int, fused: bool) -> dict[str, float]:
    """MiB of one scale, in this process."""
    scale = Scale(number)
    with torch.no_grad():
        # Loads the code and starts the threads, with workspaces of hardly any size.
        _call([torch.zeros(1, 4, 2, 2) for _ in range(SCHEDULE.num_sources)], fused)[0]()
        features = scale.features()
        call, weights = _call(features, fused)
        outputs: list[torch.Tensor] = []
        memory = peak_memory(lambda: outputs.extend(call()))
        return {
            "features": tensor_bytes(features) / MIB,
            "packed weights": weights / MIB,
            "outputs": tensor_bytes(outputs) / MIB,
            "rise": memory.rise / MIB,
        }


def _call(features: list[torch.Tensor], fused: bool) -> tuple[Callable[[], Any], int]:
    model = OpByOpSet(features[0].shape[1])
    if not fused:
        return lambda: model(features), 0
    weight, bias = model.folded()
    packed = pack_block_weights(weight, bias)
    arguments = (features, weight, bias, SCHEDULE)
    return partial(cross_attention_block, *arguments, packed=packed), tensor_bytes([packed])
