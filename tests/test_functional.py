"""What the public functions check before any engine sees it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import xattn_kernels as xk
from xattn_kernels.schedule import Schedule

BOTH = [xk.linear_cross_attention, xk.softmax_cross_attention]
both = pytest.mark.parametrize("function", BOTH, ids=lambda function: function.__name__)
Function = Callable[..., Any]


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape or (2, 4, 6), dtype=dtype)


# Types


@both
@pytest.mark.parametrize(
    "dtype",
    [torch.int32, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn],
    ids=str,
)
def test_other_dtypes(function: Function, dtype: torch.dtype) -> None:
    y = x(dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(TypeError, match=rf"query\[0\]: got a {name} tensor .*expected float32"):
        function(y, y, y)
    with pytest.raises(TypeError, match=rf"key\[0\]: got a {name} tensor"):
        function(x(), y, x())


@both
def test_mixed_dtypes(function: Function) -> None:
    for position, name in enumerate(("query", "key", "value")):
        args = [[x(), x()] for _ in range(3)]
        args[position][1] = x(dtype=torch.float64)
        with pytest.raises(TypeError, match=rf"{name}\[1\]: got a float64 .*expected float32"):
            function(*args)


@both
def test_devices(function: Function) -> None:
    meta = x().to("meta")
    with pytest.raises(ValueError, match=r"query\[0\]: got a float32 .* on meta"):
        function(meta, meta, meta)
    with pytest.raises(ValueError, match=r"value\[0\]: got .*on meta, expected a tensor on cpu"):
        function(x(), x(), meta)


@both
def test_other_layouts(function: Function) -> None:
    with pytest.raises(TypeError, match=r"key\[0\]: got a sparse_coo float32 tensor"):
        function(x(), x().to_sparse(), x())
    with pytest.raises(TypeError, match=r"query\[0\]: got a sparse_coo float32 tensor"):
        function(x().to_sparse(), x(), x())
    with warnings.catch_warnings():  # deprecated, but to be met
        warnings.simplefilter("ignore")
        quantised = torch.quantize_per_tensor(x(), 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match=r"query\[0\]: got a qint8 tensor"):
        function(quantised, quantised, quantised)


@both
def test_not_tensors(function: Function) -> None:
    with pytest.raises(TypeError, match="query: got NoneType, expected a tensor or"):
        function(None, x(), x())
    with pytest.raises(TypeError, match="value: got list"):
        function(x(), x(), [])
    with pytest.raises(TypeError, match="key: got str"):
        function(x(), "key", x())
    with pytest.raises(TypeError, match=r"key\[1\]: got int, expected a Tensor"):
        function([x(), x()], [x(), 3], [x(), x()])


# Shapes


@both
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4, 6), (2, 4, 6), (2, 4, 6)), r"query\[0\]: .*expected shape \(B, C, N\)"),
        (((2, 4, 6), (2, 4, 6, 1, 1), (2, 4, 6)), r"key\[0\]: .*expected shape \(B, C, N\)"),
        (((2, 4, 6), (3, 4, 6), (2, 4, 6)), r"key\[0\]: .*expected batch size 2"),
        (((2, 4, 6), (2, 4, 6), (1, 4, 6)), r"value\[0\]: .*expected batch size 2"),
        (((2, 4, 6), (2, 4, 6), (2, 4, 5)), r"value\[0\]: got 5 tokens, expected 6"),
        (((2, 4, 6), (2, 5, 6), (2, 4, 6)), r"edge 0 .*key of source slot 0 has 5 channels"),
        (((2, 0, 6), (2, 0, 6), (2, 4, 6)), r"query\[0\]: .*at least one channel"),
        (((2, 4, 6), (2, 4, 6), (2, 0, 6)), r"value\[0\]: .*at least one channel"),
    ],
)
def test_shapes(function: Function, shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(*(x(*shape) for shape in shapes))


@both
def test_numbers_of_slots(function: Function) -> None:
    with pytest.raises(ValueError, match="got 2, 1 and 1 slots"):
        function([x(), x()], x(), x())
    schedule = Schedule.cross_task(3)
    with pytest.raises(ValueError, match="value: got 2 slots, the schedule has 3"):
        function([x()] * 3, [x()] * 3, [x()] * 2, schedule)


@both
def test_widths_within_an_output(function: Function) -> None:
    joint = Schedule.from_edges([(0, 1, 0, 0), (0, 2, 0, 0)], num_queries=1)
    narrow = [x(), x(), x(2, 3, 6)]
    with pytest.raises(ValueError, match=r"edge 1 .*value of source slot 2 has 3 channels"):
        function(x(), [x()] * 3, narrow, joint)
    with pytest.raises(ValueError, match=r"edge 1 .*key of source slot 2 has 3 channels"):
        function(x(), narrow, [x()] * 3, joint)


@both
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_widths_may_differ_between_outputs(function: Function, backend: str) -> None:
    torch.manual_seed(0)
    schedule = Schedule.from_edges(
        [(0, 1, 0, 0), (1, 2, 1, 0), (0, 3, 2, 0), (1, 0, 1, 0)], allow_self=True
    )
    queries = [torch.randn(2, c, n, requires_grad=True) for c, n in ((8, 5), (6, 7))]
    keys = [torch.randn(2, c, n, requires_grad=True) for c, n in ((6, 4), (8, 9), (6, 3), (8, 2))]
    values = [torch.randn(2, c, k.shape[2]) for c, k in zip((4, 4, 4, 10), keys, strict=True)]
    with xk.backend(backend):
        outputs = function(queries, keys, values, schedule)
        assert [tuple(y.shape) for y in outputs] == [(2, 4, 5), (2, 4, 7), (2, 10, 5)]
        alone = function(queries[0], keys[3], values[3])
        torch.testing.assert_close(outputs[2], alone)
        # A query of two widths of values has the gradients of both.
        sum(y.sum() for y in outputs).backward()  # type: ignore[union-attr]
        total = queries[0].grad
        apart = [
            torch.autograd.grad(function(queries[0], keys[i], values[i]).sum(), queries[0])[0]
            for i in (1, 3)
        ]
    assert total is not None
    torch.testing.assert_close(total, apart[0] + apart[1])


def test_extras_of_outputs_of_different_widths() -> None:
    queries, keys = [x(2, 4, 3), x(2, 6, 3)], [x(2, 4, 5), x(2, 6, 5)]
    outputs, lse = xk.softmax_cross_attention(queries, keys, keys, heads=2, return_lse=True)
    assert [tuple(y.shape) for y in lse] == [(2, 2, 3)] * 2
    assert [y.shape[1] for y in outputs] == [4, 6]
    with pytest.raises(ValueError, match="different widths have no one state"):
        xk.linear_cross_attention(queries, keys, keys, return_state=True)


# Options


@pytest.mark.parametrize("eps", [0, -1.0, float("nan"), float("inf")])
def test_eps(eps: float) -> None:
    with pytest.raises(ValueError, match="eps: got"):
        xk.linear_cross_attention(x(), x(), x(), eps=eps)


def test_feature_map() -> None:
    with pytest.raises(ValueError, match="feature_map: got 'exp', expected one of"):
        xk.linear_cross_attention(x(), x(), x(), feature_map="exp")


@pytest.mark.parametrize("heads", [0, -1, 2.0, True, "2"])
def test_heads(heads: Any) -> None:
    with pytest.raises(ValueError, match=r"heads: got .*expected a positive integer"):
        xk.softmax_cross_attention(x(), x(), x(), heads=heads)


def test_heads_divide_widths() -> None:
    with pytest.raises(
        ValueError, match="heads: got 3, expected a divisor of the 4 channels of query"
    ):
        xk.softmax_cross_attention(x(), x(), x(), heads=3)
    with pytest.raises(
        ValueError, match="heads: got 4, expected a divisor of the 6 channels of value"
    ):
        xk.softmax_cross_attention(x(), x(), x(2, 6, 6), heads=4)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scale(scale: float) -> None:
    with pytest.raises(ValueError, match="scale: got"):
        xk.softmax_cross_attention(x(), x(), x(), scale=scale)


@pytest.mark.parametrize(
    ("error", "message", "state"),
    [
        (TypeError, "state: got a float32 tensor", x()),
        (TypeError, r"state: got tuple", (x(),)),
        (TypeError, r"state, S: .*float64", (x(1, 2, 4, 4).double(), x(1, 2, 4))),
        (ValueError, r"state, S: .*\(1, 2, 4, 4\)", (x(1, 2, 4, 5), x(1, 2, 4))),
        (ValueError, r"state, Z: .*\(1, 2, 4\)", (x(1, 2, 4, 4), x(2, 2, 4))),
        (ValueError, r"state, Z: .*on cpu", (x(1, 2, 4, 4), x(1, 2, 4).to("meta"))),
        (TypeError, r"state, Z: got NoneType", (x(1, 2, 4, 4), None)),
    ],
)
def test_state(error: type[Exception], message: str, state: Any) -> None:
    with pytest.raises(error, match=message):
        xk.linear_cross_attention(x(), x(), x(), state=state)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_state_of_16_bit_features_is_float32(backend: str) -> None:
    y = torch.randn(2, 4, 6).half()
    with xk.backend(backend):
        _, (s, z) = xk.linear_cross_attention(y, y, y, return_state=True)
        assert (s.dtype, z.dtype) == (torch.float32, torch.float32)
        strided = (s.transpose(2, 3).contiguous().transpose(2, 3), z)
        first = xk.linear_cross_attention(y, y, y, state=(s, z))
        assert torch.equal(first, xk.linear_cross_attention(y, y, y, state=strided))
        with pytest.raises(TypeError, match="state, S"):
            xk.linear_cross_attention(y, y, y, state=(s.half(), z))


# Structure of results


@both
def test_structure_follows_the_arguments(function: Function) -> None:
    y = torch.randn(2, 4, 6)
    assert isinstance(function(y, y, y), Tensor)
    assert isinstance(function([y], [y], [y]), list)
    assert isinstance(function((y,), [y], [y]), list)
    assert isinstance(function(y, [y], [y], Schedule.identity(1)), list)
    assert isinstance(function(y, y, y, Schedule.identity(1)), Tensor)
    twice = Schedule.from_edges([(0, 0, 0, 0), (0, 0, 1, 0)], allow_self=True)
    assert len(function(y, y, y, twice)) == 2
    given = [y, y]
    function(given, given, given)
    assert given[0] is y
    image = torch.randn(2, 4, 2, 3)
    mixed = [image, y]
    assert [z.dim() for z in function(mixed, mixed, mixed)] == [4, 3]
    assert mixed[0] is image


def test_extras() -> None:
    y = torch.randn(2, 4, 2, 3)
    output, lse = xk.softmax_cross_attention(y, y, y, heads=2, return_lse=True)
    assert output.shape == y.shape
    assert lse.shape == (2, 2, 6)
    outputs, lses = xk.softmax_cross_attention([y], [y], [y], return_lse=True)
    assert isinstance(outputs, list)
    assert isinstance(lses, list)
    output, (s, z) = xk.linear_cross_attention(y, y, y, return_state=True)
    assert (output.shape, s.shape, z.shape) == (y.shape, (1, 2, 4, 4), (1, 2, 4))
