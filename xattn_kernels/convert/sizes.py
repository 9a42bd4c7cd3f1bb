"""Whether a block's code decides by the size of its input, for `xattn_kernels.convert`.

The block runs on fake tensors whose sizes are symbols. Every decision by a size is then seen as a
condition on symbols, whichever way it goes for the sizes that were tried. The sizes 0 and 1 are no
symbols to torch; 1 has to be tried.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.overrides import TorchFunctionMode

from xattn_kernels.convert.code import Left

_LENGTHS = (2, 3, 4, 7, 8, 15, 16, 31, 32, 33, 64, 100, 127, 128, 255, 256, 512, 1000, 1024, 4096)
"""For which conditions are looked at. Neighbours tell odd from even, and strict from not."""
_BATCHES = (2, 3, 5, 8, 64)
_SAMPLES = 200
_POINTWISE = ("relu", "relu_", "softplus", "clamp", "clamp_", "clamp_min", "clamp_min_")

Size = tuple[Any, ...]


class Sizes:
    """Sizes as symbols, and fake tensors that have them.

    Args:
        count: of different sizes.
    """

    def __init__(self, count: int) -> None:
        self._environment = ShapeEnv(duck_shape=False)
        self._mode = FakeTensorMode(shape_env=self._environment)
        # By these lengths torch decides what it has to: different ones.
        (self._batch,) = self._symbols(3)
        self.sizes: list[Size] = [self._symbols(11 + 2 * i, 12 + 2 * i) for i in range(count)]
        self._names = {self._batch.node.expr: "batch"}
        for i, size in enumerate(self.sizes):
            for length, name in zip(size, ("height", "width"), strict=True):
                self._names[length.node.expr] = f"{name}_{i}" if count > 1 else name

    def _symbols(self, *lengths: int) -> tuple[Any, ...]:
        context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * len(lengths))
        carrier = torch.empty(lengths, device="meta")
        return tuple(self._mode.from_tensor(carrier, symbolic_context=context).shape)

    def features(self, channels: int, size: Size) -> Tensor:
        """A fake map (B, `channels`, *`size`)."""
        with self._mode:
            return torch.empty((self._batch, channels, *size), dtype=torch.float64, device="cpu")

    def run(self, call: Callable[[], Any]) -> None:
        """Call something with fake maps."""
        with self._mode, enable_python_dispatcher(), torch.no_grad(), _Shortcut():
            call()

    def check(self) -> None:
        """See what was decided by sizes.

        Raises:
            Left: if another size would have decided otherwise.
        """
        for guard in self._environment.guards:
            symbols = sorted(guard.expr.free_symbols, key=str)
            for values in self._samples(symbols):
                if not guard.expr.subs(dict(zip(symbols, values, strict=True))):
                    names = {s: type(s)(self._names.get(s, str(s))) for s in symbols}
                    raise Left(
                        "its code decides by the size of its input: whether "
                        f"{guard.expr.xreplace(names)}"
                    )

    def _samples(self, symbols: Sequence[Any]) -> Iterator[list[int]]:
        """Some lengths for symbols."""
        generator = random.Random(0)
        choices = [_BATCHES if self._names.get(s) == "batch" else _LENGTHS for s in symbols]
        for _ in range(_SAMPLES):
            yield [generator.choice(lengths) for lengths in choices]


class _Shortcut(TorchFunctionMode):
    """Leaves out computations of which nothing matters but the size of the output."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in _POINTWISE and args:
            return args[0]
        if function is F.interpolate and args and isinstance(kwargs.get("size"), Sequence):
            return args[0].new_empty((*args[0].shape[:2], *kwargs["size"]))
        return function(*args, **kwargs)


class Sized(nn.Module):
    """Stands for a layer that keeps the size of a map (B, `before`, H, W), but for its width."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self._before, self._after = before, after

    def forward(self, x: Tensor) -> Tensor:
        same = self._before == self._after
        return x if same else x.new_empty((x.shape[0], self._after, *x.shape[2:]))


class LikeTarget(nn.Module):
    """Stands for an attention block, whose output has the size of its first argument."""

    def __init__(self, argument: str) -> None:
        super().__init__()
        self._argument = argument

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        target: Tensor = args[0] if args else kwargs[self._argument]
        return target.new_empty(target.shape)
