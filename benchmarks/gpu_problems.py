"""Calls of the operators on one engine, and what the steps of `gpu_check` write down."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import xattn_kernels as xk
from xattn_kernels import registry
from xattn_kernels.functional import cross_attention_block_training
from xattn_kernels.ops.linear_cross_attention import op as linear_op
from xattn_kernels.ops.linear_cross_attention import reference as linear_reference
from xattn_kernels.ops.softmax_cross_attention import op as softmax_op
from xattn_kernels.ops.softmax_cross_attention import reference as softmax_reference
from xattn_kernels.schedule import Schedule
from xattn_kernels.testing.cases import Case

from .gpu_bars import name_for

EPS = 1e-12
#: The engine that is judged and measured; `gpu_check` sets it in the process of a step.
ENGINE = "triton"
#: Operators that engines have; the block is for inference.
OPERATORS = {
    "triton": ("block", "linear", "softmax", "training", "pyramid"),
    "cuda": ("block", "linear", "softmax", "pyramid"),
}
#: What the library calls them.
NAMES = {
    "block": "cross_attention_block",
    "linear": "linear_cross_attention",
    "softmax": "softmax_cross_attention",
    "training": "cross_attention_block_training",
    "pyramid": "pyramid_projection",
}


def rivals() -> dict[str, str]:
    """Engines that are timed beside the one that is measured, by the names they are shown by."""
    if ENGINE == "triton" or registry.unavailable("triton") is not None:
        return {}
    return {"Triton": "triton"}


class Report:
    """Rows and failures of a step, written whenever there is something new."""

    def __init__(self, path: Path, engine: str = "triton") -> None:
        self.path, self.engine = path, engine
        self.rows: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self.bars: dict[str, float] = {}

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        print(row, flush=True)
        self.write()

    def write(self) -> None:
        found = {"rows": self.rows, "failures": self.failures, "bars": self.bars}
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(found, indent=1))
        new.replace(self.path)

    def bar(self, name: str, value: float) -> None:
        """Note what was measured of a promise of `gpu_bars`, if it is one of this engine."""
        promised = name_for(self.engine, name)
        print(f"{name}: {value}", flush=True)
        if promised is not None:
            self.bars[promised] = value
        self.write()

    def check(self, what: str, judge: Callable[[], Any]) -> None:
        """Note a failure, and go on."""
        try:
            judge()
        except Exception as error:
            self.failures.append(f"{what}: {type(error).__name__}: {str(error)[:400]}")
            print("FAILED", self.failures[-1], flush=True)
        else:
            self.rows.append({"checked": what})


def split(case: Case, tensors: Sequence[Tensor]) -> tuple[Any, Any, Any]:
    queries, keys = len(case.query_tokens), len(case.source_tokens)
    return tensors[:queries], tensors[queries : queries + keys], tensors[queries + keys :]


def linear(case: Case, tensors: Sequence[Tensor], engine: str | None = None) -> list[Tensor]:
    slots = [list(x) for x in split(case, tensors)]
    edges = case.schedule.triples_flat
    engine = engine or ENGINE
    if engine == "reference":
        outputs, s, z = linear_reference.forward(*slots, edges, None, None, "softplus", EPS)
    else:
        outputs, s, z = linear_op.call(*slots, edges, None, None, "softplus", EPS, engine)
    return [*outputs, s, z]


def softmax(case: Case, tensors: Sequence[Tensor], engine: str | None = None) -> list[Tensor]:
    slots = [list(x) for x in split(case, tensors)]
    arguments = (*slots, case.schedule.triples_flat, case.heads)
    scale = (case.channels // case.heads) ** -0.5
    engine = engine or ENGINE
    if engine == "reference":
        outputs, lse = softmax_reference.forward(*arguments, scale)
    else:
        outputs, lse = softmax_op.call(*arguments, scale, engine)
    return [*outputs, *lse]


class Head:
    """A pyramid projection: channels and sizes of the levels, hidden channels and outputs."""

    def __init__(
        self,
        channels: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        hidden: int,
        outputs: int,
        batch: int = 2,
    ) -> None:
        self.channels, self.hidden, self.outputs = tuple(channels), hidden, outputs
        self.shapes = [(batch, c, *size) for c, size in zip(channels, sizes, strict=True)]

    def draw(self, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
        """Features, weights, scale, shift, classifier and its bias."""
        generator = torch.Generator().manual_seed(seed)
        m, o, wide = self.hidden, self.outputs, sum(self.channels)
        shapes = [*((*shape, 1) for shape in self.shapes), *((m, c, wide) for c in self.channels)]
        shapes += [(m, 1), (m, 1), (o, m, m), (o, 1)]
        drawn = [
            torch.randn(shape[:-1], generator=generator, dtype=torch.float64) * shape[-1] ** -0.5
            for shape in shapes
        ]
        return [x.to(dtype) for x in drawn]

    def run(
        self,
        flat: Sequence[Tensor],
        statistics: bool,
        project: Any = None,
        engine: str | None = None,
    ) -> Tensor:
        """Of this engine, another, or of a function with the arguments of the composition."""
        n = len(self.channels)
        arguments = (list(flat[:n]), list(flat[n : 2 * n]), *flat[2 * n :])
        if project is None:
            with xk.backend(engine or ENGINE):
                found = xk.pyramid_projection(*arguments, batch_statistics=statistics)
            return found[0] if isinstance(found, tuple) else found
        output: Tensor = project(*arguments, batch_statistics=statistics)
        return output


PUBLISHED_HEAD = Head((144, 216, 288, 288), ((12, 16), (6, 8), (3, 4), (2, 2)), 1080, 40)


def training_inputs(
    schedule: Schedule, tokens: Sequence[int], channels: int, dtype: torch.dtype, seed: int = 0
) -> list[Tensor]:
    """Features in ``dtype``; weight, gamma and beta in float32."""
    generator = torch.Generator().manual_seed(seed)
    features = [torch.randn(2, channels, n, generator=generator).to(dtype) for n in tokens]
    shape = (schedule.num_weights, 5, channels)
    weight = torch.randn(*shape, channels, generator=generator) * (2 / channels) ** 0.5
    gamma = torch.rand(shape, generator=generator) + 0.5
    return [*features, weight, gamma, 0.1 * torch.randn(shape, generator=generator)]


def train(schedule: Schedule, tensors: Sequence[Tensor], engine: str | None = None) -> list[Tensor]:
    """The outputs for what `training_inputs` gives."""
    with xk.backend(engine or ENGINE):
        outputs, _ = cross_attention_block_training(list(tensors[:-3]), *tensors[-3:], schedule)
    return list(outputs)
