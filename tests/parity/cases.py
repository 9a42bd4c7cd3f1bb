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
COMPUTED = "relative_position_index"
"""A buffer that depends on nothing."""
TOLERANCE = 1e-9
"""Relative L2 norm, per tensor."""
ZERO = 1e-12
"""Norm below which an expected tensor is zero but for rounding, and may differ in that."""


def _uniform(seed: int, name: str, shape: Sequence[int], low: float, high: float) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))
    return torch.from_numpy(low + (high - low) * generator.random(tuple(shape)))


def parameter(seed: int, name: str, shape: Sequence[int]) -> Tensor:
    """Value of the parameter or buffer `name`, float64."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return torch.zeros(tuple(shape), dtype=torch.int64)
    if leaf == "relative_position_bias_table":
        return _uniform(seed, name, shape, -0.5, 0.5)
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
        return bool(self.args.get("mode") == "train")

    def parameters(self) -> dict[str, Tensor]:
        return {
            name: parameter(self.args["seed"], name, shape)
            for name, shape in self.shapes.items()
            if not name.endswith(COMPUTED)
        }

    def tensor(self, name: str, shape: Sequence[int]) -> Tensor:
        return tensor(self.args["seed"], name, shape)

    def load(self, module: nn.Module) -> nn.Module:
        """`module` in float64 with the case's parameters and mode."""
        module.double()
        state = {k: v for k, v in module.state_dict().items() if k.endswith(COMPUTED)}
        module.load_state_dict(state | self.parameters(), strict=True)
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

    def is_misread(self, name: str) -> bool:
        """Whether the stored gradient `name` is not the gradient of the loss.

        With one sample, torch's CPU batch norm misread the gradient that reaches the keys (see
        `op_by_op.with_plain_gradient`); what lies before the keys is stored with that fault.
        """
        before_keys = ("key_project", "grad.source", "grad.features_", "grad.param.upsample")
        scales = tuple(f"grad.scale_{s}" for s in range(1, len(HEAD_CHANNELS)))
        return self.args["B"] == 1 and any(
            part in name for part in (*before_keys, *scales) if not name.startswith("after.")
        )

    def find(self, name: str) -> Tensor | None:
        """The expected tensor `name`, or the (sum, sum of squares) stored in its place."""
        return self.expected.get(name, self.expected.get("gradsum." + name.removeprefix("grad.")))

    def error(self, name: str, actual: Tensor, expected: Tensor) -> float:
        """Relative L2 distance; 0 if both are zero but for rounding."""
        if actual.shape != expected.shape:
            actual = torch.stack([actual.sum(), actual.square().sum()])
        assert actual.shape == expected.shape, name
        assert actual.dtype == expected.dtype, name
        if max(actual.norm(), expected.norm()) < ZERO:
            return 0.0
        return float((actual - expected).norm() / expected.norm())


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
