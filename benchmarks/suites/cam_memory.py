"""Peak memory of the fused call of `benchmarks.suites.cam`, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.core import Bar, Preset, Result
from benchmarks.problems import SCALES, SCHEDULE, OpByOpSet, Scale
from xattn_kernels.functional import cross_attention_block, pack_block_weights
from xattn_kernels.testing.measure import in_fresh_process, peak_memory, tensor_bytes

MIB = 2**20


def run(preset: Preset, say: Callable[[str], None]) -> Result:
    """Measure all scales; correctness is what `cam` checks."""
    result = Result(
        "Peak memory of the CAM set, fp32, MiB",
        ["scale", "inputs", "outputs", "packed weights", "rise", "op by op: rise", "ratio"],
        notes=[
            "rise: resident memory at the peak of a process's first call of this size beyond that "
            "before it, outputs included. ratio: (inputs + rise) / (inputs + outputs); packed "
            "weights were there before and count on neither side."
        ],
    )
    for number in SCALES:
        say(f"scale {number}")
        fused = in_fresh_process(measure, number, True)
        by_op = in_fresh_process(measure, number, False)
        ratio = (fused["inputs"] + fused["rise"]) / (fused["inputs"] + fused["outputs"])
        result.rows.append(
            {
                "scale": str(Scale(number)),
                "packed weights": fused["weights"],
                "op by op: rise": by_op["rise"],
                "ratio": ratio,
                **{name: fused[name] for name in ("inputs", "outputs", "rise")},
            }
        )
    worst = max(row["ratio"] for row in result.rows)
    result.bars = [
        Bar("CAM set, peak memory / (inputs + outputs), worst scale", 1.15, "<=", worst, "x")
    ]
    return result


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
            "inputs": tensor_bytes(features) / MIB,
            "outputs": tensor_bytes(outputs) / MIB,
            "weights": weights / MIB,
            "rise": memory.rise / MIB,
        }


def _call(features: list[torch.Tensor], fused: bool) -> tuple[Callable[[], Any], int]:
    model = OpByOpSet(features[0].shape[1])
    if not fused:
        return lambda: model(features), 0
    weight, bias = model.folded()
    packed = pack_block_weights(weight, bias)
    call = lambda: cross_attention_block(features, weight, bias, SCHEDULE, packed=packed)  # noqa: E731
    return call, tensor_bytes([packed])
