"""Values derived from parameters, kept until one of these changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from xattn_kernels.ops.features import is_transformed

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")


class DerivedCache:
    """Keeps one value per name together with what it was made of.

    A value is made again when one of its source tensors was written to (its version counter), has
    other memory, shape or strides, or when the settings differ. The sources' memory is held as
    long as the value, so that an equal address is the same memory. Writes through ``tensor.data``
    leave the version counter alone and go unnoticed: call `clear` after those.

    Copies and pickles of a cache are empty.
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[Hashable, list[Tensor], list[int], Any]] = {}

    def get(
        self, name: str, sources: Sequence[Tensor], settings: Hashable, make: Callable[[], T]
    ) -> T:
        """The value called `name`, from `make` if it is not known or outdated."""
        if torch.compiler.is_compiling() or is_transformed():
            return make()
        entry = self._entries.get(name)
        if entry is not None:
            known, aliases, versions, value = entry
            if known == settings and _unchanged(sources, aliases, versions):
                result: T = value
                return result
        result = make()
        if not any(x.is_inference() for x in sources):  # those count no versions
            aliases = [x.detach() for x in sources]
            versions = [x._version for x in sources]
            self._entries[name] = (settings, aliases, versions, result)
        return result

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> DerivedCache:
        return DerivedCache()

    def __reduce__(self) -> tuple[type[DerivedCache], tuple[()]]:
        return DerivedCache, ()


def _unchanged(sources: Sequence[Tensor], aliases: list[Tensor], versions: list[int]) -> bool:
    return len(sources) == len(aliases) and all(
        x.dtype == alias.dtype and x.is_set_to(alias) and x._version == version
        for x, alias, version in zip(sources, aliases, versions, strict=True)
    )


class CacheOwner(nn.Module):
    """A module that keeps values derived from its parameters; forgets them when it is converted
    or trained, to free their memory.
    """

    _cache: DerivedCache

    def clear_cache(self) -> None:
        """Forget folded weights: needed only after writing to parameters through ``.data``."""
        for module in self.modules():
            if isinstance(module, CacheOwner):
                module._cache.clear()

    def train(self, mode: bool = True) -> Self:
        if mode:
            self._cache.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._cache.clear()
        result: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return result
