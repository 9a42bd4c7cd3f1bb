"""Empty, huge and not-finite: what must happen at the edges of a problem."""

from __future__ import annotations

import mmap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import xattn_kernels as xk
from xattn_kernels.schedule import Schedule
from xattn_kernels.testing import compare
from xattn_kernels.testing.cases import CASES, DTYPES, single

from .harness import Core, flat, split, with_gradients

MIXED = next(case for case in CASES if case.name == "mixed")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "tokens"), [(0, 5), (2, 0)])
def test_no_batch_or_no_queries(
    engine: str, core: Core, batch: int, tokens: int, dtype: torch.dtype
) -> None:
    case = single("empty", tokens, 6, batch=batch)
    inputs = flat(case.tensors(dtype))
    results, grads = with_gradients(lambda slots: core.library(slots, case), inputs, case, dtype)
    assert results[0].shape == (batch, 8, tokens)
    outputs = [x.clone().requires_grad_() for x in inputs]
    core.function(*outputs).sum().backward()
    for x, grad in zip(outputs, grads, strict=True):
        assert x.grad is not None
        assert x.grad.shape == x.shape
        assert not x.grad.any()
        assert grad is not None
        assert grad.shape == x.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_keys(engine: str, core: Core, dtype: torch.dtype) -> None:
    case = single("no keys", 7, 0, value_channels=5)
    inputs = flat(case.tensors(dtype))
    results, grads = with_gradients(lambda slots: core.library(slots, case), inputs, case, dtype)
    assert not results[0].any()
    if core.name == "softmax":
        assert torch.equal(results[1], torch.full_like(results[1], float("-inf")))
    else:
        assert not results[1].any()
        assert not results[2].any()
    for grad, x in zip(grads, inputs, strict=True):
        assert grad is not None
        assert grad.shape == x.shape
        assert not grad.any()


def test_empty_source_beside_others(engine: str, core: Core) -> None:
    # Source 1 is read by output 0, jointly with others, and alone by output 2.
    case = replace(MIXED, source_tokens=(25, 0, 15))
    inputs = flat(case.tensors(torch.float32))
    results, grads = with_gradients(
        lambda slots: core.library(slots, case), inputs, case, torch.float32
    )
    assert not results[2].any()
    without = replace(
        case,
        schedule=Schedule.from_edges(
            [e for e in case.schedule.edges if e.source != 1],
            num_queries=3,
            num_sources=3,
            allow_self=True,
        ),
    )
    expected = core.library(split(inputs, without), without)
    assert torch.equal(results[0], expected[0])
    assert torch.equal(results[1], expected[1])
    grad = grads[4]
    assert grad is not None
    assert grad.shape == (2, 7, 0)


def test_not_a_number_in_one_key(engine: str, core: Core) -> None:
    case = CASES[[case.name for case in CASES].index("cross_task_ragged")]
    query, key, value = case.tensors(torch.float32)
    clean = core.library((query, key, value), case)
    key[1][1, 3, 4] = float("nan")
    dirty = core.library((query, key, value), case)
    for x, y, edge in zip(dirty, clean, case.schedule.edges, strict=False):
        assert torch.equal(x[0], y[0])
        if edge.source == 1:
            assert x[1].isnan().all()
        else:
            assert torch.equal(x[1], y[1])


def test_not_a_number_in_one_query(engine: str, core: Core) -> None:
    case = single("nan", 70, 30)
    query, key, value = (x[0] for x in case.tensors(torch.float32))
    clean = core.function(query, key, value)
    query[0, 2, 66] = float("nan")
    dirty = core.function(query, key, value)
    assert dirty[0, :, 66].isnan().all()
    dirty[0, :, 66] = clean[0, :, 66]
    assert torch.equal(dirty, clean)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [300.0, 1e-3])
