"""The search finds nothing, repeats by its seed, and finds what is planted."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import xattn_kernels as xk
from xattn_kernels import modules
from xattn_kernels.functional import attention as cores
from xattn_kernels.modules import attend, layers
from xattn_kernels.modules.freezing import Freezable
from xattn_kernels.ops import gradients

from . import oracle_modules
from .families import FAMILIES, Summary, family_of, run, search, seeds_of
from .judge import Precision

CASES = {
    "linear": 200,
    "softmax": 200,
    "block": 250,
    "training_block": 80,
    "pyramid": 200,
    "cross_attention": 60,
    "cross_task": 20,
    "cross_scale": 30,
    "head": 24,
    "basic_block": 80,
}
FEWEST = 0.2
"""The part of these that has to run on a machine that is slow."""
SECONDS = 3.0
"""After which a family ends."""
REFUSED = 0.12
"""The largest part of calls that are refused: batch statistics of single values, for the most."""

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_found(family: str) -> None:
    begin = time.monotonic()

    def done(summaries: dict[str, Summary]) -> bool:
        cases = summaries[family].cases
        late = time.monotonic() - begin > SECONDS and cases >= FEWEST * CASES[family]
        return late or cases == CASES[family]

    summary = search(seeds_of(family), done)[family]
    print(summary, dict(summary.refusals))
    assert not summary.flagged, "\n".join(map(str, summary.flagged))
    assert summary.cases >= FEWEST * CASES[family]
    assert summary.refusals.total() <= REFUSED * summary.calls, summary.refusals
    for text in summary.refusals:
        assert text.startswith(KNOWN_REFUSALS), text


KNOWN_REFUSALS = (
    "ValueError: Expected more than 1 value per channel when training",
    "ValueError: features[0]: got a",
    # By torch's own layers, in place of the module's.
    "RuntimeError: Argument #",
    "RuntimeError: padding='same' is not supported for strided convolutions",
)


def test_families_by_seed() -> None:
    assert {family_of(seed) for seed in range(len(FAMILIES))} == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_is_a_case(family: str) -> None:
    seed = next(seeds_of(family, 50))
    first, second = run(seed, verbose=True), run(seed, verbose=True)
    assert str(first) == str(second)
    assert first.description != run(seed + len(FAMILIES)).description


def test_batch_norm_of_the_oracle() -> None:
    """In float64 by the formula: as torch's."""
    torch.manual_seed(0)
    for momentum, training in itertools.product((0.1, None), (True, False)):
        bn = nn.BatchNorm2d(3, momentum=momentum).double().train(training)
        other = nn.BatchNorm2d(3, momentum=momentum).double().train(training)
        for _ in range(2):
            x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
            torch.testing.assert_close(oracle_modules.call(bn, x), other(x))
        for mine, theirs in zip(bn.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_oracle_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """It calls no operator of the package, and no module of it."""
    calls = []
    for seed in range(len(FAMILIES)):
        _, found = FAMILIES[family_of(seed)](seed)
        calls.append(next(found))

    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("the oracle called the package")

    for module in (xk, xk.functional):
        for name in ("linear", "softmax"):
            monkeypatch.setattr(module, f"{name}_cross_attention", refuse)
        for name in ("cross_attention_block", "cross_attention_block_training"):
            monkeypatch.setattr(module, name, refuse)
        monkeypatch.setattr(module, "pyramid_projection", refuse)
    for kind in oracle_modules.BODIES:
        monkeypatch.setattr(kind, "forward", refuse)
    for call in calls:
        assert call.oracle(Precision(True))


# What the search found.


class InFloat32(nn.Module):
    """A layer whose parameters make its output float32 under autocast too."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_adapters_that_give_float32_under_autocast(training: bool, recompute: bool) -> None:
    torch.manual_seed(0)
    module = modules.CrossScaleAttention((6, 12), recompute=recompute).train(training)
    module.upsample10[1] = InFloat32(6)
    features = [torch.randn(2, 6, 8, 8), torch.randn(2, 12, 4, 4)]
    expected = oracle_modules.call(copy.deepcopy(module).double(), [x.double() for x in features])
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16):
        [[y]] = module(features)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.double(), expected[0][0], rtol=0.05, atol=0.05)


# What the search is to find.

Plant = Callable[[pytest.MonkeyPatch], None]


def scaled(target: Any, name: str, factor: float = 1.001) -> Plant:
    """The first result of a function, `factor` times as large."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        original = getattr(target, name)

        def call(*args: Any, **options: Any) -> Any:
            results = original(*args, **options)
            if isinstance(results, Tensor):
                return results * factor
            first = results[0]
            first = first * factor if isinstance(first, Tensor) else [y * factor for y in first]
            return (first, *results[1:])

        monkeypatch.setattr(target, name, call)

    return plant


def other_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    original = cores._softmax

    def softmax(part: Any, heads: int, scale: float | None) -> Any:
        return original(part, heads, (part.channels // heads) ** -0.5)

    monkeypatch.setattr(cores, "_softmax", softmax)


def forgotten_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    original = xk.cross_attention_block

    def block(features: Any, weight: Tensor, bias: Tensor, *args: Any, **options: Any) -> Any:
        options.pop("packed", None)
        bias = bias.clone()
        bias[:, 1] = 0
        return original(features, weight, bias, *args, **options)

    monkeypatch.setattr(xk, "cross_attention_block", block)


def unbiased_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    original = xk.cross_attention_block_training

    def block(features: Any, *args: Any, **options: Any) -> Any:
        outputs, statistics = original(features, *args, **options)
        count = int(statistics.counts[0])
        return outputs, statistics._replace(var=statistics.var * (count / (count - 1)))

    monkeypatch.setattr(xk, "cross_attention_block_training", block)


def stale_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def derived(self: Freezable, key: Any, make: Callable[[], Any]) -> Any:
        kept = self.__dict__.setdefault("_stale", {})
        if key not in kept:
            kept[key] = make()
        return kept[key]

    monkeypatch.setattr(Freezable, "derived", derived)


def transposed_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def backward(ctx: Any, gradient: Tensor | None) -> Tensor | None:
        return None if gradient is None else gradients.in_order(gradient, ctx.order[::-1])

    monkeypatch.setattr(gradients._PlainGradient, "backward", staticmethod(backward))


def forgotten_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend, "_update", lambda *args: None)


def overlooked_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "is_hooked", lambda module: False)


def other_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def blocks(self: modules.CrossTaskAttention) -> list[nn.Module]:
        return [block for row in self.cross_attention.values() for block in row.values()]

    monkeypatch.setattr(modules.CrossTaskAttention, "_blocks", blocks)


def shifted_block(monkeypatch: pytest.MonkeyPatch) -> None:
    original = layers.FoldedBlock.__call__
    monkeypatch.setattr(
        layers.FoldedBlock, "__call__", lambda self, x: original(self, x).add_(1e-3)
    )


PLANTED: list[tuple[str, Plant, str]] = [
    ("linear", scaled(cores, "_linear"), "output"),
    ("linear", transposed_gradients, "strides"),
    ("softmax", other_scores, ""),
    ("block", forgotten_bias, "output"),
    ("training_block", unbiased_variance, "variance"),
    ("pyramid", scaled(xk, "pyramid_projection"), "output"),
    ("cross_attention", stale_weights, "output"),
    ("cross_attention", transposed_gradients, "strides"),
    ("cross_attention", overlooked_hooks, ""),
    ("cross_task", other_order, ""),
    ("cross_scale", forgotten_statistics, "statistics"),
    ("head", scaled(xk.functional, "pyramid_projection"), "output"),
    ("basic_block", shifted_block, "output"),
]
ENOUGH = 60
"""Cases within which a fault is found."""


@pytest.mark.parametrize(
    ("family", "plant", "text"), PLANTED, ids=[f"{p[0]}-{i}" for i, p in enumerate(PLANTED)]
)
def test_planted_faults_are_found(
    family: str, plant: Plant, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    summary = search(
        itertools.islice(seeds_of(family), ENOUGH), lambda found: bool(found[family].flagged)
    )[family]
    assert summary.flagged, f"not found in {summary.cases} cases"
    assert any(text in flag for flag in summary.flagged[0].flags), summary.flagged[0]
