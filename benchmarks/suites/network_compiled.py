"""torch.compile (inductor) of this library's network: graphs, time to compile, time of calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn_kernels.cost import STRIDES
from xattn_kernels.cost_network import BASE_WIDTHS
from xattn_models import SCAMTL

from .. import environment
from ..core import TIMES, Bar, Preset, Result, measured, milliseconds, seconds_of
from ..networks import NUM_OUTPUTS, Size, image, in_inference, targets
from ..problems import as_if_trained

TASKS = ("semseg", "depth")
"""Two: the time to compile grows with the number of tasks."""
SIZES: tuple[Size, ...] = ((256, 320), (384, 512), (480, 640))
GRAPHS = 3
"""Allowed for three sizes: one for the first, then one or two with sizes left open."""
ERROR = {"eval": 1e-5, "train": 1e-4}
"""Largest relative L2 error against eager in float32."""
EAGER, COMPILED = "eager", "compiled"


def run(preset: Preset, say: Callable[[str], None], sizes: Sequence[Size] = SIZES) -> Result:
    """Compile for one size after another; check and time each. In training, for the first."""
    result = Result(
        "Network without backbone in torch.compile: T=2, B=1, fp32",
        ["mode", "size", "graphs", "first call, s", EAGER, COMPILED, "compiled / eager"],
        question=3,
        notes=[
            f"{TIMES}. First call: of this size, with what is compiled in it. graphs: compiled so "
            "far. Sizes are left open by torch.compile from the second on."
        ],
    )
    missing = environment.compiler_error()
    if missing is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for mode, some in (("eval", sizes), ("train", sizes[:1])):
                result.rows += list(_rows(mode, some, preset, say))
    ratios = {mode: _worst(result.rows, mode) for mode in ERROR}
    graphs = max((row["graphs"] for row in result.rows), default=None)
    result.bars = [
        *(
            Bar(f"network, torch.compile of ours / ours, {mode}", 1.05, "<=", x, "x", missing or "")
            for mode, x in ratios.items()
        ),
        Bar("network, graphs for three sizes", GRAPHS, "<=", graphs, "", missing or ""),
    ]
    return result


class PooledPyramid(nn.Module):
    """In place of a backbone: averages of the image, mixed to the widths of the published one."""

    def __init__(self) -> None:
        super().__init__()
        self.feature_info = SimpleNamespace(channels=list(BASE_WIDTHS).copy)
        self.mix = nn.ModuleList(nn.Conv2d(3, width, 1) for width in BASE_WIDTHS)

    def forward(self, image: Tensor) -> list[Tensor]:
        pairs = zip(self.mix, STRIDES, strict=True)
        return [mix(stride * F.avg_pool2d(image, stride)) for mix, stride in pairs]


def _rows(
    mode: str, sizes: Sequence[Size], preset: Preset, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    model = SCAMTL(PooledPyramid(), TASKS, {task: NUM_OUTPUTS[task] for task in TASKS})
    as_if_trained(model)
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0  # inductor draws other random numbers
    model.train(mode == "train")
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    compiled = torch.compile(model)
    rows = []
    for size in sizes:
        say(f"compiling, {mode}, {size[0]}x{size[1]}")
        x = image(size)
        calls = {
            name: in_inference(f, x) if mode == "eval" else _Step(f, model, x)
            for name, f in ((EAGER, model), (COMPILED, compiled))
        }
        row: dict[str, Any] = {"mode": mode, "size": f"{size[0]}x{size[1]}"}
        row["first call, s"] = seconds_of(calls[COMPILED])
        expected, found = (_results(mode, calls[name]) for name in (EAGER, COMPILED))
        _check(expected, found, ERROR[mode])
        timings = measured(calls, preset)
        row |= {name: milliseconds(timing) for name, timing in timings.items()}
        row["compiled / eager"] = timings[COMPILED].median / timings[EAGER].median
        row["graphs"] = counters["unique_graphs"] - before
        rows.append(row)
    torch._dynamo.reset()
    return rows


class _Step:
    """Forward and backward of a network or what was compiled of it."""

    def __init__(self, call: Callable[..., Any], model: nn.Module, x: Tensor) -> None:
        self._call, self._model, self._x = call, model, x

    def __call__(self) -> list[Tensor]:
        """The gradients of all parameters."""
        self._model.zero_grad()
        output = self._call(self._x)
        torch.stack([y.square().mean() for y in targets(output).values()]).sum().backward()
        # Those that the loss does not depend on have none, or zero where a graph had them.
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self._model.parameters()]


def _results(mode: str, call: Callable[[], Any]) -> Tensor:
    found = list(targets(call()).values()) if mode == "eval" else call()
    return torch.cat([x.flatten() for x in found])


def _check(expected: Tensor, found: Tensor, allowed: float) -> None:
    error = float((found - expected).norm() / expected.norm())
    if not error <= allowed:
        raise AssertionError(f"{COMPILED}: relative L2 error {error:.1e}, allowed {allowed:.0e}")


def _worst(rows: Sequence[dict[str, Any]], mode: str) -> float | None:
    return max((row["compiled / eager"] for row in rows if row["mode"] == mode), default=None)
