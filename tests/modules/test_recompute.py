"""Training by recompute: against the op-by-op modules, and which way is taken when."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import xattn_kernels
from xattn_kernels import modules
from xattn_kernels.modules import CrossAttention, CrossTaskAttention, attend
from xattn_kernels.modules.attend import FEW_TOKENS
from xattn_kernels.testing import op_by_op

from . import support
from .test_memory import saved_bytes

WAYS = ("folded", "recomputed", "layers")


@pytest.fixture(params=["reference", "cpu"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    with xattn_kernels.backend(request.param):
        yield request.param


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways that modules take, in order."""
    taken: list[str] = []
    original = attend.choose_way

    def choose_way(*args: Any, **options: Any) -> str:
        taken.append(original(*args, **options))
        return taken[-1]

    for name in ("cross_attention", "cross_task", "cross_scale"):
        monkeypatch.setattr(f"xattn_kernels.modules.{name}.choose_way", choose_way)
    return taken


def make(name: str, **options: Any) -> support.Pair:
    """As `support.make`; ours recomputes."""
    return support.make(name, **options, recompute=True)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", support.CLASSES)
def test_as_op_by_op(engine: str, name: str, training: bool, batch: int, ways: list[str]) -> None:
    pair = make(name, batch=batch, training=training, size=(16, 16))
    support.compare_training(pair)
    assert set(ways) == {"recomputed"}


def test_auxiliary_tasks_of_several_sizes(engine: str, ways: list[str]) -> None:
    names = ("edge", "normals", "semseg", "depth", "sal")
    pair = make("CrossTaskAttention", auxiliary_tasks=names)
    features = pair.arguments[0]
    features["sal"] = features["sal"][:, :, :3, 1:].detach().requires_grad_()
    support.compare_training(pair)
    assert ways == ["recomputed"]


@pytest.mark.parametrize("momentum", [None, 0.0, 0.3])
@pytest.mark.parametrize("name", support.CLASSES)
def test_momentum(name: str, momentum: float | None) -> None:
    """Running statistics and counters of three steps, of reused blocks edge by edge."""
    pair = make(name, requires_grad=False, size=(16, 16))
    support.set_norms(pair, momentum=momentum)
    for _ in range(3):
        pair.ours(*pair.arguments), pair.theirs(*pair.arguments)
        support.compare_buffers(pair)


def test_without_running_statistics(ways: list[str]) -> None:
    pair = make("CrossTaskAttention")
    for module in (pair.ours, pair.theirs):
        for _, bn in support.norms(module):
            bn.track_running_stats = False
            bn.running_mean = bn.running_var = bn.num_batches_tracked = None
    support.compare_training(pair)
    pair.ours.eval(), pair.theirs.eval()
    support.compare_training(pair)
    assert ways == ["recomputed"] * 2


@pytest.mark.parametrize("affine", [True, False])
def test_frozen_batch_norm(engine: str, affine: bool, ways: list[str]) -> None:
    """Statistics stay; scales and shifts are trained or not."""
    pair = make("CrossTaskAttention")
    for module in (pair.ours, pair.theirs):
        for name, bn in support.norms(module):
            if "cross_attention" in name:
                bn.eval().requires_grad_(affine)
    support.compare_training(pair)
    assert ways == ["recomputed"]
    trained = [bn.weight.grad for _, bn in support.norms(pair.ours)]
    assert trained == [None] * len(trained)  # gradients were asked for, not accumulated


@pytest.mark.parametrize("frozen", ["one", "first"])
def test_some_batch_norms_frozen(frozen: str, ways: list[str]) -> None:
    pair = make("CrossTaskAttention")
    for module in (pair.ours, pair.theirs):
        for i, (name, bn) in enumerate(support.norms(module)):
            if (frozen == "one" and i == 4) or (frozen == "first" and "t.0." in name):
                bn.eval()
    support.compare_training(pair)
    assert "layers" in ways


def test_train_and_eval_in_turn(engine: str, ways: list[str]) -> None:
    pair = make("CrossTaskAttention", requires_grad=False)
    for training in (True, False, True, False):
        for module in (pair.ours, pair.theirs):
            module.train(training)
            with torch.set_grad_enabled(training):
                y = module(*pair.arguments)
                if training:
                    optimiser = torch.optim.SGD(module.parameters(), 0.1)
                    sum(x.square().sum() for x in y.values()).backward()
                    optimiser.step()
        assert support.distance(pair.ours(*pair.arguments), pair.theirs(*pair.arguments)) <= 1e-9
    assert "folded" in ways


