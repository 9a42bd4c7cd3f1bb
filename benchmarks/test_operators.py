"""Times of all operators on all cases by pytest-benchmark; not part of the tests.

    pytest benchmarks --benchmark-only --benchmark-json=FILE
    pytest benchmarks --benchmark-only --benchmark-autosave --benchmark-compare

XATTN_BENCH_DEVICE=cuda measures on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from xattn_kernels.registry import explain
from xattn_kernels.testing.cases import CROSS_SCALE, SCALES, Case
from xattn_kernels.testing.device import device_error

from .operators import BLOCK, LINEAR, SOFTMAX, Judge, both, composed, forward, operands, ours

DEVICE = os.environ.get("XATTN_BENCH_DEVICE", "cpu")
NAMES = {
    LINEAR: "linear_cross_attention",
    SOFTMAX: "softmax_cross_attention",
    BLOCK: "cross_attention_block",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

GRID = [
    *((LINEAR, case, passes) for case in (*SCALES, CROSS_SCALE) for passes in (forward, both)),
    # The finer scales take minutes op by op, which is what they would be compared with.
    *((SOFTMAX, case, passes) for case in SCALES[2:] for passes in (forward, both)),
    *((BLOCK, case, forward) for case in SCALES),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("operator", "case", "passes"),
    [pytest.param(*row, id=f"{NAMES[row[0]]}-{row[1].name}-{row[2].__name__}") for row in GRID],
)
def test_operator(
    benchmark: Any,
    operator: str,
    case: Case,
    passes: Callable[..., Callable[[], Sequence[Tensor]]],
    dtype: str,
) -> None:
    error = device_error(DEVICE)
    if error is not None:
        pytest.fail(f"XATTN_BENCH_DEVICE: {error}")
    kind = DTYPES[dtype]
    xs = operands(operator, case, kind, DEVICE)
    gradients = passes is both
    judge = Judge(composed(operator, case), xs, gradients=gradients)
    call = passes(ours(operator, case, kind, DEVICE), xs)
    judge(f"{operator}, {case.name}", call())
    benchmark.group = f"{NAMES[operator]}-{passes.__name__}-{dtype}"
    benchmark.extra_info["engine"] = explain(NAMES[operator], xs[0]).engine
    benchmark.extra_info["device"] = DEVICE

    def finished() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(finished)
