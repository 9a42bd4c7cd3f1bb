"""The cross-attention block on the host against float64."""

from __future__ import annotations

import mmap
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import xattn_kernels as xk
from xattn_kernels.modules import CrossTaskAttention
from xattn_kernels.schedule import Schedule
from xattn_kernels.testing import compare, compositions
from xattn_kernels.testing.cases import LAYOUTS

#: Linux's MAP_NORESERVE, which Python has from 3.13 on.
NORESERVE = 0x4000

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: What every bfloat16 kernel is for, and widths between these.
WIDTHS = (1, 6, 17, 18, 24, 25, 36, 40, 41, 48, 50, 72, 75, 96, 100, 144, 150, 192, 288, 300, 384)


@dataclass(frozen=True)
class Block:
    """Sizes of a block problem."""

    name: str
    schedule: Schedule
    tokens: tuple[int, ...]
    channels: int = 18
    batch: int = 2

    def tensors(self, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
        """Features of every slot, weight (W, 5, C, C) and bias (W, 5, C)."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        features = [draw(self.batch, self.channels, n).to(dtype) for n in self.tokens]
        sets, c = self.schedule.num_weights, self.channels
        weight = draw(sets, 5, c, c) * (2 / c) ** 0.5
        return features, weight.to(dtype), draw(sets, 5, c).to(dtype)


ONE = Schedule.from_edges([(0, 1, 0, 0)], num_queries=2)
TASKS = Block("cross_task", Schedule.cross_task(3), (40, 40, 40))
#: Outputs 0 and 1 share query and weights, 0 and 2 a source with its weights.
SHARED = Schedule.from_edges(
    [(0, 1, 0, 0), (0, 2, 1, 0), (2, 1, 2, 0), (2, 0, 2, 0), (1, 0, 3, 1)],
    num_queries=3,
    num_weights=2,
)
BLOCKS = [
    TASKS,
    Block("cross_scale", Schedule.cross_scale(4), (80, 20, 5, 1)),
    Block("auxiliary", Schedule.cross_task(2, 1), (33, 40, 50), channels=12),
    Block("joint", Schedule.all_pairs(3, 1), (20, 30, 40), channels=9),
    Block("shared", SHARED, (20, 30, 40), channels=20),
    Block("chunks", Schedule.cross_task(2), (300, 600), channels=5, batch=1),
    Block("one_channel", Schedule.cross_task(2), (5, 7), channels=1),
    Block("empty_source", Schedule.cross_task(3), (20, 0, 10), channels=8),
    Block("empty_sources", ONE, (20, 0), channels=8),
    Block("empty_batch", Schedule.cross_task(2), (20, 10), channels=8, batch=0),
]


def run(features: list[Tensor], weight: Tensor, bias: Tensor, *args: Any, **kw: Any) -> Any:
    with torch.no_grad():
        return xk.cross_attention_block(features, weight, bias, *args, **kw)


def judge(block: Block, dtype: torch.dtype, layout: Any = Tensor.contiguous) -> None:
    features, weight, bias = block.tensors(dtype)
    features = [layout(x) for x in features]
    inputs = [*features, weight, bias]
    kept = [x.clone() for x in inputs]
    outputs = run(features, weight, bias, block.schedule)

    def evaluate(x: Any, order: int) -> list[Tensor]:
        *slots, w, b = x
        shuffled = slots
        if order:  # tokens of sources, not of queries, may come in another order
            generator = torch.Generator().manual_seed(order)
            index = [torch.randperm(y.shape[2], generator=generator) for y in slots]
            shuffled = [y[:, :, i] for y, i in zip(slots, index, strict=True)]
        edges = [(e.query, e.source + len(slots), e.output, e.weight) for e in block.schedule.edges]
        schedule = Schedule.from_edges(edges, num_weights=block.schedule.num_weights)
        return compositions.cross_attention_block([*slots, *shuffled], w, b, schedule)

    with torch.no_grad():
        truths = compare.truths(evaluate, inputs, dtype)
    for i, (output, truth) in enumerate(zip(outputs, truths, strict=True)):
        assert output.dtype is dtype
        compare.check(f"output {i}", output, truth)
    assert all(map(torch.equal, inputs, kept)), "inputs changed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_cases(block: Block, dtype: torch.dtype) -> None:
    judge(block, dtype)


@pytest.mark.parametrize("channels", WIDTHS)
def test_widths(channels: int) -> None:
    judge(Block("width", ONE, (37, 45), channels=channels, batch=1), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [17, 72, 384])
def test_widths_of_float(channels: int, dtype: torch.dtype) -> None:
    judge(Block("width", ONE, (9, 37), channels=channels, batch=1), dtype)


def test_tf32() -> None:
    block = Block("tf32", ONE, (20, 30), channels=36)
    features, weight, bias = block.tensors(torch.float32)
    exact = run(features, weight, bias, ONE)
    kept = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        rough = run(features, weight, bias, ONE)
    finally:
        torch.backends.cuda.matmul.fp32_precision = kept
    error = (rough[0] - exact[0]).norm() / exact[0].norm()
    assert 1e-6 < error < 1e-3


@pytest.mark.parametrize("channels", [18, 36, 45, 72, 90, 144, 160, 288, 330])
@pytest.mark.parametrize("layout", ["contiguous", "token_major"])
def test_many_tiles(twin: Any, channels: int, layout: str) -> None:
    """Every bfloat16 instance with several tiles a work, the last one not full."""
    twin.twin_configure(seed=channels, processors=1)
    tokens = (500, 610) if channels < 100 else (150, 270)
    block = Block("tiles", ONE, tokens, channels=channels, batch=1)
    judge(block, torch.bfloat16, LAYOUTS[layout])


def launches(twin: Any) -> list[str]:
    return [launch[0] for launch in twin.twin_launches()]


@pytest.mark.parametrize("kilobytes", [99, 163])
@pytest.mark.parametrize("channels", [36, 72, 96, 144, 288, 384])
def test_less_shared_memory(twin: Any, channels: int, kilobytes: int) -> None:
    """What cards have that are not of the data centre, and 8.0."""
    twin.twin_configure(seed=1, processors=2, shared_bytes=kilobytes * 1024)
    judge(Block("small", ONE, (150, 170), channels=channels, batch=1), torch.bfloat16)
    fused = channels <= 48 or (channels <= 96 and kilobytes == 163)
    assert ("block_sources" in launches(twin)) == (fused and (channels, kilobytes) != (96, 163))
    twin.twin_configure(seed=1, processors=2, shared_bytes=kilobytes * 1024)
    judge(Block("small", ONE, (20, 10), channels=channels, batch=1), torch.float32)


def test_three_launches(twin: Any) -> None:
    features, weight, bias = TASKS.tensors(torch.bfloat16)
    run(features, weight, bias, TASKS.schedule)
    assert launches(twin) == ["block_sources", "block_states", "block_targets"]


#: Source and target, and sums of 37, 73 and 145 rows, the last of them in a kernel of its own.
PRODUCTS = [(36, 102 + 30 + 96), (72, 290 + 90 + 280), (144, 3 * 324 + 360 + 3 * 324)]


@pytest.mark.parametrize(("channels", "products"), PRODUCTS)
def test_products_are_of_the_exact_width(twin: Any, channels: int, products: int) -> None:
    """Of 16 x 8 x 16, for each 32 tokens: no power of two in sight."""
    tokens = 256
    block = Block("count", ONE, (tokens, tokens), channels=channels, batch=1)
    run(*block.tensors(torch.bfloat16), ONE)
    assert sum(launch["products"] for launch in twin.twin_counts()) == products * tokens // 32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [18, 36, 100])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_features(layout: str, channels: int, dtype: torch.dtype) -> None:
    block = Block("layout", Schedule.cross_task(2), (37, 40), channels=channels)
    features, weight, bias = block.tensors(dtype)
    expected = run(features, weight, bias, block.schedule)
    views = [LAYOUTS[layout](x) for x in features]
    outputs = run(views, weight, bias, block.schedule)
    assert all(map(torch.equal, outputs, expected))
    for x, edge in zip(outputs, block.schedule.edges, strict=True):
        assert (x.stride(1) == 1) == (views[edge.query].stride(1) == 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["planes", "channels_last", "odd", "mixed"])
def test_outputs_in_slices_of_a_buffer(layout: str, dtype: torch.dtype) -> None:
    """Every output in its place among NaN, which stays where nothing is to be written."""
    features, weight, bias = TASKS.tensors(dtype)
    images = [x.unflatten(2, (5, 8)) for x in features]
    expected = run(images, weight, bias, TASKS.schedule)
    width = 18
    flat = torch.full((2 * 13 * width * 40 + 1,), float("nan"), dtype=dtype)
    buffer = flat[1:] if layout == "odd" else flat[:-1]
    buffer = buffer.view(2, 13 * width, 5, 8)
    if layout == "channels_last":
        buffer = buffer.to(memory_format=torch.channels_last)
    slices = [buffer[:, (2 * i + 1) * width : (2 * i + 2) * width] for i in range(6)]
    if layout == "mixed":
        slices[1::2] = [x.to(memory_format=torch.channels_last) for x in slices[1::2]]
    outputs = run(images, weight, bias, TASKS.schedule, out=slices)
    assert all(x is y for x, y in zip(outputs, slices, strict=True))
    assert all(map(torch.equal, outputs, expected))
    gaps = [buffer[:, 2 * i * width : (2 * i + 1) * width] for i in range(7)]
    assert all(bool(gap.isnan().all()) for gap in gaps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_weights(dtype: torch.dtype) -> None:
    features, weight, bias = TASKS.tensors(dtype)
    expected = run(features, weight, bias, TASKS.schedule)
    packed = xk.pack_block_weights(weight, bias)
    again = run(features, weight, bias, TASKS.schedule, packed=packed)
    assert all(map(torch.equal, again, expected))
    odd = torch.cat([packed.new_zeros(1), packed])[1:]
    again = run(features, weight, bias, TASKS.schedule, packed=odd)
    assert all(map(torch.equal, again, expected))
    if dtype is not torch.float32:  # weights of 16-bit features may stay in float32
        weight, bias = weight.float(), bias.float()
        packed = xk.pack_block_weights(weight, bias, dtype)
        again = run(features, weight, bias, TASKS.schedule, packed=packed)
        assert all(map(torch.equal, again, expected))
    for wrong in (xk.pack_block_weights(weight[:5], bias[:5]), torch.zeros(17)):
        with pytest.raises(ValueError, match="packed"):
            run(features, weight, bias, TASKS.schedule, packed=wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_edge_more_changes_no_other(dtype: torch.dtype) -> None:
    features, weight, bias = TASKS.tensors(dtype)
    expected = run(features, weight, bias, TASKS.schedule)
    edges = [edge for edge in TASKS.schedule.edges if edge.output != 5]
    schedule = Schedule.from_edges(edges, num_queries=3, num_weights=6)
    outputs = run(features, weight, bias, schedule)
    assert all(map(torch.equal, outputs, expected[:5]))


@pytest.mark.parametrize("channels", [18, 72, 144])
def test_many_outputs_of_a_query(channels: int) -> None:
    """More than shared memory has room for, and lists that are longer than a parameter."""
    edges = [(0, 1 + i % 2, i, 0) for i in range(40)]
    schedule = Schedule.from_edges(edges, num_queries=3)
    block = Block("outputs", schedule, (21, 20, 30), channels=channels, batch=1)
    features, weight, bias = block.tensors(torch.bfloat16)
    outputs = run(features, weight, bias, schedule)
    expected = run(features, weight, bias, Schedule.from_edges(edges[:2], num_queries=3))
    for i, x in enumerate(outputs):
        assert torch.equal(x, expected[i % 2])


@pytest.mark.parametrize("channels", [18, 48, 72, 96, 144])
def test_repeatable(twin: Any, channels: int) -> None:
    block = Block("repeat", Schedule.cross_task(2), (100, 130), channels=channels, batch=1)
    arguments = (*block.tensors(torch.bfloat16), block.schedule)
    found = []
    for seed in range(3):
        twin.twin_configure(seed=seed, processors=2)
        found.append(run(*arguments))
    assert all(
        torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [18, 48, 72])
def test_not_a_number_in_one_source(channels: int, dtype: torch.dtype) -> None:
    block = replace(TASKS, channels=channels)
    features, weight, bias = block.tensors(dtype)
    clean = run(features, weight, bias, block.schedule)
    features[1][1, 3, 4] = float("nan")
    dirty = run(features, weight, bias, block.schedule)
    for x, y, edge in zip(dirty, clean, block.schedule.edges, strict=True):
        assert torch.equal(x[0], y[0])
        if edge.source == 1:
            assert x[1].isnan().all()
        elif edge.query == 1:
            assert x[1, :, 4].isnan().all()
            assert torch.equal(x[1, :, 5:], y[1, :, 5:])
        else:
            assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf")])
@pytest.mark.parametrize("channels", [1, 2, 17])
def test_infinities(channels: int, bad: float, dtype: torch.dtype) -> None:
    """With few channels they may end as numbers: padding must not make NaN of them."""
    block = Block("infinity", Schedule.cross_task(2), (5, 6), channels=channels)
    for seed in range(4):
        features, weight, bias = block.tensors(dtype)
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(weight.shape, generator=generator).to(dtype)
        features[seed % 2][0, 0, 2] = bad
        outputs = run(features, weight, bias, block.schedule)
        with xk.backend("reference"):
            expected = run(features, weight, bias, block.schedule)
        for x, y in zip(outputs, expected, strict=True):
            assert torch.equal(x.isfinite(), y.isfinite())
            assert torch.equal(x.isnan(), y.isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_module(dtype: torch.dtype) -> None:
    """CTAM with this engine below it, in inference."""
    torch.manual_seed(0)
    module = CrossTaskAttention(["a", "b", "c"], 12).eval().to(dtype)
    features = {task: torch.randn(2, 12, 4, 7).to(dtype) for task in "abc"}
    with torch.no_grad():
        outputs = module(features)
        with xk.backend("reference"):
            expected = module(features)
    tolerance = 1e-5 if dtype is torch.float32 else 4 * torch.finfo(dtype).eps
    for task in "abc":
        torch.testing.assert_close(outputs[task], expected[task], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [12, 72, 144])
def test_large_values(channels: int, dtype: torch.dtype) -> None:
    """And biases beside which others vanish, which keep their digits where they are folded."""
    block = Block("large", Schedule.cross_task(2), (40, 30), channels=channels)
    features, weight, bias = block.tensors(dtype)
    features = [x * 100 for x in features]
    bias = bias.float() * 100.3
    outputs = run(features, weight.float(), bias, block.schedule)
    assert all(x.isfinite().all() for x in outputs)
    with xk.backend("reference"):
        expected = run(features, weight.float(), bias, block.schedule)
    rtol = 4e-3 if dtype is torch.float16 else 2e-2
    for x, y in zip(outputs, expected, strict=True):
        atol = rtol / 4 * y.abs().max().item()
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", ["batch", "channel", "token"])
def test_offsets_beyond_32_bits(stride: str, dtype: torch.dtype) -> None:
    """Elements 2^31 apart, in memory of which a few pages are ever touched."""
    shape = (2, 3, 4)
    step = (2**31 + 8) // {"batch": 1, "channel": 2, "token": 3}[stride]
    strides = {"batch": (step, 4, 1), "channel": (4, step, 1), "token": (12, 4, step)}[stride]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    memory = mmap.mmap(-1, dtype.itemsize * (2 * 2**31 + 4096), flags=flags)
    numbers = torch.frombuffer(memory, dtype=dtype)
    block = Block("far", ONE, (4, 4), channels=3)
    features, weight, bias = block.tensors(dtype)
    expected = run(features, weight, bias, ONE)
    far = [numbers.as_strided(shape, strides, 64 * i) for i in range(3)]
    for x, y in zip(far, features, strict=False):
        x.copy_(y)
    outputs = run(far[:2], weight, bias, ONE, out=[far[2]])
    assert torch.equal(outputs[0], expected[0])
