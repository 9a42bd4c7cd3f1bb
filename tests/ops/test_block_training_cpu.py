"""The native passes of the training block: each against its equations in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from xattn_kernels.engines import native
from xattn_kernels.ops.cross_attention_block_training import cpu, reference

GRADIENTS = ("target_gradients", "source_sums", "source_gradients", "input_gradient")
"""Passes that add to gradients of features."""
PASSES = (
    "moments",
    "first_moments",
    "hidden_moments",
    "states",
    "attend",
    "target_sums",
    *GRADIENTS,
)


@dataclass(frozen=True)
class Layout:
    """Slots, their pairs and the outputs of the pairs."""

    channels: int
    tokens: tuple[int, ...]
    slots: tuple[int, ...] = (0,)
    outputs: tuple[int, ...] = (0,)
    batch: int = 2
    format: str = "channels_first"
    dtype: torch.dtype = torch.float64
    mean: float = 0.0
    eps: float = 1e-12

    def map(self, tokens: int, dtype: torch.dtype, fill: float | None = None) -> Tensor:
        """A (B, C, N) tensor of the format, random or filled."""
        shape = (self.batch, self.channels, tokens)
        if self.format == "channels_last":
            x = torch.empty(shape[0], shape[2], shape[1], dtype=dtype).transpose(1, 2)
        elif self.format == "steps":
            x = torch.empty(shape[0], 2 * shape[1], 3 * tokens, dtype=dtype)[:, ::2, 1::3]
        else:
            x = torch.empty(shape, dtype=dtype)
        return x.normal_() if fill is None else x.fill_(fill)

    def operands(self) -> dict[str, Any]:
        """Random operands of all passes."""
        torch.manual_seed(0)
        pairs, C = len(self.slots), self.channels
        real = torch.float64 if self.dtype is torch.float64 else torch.float32

        def new(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(shape, dtype=torch.float64)).to(real)

        features = [self.map(n, self.dtype).add_(self.mean) for n in self.tokens]
        owners = [self.slots[pair] for pair in self.outputs]
        layer = C**-0.5
        return {
            "features": features,
            "center": self.mean + new(len(self.tokens), C, scale=0.1),
            "slots": list(self.slots),
            "target_of_output": list(self.outputs),
            "first": new(pairs, 2, C, C, scale=layer),
            "first_affine": new(pairs, 2, 2, C),
            "second": new(pairs, C, C, scale=layer),
            "affine": new(pairs, 3, C),
            "state_s": new(len(self.outputs), self.batch, C, C),
            "state_z": new(len(self.outputs), self.batch, C).abs(),
            "grad_s": new(pairs, self.batch, C, C),
            "grad_z": new(pairs, self.batch, C),
            "coefficients": new(pairs, 2, C),
            "precise": torch.arange(pairs) % 2 == 0,
            "matrix": new(len(self.tokens), C, C, scale=layer),
            "vector": new(len(self.tokens), C),
            "grad_outputs": [self.map(self.tokens[slot], self.dtype) for slot in owners],
        }


def run(
    engine: Any,
    name: str,
    layout: Layout,
    x: dict[str, Any],
    wanted: Sequence[bool] | None = None,
) -> list[Tensor]:
    """Everything that a pass returns or writes; `wanted` tells the gradients of which slots."""
    side = [x[key] for key in ("features", "center", "slots")]
    if name == "moments":
        return list(engine.moments(x["features"]))
    one = [x["first"][:, 0].contiguous(), x["first_affine"][:, 0].contiguous()]
    if name == "first_moments":
        return list(engine.first_moments(*side, one[0], x["precise"]))
    if name == "hidden_moments":
        return list(engine.hidden_moments(*side, *one, x["second"]))
    target = [*side, *one, x["second"], x["affine"], x["target_of_output"]]
    target += [x["state_s"], x["state_z"], layout.eps]
    source = [*side, x["first"], x["first_affine"], x["second"], x["affine"]]
    if name == "states":
        return list(engine.states(*source))
    if name == "attend":
        outputs = [layout.map(g.size(2), g.dtype, torch.nan) for g in x["grad_outputs"]]
        engine.attend(*target, outputs)
        return outputs
    if name == "target_sums":
        return list(engine.target_sums(*target, x["grad_outputs"]))
    ones = [torch.ones(layout.batch, n, layout.channels) for n in layout.tokens]
    gradients = [
        g.to(x["center"].dtype).transpose(1, 2) if want else x["center"].new_empty(0, 0, 0)
        for g, want in zip(ones, wanted or [True] * len(ones), strict=True)
    ]
    results: Sequence[Tensor] = ()
    if name == "target_gradients":
        operands = (x["grad_outputs"], x["coefficients"], x["precise"])
        results = engine.target_gradients(*target, *operands, gradients)
    elif name == "source_sums":
        operands = (x["grad_s"], x["grad_z"], x["precise"])
        results = engine.source_sums(*source, *operands, gradients)
    elif name == "source_gradients":
        operands = (x["grad_s"], x["grad_z"], x["coefficients"], x["precise"])
        results = engine.source_gradients(*source, *operands, gradients)
    else:
        engine.input_gradient(*side[:2], x["matrix"], x["vector"], gradients)
    return [*results, *gradients]


def judge(name: str, layout: Layout) -> None:
    """A pass against the reference in float64, as close as the compute type lets it come."""
    x = layout.operands()
    got = run(cpu, name, layout, x)
    exact = {key: _double(value) for key, value in x.items()}
    expected = run(reference, name, layout, exact)
    rounding = 2e-13 if layout.dtype is torch.float64 else 2e-5
    for number, (actual, true) in enumerate(zip(got, expected, strict=True)):
        assert actual.shape == true.shape
        if true.numel() == 0:
            continue
        worst, largest = (actual.double() - true).abs().max(), true.abs().max()
        limit = max(rounding, torch.finfo(actual.dtype).eps)
        assert worst <= limit * largest, f"{name}, result {number}: {worst / largest}"


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        return [x.double() for x in value]
    return value


PAIRS = {"slots": (2, 0, 0, 1, 2), "outputs": (3, 0, 0, 1, 2, 4, 0)}
"""Pairs that are not in the order of their slots, some with several outputs."""
TOKENS = (300, 0, 61, 1)
LAYOUTS = {
    "one channel": Layout(1, (5,), eps=1e3),
    "one token": Layout(6, (1,)),
    "odd widths": Layout(17, TOKENS[:3], **PAIRS),
    "33 channels": Layout(33, TOKENS, **PAIRS, format="steps"),
    "clamped": Layout(36, TOKENS, **PAIRS, format="channels_last", eps=12.0),
    "tiles": Layout(72, (700, 40), slots=(0, 0, 1), outputs=(0, 1, 2), batch=1),
    "wide": Layout(144, (200, 30, 97), **PAIRS, format="channels_last"),
    "pieces": Layout(3, (5000, 100), slots=(0, 1), outputs=(0, 1), batch=3, format="steps"),
    "empty": Layout(8, (0, 0), slots=(1,)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("name", PASSES)
def test_equations(name: str, layout: Layout, dtype: torch.dtype) -> None:
    judge(name, replace(layout, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", ["channels_first", "channels_last", "steps"])
@pytest.mark.parametrize("name", PASSES)
def test_half_precision_features(name: str, format: str, dtype: torch.dtype) -> None:
    """Only loads and stores round: everything between is in float32."""
    judge(name, Layout(33, TOKENS, **PAIRS, format=format, dtype=dtype))


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512_bf16"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set, in use during the test."""
    info = native.core().cpu_info()
    if request.param not in info["available"]:
        pytest.skip(f"this CPU has no {request.param}")
    native.core().set_isa(request.param)
    yield request.param
    native.core().set_isa(info["isa"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_instruction_sets(isa: str, name: str, dtype: torch.dtype) -> None:
    for layout in ("odd widths", "clamped", "tiles"):
        judge(name, replace(LAYOUTS[layout], dtype=dtype))


@pytest.mark.parametrize("name", PASSES)
def test_threads_do_not_change_results(name: str) -> None:
    """Neither where pieces are many nor where pairs become tasks of their own."""
    before = torch.get_num_threads()
    for layout in ("pieces", "wide"):
        chosen = replace(LAYOUTS[layout], dtype=torch.float32)
        x = chosen.operands()
        results = []
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            results.append(run(cpu, name, chosen, x))
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", ["moments", "hidden_moments"])
def test_moments_of_a_large_mean(name: str) -> None:
    """Sums of squared deviations are of centred numbers, though the tiles' means differ."""
    layout = Layout(20, (3000,), dtype=torch.float32)
    x = layout.operands()
    drift = torch.linspace(99, 101, 3000)
    if name == "moments":
        x["features"] = [f + drift for f in x["features"]]
    else:
        x["first"] *= 0.01
        x["first_affine"] += 100
    got = run(cpu, name, layout, x)
    exact = run(reference, name, layout, {key: _double(value) for key, value in x.items()})
    if name == "moments":
        torch.testing.assert_close(got, exact, rtol=1e-13, atol=1e-10)
        return
    # The second layer of inputs near 100 is rounded before it is centred.
    torch.testing.assert_close(got[0], exact[0], rtol=2e-7, atol=3e-5)
    assert ((got[1] - exact[1]).abs() <= 1e-3 * exact[1].abs()).all()


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_that_are_not_wanted(name: str) -> None:
    """An empty gradient is left alone, and all else is as with one."""
    layout = LAYOUTS["odd widths"]
    x = layout.operands()
    expected = run(cpu, name, layout, x)
    got = run(cpu, name, layout, x, wanted=(False, True, False))
    assert [g.numel() for g in got[-3:]] == [0, expected[-2].numel(), 0]
    for actual, full in zip(got[:-3], expected[:-3], strict=True):
        assert torch.equal(actual, full)
    assert torch.equal(got[-2], expected[-2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_outputs_amid_other_numbers(channels_last: bool, dtype: torch.dtype) -> None:
    """Every number of an output is written, and none beside it."""
    layout = Layout(17, (53,), dtype=dtype)
    x = layout.operands()
    buffer = torch.full((2, 60, 60), 7, dtype=dtype)
    inner = buffer[:, 3:56, 2:19].transpose(1, 2) if channels_last else buffer[:, 2:19, 3:56]
    inner.fill_(torch.nan)
    target = [x[key] for key in ("features", "center", "slots")]
    target += [x["first"][:, 0], x["first_affine"][:, 0], x["second"], x["affine"]]
    cpu.attend(*target, [0], x["state_s"], x["state_z"], layout.eps, [inner])
    assert not inner.isnan().any()
    inner.fill_(7)
    assert (buffer == 7).all()
