"""Blocks whose Python code depends on more than shows today: none is swapped."""

from __future__ import annotations

import functools
import os
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn_kernels.convert import convert_

from .support import Attention, Residual

CALLS = 0
SEEN: list[int] = []
EPS = 1e-3


def residual(**attributes: Any) -> type[Residual]:
    """A residual block with other methods and attributes of the class."""
    return type("Other", (Residual,), attributes)


def branching(condition: Callable[[Tensor], object]) -> type[Residual]:
    """A residual block that computes something else where a condition holds."""
    return residual(add=lambda self, x, y: x if condition(x) else x + y)


def configured(**attributes: Any) -> Callable[[], nn.Module]:
    """A residual block whose activation is an attribute, with these attributes of the instance."""

    def make() -> nn.Module:
        block = residual(activate=lambda self, x: self.function(x))()
        for name, value in attributes.items():
            setattr(block, name, value)
        return block

    return make


def counting(self: Any, x: Tensor) -> Tensor:
    self.calls = getattr(self, "calls", 0) + 1
    return F.relu(x)


def counting_globally(self: Any, x: Tensor) -> Tensor:
    global CALLS
    CALLS += 1
    return F.relu(x)


def remembering(self: Any, x: Tensor) -> Tensor:
    SEEN.append(1)
    return F.relu(x)


def counted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A decorator that counts."""
    calls = 0

    @functools.wraps(function)
    def wrapper(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return function(*args)

    return wrapper


def limited(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A decorator that limits what is returned."""

    @functools.wraps(function)
    def wrapper(*args: Any) -> Tensor:
        return function(*args).clamp(max=1e4)

    return wrapper


def importing(self: Any, x: Tensor) -> Tensor:
    import math

    return F.relu(x) if math.pi > 3 else x


