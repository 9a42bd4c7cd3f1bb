"""The cross-attention block: values, packing, outputs in place, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import xattn_kernels as xk
from xattn_kernels.schedule import Schedule
from xattn_kernels.testing import compare, compositions
from xattn_kernels.testing.cases import DTYPES, LAYOUTS


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


TASKS = Block("cross_task", Schedule.cross_task(3), (70, 70, 70))
BLOCKS = [
    TASKS,
    Block("cross_scale", Schedule.cross_scale(4), (80, 20, 5, 1)),
    Block("auxiliary", Schedule.cross_task(2, 1), (33, 40, 50), channels=12),
    Block("joint", Schedule.all_pairs(3, 1), (20, 30, 40), channels=9),
    Block("one_channel", Schedule.cross_task(2), (5, 7), channels=1),
    Block("empty_source", Schedule.cross_task(3), (20, 0, 10), channels=8),
    Block("empty_batch", Schedule.cross_task(2), (20, 10), channels=8, batch=0),
]


def run(features: list[Tensor], weight: Tensor, bias: Tensor, *args: Any, **kw: Any) -> Any:
    with torch.no_grad():
        return xk.cross_attention_block(features, weight, bias, *args, **kw)


def judge(block: Block, dtype: torch.dtype) -> None:
    features, weight, bias = block.tensors(dtype)
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
        both = [*slots, *shuffled]
        edges = [(e.query, e.source + len(slots), e.output, e.weight) for e in block.schedule.edges]
        schedule = Schedule.from_edges(edges, num_weights=block.schedule.num_weights)
        return compositions.cross_attention_block(both, w, b, schedule)

    with torch.no_grad():
        truths = compare.truths(evaluate, inputs, dtype)
    for i, (output, truth) in enumerate(zip(outputs, truths, strict=True)):
        assert output.dtype is dtype
        compare.check(f"output {i}", output, truth)
    assert all(map(torch.equal, inputs, kept)), "inputs changed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_cases(engine: str, block: Block, dtype: torch.dtype) -> None:
    judge(block, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [6, 17, 33, 36, 48, 72, 144, 288])
def test_widths(engine: str, channels: int, dtype: torch.dtype) -> None:
    judge(Block("width", Schedule.cross_task(2), (130, 65), channels=channels, batch=1), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_features(engine: str, layout: str, dtype: torch.dtype) -> None:
    features, weight, bias = TASKS.tensors(dtype)
    expected = run(features, weight, bias, TASKS.schedule)
    views = [LAYOUTS[layout](x) for x in features]
    outputs = run(views, weight, bias, TASKS.schedule)
    for x, y, edge in zip(outputs, expected, TASKS.schedule.edges, strict=True):
        assert (x.stride(1) == 1) == (views[edge.query].stride(1) == 1)
        if engine == "cpu":
            assert torch.equal(x, y)
        else:
            tolerance = 32 * torch.finfo(dtype).eps
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["planes", "channels_last"])
def test_outputs_in_slices_of_a_buffer(engine: str, layout: str, dtype: torch.dtype) -> None:
    """Every output in its place among NaN, which stays where nothing is to be written."""
    features, weight, bias = TASKS.tensors(dtype)
    images = [x.unflatten(2, (7, 10)) for x in features]
    expected = run(images, weight, bias, TASKS.schedule)
    width = 18
    buffer = torch.full((2, 13 * width, 7, 10), float("nan"), dtype=dtype)
    if layout == "channels_last":
        buffer = buffer.to(memory_format=torch.channels_last)
    slices = [buffer[:, (2 * i + 1) * width : (2 * i + 2) * width] for i in range(6)]
    version = buffer._version
    outputs = run(images, weight, bias, TASKS.schedule, out=slices)
    assert buffer._version > version
    for x, y, z in zip(outputs, slices, expected, strict=True):
        assert x is y
        torch.testing.assert_close(x, z, rtol=1e-2 if dtype is torch.bfloat16 else 1e-3, atol=1e-3)
        if engine == "cpu":
            assert torch.equal(x, z)
    gaps = [buffer[:, 2 * i * width : (2 * i + 1) * width] for i in range(7)]
    assert all(bool(gap.isnan().all()) for gap in gaps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_weights(engine: str, dtype: torch.dtype) -> None:
    features, weight, bias = TASKS.tensors(dtype)
    expected = run(features, weight, bias, TASKS.schedule)
    packed = xk.pack_block_weights(weight, bias)
    again = run(features, weight, bias, TASKS.schedule, packed=packed)
    assert all(map(torch.equal, again, expected))
    # Weights of 16-bit features may stay in float32.
    if dtype in (torch.bfloat16, torch.float16):
        weight, bias = weight.float(), bias.float()
        packed = xk.pack_block_weights(weight, bias, dtype)
        assert all(map(torch.equal, run(features, weight, bias, TASKS.schedule), expected))
        again = run(features, weight, bias, TASKS.schedule, packed=packed)
        assert all(map(torch.equal, again, expected))


def test_packed_for_something_else() -> None:
    features, weight, bias = TASKS.tensors(torch.float32)
    with xk.backend("reference"):
        other = xk.pack_block_weights(weight, bias)
    empty = torch.empty(0)
    with xk.backend("cpu"):
        expected = run(features, weight, bias, TASKS.schedule)
        # An empty one stands for none.
        again = run(features, weight, bias, TASKS.schedule, packed=empty)
        assert all(map(torch.equal, again, expected))
        for wrong in (
            xk.pack_block_weights(weight, bias, torch.bfloat16),
            xk.pack_block_weights(weight[:5], bias[:5]),
            torch.zeros(17),
            other,
        ):
            with pytest.raises((ValueError, RuntimeError), match="packed"):
                run(features, weight, bias, TASKS.schedule, packed=wrong)
        with pytest.raises(TypeError, match="weight"):
            xk.pack_block_weights(weight, bias, torch.float64)


@pytest.mark.parametrize("who", ["features", "weight", "bias", "out"])
def test_gradients_are_refused(engine: str, who: str) -> None:
    features, weight, bias = TASKS.tensors(torch.float32)
    out = [torch.empty(2, 18, 70) for _ in range(6)]
    {"features": features[1], "weight": weight, "bias": bias, "out": out[2]}[who].requires_grad_()
    with pytest.raises(RuntimeError, match=rf"{who}.*torch\.no_grad.*modules in train mode"):
        xk.cross_attention_block(features, weight, bias, TASKS.schedule, out=out)
    run(features, weight, bias, TASKS.schedule, out=out)


def test_autocast(engine: str) -> None:
    features, weight, bias = TASKS.tensors(torch.float32)
    lower = [x.bfloat16() for x in features]
    expected = run(lower, weight, bias, TASKS.schedule)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = run(features, weight, bias, TASKS.schedule)
    assert outputs[0].dtype is torch.bfloat16
    assert all(map(torch.equal, outputs, expected))


def test_inference_mode(engine: str) -> None:
    features, weight, bias = TASKS.tensors(torch.float32)
    expected = run(features, weight, bias, TASKS.schedule)
    normal = [torch.empty(2, 18, 70) for _ in range(6)]
    with torch.inference_mode():
        new = run([x.clone() for x in features], weight, bias, TASKS.schedule)
        run(features, weight, bias, TASKS.schedule, out=normal)
    assert all(map(torch.equal, new, expected))
    assert all(map(torch.equal, normal, expected))


def wrong_arguments() -> list[Any]:
    features, weight, bias = TASKS.tensors(torch.float32)
    s = TASKS.schedule
    shared = torch.empty(2, 18, 75)
    new = [torch.empty(2, 18, 70) for _ in range(6)]
    two_weights = Schedule.from_edges([(0, 1, 0, 0), (0, 2, 0, 1)], num_queries=3, num_weights=6)
    cases: dict[str, tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = {
        "slots": (ValueError, "features: got 2 slots", (features[:2], weight, bias, s), {}),
        "widths": (
            ValueError,
            r"features\[1\]: got 17 channels",
            ([features[0], features[1][:, :17], features[2]], weight, bias, s),
            {},
        ),
        "weight shape": (
            ValueError,
            "weight: .*expected shape",
            (features, weight[:, 1:], bias, s),
            {},
        ),
        "weight sets": (ValueError, "weight: got 5 sets", (features, weight[1:], bias[1:], s), {}),
        "bias shape": (
            ValueError,
            "bias: .*expected shape",
            (features, weight, bias[:, 1:], s),
            {},
        ),
        "weight dtype": (TypeError, "weight: ", (features, weight.double(), bias, s), {}),
        "bias dtype": (TypeError, "bias: ", (features, weight, bias.bfloat16(), s), {}),
        "weight device": (ValueError, "weight: ", (features, weight.to("meta"), bias, s), {}),
        "weight type": (TypeError, "weight: got NoneType", (features, None, bias, s), {}),
        "two weights": (
            ValueError,
            "edge 1 .*weight id 1",
            (features, weight, bias, two_weights),
            {},
        ),
        "eps": (ValueError, "eps: got 0", (features, weight, bias, s), {"eps": 0.0}),
        "out count": (
            ValueError,
            "out: got 5 tensors",
            (features, weight, bias, s),
            {"out": new[1:]},
        ),
        "out tensor": (
            ValueError,
            "out: got a float32",
            (features, weight, bias, s),
            {"out": new[0]},
        ),
        "out shape": (
            ValueError,
            r"out\[2\]: .*expected shape",
            (features, weight, bias, s),
            {"out": [*new[:2], new[2][:, :, :9], *new[3:]]},
        ),
        "out dtype": (
            TypeError,
            r"out\[0\]: .*expected a torch.float32",
            (features, weight, bias, s),
            {"out": [new[0].double(), *new[1:]]},
        ),
        "out is an input": (
            ValueError,
            r"out\[1\]: shares memory with an input",
            (features, weight, bias, s),
            {"out": [new[0], features[2], *new[2:]]},
        ),
        "outs overlap": (
            ValueError,
            r"out\[4\]: shares memory with out\[5\]",
            (features, weight, bias, s),
            {"out": [*new[:4], shared[:, :, :70], shared[:, :, 5:]]},
        ),
        "out overlaps itself": (
            ValueError,
            r"out\[3\]: .*share memory",
            (features, weight, bias, s),
            {"out": [*new[:3], torch.empty(18, 70).expand(2, 18, 70), *new[4:]]},
        ),
        "out without a common stride": (
            ValueError,
            r"out\[0\]: .*common stride",
            ([x.unflatten(2, (7, 10)) for x in features], weight, bias, s),
            {
                "out": [
                    torch.empty(2, 18, 9, 12)[:, :, :7, :10],
                    *(y.unflatten(2, (7, 10)) for y in new[1:]),
                ]
            },
        ),
    }
    return [pytest.param(*case, id=name) for name, case in cases.items()]


@pytest.mark.parametrize(("error", "message", "args", "options"), wrong_arguments())
def test_wrong_arguments(
    error: type[Exception], message: str, args: Any, options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=message):
        run(*args, **options)


def test_memory_of_a_call_is_its_outputs() -> None:
    """Nothing of the size of a feature map is kept beside them."""
    features, weight, bias = Block("big", Schedule.cross_task(2), (60_000, 60_000)).tensors(
        torch.float32
    )
    with xk.backend("cpu"), torch.profiler.profile(profile_memory=True) as profile:
        outputs = run(features, weight, bias, Schedule.cross_task(2))
    allocated = sum(max(e.self_cpu_memory_usage, 0) for e in profile.events())
    wanted = sum(x.numel() * x.element_size() for x in outputs)
    assert allocated < 1.05 * wanted
