"""What the operators share in Triton's interpreter: pieces, layouts, tables, feature maps."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from xattn_kernels.engines.triton import maths, runtime, table_kernel
from xattn_kernels.engines.triton.runtime import Table, layout, pieces
from xattn_kernels.testing.cases import LAYOUTS
from xattn_kernels.testing.compositions import feature_map as expected_map


@triton.jit
def _map_kernel(x, y, slope, N: tl.constexpr, PHI: tl.constexpr, EXACT: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x + i)
    tl.store(y + i, maths.feature_map(value, PHI, EXACT))
    tl.store(slope + i, maths.feature_map_slope(value, PHI, EXACT))


@triton.jit
def _round_kernel(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, maths.to_tf32(tl.load(x + i)))


@triton.jit
def _complete_kernel(
    table, template, length,
    a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15,
    a16, a17, a18, a19, a20, a21, a22, a23, a24, a25, a26, a27, a28, a29, a30, a31,
):  # fmt: skip
    table_kernel.complete_table(
        table, template, length,
        a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15,
        a16, a17, a18, a19, a20, a21, a22, a23, a24, a25, a26, a27, a28, a29, a30, a31,
    )  # fmt: skip


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", ["softplus", "relu", "elu", "identity"])
def test_feature_maps(name: str, exact: bool) -> None:
    special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), float("-inf"), 1e38, -1e38])
    x = torch.cat([torch.linspace(-100, 60, 1017), special])
    y, slope = torch.empty_like(x), torch.empty_like(x)
    _map_kernel[(1,)](x, y, slope, N=1024, PHI=name, EXACT=exact)
    leaf = x.double().requires_grad_()
    expected = expected_map(leaf, name)
    expected.sum().backward()
    tolerance = 1e-6 if exact else 3e-5
    torch.testing.assert_close(
        y.double(), expected.detach(), rtol=tolerance, atol=1e-37, equal_nan=True
    )
    finite = ~x.isnan()  # a gradient of NaN is anything
    assert leaf.grad is not None
    torch.testing.assert_close(
        slope.double()[finite], leaf.grad[finite], rtol=tolerance, atol=1e-37
    )


def test_rounding_to_tf32() -> None:
    x = torch.cat(
        [
            torch.randn(1020) * torch.logspace(-30, 30, 1020),
            torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0]),
        ]
    )
    x.view(torch.int32)[-2] = 0x7FFFFFFF  # the NaN of a GPU
    y = torch.empty_like(x)
    _round_kernel[(1,)](x, y, N=1024)
    finite = x.isfinite()
    assert (y.view(torch.int32)[finite] & 0x1FFF == 0).all()
    assert ((y - x).abs()[finite] <= x.abs()[finite] * 2.0**-11).all()
    assert torch.equal(y[-4:-2], x[-4:-2])
    assert y[-2].isnan()


def test_pieces() -> None:
    expected = {1: (16, 0), 16: (16, 0), 17: (32, 0), 33: (32, 16), 36: (32, 16), 48: (32, 16)}
    expected |= {49: (64, 0), 72: (64, 16), 144: (128, 16), 288: (256, 32), 384: (256, 128)}
    for width, parts in expected.items():
        assert pieces(width) == parts
    for width in range(1, 385):
        first, second = pieces(width)
        assert width <= first + second < 2 * max(width, 16)


def test_layouts() -> None:
    x = torch.empty(2, 24, 40, dtype=torch.float16)
    assert layout([x, None]) == ("n", 8, False)
    assert layout([x, LAYOUTS["token_major"](x)]) == ("", 1, False)
    assert layout([LAYOUTS["token_major"](x)]) == ("c", 8, False)
    assert layout([x[:, :, :36]]).vector == 4
    assert layout([x[:, 1:, 2:]]).vector == 2
    assert layout([torch.empty(2, 3, 35)]).vector == 1
    assert layout([torch.empty(1, device="meta").as_strided((2, 24, 40), (9, 2**27, 1))]).wide
    assert layout([x[:, :, :0]]) == ("n", 1, False)


def test_table() -> None:
    table = Table()
    x = torch.empty(2, 3, 4)
    assert table.add_slots([x, None]) == 0
    assert table.add_lists([[7], [], [8, 9]]) == 2 * runtime.ROW
    values = table.on(x.device).tolist()
    assert values[:5] == [x.data_ptr(), 12, 4, 1, 4]
    assert values[5:10] == [0] * 5
    assert values[10:] == [4, 5, 5, 7, 7, 8, 9]


def test_table_written_by_a_kernel() -> None:
    # None from 2^31 to 2^32, which the interpreter takes for unsigned.
    values = [(-1) ** i * (7**i % 2**60) for i in range(150)]
    table = runtime._write(values, torch.device("cpu"))
    assert table.tolist()[:150] == values
    assert not table[150:].any()


def test_table_completed_by_a_kernel() -> None:
    """What changes from call to call are arguments, one for every memory; the rest is the same."""

    def make() -> tuple[Table, list[torch.Tensor | None]]:
        buffer = torch.empty(2, 40, 30)
        slots = [*(torch.empty(2, 3, 4 + i) for i in range(31)), None, *buffer.split(10, 1)]
        table = Table()
        table.add([2**40, 3, 0])
        table.add_slots(slots)
        table.add_lists([[7], [], [8, 9]])
        return table, slots

    (table, slots), (other, _) = make(), make()
    found, same = (x.by_kernel(torch.device("cpu"), runs=True) for x in (table, other))
    assert torch.equal(found[1], same[1])
    assert found[2] == len(table.values)
    assert found[3:] != same[3:]
    assert found[34] == slots[-1].untyped_storage().data_ptr()  # type: ignore[union-attr]
    assert found.table.tolist() != table.values
    _complete_kernel[(2,)](*found)
    assert found.table.tolist() == table.values


def test_tables_that_no_kernel_completes() -> None:
    many, few = Table(), Table()
    slots = [torch.empty(1, 1, 1) for _ in range(33)]
    many.add_slots(slots)
    few.add_slots(slots[:32])
    device = torch.device("cpu")
    for table, runs in ((many, True), (few, False)):
        found = table.by_kernel(device, runs)
        assert found.table.tolist() == table.values
        assert found[2] == 0
        _complete_kernel[(1,)](*found)
        assert found.table.tolist() == table.values
    assert few.by_kernel(device, runs=True)[2] == 32 * runtime.ROW
