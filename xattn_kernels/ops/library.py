"""What the registered operators share: their library, how they find engines, double backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from xattn_kernels import registry

NAMESPACE = "xattn_kernels"

library = torch.library.Library(NAMESPACE, "FRAGMENT")

# Results are read and written through strides: a compiler must keep those of the fake kernels.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

#: What to do for derivatives that operators with kernels have not.
INSTEAD = 'with backend("reference") and, in modules, recompute=False it can'

#: Context in which operators are called without being recorded for a backward pass.
below_autograd = torch._C._AutoDispatchBelowAutograd


def define(
    name: str,
    schema: str,
    op: str,
    function: str | Callable[..., Any],
    fake: Callable[..., Any],
) -> Any:
    """Register an operator that runs ``function`` of the engine named by its last argument.

    Args:
        name: name in ``torch.ops.xattn_kernels``.
        schema: arguments, the last one ``str engine``, and results.
        op: folder of the engines' modules.
        function: what to call in the engine's module, with all arguments but the last; or what to
            call with that module and these arguments.
        fake: gives the shapes, dtypes and strides of the results, from all arguments.

    Returns:
        The operator, to be called.
    """

    def run(*args: Any) -> Any:
        module = registry.engine_module(op, args[-1])
        values = [_resolved(x) for x in args[:-1]]
        if isinstance(function, str):
            return getattr(module, function)(*values)
        return function(module, *values)

    library.define(name + schema, tags=_TAGS)
    for device in ("CPU", "CUDA"):
        library.impl(name, run, device)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    return getattr(torch.ops.xattn_kernels, name).default


def _resolved(x: Any) -> Any:
    """An argument whose tensors hold the values that they stand for.

    A tensor with torch's negative bit stands for minus what is in its memory; torch resolves it for
    operators, but not in lists with missing tensors.
    """
    if isinstance(x, Tensor):
        return x.resolve_neg()
    if isinstance(x, list | tuple) and any(isinstance(y, Tensor) and y.is_neg() for y in x):
        return [_resolved(y) for y in x]
    return x


def bump_versions(op: Any, outputs: int) -> None:
    """Have autograd notice that ``op`` writes to the tensors of its argument number ``outputs``."""

    def run(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        torch.autograd.graph.increment_version(args[outputs])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    library.impl(op.name().partition("::")[2], run, "ADInplaceOrView", with_keyset=True)


def needs_gradient(*groups: Iterable[Tensor | None]) -> bool:
    """Whether autograd is to record an operator of these tensors."""
    return torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for group in groups for x in group
    )


def slots_in_use(edges: Sequence[int], queries: int, sources: int) -> list[bool]:
    """Which slots have an edge, in the order queries, keys, values; the others have no gradient."""
    used_queries, used_sources = set(edges[0::3]), set(edges[1::3])
    by_source = [slot in used_sources for slot in range(sources)]
    return [slot in used_queries for slot in range(queries)] + by_source + by_source


def place_gradients(gradients: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The wanted gradients at the places of their inputs, None at the others."""
    remaining = iter(gradients)
    return [next(remaining) if want else None for want in wanted]


def forbid_double_backward(
    name: str,
    gradients: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    instead: str = INSTEAD,
) -> tuple[Tensor | None, ...]:
    """Return gradients that can be used freely but not be differentiated again.

    Only needed under ``create_graph=True``; differentiating them with respect to anything that they
    depend on raises NotImplementedError. (torch's `once_differentiable` does so only where the
    incoming gradients require one, and only on the way to all inputs at once.)

    Args:
        name: of what has no double backward.
        gradients: to be returned; None for none.
        inputs: all that they depend on: what was saved for backward, and the incoming gradients.
        instead: what to do to get second derivatives.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return tuple(gradients)
    found = [x for x in gradients if x is not None]
    marked = _forbid((name, instead), len(found), *found, *inputs)
    return tuple(place_gradients(marked, [x is not None for x in gradients]))


def check_not_batched(name: str, gradients: Sequence[Tensor | None]) -> None:
    """Refuse a backward pass of several gradients at once: kernels take one.

    Raises:
        NotImplementedError: in ``is_grads_batched=True`` and under `torch.func.vmap`.
    """
    if torch.compiler.is_compiling():
        return
    batched = torch._C._functorch.is_legacy_batchedtensor
    if torch._C._are_functorch_transforms_active() or any(
        x is not None and batched(x) for x in gradients
    ):
        raise NotImplementedError(
            f"{name}: its backward pass takes one gradient at a time, not a batch of them "
            f"(is_grads_batched, vmap); {INSTEAD}"
        )


class _Forbid(torch.autograd.Function):
    @staticmethod
    def forward(names: tuple[str, str], count: int, *tensors: Tensor | None) -> Any:
        return tuple(x.view_as(x) for x in tensors[:count] if x is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.names = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        name, instead = ctx.names
        raise NotImplementedError(
            f"{name} cannot be differentiated twice: it has no double backward; {instead}"
        )


_forbid: Callable[..., tuple[Tensor, ...]] = _Forbid.apply
