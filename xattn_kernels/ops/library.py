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

#: Context in which operators are called without being recorded for a backward pass.
below_autograd = torch._C._AutoDispatchBelowAutograd


def define(name: str, schema: str, op: str, function: str, fake: Callable[..., Any]) -> Any:
    """Register an operator that runs ``function`` of the engine named by its last argument.

    Args:
        name: name in ``torch.ops.xattn_kernels``.
        schema: arguments, the last one ``str engine``, and results.
        op: folder of the engines' modules.
        function: what to call in the engine's module, with all arguments but the last.
        fake: gives the shapes, dtypes and strides of the results, from all arguments.

    Returns:
        The operator, to be called.
    """

    def run(*args: Any) -> Any:
        return getattr(registry.engine_module(op, args[-1]), function)(*args[:-1])

    library.define(name + schema, tags=_TAGS)
    for device in ("CPU", "CUDA"):
        library.impl(name, run, device)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    return getattr(torch.ops.xattn_kernels, name).default


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


def once(
    name: str,
    gradients: list[Tensor],
    inputs: Sequence[Tensor | None],
    instead: str = 'with backend("reference") it can',
) -> list[Tensor]:
    """Return gradients that can be used freely but not be differentiated again.

    Only needed under ``create_graph=True``; differentiating them raises NotImplementedError, which
    says what can be done ``instead``.
    """
    if not torch.is_grad_enabled():
        return gradients
    return list(_once((name, instead), len(gradients), *gradients, *inputs))


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, names: tuple[str, str], count: int, *tensors: Tensor) -> Any:
        ctx.names = names
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        name, instead = ctx.names
        raise NotImplementedError(
            f"{name} cannot be differentiated twice: it has no double backward; {instead}"
        )


_once: Callable[..., tuple[Tensor, ...]] = _Once.apply
