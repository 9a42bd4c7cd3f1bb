"""The parity cases: expected tensors from files, parameters and inputs from their names.

`NAME.safetensors` holds outputs, gradients and running statistics of the authors' released code,
computed in float64; its metadata has the case's arguments. `NAME.params.json` maps the
`state_dict` names of the authors' module to shapes. Parameters and inputs are not stored: each
is drawn from a generator seeded by the case's seed and the tensor's name.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

FOLDER = Path(__file__).parent
TASKS = ("semseg", "depth", "normals", "edge", "sal")
HEAD_CHANNELS = (36, 72, 144, 288)
TOLERANCE = 1e-9
"""Relative L2 norm, per tensor."""


def _uniform(seed: int, name: str, shape: Sequence[int], low: float, high: float) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))
    return torch.from_numpy(low + (high - low) * generator.random(tuple(shape)))


def parameter(seed: int, name: str, shape: Sequence[int]) -> Tensor:
    """Value of the parameter or buffer `name`, float64."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return torch.zeros(tuple(shape), dtype=torch.int64)
    if leaf in ("running_mean", "bias"):
        return _uniform(seed, name, shape, -0.2, 0.2)
    if leaf == "running_var" or len(shape) == 1:
        return _uniform(seed, name, shape, 0.5, 1.5)
    return _uniform(seed, name, shape, -1.0, 1.0) * math.sqrt(3.0 / math.prod(shape[1:]))


def tensor(seed: int, name: str, shape: Sequence[int]) -> Tensor:
    """Input or loss weight `name`, float64, uniform in [-1, 1)."""
    return _uniform(seed, "tensor:" + name, shape, -1.0, 1.0)


@dataclass(frozen=True)
class Case:
    """One case: `args` as the file's metadata has them, `expected` tensors, `shapes` by name."""

    name: str
    args: dict[str, Any]
    expected: dict[str, Tensor]
    shapes: dict[str, list[int]]

    @property
    def training(self) -> bool:
        return bool(self.args["mode"] == "train")

    def parameters(self) -> dict[str, Tensor]:
        return {k: parameter(self.args["seed"], k, shape) for k, shape in self.shapes.items()}

    def tensor(self, name: str, shape: Sequence[int]) -> Tensor:
        return tensor(self.args["seed"], name, shape)

    def load(self, module: nn.Module) -> nn.Module:
        """`module` in float64 with the case's parameters and mode."""
        module.double().load_state_dict(self.parameters(), strict=True)
        return module.train(self.training)

    def scales(self) -> list[Tensor]:
        """The pyramid of a head case, finest first."""
        height, width = self.args["hw0"]
        return [
            self.tensor(f"scale_{s}", (self.args["B"], c, max(height >> s, 1), max(width >> s, 1)))
            for s, c in enumerate(HEAD_CHANNELS)
        ]

    def features(self) -> dict[str, Tensor]:
        """The tasks' features of a cross-task case."""
        shape = (self.args["B"], self.args["C"], *self.args["hw"])
        return {t: self.tensor(f"features_{t}", shape) for t in TASKS[: self.args["nt"]]}

    def check(self, name: str, actual: Tensor | None) -> None:
        """Compare with the expected tensor `name`, or with its (sum, sum of squares)."""
        assert actual is not None, f"{self.name}: {name} is None"
        actual = actual.detach()
        expected = self.expected.get(name)
        if expected is None:
            expected = self.expected["gradsum." + name.removeprefix("grad.")]
            actual = torch.stack([actual.sum(), actual.square().sum()])
        assert actual.shape == expected.shape and actual.dtype == expected.dtype
        error = (actual - expected).norm() / expected.norm().clamp_min(1e-300)
        assert error <= TOLERANCE, f"{self.name}: {name} differs by {error:.2e} in relative L2"


def names(prefix: str) -> list[str]:
    """Names of the stored cases that start with `prefix`."""
    return sorted(path.stem for path in FOLDER.glob(f"{prefix}*.safetensors"))


@cache
def load(name: str) -> Case:
    with safe_open(FOLDER / f"{name}.safetensors", framework="pt") as file:
        args = json.loads(file.metadata()["args"])
        expected = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    shapes = json.loads((FOLDER / f"{name}.params.json").read_text())
    return Case(name, args, expected, shapes)
