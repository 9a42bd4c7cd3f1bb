"""Blocks that look like known ones and compute something else: none is swapped."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xattn_kernels.convert import convert_, plan
from xattn_kernels.convert.trial import largest_difference
from xattn_kernels.testing import op_by_op
from xattn_models import op_by_op as network

from .support import TASKS, Attention, Residual

# Residual blocks


def activated(function: Callable[[Tensor], Tensor]) -> type[Residual]:
    """A residual block with another activation."""
    return type("Activated", (Residual,), {"activate": lambda self, x: function(x)})


class Scaled(Residual):
    scale = 0.9

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.scale * y


class BarelyScaled(Residual):
    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y * 1.0000001


class Dropout(Residual):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def body(self, x: Tensor) -> Tensor:
        return F.dropout(super().body(x), p=self.p)


class DropoutInTraining(Dropout):
    def body(self, x: Tensor) -> Tensor:
        return F.dropout(Residual.body(self, x), p=self.p, training=self.training)


class StochasticDepth(Residual):
    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return y if random.random() < 0.3 else x + y


class DropPath(Residual):
    def add(self, x: Tensor, y: Tensor) -> Tensor:
        keep = torch.empty(x.shape[0], 1, 1, 1, dtype=x.dtype).bernoulli_(0.9)
        return x * keep / 0.9 + y


class NoisyInTraining(Residual):
    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y + torch.randn_like(x) if self.training else x + y


class Constant(Residual):
    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y + 0.1


class Sigmoid(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.add(self.body(x), x))


class WithoutLastActivation(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.body(x), x)


class PreActivation(Residual):
    def body(self, x: Tensor) -> Tensor:
        return self.conv2(self.activate(self.bn2(self.conv1(self.activate(self.bn1(x))))))


class Strided(Residual):
    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.conv1.weight, stride=2, padding=1)
        y = self.bn2(self.conv2(self.activate(self.bn1(y))))
        return self.activate(y + x[:, :, ::2, ::2])


class Detached(Residual):
    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y.detach()


class WithoutGradient(Residual):
    def body(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.bn1(self.conv1(x))
        return self.bn2(self.conv2(self.activate(x)))


class Checkpointed(Residual):
    def body(self, x: Tensor) -> Tensor:
        return checkpoint(super().body, x, use_reentrant=False)


class ClippedGradient(Residual):
    def body(self, x: Tensor) -> Tensor:
        x = super().body(x)
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient.clamp(-1e3, 1e3))
        return x


class Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clamp(-1e3, 1e3)


class OwnGradient(Residual):
    clip = Clip.apply

    def body(self, x: Tensor) -> Tensor:
        return self.clip(super().body(x))


class FrozenNorms(Residual):
    def train(self, mode: bool = True) -> Residual:
        super().train(mode)
        self.bn1.eval()
        return self


class DividedByBatch(Residual):
    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y / x.shape[0]


class Half(Residual):
    def body(self, x: Tensor) -> Tensor:
        return super().body(x).half().to(x.dtype)


class ChangesItsInput(Residual):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.activate(self.add(y, x.relu_()))


class LargeOnes(Residual):
    """Pools what is larger than any case that is tried."""

    def body(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        if x.shape[2] * x.shape[3] <= 4096:
            return super().body(x)
        return F.interpolate(super().body(F.avg_pool2d(x, 2)), size=size)


RESIDUAL: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "relu6": (activated(F.relu6), "calls torch.nn.functional.relu6, which its replacement"),
    "hardtanh": (activated(lambda x: F.hardtanh(x, 0, 9)), "calls torch.nn.functional.hardtanh"),
    "clamp": (activated(lambda x: x.clamp(0, 1e4)), "clamp with min = 0, where 1e-12 is expected"),
    "leaky relu": (activated(F.leaky_relu), "calls torch.nn.functional.leaky_relu"),
    "elu": (activated(F.elu), "calls torch.nn.functional.elu"),
    "gelu": (activated(F.gelu), "calls torch.nn.functional.gelu"),
    "silu": (activated(F.silu), "calls torch.nn.functional.silu"),
    "scaled residual": (Scaled, "computes mul with the number 0.9, where a tensor is expected"),
    "barely scaled residual": (BarelyScaled, "computes mul with the number 1.0000001"),
    "functional dropout, p = 0": (lambda: Dropout(0.0), "names dropout, which may be random"),
    "functional dropout": (lambda: Dropout(0.1), "names dropout, which may be random"),
    "dropout in training": (lambda: DropoutInTraining(0.0), "its code (reads training|names drop)"),
    "dropout": (
        lambda: Residual(drop=nn.Dropout(0.1)),
        r"it has an unknown submodule drop \(Dropout\)",
    ),
    "stochastic depth": (StochasticDepth, "names random, which may be random"),
    "drop path": (DropPath, "its code names bernoulli_, which may be random"),
    "noise in training": (NoisyInTraining, "its code (reads training|names randn_like)"),
    "constant": (Constant, "computes add with the number 0.1, where a tensor is expected"),
    "sigmoid": (Sigmoid, "calls torch.sigmoid"),
    "no last activation": (WithoutLastActivation, "its results differ from those of Converted"),
    "norms before convolutions": (PreActivation, "its results differ from those of Converted"),
    "functional stride": (Strided, "calls torch.nn.functional.conv2d, which its replacement"),
    "detached": (Detached, "calls torch.Tensor.detach"),
    "no_grad": (WithoutGradient, "its code uses torch.no_grad"),
    "checkpoint": (Checkpointed, "its code runs torch.utils.checkpoint, which its replacement"),
    "hook on a gradient": (ClippedGradient, "its code has a hook on the gradient of a tensor"),
    "gradient of its own": (OwnGradient, "its code uses its attribute clip, a method of something"),
    "train": (FrozenNorms, "its class FrozenNorms has a method train of its own"),
    "divided by the batch": (DividedByBatch, r"computes div with the number 2"),
    "half": (Half, "calls torch.Tensor.half"),
    "input changed": (ChangesItsInput, "it changes its input in place"),
    "large maps": (LargeOnes, r"decides by the size of its input: whether height\*width <= 4096"),
}

# Attention


def attending(**methods: Callable[..., Tensor]) -> type[Attention]:
    """An attention block with other methods."""
    return type("Attending", (Attention,), methods)


def divided(self: Attention, numerator: Tensor, denominator: Tensor) -> Tensor:
    return numerator / (denominator + 1e-6)


def by_softmax(self: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return value @ (query.mT @ key).softmax(dim=2).mT


class Pooled(Attention):
    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        if source.shape[2] > 100:
            source = F.avg_pool2d(source, 2)
        return super().forward(target, source)


ATTENTION: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "relu6": (attending(rectify=lambda _, x: F.relu6(x)), "calls torch.nn.functional.relu6"),
    "beta": (
        attending(activate=lambda _, x: F.softplus(x, beta=2)),
        "computes softplus with beta = 2, where 1 is expected",
    ),
    "threshold": (
        attending(activate=lambda _, x: F.softplus(x, threshold=10)),
        "computes softplus with threshold = 10, where 20 is expected",
    ),
    "softplus of a clamp": (
        attending(activate=lambda _, x: F.softplus(x.clamp(-10, 10))),
        "computes clamp with min = -10, where 1e-12 is expected",
    ),
    "eps of 1e-3": (
        attending(divide=lambda _, x, y: x / y.clamp_min(1e-3)),
        "computes clamp_min with min = 0.001, where 1e-12 is expected",
    ),
    "eps of 1e-6": (
        attending(divide=lambda _, x, y: x / y.clamp(min=1e-6)),
        "computes clamp with min = 1e-06, where 1e-12 is expected",
    ),
    "added eps": (attending(divide=divided), "computes add with the number 1e-06"),
    "no eps": (attending(divide=lambda _, x, y: x / y), "its results differ from those of"),
    "large sources": (Pooled, "by the size of its input: whether height_1 <= 100"),
    "query and key exchanged": (
        attending(forward=lambda self, target, source: Attention.forward(self, source, target)),
        r"it returns torch.float64 \(2, 6, 3, 5\), its replacement torch.float64 \(2, 6, 4, 6\)",
    ),
    "softmax": (attending(attend=by_softmax), "calls torch.Tensor.softmax"),
}

# Heads and cross-task modules


class OtherInterpolation(op_by_op.CrossScaleHead):
    """A head with another interpolation."""

    def __init__(self, **interpolation: Any) -> None:
        super().__init__((4, 6), 2)
        self.interpolation = interpolation

    def forward(self, features: Any) -> Tensor:
        first, last = features
        ((attended,),) = self.attend(features)
        parts = [first, attended, F.interpolate(last, size=first.shape[2:], **self.interpolation)]
        return self.last_layer(torch.cat(parts, dim=1))


class InForwardOrder(network.MultiTaskDistillationModule):
    """A cross-task module that does not reverse the order of the sources."""

    def __init__(self) -> None:
        super().__init__(TASKS, TASKS, 4)

    def forward(self, x: Any) -> dict[str, Tensor]:
        out = {}
        for task in self.tasks:
            target = x[f"features_{task}"]
            parts = []
            for other, block in self.cross_attention[task].items():
                parts += [target, block(target, x[f"features_{other}"])]
            out[task] = target + self.dimensionality_reduction(torch.cat(parts, dim=1))
        return out


OUTER: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "nearest": (
        lambda: OtherInterpolation(mode="nearest"),
        "it computes aten::upsample_nearest2d, which its replacement does not",
    ),
    "aligned corners": (
        lambda: OtherInterpolation(mode="bilinear", align_corners=True),
        "computes upsample_bilinear2d with align_corners = True, where False is expected",
    ),
    "antialiased": (
        lambda: OtherInterpolation(mode="bilinear", align_corners=False, antialias=True),
        "it computes aten::_upsample_bilinear2d_aa",
    ),
    "forward order": (InForwardOrder, "its results differ from those of ConvertedCrossTask"),
}

TABLE = {
    f"{kind}, {name}": entry
    for kind, table in (("residual", RESIDUAL), ("attention", ATTENTION), ("outer", OUTER))
    for name, entry in table.items()
}


@pytest.mark.parametrize("name", TABLE)
def test_left(name: str) -> None:
    make, reason = TABLE[name]
    model = nn.ModuleList([make()])
    block = model[0]
    entry, *_ = report = convert_(model)
    assert entry.replacement is None and model[0] is block
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(entry.reason)
    assert len(str(report).splitlines()) == 1 + len(report)


# What is swapped


def by_einsum(self: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key = F.softplus(query), F.softplus(key)
    numerator = torch.einsum("bcd,bdm->bcm", torch.einsum("bcn,bdn->bcd", value, key), query)
    denominator = torch.einsum("bd,bdm->bm", key.sum(-1), query).unsqueeze(1)
    return numerator / torch.clamp(denominator, min=1e-12)


def by_scores(self: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = F.softplus(query).transpose(1, 2) @ F.softplus(key)
    scores = scores / torch.clamp_min(scores.sum(-1, keepdim=True), 1e-12)
    return (scores @ value.permute(0, 2, 1)).permute(0, 2, 1).contiguous()


def by_products(self: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key = F.softplus(query), F.softplus(key)
    denominator = (query * key.sum(dim=-1, keepdim=True)).sum(dim=1, keepdim=True)
    return torch.matmul(torch.matmul(value, key.mT), query).div(denominator.clamp(1e-12))


def with_sizes(self: Attention, target: Tensor, source: Tensor) -> Tensor:
    batch, channels, height, width = target.size()
    query = self.query_project[1](F.relu(self.query_project[0](target), inplace=True))
    key = self.key_project[1](F.relu(self.key_project[0](source))).reshape(batch, channels, -1)
    value = F.relu(self.value_project(source)).flatten(start_dim=2)
    attended = self.attend(query.view(batch, channels, -1), key, value)
    return attended.view(batch, channels, height, width)


class InPlace(Residual):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu_(self.bn1(self.conv1(x)))))
        y += x
        return y.relu_()


class WithCheckpointing(Residual):
    """As in networks that can save memory and do not."""

    with_cp = False

    @property
    def norm(self) -> nn.Module:
        return getattr(self, "bn1")  # noqa: B009

    def forward(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return x + self.bn2(self.conv2(F.relu(self.norm(self.conv1(x)))))

        saves = self.with_cp and x.requires_grad
        return F.relu(checkpoint(inner, x) if saves else inner(x))


def unchanged(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A decorator that does nothing."""

    @functools.wraps(function)
    def wrapper(self: nn.Module, x: Tensor) -> Tensor:
        return function(self, x)

    return wrapper