def test_magnitudes(engine: str, core: Core, scale: float, dtype: torch.dtype) -> None:
    # Scores of up to 1e6 in the softmax; denominators of up to 1e7 in the linear core.
    case = single("magnitude", 40, 50, channels=12)
    query, key, value = case.tensors(dtype)
    inputs = [query[0] * scale, key[0] * scale, value[0]]
    with torch.no_grad():
        truths = compare.truths(
            lambda x, _: core.composition(split(x, case), case)[:1], inputs, dtype
        )
        result = core.library(split(inputs, case), case)[0]
    assert result.isfinite().all()
    if core.name == "softmax" and scale > 1:
        # The largest score takes all; which one that is, rounding of the scores may decide.
        truth = truths[0].exact.to(dtype)
        wrong = ((result - truth).abs().amax(dim=1) > 0.05).sum()
        assert wrong <= 1
    else:
        compare.check("output", result, truths[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_very_negative_scores(engine: str, dtype: torch.dtype) -> None:
    # Scores from -9e4 to -8e4: only their differences count.
    query = torch.full((1, 4, 3), 300.0, dtype=dtype)
    steps = torch.tensor([0.0, -1 / 64, -1 / 32])
    key = (torch.full((1, 4, 3), -70.0) + steps).to(torch.float32)
    value = torch.eye(3).expand(1, 3, 3).to(dtype)
    inputs = [query, key.to(dtype), value]
    exact = xk.testing.compositions.softmax_cross_attention(
        *[[x.double()] for x in inputs], Schedule.identity(1), scale=1.0
    )[0][0]
    output = xk.softmax_cross_attention(*inputs, scale=1.0)
    torch.testing.assert_close(output, exact.to(dtype), rtol=2e-2, atol=1e-3)


def test_large_batch(engine: str, core: Core) -> None:
    batch = 70_000
    query, key, value = (torch.randn(batch, 2, n) for n in (1, 2, 2))
    output = core.function(query, key, value)
    expected = core.function(query[-3:], key[-3:], value[-3:])
    torch.testing.assert_close(output[-3:], expected)


def test_many_edges(engine: str, core: Core) -> None:
    edges = 70_000
    case = replace(
        single("edges", 2, 3, channels=2, batch=1),
        schedule=Schedule.from_edges([(0, 0, i, 0) for i in range(edges)], allow_self=True),
    )
    results = core.library(case.tensors(torch.float32), case)
    assert torch.equal(results[edges - 1], results[0])
    assert len(results) > edges


@pytest.mark.parametrize("stride", ["batch", "channel", "token"])
def test_offsets_beyond_32_bits(engine: str, core: Core, stride: str, tmp_path: Path) -> None:
    """Elements 2^31 apart, in a file with holes that takes a few pages of disk."""
    shape = (2, 3, 4)
    step = (2**31 + 8) // {"batch": 1, "channel": 2, "token": 3}[stride]
    small = {"batch": (step, 4, 1), "channel": (4, step, 1), "token": (12, 4, step)}[stride]
    path = tmp_path / "memory"
    with path.open("wb") as file:
        file.truncate(4 * (2 * 2**31 + 4096))
    with path.open("r+b") as file:
        memory = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.float32)
    inputs = [torch.randn(shape) for _ in range(3)]
    far = []
    for i, x in enumerate(inputs):
        view = memory.as_strided(shape, small, 64 * i)
        view.copy_(x)
        far.append(view)
    assert torch.equal(core.function(*far), core.function(*inputs))
    # Written to, beyond 2^31 as well, where the caller gives the memory.
    weight, bias = torch.randn(1, 5, 3, 3), torch.randn(1, 5, 3)
    schedule = Schedule.from_edges([(0, 1, 0, 0)], num_queries=2)
    out = memory.as_strided(shape, small, 1024)
    with torch.no_grad():
        xk.cross_attention_block(inputs[:2], weight, bias, schedule, out=[out])
        expected = xk.cross_attention_block(inputs[:2], weight, bias, schedule)
    assert torch.equal(out, expected[0])
