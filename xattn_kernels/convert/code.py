"""What the Python code of a block depends on, for `xattn_kernels.convert`.

A block may only be swapped if nothing but its arguments, parameters and settings can change what
it computes. Its code is read for that: `forward` of the block and of the modules in it, and all
functions that these name, be they methods, globals, in closures or kept as attributes.
"""

from __future__ import annotations

import builtins
import collections
import dis
import functools
import itertools
import math
import operator
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    MethodType,
    ModuleType,
)
from typing import Any

import torch
from torch import nn
from torch.overrides import get_ignored_functions, resolve_name
from torch.utils.checkpoint import checkpoint

PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    types.EllipsisType,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
"""Types of constants."""

_PURE = (builtins, collections, collections.abc, functools, itertools, math, operator, typing)
"""Modules whose functions depend on nothing but their arguments, but for `_IMPURE`."""
_IMPURE = (
    "__import__ breakpoint compile delattr eval exec globals hash help id input locals open print "
    "setattr vars"
)
_DYNAMIC = frozenset(
    ["getattr", "hasattr", "attrgetter", "methodcaller", "__dict__", "__getattribute__"]
)
"""Names of what reads attributes under names that the code does not show."""
_RANDOM = re.compile(r"(^|_)(drop|rand|bernoulli|stochastic)", re.IGNORECASE)
_OVERRIDABLE = frozenset(
    ["__init__", "forward", "extra_repr", "__repr__", "__dir__", "_get_name", "__annotate_func__"]
)
"""Methods of `nn.Module` that a class may have its own of and lose nothing by being replaced."""
_MISSING = object()


class Left(Exception):
    """Why a block is not swapped."""

    def __init__(self, reason: str, difference: float | None = None) -> None:
        super().__init__(reason)
        self.difference = difference


@dataclass(frozen=True)
class Code:
    """What code names."""

    names: frozenset[str] | None
    """Of attributes, among others; None if it makes up names as it runs."""
    constants: tuple[tuple[str, Mapping[str, Any], str], ...]
    """Globals and attributes of classes: how to call them, where they are, and under which name."""


def read_code(modules: Iterable[nn.Module]) -> Code:
    """Read the code of modules, those of torch excepted.

    Raises:
        Left: if what they compute may depend on anything but their arguments, tensors and settings.
    """
    return _Reader(list(modules)).read()


def is_torch(kind: type) -> bool:
    """Whether a class is one of torch's own."""
    return kind.__module__.partition(".")[0] == "torch"


def is_idle(module: object) -> bool:
    """Whether something that stands for a random layer does nothing."""
    if isinstance(module, nn.modules.dropout._DropoutNd) and is_torch(type(module)):
        return module.p == 0
    return module is None or type(module) is nn.Identity


def is_plain(value: object) -> bool:
    """Whether a value is a constant, or a built-in container of constants."""
    if isinstance(value, tuple | list | set | frozenset):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(is_plain(x) for pair in value.items() for x in pair)
    return isinstance(value, PLAIN)


