"""Propagation between scales, and the initial predictions, by themselves."""

from __future__ import annotations

import pytest
import torch
from network_support import perturb

from xattn_models import op_by_op
from xattn_models.propagation import FeaturePropagation
from xattn_models.task_heads import InitialPrediction

TASKS = ("semseg", "depth", "normals")


@pytest.mark.parametrize("task_softmax", [False, True])
@pytest.mark.parametrize("channels", [6, 16, 17])
@pytest.mark.parametrize("training", [False, True])
def test_propagation(channels: int, task_softmax: bool, training: bool) -> None:
    ours = FeaturePropagation(TASKS, channels, task_softmax=task_softmax).double().train(training)
    theirs = op_by_op.FPM(TASKS, channels, task_softmax).double().train(training)
    perturb(ours)
    theirs.load_state_dict(ours.state_dict())
    features = {task: torch.randn(2, channels, 9, 5, dtype=torch.float64) for task in TASKS}
    actual, expected = ours(features), theirs(features)
    with torch.no_grad():
        inferred = ours.eval()(features)
    for task in TASKS:
        torch.testing.assert_close(actual[task], expected[task])
        if not training:
            torch.testing.assert_close(inferred[task], expected[task])


def test_softmax_is_over_consecutive_channels() -> None:
    """Weights of channels 3i .. 3i + 2 sum to one, unless the tasks' are asked for."""
    found = {}
    for task_softmax in (False, True):
        module = FeaturePropagation(TASKS, 4, task_softmax=task_softmax).eval()
        seen = []
        module.dimensionality_reduction.register_forward_pre_hook(
            lambda _, x, seen=seen: seen.append(x[0])
        )
        module({task: torch.ones(1, 4, 7, 7) for task in TASKS})
        found[task_softmax] = seen[0]
    one = torch.ones(1, 4, 7, 7)
    torch.testing.assert_close(found[False].unflatten(1, (4, 3)).sum(dim=2), one)
    torch.testing.assert_close(found[True].unflatten(1, (3, 4)).sum(dim=1), one)


def test_few_channels_are_squeezed_to_one() -> None:
    module = FeaturePropagation(TASKS, 6)
    assert module.se["depth"].squeeze[0].out_features == 1


@pytest.mark.parametrize("propagated", [0, 10])
def test_initial_prediction(propagated: int) -> None:
    outputs = {"semseg": 5, "depth": 1}
    ours = InitialPrediction(outputs, 8, propagated).double().eval()
    theirs = (
        op_by_op.InitialTaskPredictionModule(list(outputs), 8 + propagated, 8, outputs)
        .double()
        .eval()
    )
    perturb(ours)
    theirs.load_state_dict(ours.state_dict())
    features = torch.randn(2, 8, 6, 10, dtype=torch.float64)
    coarse, fine = None, None
    if propagated:
        coarse = {t: torch.randn(2, propagated, 3, 5, dtype=torch.float64) for t in outputs}
        fine = {t: op_by_op.interpolate(x, scale_factor=2) for t, x in coarse.items()}
    refined, logits = ours(features, fine)
    expected = theirs(features, coarse)
    with torch.no_grad():
        inferred = ours(features, fine)
    for task in outputs:
        for found in (refined, inferred[0]):
            torch.testing.assert_close(found[task], expected[f"features_{task}"])
        for found in (logits, inferred[1]):
            torch.testing.assert_close(found[task], expected[task])
