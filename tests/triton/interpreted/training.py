"""The passes of the training block in Triton's interpreter against their equations in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import xattn_kernels as xk
from xattn_kernels.engines.triton.training_tiles import Tiles
from xattn_kernels.ops.cross_attention_block_training import reference
from xattn_kernels.ops.cross_attention_block_training import triton as engine
from xattn_kernels.schedule import Schedule

GRADIENTS = ("target_gradients", "source_sums", "source_gradients", "input_gradient")
"""Passes that add to gradients of features."""
PASSES = ("moments", "hidden_moments", "states", "attend", "target_sums", *GRADIENTS)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: Largest error relative to the largest value. float16 is multiplied as tf32; sums of bfloat16
#: features are exact in the interpreter, which does not round products to it.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-5}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """New memory is NaN: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Case:
    """Slots, their pairs on both sides, the outputs of the target pairs."""

    name: str
    tokens: tuple[int, ...]
    channels: int
    slots: tuple[int, ...] = (0, 1)
    outputs: tuple[int, ...] = (0, 1)
    batch: int = 2
    format: str = "channels_first"
    mean: float = 0.0
    wanted: tuple[int, ...] = (0, 1, 2, 3)

    def map(self, tokens: int, dtype: torch.dtype) -> Tensor:
        """A (B, C, N) tensor of the format, filled with NaN."""
        shape = (self.batch, self.channels, tokens)
        if self.format == "channels_last":
            x = torch.empty(shape[0], shape[2], shape[1], dtype=dtype).mT
        elif self.format == "steps":
            x = torch.empty(shape[0], 2 * shape[1], 3 * tokens, dtype=dtype)[:, ::2, 1::3]
        else:
            x = torch.empty(shape, dtype=dtype)
        return x.fill_(float("nan"))

    def operands(self, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of all passes by name."""
        generator = torch.Generator().manual_seed(0)
        pairs, c = len(self.slots), self.channels

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        def matrices(*shape: int) -> Tensor:
            return draw(*shape, c, c) * c**-0.5

        def affine(*shape: int) -> Tensor:
            return torch.stack([torch.linspace(0.5, 1.5, c).expand(*shape, c), draw(*shape, c)], -2)

        features = [self.map(n, dtype) for n in self.tokens]
        for x in features:
            x.copy_(draw(*x.shape) + self.mean)
        of_outputs = [self.tokens[self.slots[pair]] for pair in self.outputs]
        gradients = [self.map(n, dtype) for n in of_outputs]
        for x in gradients:
            x.copy_(draw(*x.shape))
        operands = {
            "features": features,
            "center": self.mean + 0.1 * draw(len(self.tokens), c),
            "slots": list(self.slots),
            "first": matrices(pairs),
            "first_affine": affine(pairs),
            "both": matrices(pairs, 2),
            "both_affine": affine(pairs, 2),
            "second": matrices(pairs),
            "affine": draw(pairs, 3, c),
            "target_of_output": list(self.outputs),
            "state_s": matrices(len(self.outputs), self.batch).abs(),
            "state_z": draw(len(self.outputs), self.batch, c).abs(),
            "eps": 1e-12,
            "grad_outputs": gradients,
            "grad_s": matrices(pairs, self.batch),
            "grad_z": draw(pairs, self.batch, c),
            "coefficients": 0.1 * draw(pairs, 2, c),
            "precise": torch.arange(pairs) % 2 == 0,
            "matrix": matrices(len(self.tokens)),
            "vector": draw(len(self.tokens), c),
        }
        operands["outputs"] = [self.map(n, dtype) for n in of_outputs]
        start = [draw(self.batch, n, c).mT for n in self.tokens]
        operands["grad_features"] = [
            x if slot in self.wanted else torch.empty(0) for slot, x in enumerate(start)
        ]
        return operands


_SIDE = ["features", "center", "slots"]
_TARGET = [*_SIDE, "first", "first_affine", "second", "affine"]
_TARGET += ["target_of_output", "state_s", "state_z", "eps"]
_SOURCE = [*_SIDE, "both", "both_affine", "second", "affine"]
ARGUMENTS = {
    "moments": ["features"],
    "hidden_moments": [*_SIDE, "first", "first_affine", "second"],
    "states": _SOURCE,
    "attend": [*_TARGET, "outputs"],
    "target_sums": [*_TARGET, "grad_outputs"],
    "target_gradients": [*_TARGET, "grad_outputs", "coefficients", "precise", "grad_features"],
    "source_sums": [*_SOURCE, "grad_s", "grad_z", "precise", "grad_features"],
    "source_gradients": [*_SOURCE, "grad_s", "grad_z", "coefficients", "precise", "grad_features"],
    "input_gradient": ["features", "center", "matrix", "vector", "grad_features"],
}


def double(x: Any) -> Any:
    """Copies of all tensors in float64."""
    if isinstance(x, dict):
        return {key: double(y) for key, y in x.items()}
    if isinstance(x, list):
        return [double(y) for y in x]
    real = isinstance(x, Tensor) and x.is_floating_point()
    return x.to(torch.float64, copy=True) if real else x


def run(module: Any, name: str, operands: dict[str, Any]) -> list[Tensor]:
    """What a pass returns, and what it writes or adds to."""
    results = getattr(module, name)(*(operands[argument] for argument in ARGUMENTS[name]))
    written = operands["outputs"] if name == "attend" else []
    added = operands["grad_features"] if name in GRADIENTS else []
    return [*(results or ()), *written, *added]


def judge(case: Case, name: str, dtype: torch.dtype) -> list[Tensor]:
    operands = case.operands(dtype)
    exact = run(reference, name, double(operands))
    kept = [x.clone() for key in ("features", "grad_outputs") for x in operands[key]]
    found = run(engine, name, operands)
    inputs = [x for key in ("features", "grad_outputs") for x in operands[key]]
    assert all(map(torch.equal, inputs, kept)), "inputs changed"
    tolerance = TOLERANCE[dtype]
    if name == "attend":  # rounded once; the interpreter cuts bfloat16 off
        tolerance += 2 * torch.finfo(dtype).eps
    # One channel attends to one: gradients of queries are nothing but rounding.
    close(found, exact, tolerance, 1e-4 if case.channels == 1 else 1e-30)
    return found


def close(
    found: Sequence[Tensor], exact: Sequence[Tensor], tolerance: float, atol: float = 1e-30
) -> None:
    for number, (x, y) in enumerate(zip(found, exact, strict=True)):
        assert x.shape == y.shape
        assert x.isfinite().all(), number
        if x.numel():
            error, largest = (x.double() - y).abs().max(), y.abs().max()
            assert error <= tolerance * largest + atol, (number, error, largest)


#: Pairs 0 and 2 are of slot 0, outputs 1 and 2 of pair 1; slot 2 is empty.
SHARED = Case("shared", (37, 20, 0, 33), 18, slots=(0, 1, 0, 3, 2), outputs=(0, 1, 1, 2, 3, 4))
CASES = [
    SHARED,
    Case("one_channel", (5, 3), 1),
    Case("pieces", (20, 33), 36, batch=1),
    Case("groups", (9,), 72, slots=(0,), outputs=(0,), batch=1),
    Case("chunks", (300, 530), 5, batch=1),
    Case("channels_last", (24, 20), 12, format="channels_last"),
    Case("steps", (9, 20), 12, format="steps"),
    Case("empty_batch", (20, 10), 8, batch=0),
]


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_passes(case: Case, name: str) -> None:
    judge(case, name, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_types(name: str, dtype: torch.dtype) -> None:
    judge(replace(SHARED, tokens=(20, 9, 0, 33), batch=1), name, dtype)


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("rows", [(16, 0), (32, 16)], ids=str)
def test_groups_of_rows(rows: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What wide blocks need: sums by rows, gradients of features by a launch of their own."""
    monkeypatch.setattr(engine, "tiles_of", lambda *_: Tiles(rows, 16, 16, 4, rows == (16, 0)))
    channels = 20 if rows == (16, 0) else 50
    slots, outputs = (0, 1, 0), (0, 1, 2)
    case = Case("groups", (19, 9), channels, slots=slots, outputs=outputs, batch=1)
    judge(case, name, torch.float32)


@pytest.mark.parametrize("name", PASSES)
def test_wide_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What bfloat16 has fused, in its tiles, with exact products."""
    channels = 288 if engine.is_fused(name, 288, "bf16") else 144
    monkeypatch.setattr(engine, "is_fused", lambda *_: True)
    tiles = engine.tiles_of
    monkeypatch.setattr(engine, "tiles_of", lambda phase, width, _: tiles(phase, width, "bf16"))
    judge(Case("wide", (9,), channels, slots=(0,), outputs=(0,), batch=1), name, torch.float32)


def test_too_wide_for_registers() -> None:
    assert not any(engine.is_fused(name, 100, "ieee") for name in PASSES[:-1])
    for name in PASSES:
        judge(Case("torch", (9,), 100, slots=(0,), outputs=(0,), batch=1), name, torch.float32)


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("wanted", [(), (1,)], ids=str)
def test_unwanted_gradients(wanted: tuple[int, ...], name: str) -> None:
    """All else is the same, bit for bit."""
    case = replace(SHARED, batch=1)
    found = judge(replace(case, wanted=wanted), name, torch.float32)
    expected = judge(case, name, torch.float32)
    for x, y in zip(found, expected, strict=True):
        assert x.numel() == 0 or torch.equal(x, y)


@pytest.mark.parametrize("name", ["moments", "hidden_moments"])
def test_far_from_zero(name: str) -> None:
    case = Case("far", (150, 300), 9, batch=2, mean=100.0)
    judge(case, name, torch.float32)


def test_keys_that_hardly_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """S^T g and c Z cancel; with tf32 products all digits of their difference would be lost."""
    monkeypatch.setattr(engine.runtime, "precision", lambda _: "tf32")
    operands = Case("alike", (30, 20), 12).operands(torch.float32)
    z = operands["state_z"]
    values = operands["grad_z"].abs() + 1
    operands["state_s"] = values.unsqueeze(3) * z.unsqueeze(2)
    operands["state_s"] *= 1 + 1e-3 * operands["grad_s"]
    exact = run(reference, "target_sums", double(operands))
    found = run(engine, "target_sums", operands)
    close(found[2:], exact[2:], 1e-2)


#: Weights 0 and 1, the former for two sources of one query; slot 1 attends to itself.
SCHEDULE = Schedule.from_edges(
    [(0, 1, 0, 0), (0, 2, 1, 0), (1, 1, 2, 1), (2, 1, 3, 0), (2, 0, 3, 0)],
    num_queries=3,
    num_weights=2,
    allow_self=True,
)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_forward_and_backward(dtype: torch.dtype, fixed: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    channels = 9

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    features = [draw(2, channels, n).to(dtype) for n in (40, 35, 30)]
    weight = draw(2, 5, channels, channels) * (2 / channels) ** 0.5
    gamma, beta = 0.5 + draw(2, 5, channels).abs(), draw(2, 5, channels)
    running = {"running_mean": beta + 0.1, "running_var": gamma * 2} if fixed else {}
    factors = [draw(2, channels, features[q].size(2)) for q in (0, 0, 1, 2)]

    def evaluate(real: torch.dtype, kind: torch.dtype) -> list[Tensor]:
        slots = [x.to(kind).requires_grad_() for x in features]
        leaves = [x.to(real).requires_grad_() for x in (weight, gamma, beta)]
        outputs, statistics = xk.cross_attention_block_training(
            slots, *leaves, SCHEDULE, **{key: x.to(real) for key, x in running.items()}
        )
        loss = sum((x * f.to(real)).sum() for x, f in zip(outputs, factors, strict=True))
        gradients = torch.autograd.grad(loss, [*slots, *leaves])
        return [*(x.detach() for x in outputs), statistics.mean, statistics.var, *gradients]

    found = evaluate(torch.float32, dtype)
    with xk.backend("reference"):
        exact = evaluate(torch.float64, torch.float64)
    for number, (x, y) in enumerate(zip(found, exact, strict=True)):
        # Products as tf32 turn a few of the relus that are near zero, and gradients with them.
        tolerance = {torch.float32: 2e-5, torch.float16: 0.1}[dtype]
        assert (x.double() - y).norm() <= tolerance * y.norm(), number