class Configured(Residual):
    """Activations as attributes, in a function and with a decorator."""

    def __init__(self) -> None:
        super().__init__()
        self.function = functools.partial(F.relu, inplace=True)
        self.last = lambda x: torch.relu(x)
        self.options = {"add": True, "names": ["conv1", "conv2"]}

    def activate(self, x: Tensor) -> Tensor:
        return self.function(x)

    @unchanged
    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.body(x)) if self.options["add"] else x


@pytest.mark.parametrize(
    "make",
    [
        Residual,
        Attention,
        lambda: Residual(drop=nn.Dropout(0.0)),
        lambda: Residual(drop=nn.Identity(), aa=None),
        lambda: OtherInterpolation(mode="bilinear"),
        lambda: network.MultiTaskDistillationModule(TASKS, TASKS, 4),
        attending(attend=by_einsum),
        attending(attend=by_scores),
        attending(attend=by_products),
        attending(forward=with_sizes),
        InPlace,
        WithCheckpointing,
        Configured,
    ],
)
def test_what_they_look_like_is_swapped(make: Callable[[], nn.Module]) -> None:
    [entry] = convert_(nn.ModuleList([make()]))
    assert not entry.reason and entry.replacement


def test_equal_blocks_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one class are no equals if their attributes, shapes or functions differ."""
    tried = []

    def try_(original: nn.Module, kind: str) -> float:
        tried.append(original)
        return largest_difference(original, kind)

    monkeypatch.setattr(plan, "largest_difference", try_)

    def configured(limit: float | None) -> nn.Module:
        block = Configured()
        block.last = lambda x: F.relu(x) if limit is None else x.clamp(0, limit)
        return block

    blocks = [Residual(), Configured(), Residual(), Residual(4), Configured()]
    blocks += [configured(None), configured(9.0)]
    model = nn.ModuleList(blocks)
    report = convert_(model)
    assert [e.name for e in report.left] == ["6"]
    assert tried == [blocks[i] for i in (0, 1, 3, 5, 6)]
