"""Training step of the whole network, T=4, with Adam: op by op and ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from xattn_kernels.testing.measure import in_fresh_process, peak_memory

from ..core import TIMES, Bar, Preset, Result, measured, milliseconds
from ..networks import OP_BY_OP, OURS, Size, check_outputs, image, make, targets
from ..problems import IMAGE, TASKS

FACTOR, FLOOR = 3.0, 1e-4
"""Allowed is FACTOR times the relative L2 error of op by op in float32, and FLOOR beside it: all
gradients together, as relus near zero take either side in any evaluation."""
MIB = 2**20
WAYS = (OP_BY_OP, OURS)


def run(preset: Preset, say: Callable[[str], None], size: Size = IMAGE) -> Result:
    """Check outputs, loss and gradients; then time, and count memory."""
    result = Result(
        f"Training, whole network: T=4, {size[0]}x{size[1]}, B=1, fp32, Adam",
        ["way", "step", "rise at peak, MiB"],
        question=3,
        notes=[
            f"{TIMES}. A step is forward, backward and Adam; the loss has the deep supervision of "
            "all scales. rise at peak: resident memory in a process's first step beyond that "
            "before it, gradients and Adam's moments included."
        ],
    )
    say("checking")
    _check(size)
    say("timing")
    steps = {way: Step(way, size) for way in WAYS}
    timings = measured(steps, preset, warmup=0)
    del steps
    say("memory")
    rises = {way: in_fresh_process(rise_bytes, way, size) for way in WAYS}
    for way in WAYS:
        result.rows.append(
            {
                "way": way,
                "step": milliseconds(timings[way]),
                "rise at peak, MiB": rises[way] / MIB,
            }
        )
    result.answers = [
        "A training step of the whole network is "
        f"{timings[OP_BY_OP].median / timings[OURS].median:.1f} times as fast as op by op, and at "
        f"its peak takes {rises[OURS] / MIB:,.0f} instead of {rises[OP_BY_OP] / MIB:,.0f} MiB."
    ]
    result.bars = [
        Bar(
            "training network, op by op / ours",
            1.3,
            ">=",
            timings[OP_BY_OP].median / timings[OURS].median,
            "x",
        ),
        Bar(
            "training network, peak memory, ours / op by op",
            0.7,
            "<=",
            rises[OURS] / rises[OP_BY_OP],
            "x",
        ),
    ]
    return result


class Step:
    """One step of training on a fixed image; the loss is a fixed functional of all outputs."""

    def __init__(self, way: str, size: Size, dtype: torch.dtype = torch.float32) -> None:
        self.model: nn.Module = make(way, size, backbone=True).to(dtype).train()
        self.image = image(size).to(dtype)
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=1e-4, weight_decay=1e-4)

    def __call__(self) -> dict[str, Any]:
        """The outputs; gradients are in the parameters' `grad`."""
        self.optimiser.zero_grad()
        output, loss = self.forward()
        loss.backward()
        self.optimiser.step()
        return output

    def forward(self) -> tuple[dict[str, Any], Tensor]:
        """Outputs and loss."""
        output = self.model(self.image)
        deep = [scale[task] for scale in output["deep_supervision"].values() for task in TASKS]
        maps = [*targets(output).values(), *deep]
        return output, torch.stack([y.square().mean() for y in maps]).sum()

    def results(self) -> tuple[dict[str, Tensor], Tensor]:
        """Outputs, and all gradients in one vector, with the random numbers of seed 0."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            output, loss = self.forward()
        loss.backward()
        # Parameters of a norm that nothing uses are in every checkpoint; they have no gradient.
        gradients = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
        return {k: y.detach() for k, y in targets(output).items()}, torch.cat(gradients)


def rise_bytes(way: str, size: Size) -> int:
    """Resident bytes at the peak of this process's first step beyond those before it."""
    Step(way, (64, 64))()
    return peak_memory(Step(way, size)).rise


def _check(size: Size) -> None:
    exact = _named(*Step(OP_BY_OP, size, torch.float64).results())
    by_op = _named(*Step(OP_BY_OP, size).results())
    found = _named(*Step(OURS, size).results())
    for name, truth in exact.items():
        if found[name].shape != truth.shape:
            raise AssertionError(
                f"{OURS}, {name}: shape {tuple(found[name].shape)}, expected {tuple(truth.shape)}"
            )
        rounding = float((by_op[name] - truth).norm() / truth.norm())
        check_outputs(OURS, found, {name: truth}, FACTOR * rounding + FLOOR)


def _named(outputs: dict[str, Tensor], gradients: Tensor) -> dict[str, Tensor]:
    return {**outputs, "gradients": gradients}
