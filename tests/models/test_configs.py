"""The published settings."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from xattn_models import CONFIGS, config, sca_mtl

PARAMETERS = {"nyud_2": 25.76, "nyud_4": 56.37, "pascal_3": 39.94, "pascal_5": 74.96}
"""Millions, as published."""


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_many_as_published(name: str) -> None:
    with torch.device("meta"):
        model = sca_mtl(**config(name).arguments())
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6, 2) == PARAMETERS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_fit_together(name: str) -> None:
    settings = config(name)
    assert settings.tasks == tuple(settings.num_outputs) == tuple(settings.loss_weights)
    order = ["semseg", "human_parts", "sal", "normals", "edge", "depth"]
    assert list(settings.tasks) == [task for task in order if task in settings.tasks]
    assert len(settings.tasks) == int(name[-1])
    assert not settings.image_size[0] % 32 and not settings.image_size[1] % 32


def test_settings_are_constant() -> None:
    settings = config("nyud_2")
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.backbone = "resnet18"
    with pytest.raises(TypeError):
        settings.num_outputs["semseg"] = 2
    arguments = settings.arguments()
    arguments["num_outputs"]["semseg"] = 2
    assert settings.num_outputs["semseg"] == 40


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"config: got 'nyud', expected one of \['nyud_2'"):
        config("nyud")
