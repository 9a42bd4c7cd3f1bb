"""One run of the linear operator's forward pass on the host, for test_planted.py to judge.

``places``: prints all barriers and waits passed, and those that nothing depends on. ``result``:
compares with float64 and prints ``right`` or ``wrong``; a fault ends the process in its own way.
"""

from __future__ import annotations

import json
import mmap
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from twin import host

TWIN = host.load()

import xattn_kernels as xk  # noqa: E402
from xattn_kernels import registry  # noqa: E402
from xattn_kernels.schedule import Schedule  # noqa: E402
from xattn_kernels.testing import compositions  # noqa: E402

Slots = list[list[Tensor]]
#: Linux's MAP_NORESERVE, which Python has from 3.13 on.
NORESERVE = 0x4000
SCHEDULE = Schedule.cross_task(2)


def slots(dtype: torch.dtype, channels: int, values: int, channels_last: bool = False) -> Slots:
    """Queries, keys, values of two tasks: more tokens than a chunk, no multiple of any tile."""
    generator = torch.Generator().manual_seed(1)

    def draw(width: int, tokens: int) -> Tensor:
        shape = (1, tokens, width) if channels_last else (1, width, tokens)
        x = torch.randn(shape, generator=generator).to(dtype)
        return x.mT if channels_last else x

    return [
        [draw(width, tokens) for tokens in (300, 275)] for width in (channels, channels, values)
    ]


def far(x: Tensor) -> Tensor:
    """The same numbers, samples 2^31 elements and more apart; what lies between is no memory."""
    step = 2**31 + 8
    size = (step * (x.size(0) - 1) + x[0].numel()) * x.element_size()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    memory = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=x.dtype)
    return memory.as_strided(x.shape, (step, x.size(2), 1)).copy_(x)


def far_slots() -> Slots:
    drawn = slots(torch.bfloat16, 18, 18)
    return [[far(torch.cat([x, x + 1])) for x in group] for group in drawn]


#: Kinds of products, ways to load tiles, both numbers of stages.
PROBLEMS = {
    "float32": partial(slots, torch.float32, 36, 36),
    "float32 channels last": partial(slots, torch.float32, 20, 36, True),
    "float32 wide": partial(slots, torch.float32, 384, 20),
    "bfloat16": partial(slots, torch.bfloat16, 36, 36),
    "bfloat16 channels last": partial(slots, torch.bfloat16, 104, 96, True),
    "float16": partial(slots, torch.float16, 18, 36),
    "far": far_slots,
}


def evaluate(problem: Slots) -> list[Tensor]:
    with registry.backend("cuda"):
        outputs, state = xk.linear_cross_attention(*problem, SCHEDULE, return_state=True)
    return [*outputs, *state]


def is_right(problem: Slots) -> bool:
    exact = [[x.double() for x in group] for group in problem]
    outputs, state = compositions.linear_cross_attention(*exact, SCHEDULE, name="softplus")
    bound = 1e-5 if problem[0][0].dtype is torch.float32 else 1e-2

    def close(x: Tensor, y: Tensor) -> bool:
        return bool((x.double() - y).norm() <= bound * y.norm())  # false for NaN

    return all(map(close, evaluate(problem), [*outputs, *state]))


def main(task: str, names: Sequence[str]) -> None:
    problems = {name: PROBLEMS[name]() for name in names or PROBLEMS}
    if task == "places":
        runs = {name: partial(evaluate, problem) for name, problem in problems.items()}
        passed, idle = host.not_needed(TWIN, runs)
        print(json.dumps([sorted(passed), sorted(idle)]))
    else:
        TWIN.twin_configure(processors=1)
        print("right" if all(map(is_right, problems.values())) else "wrong")


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    main(sys.argv[1], sys.argv[2:])
