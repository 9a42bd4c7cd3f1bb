"""The CPU kernels on every instruction set they are compiled for, not only on the best."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import xattn_kernels as xk
from xattn_kernels.engines import native
from xattn_kernels.testing.cases import CASES, DTYPES, Case

from . import test_accuracy, test_block, test_exact
from .harness import Core

NAMES = ["portable", "avx2", "avx512", "avx512_bf16"]


@pytest.fixture(params=NAMES)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set, in use during the test."""
    core = native.core()
    info = core.cpu_info()
    assert set(info["available"]) <= set(info["compiled"]) <= set(NAMES)
    if request.param not in info["available"]:
        pytest.skip(f"this CPU has no {request.param}")
    core.set_isa(request.param)
    assert core.cpu_info()["isa"] == request.param
    with xk.backend("cpu"):
        yield request.param
    core.set_isa(info["isa"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cores(isa: str, core: Core, case: Case, dtype: torch.dtype) -> None:
    test_accuracy.judge(core, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", test_block.BLOCKS, ids=lambda block: block.name)
def test_blocks(isa: str, block: test_block.Block, dtype: torch.dtype) -> None:
    test_block.judge(block, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_results(isa: str, dtype: torch.dtype) -> None:
    test_exact.test_linear(isa, "relu", dtype)
    test_exact.test_softmax(isa, dtype)
    test_exact.test_softmax_of_one_key(isa, dtype)
    test_exact.test_block(isa, dtype)


def test_unknown_instruction_set() -> None:
    before = native.core().cpu_info()["isa"]
    with pytest.raises(ValueError, match="mmx"):
        native.core().set_isa("mmx")
    assert native.core().cpu_info()["isa"] == before


def test_weights_packed_for_another_instruction_set(isa: str) -> None:
    block = test_block.TASKS
    features, weight, bias = block.tensors(torch.float32)
    packed = xk.pack_block_weights(weight, bias)
    expected = test_block.run(features, weight, bias, block.schedule)
    for other in native.core().cpu_info()["available"]:
        native.core().set_isa(other)
        outputs, refusal = expected, "packed"  # some share a layout, the others say so
        try:
            outputs = test_block.run(features, weight, bias, block.schedule, packed=packed)
        except (RuntimeError, ValueError) as error:
            refusal = str(error)
        assert "packed" in refusal
        for x, y in zip(outputs, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    native.core().set_isa(isa)
