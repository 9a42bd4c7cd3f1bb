"""The cross-attention block's path for sm_90a with and without a bug; see test_planted_sm90.py.

``places``: what waits there is, and what is not needed. ``right``: whether results are right.
"""

from __future__ import annotations

import json
import os
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

Problem = tuple[list[Tensor], Tensor, Tensor, Schedule]


def problem(
    channels: int, tokens: tuple[int, ...], channels_last: bool = False, batch: int = 1
) -> Problem:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    features = [
        draw(batch, n, channels).mT if channels_last else draw(batch, channels, n) for n in tokens
    ]
    schedule = Schedule.cross_task(len(tokens))
    weight = draw(schedule.num_weights, 5, channels, channels) * (2 / channels) ** 0.5
    return features, weight, draw(schedule.num_weights, 5, channels), schedule


#: Sums of a warpgroup's own tokens, and of all for some columns; slabs that stay, that are
#: replaced between maps, and that are replaced for every tile.
PROBLEMS = {
    "own": partial(problem, 36, (300, 275)),
    "maps": partial(problem, 40, (140, 130, 70), True, 2),
    "columns": partial(problem, 144, (300, 200)),
    "stream": partial(problem, 192, (150, 140)),
    "few": partial(problem, 36, (9, 7)),
}


def evaluate(problem: Problem) -> Sequence[Tensor]:
    with torch.no_grad(), registry.backend("cuda"):
        return xk.cross_attention_block(*problem)


def is_right(problem: Problem) -> bool:
    features, weight, bias, schedule = problem
    truth = compositions.cross_attention_block(
        [x.double() for x in features], weight.double(), bias.double(), schedule
    )

    def close(x: Tensor, y: Tensor) -> bool:
        return bool((x.double() - y).norm() <= 1e-2 * y.norm())  # false for NaN

    return all(map(close, evaluate(problem), truth))


def main(task: str, names: Sequence[str]) -> None:
    os.environ["XATTN_CUDA_SM90A"] = "1"
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
