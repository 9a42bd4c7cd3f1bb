"""Weights with batch norms folded in, kept for as long as nobody writes to the parameters.

By default nothing that is computed from parameters outlives a call: whatever wrote to them, the
next call sees it. `freeze_` is the promise that nobody will.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from xattn_kernels.ops.tracing import is_observed

if TYPE_CHECKING:
    from typing_extensions import Self

_TRACERS = (
    "Python code, and cannot read this module's: use torch.jit.trace, torch.export or "
    "torch.compile, which follow tensors"
)

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


class Freezable(nn.Module):
    """A module that computes values from its parameters, and keeps them while it is frozen.

    Copies, pickles and replicas of it are not frozen. `train` ends freezing; `to` and
    `load_state_dict` have the values computed again.
    """

    _frozen: dict[Hashable, Any] | None = None

    def derived(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` computes from the parameters; while frozen, only once for each `key`."""
        if self._frozen is None or is_observed():
            return make()
        if key not in self._frozen:
            with torch.inference_mode(False), torch.no_grad():
                self._frozen[key] = make()
        result: T = self._frozen[key]
        return result

    def train(self, mode: bool = True) -> Self:
        if mode:
            self._frozen = None
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self._forget()
        result: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def _forget(self) -> None:
        if self._frozen is not None:
            self._frozen = {}

    def __prepare_scriptable__(self) -> Any:
        raise NotImplementedError(f"{type(self).__name__}: torch.jit.script reads {_TRACERS}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_frozen": None}

    def _replicate_for_data_parallel(self) -> Self:
        replica: Self = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica._frozen = None
        return replica


def refuse_proxies(module: nn.Module, *inputs: object) -> None:
    """Refuse to be traced by symbols in place of tensors.

    Raises:
        NotImplementedError: under `torch.fx.symbolic_trace`.
    """
    if any(isinstance(x, torch.fx.Proxy) for x in inputs):
        raise NotImplementedError(
            f"{type(module).__name__}: torch.fx.symbolic_trace reads {_TRACERS}"
        )


def freeze_(model: M) -> M:
    """Keep weights with batch norms folded in, from the next call on: faster, for more memory.

    The modules of this package inside `model` then fold their batch norms once, and not in every
    call. It is a promise that parameters and running statistics are not written to until
    `unfreeze_`: results for other values would be those of the old ones. What ends or renews it by
    itself: ``model.train()`` unfreezes; ``model.to(...)`` and ``load_state_dict`` have the weights
    folded again.

    Args:
        model: any model in evaluation mode, converted by `convert_` or not.

    Returns:
        `model`, changed in place.

    Raises:
        TypeError: if `model` is not an `nn.Module`.
        ValueError: for a model in training mode.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
    if model.training:
        raise ValueError("model: got one in training mode, expected model.eval()")
    for module in model.modules():
        if isinstance(module, Freezable) and not module.training:
            module._frozen = {}
    return model


def unfreeze_(model: M) -> M:
    """End `freeze_`: parameters may be written to, and the folded weights are given up.

    Args:
        model: any model.

    Returns:
        `model`, changed in place.

    Raises:
        TypeError: if `model` is not an `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
    for module in model.modules():
        if isinstance(module, Freezable):
            module._frozen = None
    return model


@contextlib.contextmanager
def frozen(model: M) -> Iterator[M]:
    """`freeze_` within a ``with`` block. What was frozen before stays so.

    Args:
        model: as for `freeze_`.

    Raises:
        TypeError: as `freeze_`.
        ValueError: as `freeze_`.
    """
    before = (
        [m for m in model.modules() if isinstance(m, Freezable) and m._frozen is not None]
        if isinstance(model, nn.Module)
        else []
    )
    kept = [module._frozen for module in before]
    freeze_(model)
    for module, values in zip(before, kept, strict=True):
        module._frozen = values
    try:
        yield model
    finally:
        unfreeze_(model)
        for module, values in zip(before, kept, strict=True):
            module._frozen = None if module.training else values