def closure(function: FunctionType) -> dict[str, Any]:
    """What a function refers to in the functions around it."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    filled = {name: cell for name, cell in cells if cell != CellType()}
    return {name: cell.cell_contents for name, cell in filled.items() if name != "__class__"}


class _Reader:
    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._own = [m for m in modules if not is_torch(type(m))]
        mros = [type(m).__mro__ for m in self._own]
        self._classes = dict.fromkeys(c for mro in mros for c in mro if _is_own(c))
        self._names: set[str] = set()
        self._functions: set[FunctionType] = set()
        self._pending: list[FunctionType] = []
        self._constants: dict[str, tuple[Mapping[str, Any], str]] = {}

    def read(self) -> Code:
        for kind in self._classes:
            _check_overrides(kind)
        for module in self._own:
            self._read_forward(type(module))
        while self._pending:
            self._read_function(self._pending.pop())
        dynamic = not self._names.isdisjoint(_DYNAMIC)
        if dynamic:
            for module in self._own:
                for name in vars(module).keys() - vars(nn.Module()).keys() - self._names:
                    self._judge(vars(module)[name], f"its attribute {name}")
        constants = ((label, *place) for label, place in self._constants.items())
        return Code(None if dynamic else frozenset(self._names), tuple(constants))

    def _read_forward(self, kind: type) -> None:
        """What calling a module of this class runs."""
        names = ["forward"]
        base = next(c for c in kind.__mro__ if is_torch(c))
        if base is not nn.Module:  # whose own methods are called in ways that its code shows
            own = itertools.takewhile(lambda c: c is not base, kind.__mro__)
            methods = {n for c in own for n, x in vars(c).items() if isinstance(x, FunctionType)}
            names += sorted(methods - _OVERRIDABLE)
        for name in names:
            owner = next(c for c in kind.__mro__ if name in vars(c))
            if not is_torch(owner):
                self._keep(owner, name)
                self._judge(vars(owner)[name], f"{kind.__name__}.{name}")

    def _read_function(self, function: FunctionType) -> None:
        for name, value in closure(function).items():
            self._judge_fixed(value, name)
        for value in (function.__defaults__ or (), *(function.__kwdefaults__ or {}).values()):
            self._judge_fixed(value, f"a default of {function.__name__}")
        for code in _nested(function.__code__):
            for name in set(code.co_names) - self._names:
                self._read_name(name)
            for instruction in dis.get_instructions(code):
                _check_instruction(instruction, code)
            for chain in _chains(code):
                self._read_global(chain, function)

    def _read_name(self, name: str) -> None:
        """A name of an attribute, perhaps: what it stands for in the modules."""
        if name == "training":
            raise Left("its code reads training: it may compute something else then")
        self._names.add(name)
        found: list[object] = []
        for kind in self._classes:
            if name in vars(kind):
                found.append(vars(kind)[name])
                self._keep(kind, name)
        for module in self._own:
            if name in vars(module):
                found.append(vars(module)[name])
            elif name in module._modules and _RANDOM.search(name):
                found.append(module._modules[name])
        if _RANDOM.search(name) and not (found and all(map(is_idle, found))):
            raise Left(f"its code names {name}, which may be random")
        for value in found:
            if not is_idle(value):
                self._judge(value, f"its attribute {name}")

    def _keep(self, kind: type, name: str) -> None:
        label = f"{kind.__module__}.{kind.__qualname__}.{name}"
        self._constants[label] = (vars(kind), name)

    def _read_global(self, chain: Sequence[str], function: FunctionType) -> None:
        place: Mapping[str, Any] = function.__globals__
        name, *rest = chain
        if name not in place:
            place = vars(builtins)
        value = place.get(name, _MISSING)
        while isinstance(value, ModuleType) and rest:
            place, name = vars(value), rest.pop(0)
            value = getattr(value, name, _MISSING)
        if value is _MISSING:
            return
        self._judge(value, ".".join(chain[: len(chain) - len(rest)]))
        owner = str(place.get("__name__"))
        if owner.partition(".")[0] not in ("builtins", "torch"):
            self._constants[f"{owner}.{name}"] = (place, name)

    def _judge_fixed(self, value: object, what: str) -> None:
        """Judge what can be changed without that anybody sees it."""
        if isinstance(value, list | dict | set):
            raise Left(f"its code refers to {what}, a {type(value).__name__} that may change")
        if isinstance(value, tuple):
            for part in value:
                self._judge_fixed(part, what)
        else:
            self._judge(value, what)

    def _judge(self, value: Any, what: str) -> None:
        """Accept a constant, an operator or a class of torch, or a function, whose turn comes."""
        if isinstance(value, staticmethod | classmethod | MethodType):
            if isinstance(value, MethodType) and not any(value.__self__ is m for m in self._own):
                raise Left(f"its code uses {what}, a method of something outside")
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        elif isinstance(value, functools.partial):
            for part in (*value.args, *value.keywords.values()):
                self._judge_fixed(part, what)
            self._judge(value.func, what)
            return
        if is_plain(value) or value is checkpoint:  # which shows when it runs
            return
        if isinstance(value, type):
            known = is_torch(value) and issubclass(value, nn.Module | torch.Tensor | torch.Size)
            if known or issubclass(value, nn.Module | BaseException) or _is_pure(value):
                return
        elif isinstance(value, ModuleType):
            if value.__name__.partition(".")[0] == "torch" or value in _PURE:
                return
        elif _is_operator(value) or _is_pure(value) or type(value).__module__ == "typing":
            return
        elif isinstance(value, FunctionType) and value.__module__.partition(".")[0] != "torch":
            if value not in self._functions:
                self._functions.add(value)
                self._pending.append(value)
            return
        kind = "" if hasattr(value, "__name__") else f" ({type(value).__name__})"
        raise Left(f"its code uses {what}{kind}: what that depends on is not known")


def _check_overrides(kind: type) -> None:
    for name, value in vars(kind).items():
        known = name in vars(nn.Module) or name == "__getattribute__"
        if known and callable(value) and name not in _OVERRIDABLE:
            raise Left(f"its class {kind.__name__} has a method {name} of its own")


def _check_instruction(instruction: dis.Instruction, code: CodeType) -> None:
    name, what = instruction.opname, instruction.argval
    if name in ("STORE_GLOBAL", "DELETE_GLOBAL"):
        raise Left(f"its code changes the global {what}")
    if name in ("STORE_DEREF", "DELETE_DEREF") and what in code.co_freevars:
        raise Left(f"its code changes {what}, which it keeps between calls")
    if name == "IMPORT_NAME":
        raise Left(f"its code imports {what} as it runs")


def _nested(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions and comprehensions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _chains(code: CodeType) -> Iterator[list[str]]:
    """Globals with the attributes that are read from them at once: `a.b.c` as [a, b, c]."""
    instructions = [*dis.get_instructions(code)]
    for i, first in enumerate(instructions):
        if first.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            attributes = itertools.takewhile(
                lambda x: x.opname in ("LOAD_ATTR", "LOAD_METHOD"), instructions[i + 1 :]
            )
            yield [first.argval, *(x.argval for x in attributes)]


def _is_own(kind: type) -> bool:
    return kind is not object and not is_torch(kind) and not _is_pure(kind)


def _is_pure(value: Any) -> bool:
    """Whether it is of a module of `_PURE`, and none of its exceptions."""
    name = getattr(value, "__name__", "")
    if not isinstance(value, type | FunctionType | BuiltinFunctionType) or name in _IMPURE.split():
        return False
    return any(value.__module__ == module.__name__ for module in _PURE) or (
        value.__module__ in ("_operator", "_functools", "_collections_abc")
    )


def _is_operator(value: Any) -> bool:
    """Whether it is a function of torch of tensors, which shows when it is called."""
    try:
        return resolve_name(value) is not None and value not in get_ignored_functions()
    except TypeError:  # not hashable
        return False
