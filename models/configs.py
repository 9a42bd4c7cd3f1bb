"""The published settings of SCA-MTL: tasks, sizes, loss weights and recipe of training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """Adam with a learning rate of lr (1 - epoch / epochs)^power."""

    epochs: int
    batch: int
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    power: float = 0.9


@dataclass(frozen=True)
class Config:
    """A network, its data set and how it is trained.

    Attributes:
        dataset: "NYUD-v2" or "PASCAL-Context".
        num_outputs: channels of every task's output; the order is that of the tasks.
        image_size: height and width.
        loss_weights: factor of every task's loss.
        recipe: of training.
        backbone: name of the timm model.
    """

    dataset: str
    num_outputs: Mapping[str, int]
    image_size: tuple[int, int]
    loss_weights: Mapping[str, float]
    recipe: Recipe
    backbone: str = "hrnet_w18_small_v2"
    tasks: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        for name in ("num_outputs", "loss_weights"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        object.__setattr__(self, "tasks", tuple(self.num_outputs))

    def arguments(self) -> dict[str, Any]:
        """Arguments of `sca_mtl`."""
        return {
            "tasks": self.tasks,
            "num_outputs": dict(self.num_outputs),
            "backbone": self.backbone,
        }


_NYUD_SIZE = (480, 640)
_PASCAL_SIZE = (512, 512)

CONFIGS: Mapping[str, Config] = MappingProxyType(
    {
        "nyud_2": Config(
            dataset="NYUD-v2",
            num_outputs={"semseg": 40, "depth": 1},
            image_size=_NYUD_SIZE,
            loss_weights={"semseg": 1.44, "depth": 1.15},
            recipe=Recipe(epochs=100, batch=10),
        ),
        # No weights are published for these tasks together: those of Vandenhende et al., MTI-Net.
        "nyud_4": Config(
            dataset="NYUD-v2",
            num_outputs={"semseg": 40, "normals": 3, "edge": 1, "depth": 1},
            image_size=_NYUD_SIZE,
            loss_weights={"semseg": 1.0, "normals": 10.0, "edge": 50.0, "depth": 1.0},
            recipe=Recipe(epochs=100, batch=10),
        ),
        "pascal_2": Config(
            dataset="PASCAL-Context",
            num_outputs={"semseg": 21, "normals": 3},
            image_size=_PASCAL_SIZE,
            loss_weights={"semseg": 1.1, "normals": 40.0},
            recipe=Recipe(epochs=100, batch=16),
        ),
        "pascal_3": Config(
            dataset="PASCAL-Context",
            num_outputs={"semseg": 21, "human_parts": 7, "sal": 1},
            image_size=_PASCAL_SIZE,
            loss_weights={"semseg": 1.0, "human_parts": 2.0, "sal": 5.0},
            recipe=Recipe(epochs=80, batch=8),
        ),
        # As above for the weights.
        "pascal_5": Config(
            dataset="PASCAL-Context",
            num_outputs={"semseg": 21, "human_parts": 7, "sal": 1, "normals": 3, "edge": 1},
            image_size=_PASCAL_SIZE,
            loss_weights={
                "semseg": 1.0,
                "human_parts": 2.0,
                "sal": 5.0,
                "normals": 10.0,
                "edge": 50.0,
            },
            recipe=Recipe(epochs=80, batch=8),
        ),
    }
)


def config(name: str) -> Config:
    """One of `CONFIGS` by its name.

    Raises:
        ValueError: for another name.
    """
    if name not in CONFIGS:
        raise ValueError(f"config: got {name!r}, expected one of {list(CONFIGS)}")
    return CONFIGS[name]
