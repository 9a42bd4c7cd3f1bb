"""Watching which operators a block runs between its layers, for `xattn_kernels.convert`.

Two levels are watched. Functions of torch, as the block's code calls them, show what is hidden
below: a dropout that does nothing today, a cast to the dtype that the tensor has already. The
operators that these come down to show the constants: bounds, slopes, thresholds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

_SIZES = ("shape", "size", "numel", "nelement")
_FUNCTIONS = (
    "relu relu_ softplus add add_ mul matmul bmm mm einsum sum clamp clamp_ clamp_min clamp_min_ "
    "div div_ true_divide cat concat concatenate interpolate view view_as reshape reshape_as "
    "flatten unflatten transpose t permute movedim swapaxes swapdims squeeze unsqueeze expand "
    "expand_as contiguous dim ndim shape size numel nelement requires_grad register_hook T mT"
)
"""Names of functions, methods and attributes of tensors that may occur."""
_WITHOUT_NUMBERS = (
    "relu relu_ mul div div_ mm bmm cat view _unsafe_view reshape _reshape_alias transpose t "
    "permute squeeze unsqueeze expand clone detach alias"
)
_CLAMP = {"min": 1e-12, "max": None}
_OPERATORS: Mapping[str, Mapping[str, object]] = {
    **{name: {} for name in _WITHOUT_NUMBERS.split()},
    "softplus": {"beta": 1, "threshold": 20},
    "add": {"alpha": 1},
    "add_": {"alpha": 1},
    "clamp": _CLAMP,
    "clamp_": _CLAMP,
    "clamp_min": _CLAMP,
    "clamp_min_": _CLAMP,
    "sum": {"dtype": None},
    "upsample_bilinear2d": {"align_corners": False},
}
"""Operators that may run, with the values that arguments must have. No other numbers may occur."""


class Observer(TorchFunctionMode):
    """Collects what a block does that no known block does. Within `watch`.

    Args:
        layers: modules that may do what they like: those that a replacement shares. They get hooks.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.findings: list[str] = []
        """As what a report says of the block."""
        self.reads_sizes = False
        """Whether the block's code looks at the size of a tensor."""
        self._in_layer = False
        for layer in dict.fromkeys(layers):
            layer.register_forward_pre_hook(self._enter)
            layer.register_forward_hook(self._leave, always_call=True)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watch a forward pass."""
        with _Operators(self), self:
            yield

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if not self._in_layer:
            full = str(resolve_name(function) or getattr(function, "__name__", function))
            name = full.removesuffix(".__get__")
            last = name.rpartition(".")[2]
            caller = str(sys._getframe(1).f_globals.get("__name__"))
            if caller.startswith("torch.utils."):
                self.findings.append(f"its code runs {caller}, which its replacement does not")
            elif last not in _FUNCTIONS.split():
                verb = "calls" if name == full else "reads"
                self.findings.append(f"its code {verb} {name}, which its replacement does not")
            elif last == "register_hook" and args[1:] != (Tensor.contiguous,):
                self.findings.append("its code has a hook on the gradient of a tensor")
            self.reads_sizes |= last in _SIZES
        return function(*args, **(kwargs or {}))

    def see_operator(self, operator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Look at a call of an operator of torch's dispatcher."""
        if not self._in_layer:
            self.findings += _objections(operator, args, kwargs)

    def see_output(self, output: Tensor) -> None:
        """Look at what leads to an output."""
        nodes, seen = [output.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is not None and node not in seen:
                seen.add(node)
                if isinstance(node, torch.autograd.function.BackwardCFunction):
                    self.findings.append(f"it has a gradient of its own, {node.name()}")
                nodes += [following for following, _ in node.next_functions]

    def _enter(self, layer: nn.Module, args: object) -> None:
        self._in_layer = True

    def _leave(self, layer: nn.Module, args: object, output: object) -> None:
        self._in_layer = False


class _Operators(TorchDispatchMode):
    def __init__(self, observer: Observer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._observer = observer

    def __torch_dispatch__(
        self,
        operator: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self._observer.see_operator(operator, args, kwargs or {})
        return operator(*args, **(kwargs or {}))


def _objections(operator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[str]:
    """What speaks against a call of an operator."""
    name = operator._schema.name
    namespace, _, short = name.partition("::")
    expected = _OPERATORS.get(short) if namespace == "aten" else None
    if expected is None:
        yield f"it computes {name}, which its replacement does not"
        return
    given = {a.name: a.default_value for a in operator._schema.arguments if a.has_default_value()}
    given |= zip((a.name for a in operator._schema.arguments), args, strict=False)
    given |= kwargs
    for argument in operator._schema.arguments:
        kind, value = str(argument.type), given[argument.name]
        if argument.name in expected:
            wanted = expected[argument.name]
            shown = "a tensor" if isinstance(value, Tensor) else value
            if shown != wanted:
                what = f"{argument.name} = {shown}, where {wanted} is expected"
                yield f"it computes {short} with {what}"
        elif kind == "Tensor" and not isinstance(value, Tensor):
            yield f"it computes {short} with the number {value}, where a tensor is expected"
        elif kind == "number":
            yield f"it computes {short} with {argument.name} = {value}, which is not expected"
    if short == "upsample_bilinear2d":
        x, size = given["self"], given["output_size"]
        scales = (given.get("scales_h"), given.get("scales_w"))
        for n, m, scale in zip(x.shape[2:], size, scales, strict=True):
            if scale is not None and n * scale != m:
                yield f"it enlarges by {scale} what becomes {m} of {n}"
