"""The op-by-op modules against the authors' outputs, gradients and running statistics."""

from __future__ import annotations

import pytest
import torch

from xattn_kernels.testing import op_by_op

from . import cases, checks

NAMES = [name for prefix in ("cam", "ctam", "csam_head") for name in cases.names(prefix)]


@pytest.mark.parametrize("name", NAMES)
def test_parity(name: str) -> None:
    case = cases.load(name)
    module = checks.build(case, op_by_op)
    assert list(module.state_dict()) == list(case.shapes)
    checks.compare(case, checks.run(case, module))


@pytest.mark.parametrize("name", [name for name in NAMES if cases.load(name).args["B"] == 1])
def test_stored_gradients_of_one_sample(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has what torch's batch norm makes of them, unless torch no longer misreads them."""
    case = cases.load(name)
    right = checks.run(case, checks.build(case, op_by_op))
    monkeypatch.setattr(op_by_op, "with_plain_gradient", lambda x: x)
    as_torch = checks.run(case, checks.build(case, op_by_op))
    for key, actual in as_torch.items():
        expected = case.find(key)
        assert expected is not None
        if case.error(key, actual, expected) > cases.TOLERANCE:
            assert case.is_misread(key)
            assert case.error(key, actual, right[key]) <= cases.TOLERANCE


@pytest.mark.parametrize("name", cases.names("cam"))
def test_gradient_by_differences(name: str) -> None:
    """Which gradient is that of the loss is beyond doubt, also with one sample."""
    case = cases.load(name)
    gradient = checks.run(case, checks.build(case, op_by_op))["grad.source"]
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0)).double()
    losses = []
    for step in (1e-5, -1e-5):
        named, call = checks.inputs(case)
        named["source"] += step * direction
        with torch.no_grad():
            output = call(checks.build(case, op_by_op))[""]
        losses.append((output * case.tensor("loss_weight", output.shape)).sum())
    slope = (losses[0] - losses[1]) / 2e-5
    assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-6)