@pytest.mark.parametrize(
    ("options", "recompute", "backend", "way"),
    [
        ({}, "auto", "cpu", "recomputed"),
        ({}, "auto", "reference", "layers"),
        ({}, True, "reference", "recomputed"),
        ({}, False, "cpu", "layers"),
        ({"kind": "softmax", "heads": 3}, "auto", "cpu", "layers"),
        ({"batch": 1, "size": (4, 4)}, True, "cpu", "layers"),
        ({"batch": 1, "size": (8, 8)}, True, "cpu", "recomputed"),
        ({"batch": 0}, True, "cpu", "layers"),
        ({"training": False}, True, "cpu", "recomputed"),
    ],
)
def test_way(
    options: dict[str, Any], recompute: bool | str, backend: str, way: str, ways: list[str]
) -> None:
    pair = support.make("CrossAttention", **options, recompute=recompute)
    with xattn_kernels.backend(backend):
        support.compare_training(pair)
    assert ways == [way]
    assert way in WAYS


def test_way_with_hooks_and_in_inference(ways: list[str]) -> None:
    pair = make("CrossAttention", requires_grad=False, training=False)
    with torch.no_grad():
        pair.ours(*pair.arguments)
    pair.ours.query_project[0].bn.register_forward_hook(lambda *_: None)
    pair.ours(*pair.arguments)
    assert ways == ["folded", "layers"]


def test_argument() -> None:
    for value in (True, False, "auto"):
        head = modules.CrossScaleHead([8, 16], 3, recompute=value)
        assert [m.recompute for m in head.modules() if hasattr(m, "recompute")] == [value] * 2
        ctam = CrossTaskAttention(["a", "b"], 8, recompute=value)
        assert [m.recompute for m in ctam.modules() if hasattr(m, "recompute")] == [value] * 3
        assert f"recompute={value!r}" in repr(CrossAttention(8, recompute=value))
    for make_one in (
        lambda **options: CrossAttention(8, **options),
        lambda **options: CrossTaskAttention(["a", "b"], 8, **options),
        lambda **options: modules.CrossScaleAttention([8, 16], **options),
        lambda **options: modules.CrossScaleHead([8, 16], 3, **options),
    ):
        with pytest.raises(ValueError, match="recompute: got 'yes', expected"):
            make_one(recompute="yes")
        with pytest.raises(ValueError, match=r"recompute: got True.*'softmax'"):
            make_one(recompute=True, kind="softmax")


