"""The modules against the authors' outputs, gradients and running statistics, on each engine."""

from __future__ import annotations

import pytest
import torch

import xattn_kernels
from xattn_kernels import modules
from xattn_kernels.modules import attend
from xattn_kernels.testing import op_by_op

from . import cases, checks

NAMES = [name for prefix in ("cam", "ctam", "csam_head") for name in cases.names(prefix)]
ENGINES = ("reference", "cpu")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NAMES)
def test_parity(name: str, engine: str) -> None:
    case = cases.load(name)
    with xattn_kernels.backend(engine):
        checks.compare(case, checks.run(case, checks.build(case, modules)))


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NAMES)
def test_each_way(name: str, engine: str, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored and recomputed, however few the tokens are: they are many enough for float64."""
    monkeypatch.setattr(attend, "FEW_TOKENS", 0)
    case = cases.load(name)
    module = checks.build(case, modules)
    for part in module.modules():
        if hasattr(part, "recompute"):
            part.recompute = recompute
    with xattn_kernels.backend(engine):
        checks.compare(case, checks.run(case, module))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", [name for name in NAMES if not cases.load(name).training])
def test_inference(name: str, engine: str) -> None:
    """The folded block and its outputs written in place."""
    case = cases.load(name)
    module = checks.build(case, modules)
    with xattn_kernels.backend(engine), torch.no_grad():
        for key, actual in checks.outputs(case, module).items():
            expected = case.find(key)
            assert expected is not None
            assert case.error(key, actual, expected) <= cases.TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_state_dict(name: str) -> None:
    """Names, shapes and order, so that optimiser states fit too; strict loading both ways."""
    case = cases.load(name)
    ours, theirs = checks.build(case, modules), checks.build(case, op_by_op)
    state = ours.state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == case.shapes
    assert list(state) == list(case.shapes)
    assert [key for key, _ in ours.named_parameters()] == [
        key for key, _ in theirs.named_parameters()
    ]
    theirs.load_state_dict(state, strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
