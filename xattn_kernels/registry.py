"""Engines: which implementations of the operators exist, and which one runs.

An engine is a set of modules ``ops/<operator>/<engine>.py``. Each of them says which problems it
refuses (``refusals(problem)``); this module collects the reasons and picks. Nothing is loaded at
import: an engine's modules are imported when it is first asked about.

The choice, in the order of precedence: the innermost ``with backend(name)`` of this thread, then
``set_backend(name)``, then the environment variable ``XATTN_BACKEND``, then ``"auto"``. ``"auto"``
takes the first engine of :data:`ENGINES` that refuses nothing; a name never falls back.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

import torch

__all__ = [
    "ENGINES",
    "OPERATORS",
    "EngineInfo",
    "Explanation",
    "Problem",
    "backend",
    "current_backend",
    "explain",
    "list_backends",
    "set_backend",
]

#: Every engine, in the order in which ``"auto"`` tries them.
ENGINES = ("cuda", "triton", "cpu", "reference")
#: Engines that ``"auto"`` leaves alone: they were never measured on the device they are made for.
ON_REQUEST = ("triton",)
OPERATORS = (
    "linear_cross_attention",
    "softmax_cross_attention",
    "cross_attention_block",
    "cross_attention_block_training",
    "pyramid_projection",
)


class Problem(NamedTuple):
    """What an engine is told when it is asked whether it can run an operator.

    Attributes:
        op: one of :data:`OPERATORS`.
        dtype: element type of the features.
        device: device type, such as ``"cpu"``.
        channels: width C of queries and keys; of the finest level for ``pyramid_projection``.
        value_channels: width of values or, for ``pyramid_projection``, of outputs.
        heads: heads of the softmax operator, else 1.
        transformed: whether a ``torch.func`` transform or forward-mode differentiation is active.
    """

    op: str
    dtype: torch.dtype
    device: str
    channels: int
    value_channels: int
    heads: int = 1
    transformed: bool = False


@dataclass(frozen=True)
class EngineInfo:
    """An engine, whether it can be used in this process, and if not, why."""

    name: str
    available: bool
    reason: str | None


@dataclass(frozen=True)
class Explanation:
    """Which engine runs a problem (``engine``, None if none can), and why the others do not."""

    problem: Problem
    requested: str
    engine: str | None
    reasons: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        problem = self.problem
        lines = [
            f"{problem.op} on {problem.device}, {problem.dtype}, C={problem.channels}, "
            f"Cv={problem.value_channels}, heads={problem.heads}; asked for: {self.requested!r}"
        ]
        for name in ENGINES:
            if name == self.engine:
                verdict = "runs"
            elif self.reasons[name]:
                verdict = "; ".join(self.reasons[name])
            elif self.requested == "auto" and name in ON_REQUEST:
                verdict = "could run, when asked for by name"
            elif self.requested == "auto":
                verdict = "could run, comes later in the order of preference"
            else:
                verdict = "could run, was not asked for"
            lines.append(f"  {name}: {verdict}")
        return "\n".join(lines)


def check_name(name: object, source: str = "backend") -> str:
    """Return ``name`` if it is ``"auto"`` or an engine, else raise ``ValueError``."""
    if name == "auto" or name in ENGINES:
        return str(name)
    known = ", ".join(repr(known) for known in ("auto", *ENGINES))
    raise ValueError(f"{source}: got {name!r}, expected one of {known}\n{_availability()}")


class _Choice(threading.local):
    """The engine asked for by this thread's ``with backend(...)``; None outside of any.

    A thread-local attribute and not a context variable: torch.compile can guard on the former, so
    that a compiled function is compiled again, and not misled, when the choice changes.
    """

    def __init__(self) -> None:
        self.name: str | None = None


class _Default:
    """The process-wide choice; None until first read, then from XATTN_BACKEND or ``"auto"``."""

    name: str | None = None


_choice = _Choice()
_default = _Default()


def current_backend() -> str:
    """Return the name in force in this thread: ``"auto"`` or an engine.

    Raises:
        ValueError: if XATTN_BACKEND holds an unknown name.
    """
    name = _choice.name
    if name is None:
        name = _default.name
        if name is None:
            name = check_name(os.environ.get("XATTN_BACKEND") or "auto", "XATTN_BACKEND")
            _default.name = name
    return name


def set_backend(name: str) -> None:
    """Set the engine for the whole process; ``with backend(...)`` still overrides it.

    Raises:
        ValueError: if ``name`` is neither ``"auto"`` nor an engine.
    """
    _default.name = check_name(name)


class backend(contextlib.ContextDecorator):
    """Ask for an engine by name, for the calls of this thread inside the ``with`` block.

    Usable as a decorator too. Backward passes run on the engine of their forward pass, wherever
    they are called.

    Args:
        name: ``"auto"`` or one of :data:`ENGINES`.

    Raises:
        ValueError: if the name is unknown. Whether the engine can run a problem is known only at
            the call: it raises ``RuntimeError`` with every engine's reasons.
    """

    def __init__(self, name: str) -> None:
        self.name = check_name(name)
        self._previous: list[str | None] = []

    def __enter__(self) -> backend:
        self._previous.append(_choice.name)
        _choice.name = self.name
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _choice.name = self._previous.pop()


@functools.cache
def unavailable(name: str) -> str | None:
    """Return why an engine cannot be used in this process at all; None if it can."""
    if name == "reference":
        return None
    if name == "cpu":
        from xattn_kernels.ops import native

        return native.load_error()
    if name == "triton":
        from xattn_kernels.triton import runtime

        return runtime.load_error()
    return f"not built: this version of xattn_kernels has no {name} kernels"


def list_backends() -> list[EngineInfo]:
    """Return all engines in the order in which ``"auto"`` tries them."""
    reasons = {name: unavailable(name) for name in ENGINES}
    return [EngineInfo(name, reason is None, reason) for name, reason in reasons.items()]


def _availability() -> str:
    return "\n".join(
        f"  {info.name}: {'available' if info.available else info.reason}"
        for info in list_backends()
    )


@functools.cache
def engine_module(op: str, name: str) -> ModuleType:
    """Import and return ``ops/<op>/<name>.py``."""
    return importlib.import_module(f"xattn_kernels.ops.{op}.{name}")


def _refusals(name: str, problem: Problem) -> tuple[str, ...]:
    reason = unavailable(name)
    if reason is not None:
        return (reason,)
    if importlib.util.find_spec(f"xattn_kernels.ops.{problem.op}.{name}") is None:
        return (f"has no {problem.op}",)
    return tuple(engine_module(problem.op, name).refusals(problem))


@functools.lru_cache(maxsize=4096)
def _explain(problem: Problem, requested: str) -> Explanation:
    reasons = {name: _refusals(name, problem) for name in ENGINES}
    candidates: Sequence[str] = (requested,)
    if requested == "auto":
        candidates = [name for name in ENGINES if name not in ON_REQUEST]
    engine = next((name for name in candidates if not reasons[name]), None)
    return Explanation(problem, requested, engine, reasons)


def explain(
    op: str | Problem,
    query: torch.Tensor | Sequence[torch.Tensor] | None = None,
    key: torch.Tensor | Sequence[torch.Tensor] | None = None,
    value: torch.Tensor | Sequence[torch.Tensor] | None = None,
    *,
    heads: int = 1,
) -> Explanation:
    """Say which engine would run a problem now, and why the others would not.

    Args:
        op: an operator's name, with the first arguments of a call; or a :class:`Problem`.
        query: a query (B, C, ...), or a list of which the first counts: gives dtype, device, width.
        key: not looked at: as wide as the query.
        value: a value (B, Cv, ...) or a list, for its width. Default: the query's.
        heads: heads of the softmax operator.

    Returns:
        The explanation; ``print`` it for text.

    Raises:
        ValueError: if the operator is unknown or the query is missing.
    """
    if not isinstance(op, Problem):
        if op not in OPERATORS:
            raise ValueError(f"op: got {op!r}, expected one of {', '.join(OPERATORS)}")
        if query is None:
            raise ValueError("query: got None, expected a tensor that shows the problem")
        first = query if isinstance(query, torch.Tensor) else query[0]
        last = first if value is None else value
        last = last if isinstance(last, torch.Tensor) else last[0]
        op = Problem(op, first.dtype, first.device.type, first.size(1), last.size(1), heads)
    return _explain(op, current_backend())


def select(problem: Problem) -> str:
    """Return the name of the engine that runs ``problem`` under the current choice.

    Raises:
        RuntimeError: if no engine can, or the one asked for by name cannot; lists every engine's
            reasons.
    """
    requested = current_backend()
    engine, reasons = _choose(problem, requested)
    if engine is None:
        asked = "no engine" if requested == "auto" else f"backend {requested!r}"
        raise RuntimeError(
            f"{asked} cannot run this problem\n{reasons or _explain(problem, requested)}"
        )
    return engine


def find(problem: Problem) -> str | None:
    """Return the engine that :func:`select` would, None where that raises."""
    return _choose(problem, current_backend())[0]


def _choose(problem: Problem, requested: str) -> tuple[str | None, str | None]:
    if torch.compiler.is_compiling():
        return _choice_as_constant(requested, *problem)
    return _explain(problem, requested).engine, None


def _choice_as_constant(requested: str, *problem: Any) -> tuple[str | None, str]:
    explanation = _explain(Problem(*problem), requested)
    return explanation.engine, str(explanation)


# A compiled graph holds the choice as a constant, guarded by what it depends on: its arguments.
# That is all torch.compiler.assume_constant_result does, besides importing the whole compiler.
_choice_as_constant._dynamo_marked_constant = True  # type: ignore[attr-defined]
