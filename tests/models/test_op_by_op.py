"""The network composed op by op against the authors' outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from parity import cases
from torch import nn

from xattn_models import op_by_op

OUTPUTS = {"semseg": 40, "depth": 1, "normals": 3, "edge": 1, "sal": 1}
NETWORK_TOLERANCE = 1e-6


def load(module: nn.Module, case: cases.Case) -> nn.Module:
    """`module` in eval mode and float64 with the case's parameters; what is computed stays."""
    state = case.parameters()
    for name, value in module.state_dict().items():
        if name.endswith("relative_position_index"):
            state[name] = value
        elif name.endswith("relative_position_bias_table"):
            state[name] = cases._uniform(case.args["seed"], name, value.shape, -0.5, 0.5)
    module.double().load_state_dict(state, strict=True)
    return module.eval()


def network(case: cases.Case) -> op_by_op.SCAMTL:
    tasks = cases.TASKS[: case.args["nt"]]
    return op_by_op.SCAMTL(tasks, {task: OUTPUTS[task] for task in tasks})


@pytest.mark.parametrize("name", ["network_0", "network_1"])
def test_network(name: str) -> None:
    case = cases.load(name)
    model = load(network(case), case)
    state = model.state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == case.shapes
    assert list(state) == list(case.shapes)
    with torch.no_grad():
        found = model(case.tensor("image", (case.args["B"], 3, *case.args["hw"])))
    deep = found.pop("deep_supervision")
    results = {f"output.{task}": y for task, y in found.items()}
    results |= {f"deep.{s}.{task}": x[task] for s, x in deep.items() for task in model.tasks}
    assert set(results) == set(case.expected)
    for key, expected in case.expected.items():
        assert case.error(key, results[key].float(), expected) <= NETWORK_TOLERANCE, key


@pytest.mark.parametrize("name", ["att_0", "att_1"])
def test_window_attention(name: str) -> None:
    case = cases.load(name)
    module = load(op_by_op.SwinTransformer(case.args["C"]), case)
    x = case.tensor("x", (case.args["B"], case.args["C"], *case.args["hw"])).requires_grad_()
    [output] = module(x)
    output.backward(case.tensor("loss_weight", output.shape))
    for key, actual in (("output", output.detach()), ("grad.x", x.grad)):
        assert case.error(key, actual, case.expected[key]) <= cases.TOLERANCE, key


def test_propagation() -> None:
    case = cases.load("fpma_0")
    tasks = cases.TASKS[: case.args["nt"]]
    module = load(op_by_op.FPM(tasks, case.args["C"]), case)
    shape = (case.args["B"], case.args["C"], *case.args["hw"])
    features = {task: case.tensor(task, shape).requires_grad_() for task in tasks}
    outputs = module(features)
    loss = sum((outputs[t] * case.tensor(f"loss_weight_{t}", shape)).sum() for t in tasks)
    loss.backward()
    for task in tasks:
        for key, actual in (("output", outputs[task].detach()), ("grad", features[task].grad)):
            expected = case.expected[f"{key}.{task}"]
            assert case.error(key, actual, expected) <= cases.TOLERANCE, (key, task)
