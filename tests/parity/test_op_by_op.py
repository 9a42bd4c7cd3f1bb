"""The op-by-op modules against the authors' outputs, gradients and running statistics."""

from __future__ import annotations

import pytest

from xattn_kernels.testing import op_by_op

from . import cases, checks


@pytest.mark.parametrize("name", cases.names("cam"))
def test_cross_attention(name: str) -> None:
    case = cases.load(name)
    checks.cross_attention(case, op_by_op.CrossAttention(case.args["C"]))


@pytest.mark.parametrize("name", cases.names("ctam"))
def test_cross_task_attention(name: str) -> None:
    case = cases.load(name)
    tasks = cases.TASKS[: case.args["nt"]]
    checks.cross_task_attention(case, op_by_op.CrossTaskAttention(tasks, case.args["C"]))


@pytest.mark.parametrize("name", cases.names("csam_head"))
def test_cross_scale_head(name: str) -> None:
    case = cases.load(name)
    checks.cross_scale_head(case, op_by_op.CrossScaleHead(cases.HEAD_CHANNELS, case.args["no"]))
