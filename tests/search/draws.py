"""Random choices of a case, all from its seed: sizes, values of features, layouts of tensors."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

GRADIENT = "gradient of "

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Draw:
    """A source of choices and numbers that depends on a seed and nothing else."""

    def __init__(self, seed: object) -> None:
        self.random = random.Random(str(seed))
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(48))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def one(self, options: Sequence[T]) -> T:
        return self.random.choice(options)

    def weighted(self, options: dict[T, float]) -> T:
        """One of `options`, by their weights."""
        return self.random.choices([*options], weights=[*options.values()])[0]

    def integer(self, low: int, high: int) -> int:
        """From `low` to `high`, both included."""
        return self.random.randint(low, high)

    def likely(self, chance: float) -> bool:
        return self.random.random() < chance

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)


def _two_clusters(draw: Draw, x: Tensor) -> Tensor:
    batch, channels, tokens = x.shape
    first = draw.normal(batch, 1, tokens) < 0
    return torch.where(first, draw.normal(1, channels, 1), draw.normal(1, channels, 1))


def _column(draw: Draw, x: Tensor, value: float | None) -> Tensor:
    """One channel 1e4 times as large, or of one value."""
    x, c = x.clone(), draw.integer(0, x.shape[1] - 1)
    x[:, c] = 1e4 * x[:, c] if value is None else value
    return x


#: From standard normal features (B, C, N) to those of a kind; the first is by far the commonest.
VALUES: dict[str, Callable[[Draw, Tensor], Tensor]] = {
    "ordinary": lambda draw, x: x,
    "rank_1": lambda draw, x: draw.normal(1, x.shape[1], 1) * x[:, :1],
    "huge_channel": lambda draw, x: _column(draw, x, None),
    "constant_channel": lambda draw, x: _column(draw, x, 3.25),
    "common_mode": lambda draw, x: x + 100 * draw.normal(x.shape[0], 1, x.shape[2]),
    "mean_10": lambda draw, x: x + 10,
    "mean_100": lambda draw, x: x + 100,
    "two_clusters": _two_clusters,
    "sparse": lambda draw, x: x * (draw.normal(*x.shape) > 1),
    "tiny": lambda draw, x: 1e-4 * x,
    "zero": lambda draw, x: 0 * x,
    "same_samples": lambda draw, x: x[:1].expand(x.shape),
    "same_tokens": lambda draw, x: x[:, :, :1].expand(x.shape),
    "same_channels": lambda draw, x: x[:, :1].expand(x.shape),
}


_moves: list[int] = []


@contextlib.contextmanager
def moved(seed: int) -> Iterator[None]:
    """Have features of cases differ by some thousandths, and nothing else.

    What is wrong stays so; by which side of the kink of a relu a rounding error came to lie, not.
    """
    _moves.append(seed)
    try:
        yield
    finally:
        _moves.pop()


#: Kinds of which a batch norm by their statistics leaves noise.
DEGENERATE = ("zero", "same_tokens", "constant_channel")


def kind_of_values(draw: Draw, chance: float = 0.3) -> str:
    kinds = list(VALUES)
    return draw.one(kinds[1:]) if draw.likely(chance) else kinds[0]


def values(draw: Draw, kind: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Features of a kind, (B, C, N) or (B, C, H, W); those of equal ones have strides of 0."""
    x = draw.normal(*shape)
    if x.numel() == 0:
        return x.to(dtype)
    if _moves:
        x = x + 0.01 * Draw(_moves[-1]).normal(*shape)
    y = VALUES[kind](draw, x.flatten(2)).unflatten(2, x.shape[2:])
    if not kind.startswith("same"):
        return y.to(dtype)
    small = tuple(slice(1) if s == 0 and n > 1 else slice(None) for s, n in _strided(y))
    return y[small].to(dtype).expand(y.shape)


def _strided(x: Tensor) -> list[tuple[int, int]]:
    return list(zip(x.stride(), x.shape, strict=True))


def _permuted(x: Tensor, order: Sequence[int]) -> Tensor:
    """As `x`, with its dimensions in this order in memory, slowest first."""
    dense = x.permute(tuple(order)).clone(memory_format=torch.contiguous_format)
    return dense.permute([list(order).index(d) for d in range(x.dim())])


def _channels_last(x: Tensor) -> Tensor:
    return _permuted(x, (0, *range(2, x.dim()), 1))


def _batch_last(x: Tensor) -> Tensor:
    return _permuted(x, (*range(1, x.dim()), 0))


def _turned(x: Tensor) -> Tensor:
    """The last two dimensions the other way round."""
    return _permuted(x, (*range(x.dim() - 2), x.dim() - 1, x.dim() - 2))


def _in(wide: Tensor, place: tuple[slice, ...], x: Tensor) -> Tensor:
    wide[place] = x
    return wide[place]