def in_full_precision(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return Residual.body(self, x)


class BoundedReLU(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(0, 1e6)


class Function:
    def __call__(self, x: Tensor) -> Tensor:
        return F.relu(x)


def with_attribute(kind: type[nn.Module], name: str, value: object) -> nn.Module:
    block = kind()
    setattr(block, name, value)
    return block


class WithEps(Attention):
    eps = 1e-12

    def divide(self, numerator: Tensor, denominator: Tensor) -> Tensor:
        return numerator / denominator.clamp_min(self.eps)


class WithGlobalEps(Attention):
    def divide(self, numerator: Tensor, denominator: Tensor) -> Tensor:
        return numerator / denominator.clamp_min(EPS)


TABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    # Operators
    "threshold": (residual(activate=lambda _, x: F.threshold(x, 0, 0)), "nn.functional.threshold"),
    "minimum": (
        residual(activate=lambda _, x: torch.minimum(F.relu(x), x.new_tensor(1e5))),
        "calls torch.Tensor.new_tensor",
    ),
    "clip_": (residual(activate=lambda _, x: x.clip_(0)), "calls torch.Tensor.clip_"),
    "hardtanh as relu": (
        lambda: residual(activate=lambda self, x: self.relu(x))(relu=nn.Hardtanh(0, 6)),
        r"unknown submodule relu \(Hardtanh\)",
    ),
    "subclass of relu": (
        lambda: residual(activate=lambda self, x: self.relu(x))(relu=BoundedReLU()),
        "computes clamp with min = 0",
    ),
    "functional batch norm": (
        residual(
            body=lambda self, x: self.bn2(
                self.conv2(
                    F.relu(
                        F.batch_norm(
                            self.conv1(x), self.bn1.running_mean, self.bn1.running_var, eps=1e-5
                        )
                    )
                )
            )
        ),
        "calls torch.nn.functional.batch_norm",
    ),
    "crop": (residual(add=lambda _, x, y: (x + y)[..., :4096]), "calls torch.Tensor.__getitem__"),
    "operator by its name": (
        residual(activate=lambda _, x: torch.ops.aten.hardtanh(x, 0.0, 6.0)),
        "calls aten.hardtanh",
    ),
    # Functions and constants kept in other places
    "partial": (
        configured(function=functools.partial(F.leaky_relu, negative_slope=0.0)),
        "calls torch.nn.functional.leaky_relu",
    ),
    "lambda": (
        configured(function=lambda x: F.relu(x).clamp_max(1e6)),
        "calls torch.Tensor.clamp_max",
    ),
    "callable object": (configured(function=Function()), r"uses its attribute function \(Function"),
    "hidden module": (configured(function=nn.ModuleList([nn.ReLU6()])[0]), "unknown submodule"),
    "modules in a list": (
        lambda: with_attribute(
            residual(activate=lambda self, x: self.functions[0](x)), "functions", [nn.ReLU6()]
        ),
        r"uses its attribute functions \(list\)",
    ),
    "tensor": (
        lambda: with_attribute(
            residual(add=lambda self, x, y: x * self.one + y), "one", torch.tensor(1.0000001)
        ),
        r"uses its attribute one \(Tensor\)",
    ),
    "eps of the instance": (
        lambda: with_attribute(WithEps, "eps", 1e-9),
        "eps of the block itself is 1e-09",
    ),
    "global eps": (WithGlobalEps, "computes clamp_min with min = 0.001"),
    "decorator": (residual(forward=limited(Residual.forward)), "computes clamp with min = None"),
    "call": (
        residual(__call__=lambda self, x: nn.Module.__call__(self, x).clamp(max=9)),
        "its class Other has a method __call__ of its own",
    ),
    "compiled function": (
        configured(function=torch.compile(lambda x: F.relu(x), backend="eager")),
        "what that depends on is not known",
    ),
    # State
    "counter": (residual(activate=counting), "it changes its attributes"),
    "global counter": (residual(activate=counting_globally), "changes the global CALLS"),
    "global list": (residual(activate=remembering), "it changes its attributes, or what its code"),
    "counter of a decorator": (
        residual(forward=counted(Residual.forward)),
        "changes calls, which it keeps between calls",
    ),
    "modes of layers": (
        residual(body=lambda self, x: Residual.body(self, x) if self.bn1.eval() else x),
        "its results differ",
    ),
    "import": (residual(activate=importing), "imports math as it runs"),
    # What differs from call to call, or from process to process
    "random": (branching(lambda x: random.random() < 1e-9), "names random, which may be random"),
    "time": (branching(lambda x: time.time() < 0), "uses time.time"),
    "environment": (branching(lambda x: "XATTN_NOTHING" in os.environ), "uses os.environ"),
    "mode of autograd": (branching(lambda x: not torch.is_grad_enabled()), "is_grad_enabled"),
    "tracing": (branching(lambda x: torch.jit.is_tracing()), "uses torch.jit.is_tracing"),
    "autocast": (residual(body=in_full_precision), "uses torch.autocast"),
    # What differs from input to input
    "dtype": (branching(lambda x: x.dtype == torch.float16), "reads torch.Tensor.dtype"),
    "device": (branching(lambda x: x.is_cuda), "reads torch.Tensor.is_cuda"),
    "layout": (branching(lambda x: x.stride(1) == 1), "calls torch.Tensor.stride"),
    "gradient": (branching(lambda x: not x.requires_grad), "its results differ"),
    "values": (branching(lambda x: x.max() > 1e9), "calls torch.Tensor.max"),
    "truth": (branching(lambda x: x.sum().gt(1e30)), "calls torch.Tensor.gt"),
    "one sample": (branching(lambda x: x.shape[0] == 1), "its results differ"),
    "one row": (branching(lambda x: x.shape[2] == 1), "its results differ"),
    "one column": (branching(lambda x: x.shape[3] == 1), "its results differ"),
    "one token": (branching(lambda x: x.shape[2:].numel() == 1), r"whether Eq\(height"),
    "square": (branching(lambda x: x.shape[2] == x.shape[3]), "whether Ne"),
    "size in parts": (
        branching(lambda x: int(x.shape[2] / 64) * 64 > 1000),
        "by the size of its input: whether .*height",
    ),
    "range": (branching(lambda x: len(range(x.shape[3])) > 999), r"whether Eq\(width"),
    "samples": (
        residual(add=lambda _, x, y: torch.stack([a + b for a, b in zip(x, y, strict=True)])),
        "calls torch.Tensor.unbind",
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_left(name: str) -> None:
    make, reason = TABLE[name]
    model = nn.ModuleList([make()])
    [entry] = report = convert_(model)
    assert entry.replacement is None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(entry.reason)
    assert len(str(report).splitlines()) == 2


def test_nothing_is_left_behind() -> None:
    """Neither random states nor the numbers of calls change."""
    model = nn.ModuleList([Residual(), residual(activate=counting)()])
    states = random.getstate(), torch.get_rng_state()
    convert_(model)
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert not hasattr(model[1], "calls")
