"""Tests of the Triton kernels in Triton's interpreter, on the CPU: no GPU is needed.

They run in processes of their own (`test_interpreter.py` starts them), as the interpreter must be
on before Triton is first imported. What it cannot show: tf32 and bfloat16 products, races, reads
out of bounds, limits of a card. Those are for `test_resources.py` and for a machine with a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import pytest

from xattn_kernels import registry
from xattn_kernels.engines.triton import runtime


class _Patches:
    """Patches of Triton's language, made once a launch and not at every call of a function."""

    def __init__(self, make: Any, modules: tuple[Any, ...]) -> None:
        self.make, self.modules = make, modules
        self.patched: set[int] = set()
        self.scopes: list[Any] = []

    def __call__(self, function: FunctionType) -> Any:
        seen = function.__globals__.values()
        needed = {id(module) for module in self.modules if any(x is module for x in seen)}
        if self.patched and needed <= self.patched:
            return None
        scope = self.make(function)
        outermost = not self.scopes
        self.patched |= needed
        self.scopes.append(scope)
        if outermost:
            scope.restore = functools.partial(self._restore, [scope.restore])
        return scope

    def _restore(self, first: list[Any]) -> None:
        for scope in self.scopes[:0:-1]:
            scope.restore()
        first[0]()
        self.scopes, self.patched = [], set()


@pytest.fixture(scope="session", autouse=True)
def fast_interpreter() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    interpreter._patch_lang = _Patches(interpreter._patch_lang, (tl, tl.core))


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ask for the engine by name."""
    assert runtime.interpreting(), "run these tests with TRITON_INTERPRET=1"
    available = registry.unavailable

    def unavailable(name: str) -> str | None:
        return runtime.load_error() if name == "triton" else available(name)

    monkeypatch.setattr(registry, "unavailable", unavailable)
    registry._explain.cache_clear()
    with registry.backend("triton"):
        yield
