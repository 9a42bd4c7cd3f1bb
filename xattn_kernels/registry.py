"""Engines: which implementations of the operators exist, and which one runs.

An engine is a set of modules ``ops/<operator>/<engine>.py``. Each of them says which problems it
refuses (``refusals(problem)``); this module collects the reasons and picks. Nothing is loaded at
import: an engine's modules are imported when it is first asked about.

The choice, in the order of precedence: the innermost ``with backend(name)`` of this thread, then
``set_backend(name)``, then the environment variable ``XATTN_BACKEND``, then ``"auto"``. ``"auto"``
takes the engine that was measured to be the fastest (`xattn_kernels.measured`) of those that refuse
nothing, and without measurements the first of :data:`ENGINES` that is not in
:data:`MEASURED_ENGINES`; a name never falls back.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any

import torch

from xattn_kernels import measured
from xattn_kernels.problem import ENGINES, MEASURED_ENGINES, OPERATORS, TRAINING, Problem

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


@dataclass(frozen=True)
class EngineInfo:
    """An engine, whether it can be used in this process, and if not, why."""

    name: str
    available: bool
    reason: str | None


@dataclass(frozen=True)
class Explanation:
    """Which engine runs a problem (``engine``, None if none can), and why the others do not.

    ``reasons`` has what makes an engine unable to, ``notes`` what ``"auto"`` knows of those able.
    """

    problem: Problem
    requested: str
    engine: str | None
    reasons: dict[str, tuple[str, ...]]
    notes: dict[str, str]

    def __str__(self) -> str:
        problem = self.problem
        lines = [
            f"{problem.op} on {problem.device}, {problem.dtype}, C={problem.channels}, "
            f"Cv={problem.value_channels}, heads={problem.heads}"
            f"{', with gradients' if problem.gradient else ''}; asked for: {self.requested!r}"
        ]
        for name in ENGINES:
            if self.reasons[name]:
                verdict = "; ".join(self.reasons[name])
            elif name == self.engine:
                verdict = f"runs; {self.notes[name]}" if name in self.notes else "runs"
            elif self.requested != "auto":
                verdict = "could run, was not asked for"
            elif name in self.notes:
                verdict = f"could run; {self.notes[name]}"
            else:
                verdict = "could run, comes later in the order of preference"
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
        from xattn_kernels.engines import native

        return native.load_error()
    if name == "triton":
        from xattn_kernels.engines.triton import runtime

        return runtime.load_error()
    from xattn_kernels.engines import native_cuda

    return native_cuda.load_error()


def list_backends() -> list[EngineInfo]:
    """Return all engines, in the order of :data:`ENGINES`."""
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


def capability(problem: Problem) -> str | None:
    """Compute capability of the problem's device, such as ``"9.0"``; None if it is no CUDA GPU."""
    if problem.device != "cuda" or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(problem.device_index)
    return f"{major}.{minor}"


def _preference(problem: Problem) -> tuple[list[str], dict[str, str]]:
    """Engines in the order in which ``"auto"`` tries them, and what speaks for or against them."""
    others = [name for name in ENGINES if name not in MEASURED_ENGINES]
    where = capability(problem)
    if where is None:
        return others, dict.fromkeys(MEASURED_ENGINES, "ask for it by name")
    width, dtype = max(problem.channels // problem.heads, 1), str(problem.dtype).rpartition(".")[2]
    entry = measured.find(measured.Key(where, problem.op, dtype, width, problem.gradient))
    place = f"compute capability {where}"
    if where in measured.capabilities():
        place += f" for {problem.op} in {dtype}{' with gradients' if problem.gradient else ''}"
    never = f"never measured on {place}; ask for it by name"
    if entry is None:
        return others, dict.fromkeys(MEASURED_ENGINES, never)
    notes = dict.fromkeys(MEASURED_ENGINES, never)
    for name, microseconds in entry.microseconds.items():
        notes[name] = (
            f"measured {microseconds:.4g} us on compute capability {where} with "
            f"C={entry.key.channels}, N={entry.tokens}"
        )
    order = [name for name in entry.fastest_first() if name in ENGINES]
    return [*order, *(name for name in others if name not in order)], notes


@functools.lru_cache(maxsize=4096)
def _explain(problem: Problem, requested: str) -> Explanation:
    reasons = {name: _refusals(name, problem) for name in ENGINES}
    candidates: Sequence[str] = (requested,)
    notes: dict[str, str] = {}
    if requested == "auto":
        candidates, notes = _preference(problem)
    engine = next((name for name in candidates if not reasons[name]), None)
    return Explanation(problem, requested, engine, reasons, notes)


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
        key: as wide as the query; looked at for whether it requires a gradient, as all are.
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
        slots = [
            [x] if isinstance(x, torch.Tensor) else list(x)
            for x in (query, key, value)
            if x is not None
        ]
        first, last = slots[0][0], slots[-1][0] if value is not None else slots[0][0]
        gradient = op == TRAINING or wants_gradient(x for slot in slots for x in slot)
        op = Problem.of(op, first, first.size(1), last.size(1), heads=heads, gradient=gradient)
    return _explain(op, current_backend())


def wants_gradient(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether a backward pass may follow a call with these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


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
