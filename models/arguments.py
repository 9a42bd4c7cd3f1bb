"""Arguments as people write them, brought to plain lists, dicts and integers."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

from .files import clip


def plain_names(argument: str, names: Any) -> list[Any]:
    """Names of tasks as a list: of any iterable with an order, such as the keys of a dict.

    Raises:
        ValueError: naming the argument, for anything else, a text or a set included.
    """
    if isinstance(names, (str, bytes, set, frozenset)) or not isinstance(names, Iterable):
        kind = "the string " if isinstance(names, str) else ""
        raise ValueError(
            f"{argument}: got {kind}{clip(repr(names), 200)}, expected a sequence of names, in the "
            "network's order"
        )
    return list(names)


def plain_outputs(argument: str, outputs: Any) -> dict[Any, Any]:
    """Numbers of outputs by task, with integers of any kind as `int`.

    Raises:
        TypeError: naming the argument, for anything but a mapping.
    """
    if not isinstance(outputs, Mapping):
        raise TypeError(
            f"{argument}: got {clip(repr(outputs), 200)}, expected a dict of numbers by task"
        )
    return {task: plain_integer(count) for task, count in outputs.items()}


def plain_integer(value: Any) -> Any:
    """An integer of any kind, such as numpy's, as `int`; other values as they are."""
    if isinstance(value, bool):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return value
