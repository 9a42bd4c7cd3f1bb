"""Pairs of modules under test and op-by-op modules, with inputs and what to compare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from xattn_kernels import modules
from xattn_kernels.testing import op_by_op

TASKS = ("semseg", "depth", "normals")
WIDTHS = (12, 18, 24)
CLASSES = ("CrossAttention", "CrossTaskAttention", "CrossScaleHead")


@dataclass
class Pair:
    """A module, the op-by-op module in the same state, and the arguments of a call."""

    ours: nn.Module
    theirs: nn.Module
    arguments: tuple[Any, ...]

    def leaves(self) -> list[Tensor]:
        return tree_leaves(self.arguments)

    def with_arguments(self, **options: Any) -> tuple[Any, ...]:
        """The arguments after `Tensor.to(**options)`, without a gradient."""
        return tree_map(lambda x: x.detach().to(**options), self.arguments)

    def reset(self) -> None:
        """Give `ours` the state of `theirs`."""
        self.ours.load_state_dict(self.theirs.state_dict())


def make(
    name: str,
    *,
    dtype: torch.dtype = torch.float64,
    batch: int = 2,
    size: tuple[int, int] = (6, 8),
    training: bool = True,
    requires_grad: bool = True,
    seed: int = 0,
    recompute: bool | str = "auto",
    **options: Any,
) -> Pair:
    """A pair with random parameters and running statistics."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return x.to(dtype).requires_grad_(requires_grad)

    height, width = size
    arguments: tuple[Any, ...]
    if name == "CrossAttention":
        shape: tuple[Any, ...] = (WIDTHS[0],)
        arguments = (draw(batch, 12, *size), draw(batch, 12, height // 2, width // 2))
    elif name == "CrossTaskAttention":
        shape = (TASKS, WIDTHS[0])
        names = options.get("auxiliary_tasks") or TASKS
        arguments = ({task: draw(batch, 12, *size) for task in names},)
    else:
        shape = (WIDTHS, 5) if name == "CrossScaleHead" else (WIDTHS,)
        sizes = [(batch, c, height >> s, width >> s) for s, c in enumerate(WIDTHS)]
        arguments = ([draw(*one) for one in sizes],)
    ours = getattr(modules, name)(*shape, **options, recompute=recompute).to(dtype)
    reference = "CrossScaleHead" if name == "CrossScaleAttention" else name
    shape = (WIDTHS, 5) if reference == "CrossScaleHead" else shape
    theirs = getattr(op_by_op, reference)(*shape, **options).to(dtype)
    randomise(theirs, generator)
    if reference == name:
        ours.load_state_dict(theirs.state_dict(), strict=True)
    return Pair(ours.train(training), theirs.train(training), arguments)


def randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Random batch-norm parameters and running statistics; convolutions keep theirs."""
    for name, x in module.state_dict().items():
        draw = torch.rand(x.shape, generator=generator, dtype=torch.float64)
        if name.endswith("running_var") or (x.dim() == 1 and name.endswith("weight")):
            x.copy_(0.5 + draw)
        elif name.endswith(("running_mean", "bias")):
            x.copy_(0.4 * draw - 0.2)


def tensors(value: Any) -> list[Tensor]:
    return tree_leaves(value)


def gradients(
    module: Any, arguments: Any, parameters: Sequence[Tensor]
) -> tuple[Any, list[Tensor]]:
    """Outputs, and gradients of a fixed random functional of them, zeros where there are none."""
    outputs = module(*arguments)
    generator = torch.Generator().manual_seed(1)
    weights = [
        torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
        for y in tensors(outputs)
    ]
    leaves = [x for x in (*tensors(arguments), *parameters) if x.requires_grad]
    found = torch.autograd.grad(tensors(outputs), leaves, weights, allow_unused=True)
    return outputs, [
        torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)
    ]


def distance(actual: Any, expected: Any) -> float:
    """Largest relative L2 distance of corresponding tensors; 0 where both are rounding noise."""
    worst = 0.0
    for a, e in zip(tensors(actual), tensors(expected), strict=True):
        assert a.shape == e.shape
        a, e = a.detach().double(), e.detach().double()
        if max(a.norm(), e.norm()) > 1e-12:
            worst = max(worst, float((a - e).norm() / e.norm()))
    return worst


def compare_training(pair: Pair, tolerance: float = 1e-9) -> None:
    """Outputs, gradients and all buffers after one forward and backward."""
    ours, our_gradients = gradients(pair.ours, pair.arguments, [*pair.ours.parameters()])
    theirs, gradients_ = gradients(pair.theirs, pair.arguments, [*pair.theirs.parameters()])
    assert distance(ours, theirs) <= tolerance
    assert distance(our_gradients, gradients_) <= tolerance
    compare_buffers(pair, tolerance)


def compare_buffers(pair: Pair, tolerance: float = 1e-9) -> None:
    for (name, a), (_, b) in zip(
        pair.ours.named_buffers(), pair.theirs.named_buffers(), strict=True
    ):
        assert a.dtype == b.dtype, name
        assert distance(a, b) <= tolerance, name


def norms(module: nn.Module) -> Iterator[tuple[str, nn.BatchNorm2d]]:
    for name, child in module.named_modules():
        if isinstance(child, nn.BatchNorm2d):
            yield name, child


def set_norms(pair: Pair, **attributes: Any) -> None:
    """Set attributes of every batch norm of both modules."""
    for module in (pair.ours, pair.theirs):
        for _, bn in norms(module):
            for key, value in attributes.items():
                setattr(bn, key, value)


def as_mapping(value: Any) -> Mapping[Any, Tensor]:
    return dict(enumerate(tensors(value)))
