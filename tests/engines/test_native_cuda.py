"""Which GPUs the CUDA module has code for, and what is said of the others."""

from __future__ import annotations

import types

import pytest
import torch

from xattn_kernels.engines import native_cuda
from xattn_kernels.problem import Problem


@pytest.mark.parametrize(
    ("compiled", "capability", "found"),
    [
        (["80-real"], 80, True),
        (["80-real"], 89, True),
        (["86-real"], 80, False),
        (["80-real"], 90, False),
        (["90a-real"], 90, True),
        (["90a-real"], 100, False),
        (["80-real", "120"], 90, False),
        (["80-real", "120"], 121, True),
        (["80"], 90, True),
        (["90-virtual"], 100, True),
        (["90-virtual"], 89, False),
        (["100f-real"], 103, False),
        (["native"], 80, True),
        ([], 80, False),
    ],
)
def test_code(compiled: list[str], capability: int, found: bool) -> None:
    assert native_cuda.has_code(compiled, capability) is found


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ((7, 5), "needs compute capability 8.0, not 7.5"),
        ((9, 0), "was built for 80-real, 86-real, not for compute capability 9.0"),
        ((8, 9), None),
    ],
)
def test_refusals(
    capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the GPU that the problem is on."""
    built = types.SimpleNamespace(device_type="cuda", compiled_archs=lambda: ["80-real", "86-real"])
    monkeypatch.setattr(native_cuda, "module", lambda: built)
    capabilities = {0: (6, 0), 1: capability}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    problem = Problem("linear_cross_attention", torch.float32, "cuda", 36, 36, device_index=1)
    found = native_cuda.refusals(problem)
    assert len(found) == (reason is not None)
    assert reason is None or reason in found[0]