@pytest.mark.parametrize("tokens", [2, 4, FEW_TOKENS])
def test_few_tokens(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics in closed form lose digits for a handful of tokens: those are not used there."""

    def errors() -> list[float]:
        """The largest of outputs and gradients against float64: ours and op by op."""
        worst = [0.0, 0.0]
        for seed in range(3):
            torch.manual_seed(seed)
            pair = support.make(
                "CrossAttention",
                dtype=torch.float32,
                batch=1,
                size=(2, tokens),
                seed=seed,
                recompute=True,
            )
            pair.arguments = (pair.arguments[0][:, :, :1], pair.arguments[1].repeat(1, 1, 1, 2))
            pair.arguments = tuple(x.detach().requires_grad_() for x in pair.arguments)
            exact = support.make("CrossAttention").theirs
            exact.load_state_dict(pair.theirs.state_dict())
            arguments = pair.with_arguments(dtype=torch.float64)
            arguments = tuple(x.requires_grad_() for x in arguments)
            truth = support.gradients(exact, arguments, [*exact.parameters()])
            for i, module in enumerate((pair.ours, pair.theirs)):
                found = support.gradients(module, pair.arguments, [*module.parameters()])
                worst[i] = max(worst[i], support.distance(found, truth))
        return worst

    with xattn_kernels.backend("cpu"):
        ours, theirs = errors()
        assert ours <= 3 * theirs + 1e-6
        if tokens == 2:
            monkeypatch.setattr(attend, "FEW_TOKENS", 0)
            ours, theirs = errors()
            assert ours > 3 * theirs, "the rule is for nothing"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["CrossTaskAttention", "CrossScaleHead"])
def test_autocast(engine: str, name: str, dtype: torch.dtype) -> None:
    """As close to float32 as op by op; statistics and gradients of parameters are float32."""
    pair = make(name, dtype=torch.float32, size=(16, 16))
    exact = support.gradients(pair.theirs, pair.arguments, [*pair.theirs.parameters()])
    results = []
    for module in (pair.ours, pair.theirs):
        module.load_state_dict(make(name, dtype=torch.float32, size=(16, 16)).theirs.state_dict())
        with torch.autocast("cpu", dtype=dtype):
            results.append(support.gradients(module, pair.arguments, [*module.parameters()]))
    ours, theirs = (support.distance(result, exact) for result in results)
    # Cross-task attention adds its features, which are float32.
    expected = dtype if name == "CrossScaleHead" else torch.float32
    assert {y.dtype for y in support.tensors(results[0][0])} == {expected}
    assert {g.dtype for g in results[0][1]} == {torch.float32}
    assert ours <= 2 * theirs
    norm = next(bn for name, bn in support.norms(pair.ours) if "query_project.1" in name)
    assert norm.running_var.dtype is torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(engine: str, reentrant: bool) -> None:
    # Reentrant ones see no gradients in a dict.
    pair = make("CrossAttention" if reentrant else "CrossTaskAttention")
    parameters = [*pair.ours.parameters()]

    def backward(call: Any) -> list[torch.Tensor]:
        pair.ours.zero_grad(set_to_none=True)
        outputs = call(*pair.arguments)
        sum(y.square().sum() for y in support.tensors(outputs)).backward()
        return [p.grad for p in parameters]

    expected = backward(pair.ours)
    actual = backward(lambda *x: checkpoint(pair.ours, *x, use_reentrant=reentrant))
    assert all(map(torch.equal, actual, expected))


def test_checkpoint_under_autocast() -> None:
    pair = make("CrossTaskAttention", dtype=torch.float32)
    parameters = [*pair.ours.parameters()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = support.gradients(pair.ours, pair.arguments, parameters)
        actual = support.gradients(
            lambda *x: checkpoint(pair.ours, *x, use_reentrant=False), pair.arguments, parameters
        )
    assert support.distance(actual, expected) == 0


def test_saved_for_backward() -> None:
    """A twentieth of op by op, where maps are larger than matrices; inputs and parameters apart.

    The cross-attentions alone, as the fuse block keeps its own.
    """
    tasks, channels, size = support.TASKS, 12, (48, 64)
    features = [torch.randn(2, channels, *size).requires_grad_() for _ in tasks]
    ours = nn.ModuleList(CrossAttention(channels, recompute=True) for _ in range(6))
    theirs = nn.ModuleList(op_by_op.CrossAttention(channels) for _ in range(6))
    edges = [
        (t, a, b) for b, (t, a) in enumerate((t, a) for t in range(3) for a in range(3) if t != a)
    ]
    wiring = attend.Wiring(tuple(edges), 3)

    class Fused(nn.Module):
        def forward(self, *x: torch.Tensor) -> list[torch.Tensor]:
            return attend.attend("recomputed", list(ours), wiring, x)

    class OneByOne(nn.Module):
        def forward(self, *x: torch.Tensor) -> list[torch.Tensor]:
            return [theirs[b](x[t], x[a]) for t, a, b in edges]

    fused, one_by_one = Fused(), OneByOne()
    fused.blocks, one_by_one.blocks = ours, theirs
    ours_bytes, theirs_bytes = (saved_bytes(m, tuple(features)) for m in (fused, one_by_one))
    assert ours_bytes <= 0.05 * theirs_bytes
    states, center = 6 * 2 * channels * (channels + 1), 3 * channels
    moments = 3 * (channels**2 + 2 * channels + 1)
    # Of all 30 layers a mean and a variance; of the 18 first ones another, and whether to measure.
    statistics = 2 * 30 * channels + 18 * channels
    assert ours_bytes == 4 * (states + center) + 8 * (moments + statistics) + 18


@pytest.mark.parametrize("checkpointed", [False, True])
def test_memory_stays_flat(checkpointed: bool) -> None:
    block = CrossAttention(6, recompute=True)
    x, y = torch.randn(1, 6, 5, 5, requires_grad=True), torch.randn(1, 6, 4, 4)

    def iterate(count: int) -> int:
        for _ in range(count):
            output = checkpoint(block, x, y, use_reentrant=False) if checkpointed else block(x, y)
            output.sum().backward()
        gc.collect()
        return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())

    before = iterate(5)
    assert iterate(40) <= before
