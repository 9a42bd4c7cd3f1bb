"""The network and its parts against the authors' outputs and gradients, on each engine."""

from __future__ import annotations

import pytest
import torch

import xattn_kernels
from xattn_models import SCAMTL, op_by_op, sca_mtl
from xattn_models.propagation import FeaturePropagation
from xattn_models.window_attention import WindowTransformer

from . import cases

ENGINES = ("reference", "cpu")
NETWORKS = cases.names("network")
NETWORK_TOLERANCE = 1e-6
"""The file has float32."""


def network(case: cases.Case) -> SCAMTL:
    model = case.load(sca_mtl(cases.TASKS[: case.args["nt"]]))
    assert isinstance(model, SCAMTL)
    return model


@pytest.mark.parametrize("name", cases.names("att"))
def test_window_attention(name: str) -> None:
    case = cases.load(name)
    module = case.load(WindowTransformer(case.args["C"], heads=6))
    assert list(module.state_dict()) == list(case.shapes)
    x = case.tensor("x", (case.args["B"], case.args["C"], *case.args["hw"])).requires_grad_()
    output = module(x)
    output.backward(case.tensor("loss_weight", output.shape))
    with torch.no_grad():
        inferred = module(x)
    for key, actual in (("output", output.detach()), ("output", inferred), ("grad.x", x.grad)):
        assert case.error(key, actual, case.expected[key]) <= cases.TOLERANCE


@pytest.mark.parametrize("name", cases.names("fpma"))
def test_propagation(name: str) -> None:
    case = cases.load(name)
    tasks, shape = cases.TASKS[: case.args["nt"]], (case.args["B"], case.args["C"])
    module = case.load(FeaturePropagation(tasks, case.args["C"]))
    assert list(module.state_dict()) == list(case.shapes)
    features = {
        task: case.tensor(task, (*shape, *case.args["hw"])).requires_grad_() for task in tasks
    }
    outputs = module(features)
    weights = [case.tensor(f"loss_weight_{task}", outputs[task].shape) for task in tasks]
    torch.autograd.backward([outputs[task] for task in tasks], weights)
    with torch.no_grad():
        inferred = module(features)
    for task in tasks:
        for key, actual in (
            (f"output.{task}", outputs[task].detach()),
            (f"output.{task}", inferred[task]),
            (f"grad.{task}", features[task].grad),
        ):
            assert case.error(key, actual, case.expected[key]) <= cases.TOLERANCE


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
def test_network(name: str, engine: str, grad: bool) -> None:
    """Folded for inference, and layer by layer."""
    case = cases.load(name)
    model = network(case)
    image = case.tensor("image", (case.args["B"], 3, *case.args["hw"]))
    with xattn_kernels.backend(engine), torch.set_grad_enabled(grad):
        outputs = model(image)
    supervised = outputs.pop("deep_supervision")
    actual = {f"output.{task}": x.detach().float() for task, x in outputs.items()}
    for scale, logits in supervised.items():
        actual |= {f"deep.{scale}.{task}": x.detach().float() for task, x in logits.items()}
    assert set(actual) == set(case.expected)
    for key, expected in case.expected.items():
        assert case.error(key, actual[key], expected) <= NETWORK_TOLERANCE


@pytest.mark.parametrize("name", NETWORKS)
def test_state_dict(name: str) -> None:
    """Names, shapes and order, so that optimiser states fit too; strict loading both ways."""
    case = cases.load(name)
    ours = network(case)
    theirs = op_by_op.SCAMTL(ours.tasks, ours.num_outputs)
    state = ours.state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == case.shapes
    assert list(state) == list(case.shapes)
    assert [key for key, _ in ours.named_parameters()] == [
        key for key, _ in theirs.named_parameters()
    ]
    theirs.load_state_dict(state, strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
