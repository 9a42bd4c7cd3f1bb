"""What a swapped block relies on, and noticing that it changed, for `xattn_kernels.convert`."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

from xattn_kernels.convert.code import PLAIN, Code, closure, is_torch

INTERNAL = frozenset(vars(nn.Module()))
"""Attributes that every module has."""
CALL_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
NORMS = nn.modules.batchnorm._BatchNorm
LIBRARY = "_xattn_"
"""What the names of attributes begin with that this library sets on modules."""
_READ_LIVE = frozenset(["eps", "momentum"])
"""Of batch norms: replacements read these whenever they run."""


@dataclass(frozen=True)
class Settings:
    """Everything but tensors that decides what a block computes, as plain data."""

    names: frozenset[str] | None
    """Attributes that count, whatever module has them; None: all."""
    modules: tuple[tuple[object, ...], ...]
    """Path, class, attributes and whether there are hooks."""
    constants: tuple[tuple[str, object], ...]
    """Globals and attributes of classes."""


def settings_of(
    modules: Mapping[str, nn.Module],
    code: Code,
    hooked: frozenset[str],
    names: frozenset[str] | None = None,
) -> Settings:
    """The present settings of a block.

    Args:
        modules: all modules of the block by path.
        code: what their code names.
        hooked: paths of those whose hooks do not count, because they run.
        names: attributes that count. Default: what the code names, and what torch's layers have.
    """
    if names is None and code.names is not None:
        layers = [m for m in modules.values() if is_torch(type(m))]
        names = code.names.union(*(vars(m).keys() - INTERNAL for m in layers))
    return Settings(
        names,
        tuple(_module(path, m, names, path in hooked) for path, m in modules.items()),
        tuple((label, frozen(place.get(name))) for label, place, name in code.constants),
    )


def _module(
    path: str, module: nn.Module, names: frozenset[str] | None, hooked: bool
) -> tuple[object, ...]:
    kind = type(module)
    own = {name for name in vars(module) if name not in INTERNAL and not name.startswith(LIBRARY)}
    if isinstance(module, NORMS):
        own -= _READ_LIVE
        kind = nn.BatchNorm2d if kind is nn.SyncBatchNorm else kind
        own.discard("process_group")
    if names is not None:
        own = {name for name in own if name in names or hasattr(kind, name)}
    attributes = tuple((name, frozen(vars(module)[name])) for name in sorted(own))
    hooks = not hooked and any(vars(module)[name] for name in CALL_HOOKS)
    return path, frozen(kind), attributes, hooks


class _Identity:
    """Equal to what holds the same object."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def frozen(value: Any, outer: tuple[FunctionType, ...] = ()) -> object:
    """A value as something to keep, to compare by `==` and to hash, which later changes miss.

    What is no constant, container, class or function is equal to itself alone.

    Args:
        value: anything.
        outer: functions that it was found in.
    """
    kind, freeze = type(value), functools.partial(frozen, outer=outer)
    if kind in PLAIN:
        return kind.__name__, value
    if isinstance(value, list | tuple):
        return kind.__name__, *map(freeze, value)
    if isinstance(value, set | frozenset):
        return kind.__name__, frozenset(map(freeze, value))
    if isinstance(value, Mapping):
        return kind.__name__, *((freeze(key), freeze(x)) for key, x in value.items())
    if isinstance(value, functools.partial):
        return "partial", *map(freeze, (value.func, value.args, value.keywords))
    if isinstance(value, MethodType):
        return kind.__name__, _Identity(value.__self__), freeze(value.__func__)
    if isinstance(value, staticmethod | classmethod):
        return kind.__name__, freeze(value.__func__)
    if isinstance(value, property):
        return kind.__name__, freeze(value.fget)
    if isinstance(value, FunctionType):
        name = (value.__module__, value.__qualname__)
        if value in outer:
            return name
        fixed = (value.__defaults__, value.__kwdefaults__, closure(value))
        return *name, _digest(value.__code__), frozen(fixed, (*outer, value))
    if isinstance(value, type | BuiltinFunctionType):
        return kind.__name__, value.__module__, value.__qualname__
    if isinstance(value, ModuleType):
        return kind.__name__, value.__name__
    return _Identity(value)


def _digest(code: CodeType) -> str:
    """Equal for equal code in the same version of Python, in another process as well."""
    constants = [_digest(x) if isinstance(x, CodeType) else frozen(x) for x in code.co_consts]
    for i, x in enumerate(code.co_consts):
        if isinstance(x, frozenset):
            constants[i] = sorted(map(repr, x))
    parts = (code.co_code, code.co_names, code.co_varnames, code.co_freevars, constants)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


_Read = Callable[[Mapping[str, Any]], object]
_Watched = tuple[nn.Module, type, dict[str, Any], int, _Read, object]
"""A module, its class, attributes and their number, and how to read those that count."""


class Watch:
    """Notices cheaply that something may have been changed since it was made.

    Args:
        modules: whose attributes and children are watched.
        ignored: for modules by id, further attributes that are not.
        code: whose constants are watched.
    """

    def __init__(
        self, modules: Iterable[nn.Module], ignored: Mapping[int, frozenset[str]], code: Code
    ) -> None:
        self._modules = [*self._watched(modules, ignored)]
        self._constants = [(place, name, place.get(name)) for _, place, name in code.constants]

    @staticmethod
    def _watched(
        modules: Iterable[nn.Module], ignored: Mapping[int, frozenset[str]]
    ) -> Iterator[_Watched]:
        unwatched = INTERNAL - {"_modules", *CALL_HOOKS}
        for module in {id(m): m for m in modules}.values():
            attributes = vars(module)
            names = attributes.keys() - unwatched - ignored.get(id(module), frozenset())
            read = itemgetter(*names)
            values = _copied(read(attributes))
            yield module, type(module), attributes, len(attributes), read, values

    def holds(self) -> bool:
        """Whether nothing was changed."""
        try:
            return all(
                type(module) is kind and len(attributes) == size and read(attributes) == values
                for module, kind, attributes, size, read, values in self._modules
            ) and all(place.get(name) is value for place, name, value in self._constants)
        except Exception:  # gone, or of a kind that cannot be compared
            return False


def _copied(value: Any) -> Any:
    """A copy of nested built-in containers, around the same objects."""
    if isinstance(value, dict):
        return {key: _copied(x) for key, x in value.items()}
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    return set(value) if type(value) is set else value