def _sliced(x: Tensor) -> Tensor:
    """Channels of a wider map, at an offset; NaN around."""
    c = x.shape[1]
    wide = x.new_full((x.shape[0], 3 * c + 1, *x.shape[2:]), float("nan"))
    return _in(wide, (slice(None), slice(c + 1, 2 * c + 1)), x)


def _sliced_last(x: Tensor) -> Tensor:
    """As `_sliced`, of a map in channels_last."""
    c = x.shape[1]
    wide = _channels_last(x.new_full((x.shape[0], 3 * c + 1, *x.shape[2:]), float("nan")))
    return _in(wide, (slice(None), slice(c + 1, 2 * c + 1)), x)


def _cropped(x: Tensor) -> Tensor:
    """A part of a larger map: rows with NaN at both ends."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), float("nan"))
    return _in(wide, (..., slice(1, x.shape[-1] + 1)), x)


def _stepped(x: Tensor) -> Tensor:
    """Every second channel and every third token of a larger map."""
    if x.dim() == 2:
        return _stepped(x.unsqueeze(1)).squeeze(1)
    shape = (x.shape[0], 2 * x.shape[1], *x.shape[2:-1], 3 * x.shape[-1])
    wide = x.new_full(shape, float("nan"))
    return _in(wide, (slice(None), slice(0, None, 2), ..., slice(1, None, 3)), x)


def _negative(x: Tensor) -> Tensor:
    """With the negative bit: minus what stands in memory."""
    return torch._neg_view(-x)


def _conjugate(x: Tensor) -> Tensor:
    """The imaginary part of a conjugate view: the negative bit, and steps of 2."""
    if x.dtype not in (torch.float32, torch.float64):
        return _negative(x)
    return torch.complex(torch.full_like(x, float("nan")), -x.contiguous()).conj().imag


def _odd_batch(x: Tensor) -> Tensor:
    """A single sample with a batch stride that nothing follows from."""
    x = x.contiguous()
    return x.as_strided(x.shape, (x.shape[1], *x.stride()[1:])) if x.shape[0] == 1 else x


def _odd_batch_last(x: Tensor) -> Tensor:
    x = _channels_last(x)
    return x.as_strided(x.shape, (x.shape[1], *x.stride()[1:])) if x.shape[0] == 1 else x


#: Views of other strides with the same values.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
    "as_drawn": lambda x: x,
    "channels_last": _channels_last,
    "batch_last": _batch_last,
    "turned": _turned,
    "sliced": _sliced,
    "sliced_last": _sliced_last,
    "cropped": _cropped,
    "stepped": _stepped,
    "negative": _negative,
    "conjugate": _conjugate,
    "odd_batch": _odd_batch,
    "odd_batch_last": _odd_batch_last,
}
_COMMON = {"contiguous": 6.0, "channels_last": 4.0, "as_drawn": 3.0}


def kind_of_layout(draw: Draw) -> str:
    return draw.weighted({name: _COMMON.get(name, 1.0) for name in LAYOUTS})


def cotangents(
    seed: object, outputs: Mapping[str, Tensor], dtype: torch.dtype, layouts: bool
) -> dict[str, Tensor]:
    """Gradients of outputs, equal in all samples or tokens at times, none of some outputs.

    Args:
        seed: the same values for the same seed and names.
        outputs: what they are gradients of, and in whose dtypes.
        dtype: of the values.
        layouts: whether to give them in any layout.
    """
    found = {}
    unused = len(outputs) > 1 and Draw(seed).likely(0.2)
    for name, y in outputs.items():
        draw = Draw(f"{seed} {name}")
        if unused and draw.likely(0.5):
            continue
        x = draw.normal(*y.shape)
        for dim in range(y.dim()):
            if draw.likely(0.05) and y.shape[dim]:
                x = x.narrow(dim, 0, 1)
        x = x.to(dtype).to(y.dtype).expand(y.shape)
        if layouts and y.dim() >= 3 and x.numel():
            x = LAYOUTS[kind_of_layout(draw)](x)
        found[name] = x
    return found


def gradients(
    outputs: Mapping[str, Tensor], leaves: Mapping[str, Tensor], given: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Gradients of the leaves that want one; zeros where there is none."""
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    through = {name: y for name, y in outputs.items() if y.requires_grad and name in given}
    found: Sequence[Tensor | None] = [None] * len(wanted)
    if wanted and through:
        found = torch.autograd.grad(
            [*through.values()],
            [*wanted.values()],
            [given[name] for name in through],
            allow_unused=True,
        )
    return {
        GRADIENT + name: torch.zeros_like(x) if g is None else g
        for (name, x), g in zip(wanted.items(), found, strict=True)
    }
